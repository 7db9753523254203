"""What ``examples/`` shows: it learns, and two ranks train as one process does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/own_loop.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
CAPTIONS = 72


@dataclass(frozen=True)
class Printed:
    """What a run prints: the losses of each of its two models, then how often they find a caption."""

    losses: tuple[list[float], list[float]]
    accuracies: list[float]


@pytest.fixture(scope="module")
def runs() -> tuple[Printed, Printed]:
    """The same program on one rank and on two, side by side."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    started = [
        subprocess.Popen(
            [sys.executable, *launcher, SCRIPT],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for launcher in ((), TORCHRUN)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors[-4000:]
    one, two = (printed(output) for output, _ in outputs)
    return one, two


def printed(output: str) -> Printed:
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", output)]
    half = len(losses) // 2
    found = re.search(r"reference ([\d.]+), target ([\d.]+)", output)
    return Printed((losses[:half], losses[half:]), [float(value) for value in found.groups()])


def test_both_models_learn(runs):
    one, _ = runs
    for losses in one.losses:
        assert len(losses) == 3
        assert losses == sorted(losses, reverse=True)
    assert min(one.accuracies) > 20 / CAPTIONS


def test_two_ranks_train_as_one_does(runs):
    """They add up in another order, and what that changes grows from step to step."""
    one, two = runs
    for ours, theirs in zip(one.losses, two.losses, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3)
    assert two.accuracies == pytest.approx(one.accuracies, abs=0.02)


def test_nothing_of_the_trainer_is_used():
    assert not re.search(r"^\s*(from|import) training", SCRIPT.read_text(), re.MULTILINE)
