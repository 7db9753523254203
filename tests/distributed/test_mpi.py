"""Real launchers of MPI, where they are installed: Debian's openmpi-bin (mpirun) and mpich (mpiexec.hydra)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import free_port
from training.distributed import launcher

MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2"]
HYDRA = ["mpiexec.hydra", "-n", "2"]
MEET = """
import os, sys, torch
from training.config.params import parse
from training.distributed import collectives, process_group
world = process_group.start(parse(sys.argv[1:]).distributed)
total = collectives.all_reduce_sum(torch.tensor(world.rank + 1.0))
where = f"{world.rank} {world.world_size} {world.local_rank} {world.local_world_size}"
sys.stdout.write(f"{where} {total.item()}\\n")
process_group.stop()
"""
FLAGS = "--dataset-type synthetic --train-num-samples 8 --batch-size 2 --workers 0"


def start(command: list[str], *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What becomes of Python with ``words``, started by ``command``; the tests may be running under a launcher."""
    if shutil.which(command[0]) is None:
        package = {"mpirun": "openmpi-bin", "mpiexec.hydra": "mpich"}[command[0]]
        pytest.skip(f"{command[0]} is not installed: apt-get install {package}")
    names = {name for known in (launcher.BY_HAND, *launcher.LAUNCHERS) for name in vars(known).values()}
    plain = {n: v for n, v in os.environ.items() if n not in names | {"MASTER_ADDR", "MASTER_PORT"}}
    env = plain | {"PYTHONPATH": str(Path(launcher.__file__).parents[2]), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([*command, sys.executable, *words], env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", [MPIRUN, HYDRA], ids=["mpirun", "mpiexec.hydra"])
def test_processes_on_one_host_meet_by_themselves(command):
    done = start(command, "-c", MEET, *FLAGS.split(), "--dist_port", str(free_port()))
    assert sorted(done.stdout.splitlines()) == ["0 2 0 2 3.0", "1 2 1 2 3.0"], done.stderr


@pytest.mark.parametrize("command", [MPIRUN, HYDRA], ids=["mpirun", "mpiexec.hydra"])
def test_a_refusal_is_told_once(command):
    done = start(command, "-m", "training.main", *FLAGS.split(), "--nonsense", "3")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert errors == ["error: --nonsense: not a flag of this program; see --help"]
