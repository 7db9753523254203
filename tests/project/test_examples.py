"""What ``examples/`` shows: it learns, two ranks train as one process does, and a reference helps."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT, DIGITS = ROOT / "examples/own_loop.py", ROOT / "examples/digits.py"
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
    started = [
        subprocess.Popen(
            [sys.executable, *launcher, SCRIPT],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for launcher in ((), TORCHRUN)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors[-4000:]
    one, two = (printed(output) for output, _ in outputs)
    return one, two


def environment() -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}


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


@pytest.mark.parametrize("script", [SCRIPT, DIGITS], ids=lambda path: path.name)
def test_nothing_of_the_trainer_is_used(script):
    assert not re.search(r"^\s*(from|import) training", script.read_text(), re.MULTILINE)


def test_digits_gain_by_a_reference():
    """Where labels are wrong, DRRho is better than ERM by more than its interval, and the RHO loss varies less."""
    command = [sys.executable, DIGITS, "--seeds", "3", "--samples", "100", "--steps", "100"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    accuracies, moments = (
        [[float(x) for x in re.findall(r"[\d.]+", cell)] for cell in line.strip("| ").split("|")]
        for line in re.findall(r"^\| 100 .*$", done.stdout, re.MULTILINE)
    )
    _, erm, _, _, drrho, (gain, half), _ = accuracies
    assert gain == pytest.approx(drrho[0] - erm[0], abs=0.11)
    assert gain > half
    *_, variance, of_rho_loss = moments
    assert of_rho_loss[0] < variance[0] / 2


def test_digits_refuses_what_it_cannot_do(monkeypatch, capsys):
    for options, message in (
        (["--samples", "900"], "more than the 997 there are"),
        (["--seeds", "1"], "2 or more"),
        (["--steps", "10"], "every 20 steps"),
    ):
        monkeypatch.setattr(sys, "argv", ["digits.py", *options])
        with pytest.raises(SystemExit, match="2"):
            runpy.run_path(str(DIGITS), run_name="__main__")
        assert message in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["digits.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(DIGITS), run_name="__main__")
    assert "{kl-constrained,kl-regularized,cvar,moving-average}" in capsys.readouterr().out
