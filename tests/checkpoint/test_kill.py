"""Ranks and loader processes that are killed: the run resumes by itself and ends like an undisturbed one.

``benchmarks/kill.py`` is the same with more kills, and at random instants too.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

from tests.support import shards, tiny_models
from training import main
from training.loop.step import Stepper

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KILLS = 5  # the named phases, and a loader process
RANKS = min(2, torch.cuda.device_count()) or 2


@pytest.fixture(scope="module")
def kill():
    sys.path.insert(0, str(BENCHMARKS))
    import kill

    yield kill
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def killed(kill, tmp_path_factory) -> tuple[dict, str]:
    """What the benchmark found, and what torchrun and the ranks printed."""
    lab = tmp_path_factory.mktemp("lab")
    result = kill.measure(kill.Options(KILLS, RANKS, seed=0), lab)
    return result, (lab / "killed" / "output").read_text()


@pytest.mark.gpu
def test_a_run_that_is_killed_in_every_phase_is_the_undisturbed_one(kill, killed):
    result, _ = killed
    assert result["killed"] == {
        "forward pass": 1,
        "between two shards": 1,
        "before the marker": 1,
        "after the marker": 1,
        "loader process": 1,
    }
    assert kill.verdict(result) == []
    assert result["launches"] == KILLS + 1 and result["steps_again"] > 0


def test_a_killed_loader_process_ends_its_launch_with_a_clear_message(killed):
    _, output = killed
    told = [line for line in output.splitlines() if "loader process" in line]
    assert len(told) == 1
    how = r"was killed \(signal: Killed\): by a user, or because memory ran out; fewer --workers need less"
    assert re.fullmatch(rf"error: rank 0 failed: loader process \d+ {how}", told[0])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_single_process_too_ends_when_its_loader_process_is_killed(tmp_path, monkeypatch, capsys, number):
    others = set(multiprocessing.active_children())
    take_step = Stepper.__call__

    def step(self, batch, step):
        if step == 1:
            (loader,) = set(multiprocessing.active_children()) - others
            os.kill(loader.pid, number)
        return take_step(self, batch, step)

    monkeypatch.setattr(Stepper, "__call__", step)
    data = f"--train-data {shards.write_shards(tmp_path, 8, per_shard=8)} --train-num-samples 8 --batch-size 4"
    flags = f"--model {tiny_models.path('tiny-vit', tmp_path)} --precision fp32 --workers 1 --epochs 99"
    assert main.main([*data.split(), *flags.split(), "--logs", str(tmp_path / "logs")]) == 1
    errors = capsys.readouterr().err
    assert re.search(r"error: rank 0 failed: loader process \d+ was killed", errors)
    assert "Traceback" not in errors


def test_what_is_compared(kill):
    one = {"state_dict": {"visual.proj": torch.ones(3)}, "u_im": torch.zeros(2), "step": 7, "name": "a"}
    assert kill.differing(one, one | {"name": "b", "saved_at": 3.0}) == []
    other = one | {"state_dict": {"visual.proj": torch.tensor([1.0, 1.0, 1.0 + 2**-23])}, "step": 8}
    assert kill.differing(one, other) == [".state_dict.visual.proj", ".step"]
    assert kill.differing(one | {"stream": {"places": [1]}}, one) == [".stream.places.0"]
    found = {"differing": [".step"], "skipped": ["skipped: x"], "killed": {"forward pass": 1}, "kills": 2}
    assert len(kill.verdict(found)) == 3


def test_the_plan_goes_through_phases_and_ranks(kill):
    plan = kill.make_plan(kill.Options(30, ranks=2, seed=3))
    assert len(plan) == 30
    for phase in kill.PHASES:
        ranks = [k.rank for k in plan if k.phase == phase]
        assert len(ranks) >= 3 and set(ranks) == {0, 1}
    assert plan == kill.make_plan(kill.Options(30, ranks=2, seed=3))
