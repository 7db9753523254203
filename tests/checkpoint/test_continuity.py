"""A resumed run: N steps equal n steps, a stop, and N - n steps, bit for bit, through the program itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support import tiny_models
from tests.support.ranks import run_program
from tests.support.recording import record, tensors
from tests.support.shards import write_shards
from training.checkpoint.pt_file import read
from training.loop.step import Stepper

STEPS_PER_EPOCH, EPOCHS = 4, 3

V3 = "--fastclip --multiply_tau --temperature 0.07 --gamma 0.6 --rho 6.5 --lr_tau 1e-4"
OBJECTIVES = {
    "openclip": "",
    "v3, accumulated": f"{V3} --accum-freq 2 --optimizer lamb --sample_state_device cpu",
    "powersgd": f"{V3} --grad_compression powersgd --powersgd_rank 1",
    "v2": "--fastclip --temperature_scheme individual_learnable --gamma 0.6 --lr_tau 1e-2 "
    "--sample_state_dtype bound",
    "channels last": "--model @resnet --channels_last",
    "drrho": f"{V3} --ref_model @reference --ref_model_checkpoint @weights --grad-clip-norm 0.5",
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    tiny_models.path("tiny-vit", folder)
    tiny_models.path("tiny-vit-reference", folder)
    tiny_models.path("tiny-resnet", folder)
    torch.save(tiny_models.build("tiny-vit-reference").state_dict(), folder / "weights.pt")
    write_shards(folder, 30, per_shard=7)
    return folder


def command(lab: Path, ranks: int, name: str, objective: str) -> list[str]:
    """12 steps of 8 samples: the last batch of an epoch of 30 samples is filled from a second pass."""
    dropout = "" if "@resnet" in objective else "--force-patch-dropout 0.25"
    text = f"""--model {lab}/tiny-vit.json --train-data {lab}/{{00000..00004}}.tar --train-num-samples 30
        --data_size 30 --batch-size {8 // ranks} --epochs {EPOCHS} --workers 0 --lanes 2,1 --precision fp32
        --lr 1e-3 --warmup 2 {dropout} --aug-cfg scale=(0.3,1.0) --seed 5
        --log-every-n-steps 1 --logs {lab}/logs --name {name} --save_published_state {objective}"""
    for name, file in (
        ("reference", "tiny-vit-reference.json"),
        ("resnet", "tiny-resnet.json"),
        ("weights", "weights.pt"),
    ):
        text = text.replace(f"@{name}", f"{lab}/{file}")
    return text.split()


def run(lab: Path, ranks: int, words: list[str]) -> list[list]:
    """What each rank has trained on. A single rank runs in this process."""
    if ranks > 1:
        results = run_program(ranks, words, record)
    else:
        from training import main

        with mock.patch.object(Stepper, "__call__", Stepper.__call__), one_thread():
            seen = record()
            results = [(main.main(words), seen)]
    assert [code for code, _ in results] == [0] * ranks
    return [seen for _, seen in results]


class one_thread:
    def __enter__(self) -> None:
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.threads)
        if "original" in vars(Stepper):
            Stepper.__call__ = Stepper.original
            del Stepper.original


def outcome(lab: Path, name: str) -> tuple[dict[str, torch.Tensor], list[str], dict[str, Any]]:
    """Weights, optimizer and u; the logged losses with their means; the counters."""
    held = read(lab / "logs" / name / "checkpoints" / f"epoch_{EPOCHS}.pt")
    log = (lab / "logs" / name / "out.log").read_text()
    # From LR on, nothing in a line depends on how long a step took.
    lines = re.findall(r"(Train Epoch: .*?) ETA.*(LR: .*)", log)
    counters = {key: held[key] for key in ("epoch", "epoch_step", "step", "samples_seen", "stream", "skipped")}
    return tensors(dict(held)), lines, counters


@pytest.fixture(scope="module")
def uninterrupted(lab):
    """The run without a stop, made once per objective and number of ranks."""
    runs = {}

    def make(ranks: int, objective: str) -> tuple[str, list[list]]:
        if (ranks, objective) not in runs:
            name = f"whole{len(runs)}"
            runs[ranks, objective] = name, run(lab, ranks, command(lab, ranks, name, OBJECTIVES[objective]))
        return runs[ranks, objective]

    return make


@pytest.mark.parametrize(
    ("ranks", "objective", "stops"),
    [
        (1, "openclip", (1,)),
        (1, "v3, accumulated", (3, 4)),
        (1, "v2", (2, 9)),
        (1, "channels last", (5,)),
        (1, "drrho", (5, 11)),
        (2, "v3, accumulated", (6,)),
        (2, "v2", (8,)),
        (2, "powersgd", (4, 8)),
        (2, "drrho", (3, 10)),
    ],
)
def test_a_continued_run_is_the_uninterrupted_one(lab, uninterrupted, ranks, objective, stops):
    """Weights, optimizer, u, sample ids, augmented pixels, logged losses; stopped after any of ``stops`` steps."""
    whole, expected = uninterrupted(ranks, objective)
    name = f"parts{ranks}{'_'.join(map(str, stops))}{objective[:2]}"
    words = command(lab, ranks, name, OBJECTIVES[objective])
    parts = [run(lab, ranks, [*words, "--stop_iters", str(stops[0])])]
    for stop in stops[1:]:
        parts.append(run(lab, ranks, [*words, "--resume", "latest", "--stop_iters", str(stop)]))
    parts.append(run(lab, ranks, [*words, "--resume", "latest"]))
    assert [[step for part in parts for step in part[rank]] for rank in range(ranks)] == expected
    assert [len(seen) for seen in expected] == [STEPS_PER_EPOCH * EPOCHS] * ranks
    (a, a_log, a_counters), (b, b_log, b_counters) = outcome(lab, whole), outcome(lab, name)
    assert a.keys() == b.keys() and any("exp_avg" in key for key in a)
    assert objective in ("openclip", "channels last") or ".u_im" in a
    for key in a:
        assert torch.equal(a[key], b[key]), key
    assert a_log == b_log and len(a_log) == STEPS_PER_EPOCH * EPOCHS
    assert a_counters == b_counters


def test_the_number_of_ranks_may_change_at_every_launch(lab):
    """4 ranks, 2, 1, and 4 again: the same global batches, the same samples of them, the same losses."""
    selection = "--ref_features_usage ref,select --ref_filter_ratio 0.5 --ref_filter_n_chunks 1"
    common = command(lab, 4, "@", f"{OBJECTIVES['drrho']} {selection} --sample_state_device cpu")
    for flag in (
        "--lanes",
        "--force-patch-dropout",
    ):  # lanes of the first launch; dropout masks would be those of other ranks
        del common[common.index(flag) : common.index(flag) + 2]
    common += ["--global_batch_size", "8"]

    def launch(name: str, ranks: int, *more: str) -> list[list[list[int]]]:
        """The sample ids of each step, those of all ranks one after another."""
        words = [name if word == "@" else word for word in common]
        seen = run(lab, ranks, [*words, *more])
        return [[i for _, ids, _ in step for i in ids] for step in zip(*seen, strict=True)]

    whole = launch("four", 4)
    batches = launch("elastic", 4, "--stop_iters", "3")
    batches += launch("elastic", 2, "--resume", "latest", "--stop_iters", "6")
    batches += launch("elastic", 1, "--resume", "latest", "--stop_iters", "10")
    batches += launch("elastic", 4, "--resume", "latest")
    assert batches == whole and len({len(batch) for batch in batches} | {8}) == 1
    (a, a_log, a_counters), (b, b_log, b_counters) = outcome(lab, "four"), outcome(lab, "elastic")
    assert a_counters == b_counters
    for one, other in zip(losses(a_log), losses(b_log), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    for key in (".u_im", ".u_tt"):
        assert torch.equal(a[key] == 0, b[key] == 0) and (a[key] == 0).any()  # not selected so far
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-4)


def losses(log: list[tuple[str, str]]) -> list[float]:
    return [float(re.search(r" Loss: (\S+)", line)[1]) for _, line in log]


def test_a_number_of_ranks_that_the_lanes_do_not_fit_goes_on_and_says_what_changes(lab, caplog):
    words = command(lab, 2, "misfit", OBJECTIVES["drrho"])
    words[words.index("--batch-size") + 1] = "4"
    run(lab, 2, [*words, "--stop_iters", "6"])
    words[words.index("--lanes") + 1] = "1,1"
    words[words.index("--batch-size") + 1] = "8"
    run(lab, 1, [*words, "--resume", "latest"])
    assert "the order of samples is different now: lanes ([2, 1] then, [1, 1] now)" in caplog.text
    _, log, counters = outcome(lab, "misfit")
    assert len(log) == counters["step"] == STEPS_PER_EPOCH * EPOCHS
