"""Whole runs: resumed bit for bit, on two ranks as on one, compiled as eager."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn

from drrho_clip import collectives
from tests.support.lab import Lab
from tests.support.ranks import free_port, ranks, run_program
from tests.support.recording import tensors
from training.checkpoint.pt_file import read
from training.distributed import collectives as host
from training.main import main

DRRHO = "--fastclip --multiply_tau --gamma 0.5 --ref_model @reference --ref_model_pretrained @reference_weights"
NUMBERS = itertools.count()
# After nine steps of Adam. TF32 rounds to 10 bits, and other shapes choose other kernels.
NEAR = 1e-3 if torch.cuda.is_available() else 1e-4


def run(lab: Lab, line: str, size: int = 0) -> str:
    """Train three epochs of twelve samples, in this process or on ``size`` ranks; the run's checkpoints."""
    name = f"device{next(NUMBERS)}"
    base = f"--train-num-samples 12 --epochs 3 --log-every-n-steps 1 --name {name}"
    words = lab.words(f"{base} {line}")
    codes = [code for code, _ in run_program(size, words)] if size else [main(words)]
    assert set(codes) == {0}
    return str(lab.root / "logs" / name / "checkpoints")


def weights(folder: str) -> torch.Tensor:
    return torch.cat([t.flatten().float() for t in read(f"{folder}/epoch_3.pt")["state_dict"].values()])


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("precision", ["amp_bf16", "amp"])
def test_a_resumed_run_has_the_same_bits(lab, precision):
    line = f"--batch-size 4 --deterministic --precision {precision} --save_every_n_steps 5 {DRRHO} --accum-freq 2"
    whole = run(lab, line)
    resumed = run(lab, f"{line} --resume {whole}/step_5.pt")
    ours, theirs = (tensors(read(f"{folder}/epoch_3.pt")) for folder in (resumed, whole))
    assert ours.keys() == theirs.keys() and len(theirs) > 50
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_two_ranks_on_one_device_are_one_rank_on_the_whole_batch(lab):
    line = f"--lanes 2,1 {DRRHO} --dist-backend gloo --no-set-device-rank"
    two, one = (weights(run(lab, f"{line} --batch-size {4 // size}", size)) for size in (2, 1))
    assert distance(two, one) < NEAR


def _alone_in_a_group(port: int) -> list[bool]:
    """What the program does with its group, in a group of one rank: on a GPU through NCCL."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    backend, bound = ("cpu:gloo,cuda:nccl", {"device_id": device}) if on_gpu else ("gloo", {})
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1, **bound)
    try:
        x = torch.randn(4, 3, device=device)
        gathered, own, total = torch.empty_like(x), torch.empty_like(x), x.clone()
        collectives._gather(gathered, x)
        collectives._reduce_scatter(own, x)
        dist.all_reduce(total)
        model = nn.parallel.DistributedDataParallel(
            nn.Linear(3, 3).to(device), device_ids=[device] if on_gpu else None, gradient_as_bucket_view=True
        )
        model(x).sum().backward()
        host.barrier()
        told = host.gather_object({"a": 1}) == [{"a": 1}]
        gradients = all(p.grad is not None for p in model.parameters())
        return [torch.equal(gathered, x), torch.equal(own, x), torch.equal(total, x), told, gradients]
    finally:
        dist.destroy_process_group()


def test_a_group_of_one_rank():
    assert ranks(1, joined=False).run(_alone_in_a_group, free_port()) == [[True] * 5]


def test_two_ranks_compiled_by_inductor(lab):
    line = f"--lanes 2,1 --batch-size 2 {DRRHO} --dist-backend gloo --no-set-device-rank"
    compiled = weights(run(lab, f"{line} --torchcompile --grad-checkpointing", 2))
    assert distance(compiled, weights(run(lab, line, 2))) < NEAR
