"""The rank of this process, from the variables of torchrun or Slurm, and messages that are printed once per node.

All this works before torch is imported and before the ranks meet. A process takes its rank, in this order, from

1. torchrun's variables (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``);
2. Slurm's, inside an ``srun`` step of several tasks (``SLURM_PROCID``, ``SLURM_NTASKS``, ``SLURM_LOCALID``);
3. ``RANK`` alone, with ``--world_size``, for processes started by hand;
4. otherwise it is the only process.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_KEPT = 24 * 3600  # seconds for which a launch's file is kept


@dataclass(frozen=True)
class LaunchedRank:
    """The rank of a process among all and on its node, and the number of ranks in both."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def rank(env: Mapping[str, str] = os.environ) -> int:
    """The rank of this process; 0 where no launcher has set one."""
    return int(env.get("RANK") or env.get("SLURM_PROCID") or 0)


def slurm_job(env: Mapping[str, str] = os.environ) -> str | None:
    """The number of the Slurm job that this process belongs to."""
    return env.get("SLURM_JOB_ID")


def local_rank(env: Mapping[str, str] = os.environ) -> int:
    """Its rank on its node; processes started by hand are assumed to be on one node."""
    return int(env.get("LOCAL_RANK") or env.get("SLURM_LOCALID") or rank(env))


def say_once(line: str, env: Mapping[str, str] = os.environ) -> None:
    """Print ``line`` on stderr, unless another process of this launch on this node has printed it.

    A launcher ends all of its processes when one of them ends. So the first process that gets here prints, and the
    others wait for it: the lines that have been printed are kept in a file, which they lock. Processes started by
    hand do not know of each other; of those, local rank 0 prints.
    """
    launch = _launch(env)
    if launch is None:
        if local_rank(env) == 0:
            print(line, file=sys.stderr, flush=True)
        return
    name = hashlib.sha256(launch.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"drrho-clip-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        for old in folder.iterdir():
            if time.time() - old.stat().st_mtime > _KEPT:
                old.unlink(missing_ok=True)
        with (folder / name).open("a+") as said:
            fcntl.flock(said, fcntl.LOCK_EX)
            said.seek(0)
            if f"{line}\n" not in said.read():
                print(line, file=sys.stderr, flush=True)
                said.write(f"{line}\n")
    except OSError:  # better twice than never
        print(line, file=sys.stderr, flush=True)


def _launch(env: Mapping[str, str]) -> str | None:
    """A name shared by the processes of one launch on one node, and by no other launch; None: started by hand."""
    if "TORCHELASTIC_RUN_ID" in env:
        agent = os.getppid()
        with suppress(OSError):
            begun = Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[19]
            return f"torchrun {agent} {begun} {env.get('TORCHELASTIC_RESTART_COUNT')}"
        return None
    if "SLURM_STEP_ID" in env:
        return " ".join(env.get(f"SLURM_{key}", "") for key in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    return None


def find_place(env: Mapping[str, str], world_size: int, by_url: bool) -> LaunchedRank:
    """The rank of this process. ``world_size``: used if no launcher sets it. ``by_url``: the ranks meet at a URL.

    ValueError: the variables contradict each other, or the address at which the ranks meet is missing.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        world_size = int(env["WORLD_SIZE"])
    elif "SLURM_PROCID" in env and _slurm_tasks(env) > 1 and _is_srun_step(env, by_url):
        return _slurm_place(env)
    if world_size == 1:
        return LaunchedRank()
    if "RANK" not in env:
        raise ValueError(
            f"--world_size {world_size}: it is not known which of the {world_size} ranks this process is; start "
            "it with torchrun or srun, or set RANK in its environment"
        )
    if not by_url and "MASTER_ADDR" not in env:
        raise ValueError(
            f"WORLD_SIZE is {world_size} but MASTER_ADDR is not set: export the host of rank 0, start with "
            "torchrun, or give --dist-url tcp://HOST:PORT"
        )
    rank = int(env["RANK"])
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK is {rank}, which is not one of the {world_size} ranks 0..{world_size - 1}")
    return LaunchedRank(rank, world_size, local_rank(env), int(env.get("LOCAL_WORLD_SIZE", world_size)))


def _slurm_tasks(env: Mapping[str, str]) -> int:
    """The tasks of this step. In a shell inside an allocation, the count of the allocation would be wrong."""
    return int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)


def _is_srun_step(env: Mapping[str, str], by_url: bool) -> bool:
    """Whether the other tasks of this Slurm step run this program too.

    They do not in an interactive shell (``srun --pty``) and in a batch script that calls Python without ``srun``
    (a job, but no step), where waiting for them would hang.
    """
    alone = "SLURM_JOB_ID" in env and "SLURM_STEP_ID" not in env
    alone = alone or ("SLURM_PTY_PORT" in env and "MASTER_ADDR" not in env)
    if alone:
        logging.getLogger(__name__).warning(
            "inside a Slurm allocation, but not started by srun: running as a single process"
        )
        return False
    if by_url or "MASTER_ADDR" in env:
        return True
    raise ValueError(
        f"Slurm started {_slurm_tasks(env)} tasks but MASTER_ADDR is not set: export the host of the first one "
        "(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1), or set SLURM_NTASKS=1 to run one process"
    )


def _slurm_place(env: Mapping[str, str]) -> LaunchedRank:
    rank, world_size = int(env["SLURM_PROCID"]), _slurm_tasks(env)
    counts = _tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "")
    node = int(env.get("SLURM_NODEID", 0))
    local_world_size = counts[node] if node < len(counts) else world_size
    return LaunchedRank(rank, world_size, int(env.get("SLURM_LOCALID", rank)), local_world_size)


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's compressed counts: ``4(x2),3`` -> [4, 4, 3]."""
    counts = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(repeat or 1)
    return counts
