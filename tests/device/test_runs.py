"""Whole runs: resumed bit for bit, on two ranks as on one, compiled as eager."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.support.lab import Lab
from tests.support.ranks import run_program
from tests.support.recording import tensors
from training.checkpoint.pt_file import read
from training.main import main

DRRHO = "--fastclip --multiply_tau --gamma 0.5 --ref_model @reference --ref_model_pretrained @reference_weights"
NUMBERS = itertools.count()


def run(lab: Lab, line: str, ranks: int = 0) -> str:
    """Train three epochs of twelve samples, in this process or on ``ranks`` of a group; the run's checkpoints."""
    name = f"device{next(NUMBERS)}"
    base = f"--train-num-samples 12 --epochs 3 --log-every-n-steps 1 --name {name}"
    words = lab.words(f"{base} {line}")
    codes = [code for code, _ in run_program(ranks, words)] if ranks else [main(words)]
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
    two, one = (weights(run(lab, f"{line} --batch-size {4 // ranks}", ranks)) for ranks in (2, 1))
    assert distance(two, one) < 1e-4


def test_a_group_of_one_rank(lab):
    """On a GPU through NCCL."""
    line = f"--batch-size 4 --dist-url env:// {DRRHO}"
    assert distance(weights(run(lab, line, 1)), weights(run(lab, line))) < 1e-4


def test_two_ranks_compiled_by_inductor(lab):
    line = f"--lanes 2,1 --batch-size 2 {DRRHO} --dist-backend gloo --no-set-device-rank"
    compiled = weights(run(lab, f"{line} --torchcompile --grad-checkpointing", 2))
    assert distance(compiled, weights(run(lab, line, 2))) < 1e-4
