"""Processes that a launcher starts say a line once, with real processes of stand-ins for launchers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.distributed import once

SAY = "from training.distributed import once; once.say('error: no such file')"
LINE = "error: no such file"
# Each starts two of our processes in turn, as a launcher does in a moment: the later one must not speak again.
MPIRUN = "for r in 0 1; do OMPI_COMM_WORLD_RANK=$r $SAY; done"
TORCHRUN = "for r in 0 1; do TORCHELASTIC_RUN_ID=none TORCHELASTIC_RESTART_COUNT=0 RANK=$r $SAY; done"
SRUN = "for r in 0 1; do SLURM_JOB_ID=$ID SLURM_STEP_ID=0 SLURM_PROCID=$r PMI_RANK=$r $SAY; done"
BY_HAND = "for r in 0 1; do RANK=$r WORLD_SIZE=2 $SAY & done; wait"
ALONE = "for r in 0 1; do $SAY; done"


@pytest.fixture
def start(tmp_path):
    """``start(script)``: the lines that the processes of a script print."""
    plain = {
        n: v for n, v in os.environ.items() if not n.startswith(("OMPI", "PMI", "SLURM", "TORCHELASTIC", "RANK"))
    }
    says = tmp_path / "say"
    says.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c \"{SAY}\"\n")
    says.chmod(0o755)
    env = plain | {
        "PYTHONPATH": str(Path(once.__file__).parents[2]),
        "SAY": str(says),
        "TMPDIR": str(tmp_path),
        "ID": str(os.getpid()),
    }

    def run(script: str, **variables: str) -> list[str]:
        done = subprocess.run(
            ["sh", "-c", script], env=env | variables, capture_output=True, text=True, start_new_session=True
        )
        return done.stderr.splitlines()

    return run


@pytest.mark.parametrize("script", [MPIRUN, TORCHRUN, SRUN, BY_HAND])
def test_the_processes_of_a_launch_say_it_once(start, script):
    assert start(script) == [LINE]


def test_each_launch_says_it(start):
    assert start(MPIRUN) + start(MPIRUN) == [LINE] * 2
    assert start(TORCHRUN.replace("COUNT=0", "COUNT=$r")) == [LINE] * 2  # restarted
    assert (
        start(f"{SRUN.replace('for r in 0 1', 'for s in 0 1').replace('STEP_ID=0', 'STEP_ID=$s')}") == [LINE] * 2
    )
    assert start(BY_HAND.replace("& done; wait", "; done")) == [LINE] * 2  # in the same shell, one after the other
    assert start(ALONE) == [LINE] * 2


def test_better_twice_than_never(start, tmp_path):
    (tmp_path / f"drrho-clip-{os.getuid()}").write_text("not a folder")
    assert start(MPIRUN) == [LINE] * 2


def test_lines_that_no_encoding_can_write(start, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said = []
    for name in ("caf\udce9.tar", "café.tar", "two\nlines", "caf\udce9.tar"):
        once.do(name, lambda name=name: said.append(name))
    assert said == ["caf\udce9.tar", "café.tar", "two\nlines"]
