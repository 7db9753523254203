"""The program with ranks that die at named moments: what ``kill.py`` has torchrun start in place of it.

    KILL_FOLDER=DIR torchrun ... benchmarks/victim.py -- FLAGS

``DIR/plan.json`` is a list with one ``Kill`` per launch (torchrun's restart count), in order; later launches are
left alone. Every rank adds to ``DIR/events.jsonl`` when it starts, when a step is done, and before it kills. All
else is ``training.main``: the functions below note that they were reached and go on as they are.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHASES = FORWARD, BETWEEN, BEFORE, AFTER, LOADER, RESUMING, STARTING, TRAINING, ALL = (
    *("forward pass", "between two shards", "before the marker", "after the marker"),
    *("loader process", "while resuming", "while starting", "while training", "all ranks at once"),
)
_PATIENCE = 20.0  # seconds until the other rank's shard is there


@dataclass(frozen=True)
class Kill:
    """What ends a launch: rank ``rank``, in ``phase``, when that has come ``after`` times before in this launch.

    ``instant``: of the phases that the parent looks after, when; in [0, 1) of its duration.
    """

    phase: str
    rank: int
    after: int = 0
    instant: float = 0.0


class Events:
    """A file that processes add lines to. A line is written in one piece, and outlives its process."""

    def __init__(self, folder: Path, launch: int, rank: int) -> None:
        self._path, self._origin = folder / "events.jsonl", {"launch": launch, "rank": rank}

    def add(self, what: str, **more: Any) -> None:
        line = json.dumps({"what": what, "time": time.time(), **self._origin, **more}) + "\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(descriptor, line.encode())
        os.close(descriptor)


class Killer:
    """Carries out this launch's part of the plan."""

    def __init__(self, folder: Path, launch: int, rank: int, ranks: int) -> None:
        plan = json.loads((folder / "plan.json").read_text())
        self.events = Events(folder, launch, rank)
        self._folder, self._launch, self._rank, self._ranks = folder, launch, rank, ranks
        self._kill = Kill(**plan[launch]) if launch < len(plan) else None
        self._reached = 0

    def sign_in(self) -> None:
        """Leave this process's number where the parent and the other ranks find it."""
        (self._folder / f"pid-{self._launch}-{self._rank}").write_text(str(os.getpid()))
        self.events.add("started")

    def is_due(self, phase: str, by: int | None = None) -> bool:
        """Whether this is the moment. ``by``: the rank that goes through it, by default the one to be killed."""
        kill = self._kill
        if kill is None or kill.phase != phase or self._rank != (kill.rank if by is None else by):
            return False
        self._reached += 1
        return self._reached == kill.after + 1

    def kill(self, process: int | None = None) -> None:
        """Kill ``process``, by default the planned rank."""
        kill = self._kill
        process = process or int((self._folder / f"pid-{self._launch}-{kill.rank}").read_text())
        self.events.add("killed", phase=kill.phase, victim=kill.rank)
        os.kill(process, signal.SIGKILL)

    def wait_for_another_shard(self, folder: Path) -> None:
        """Until a shard of another rank is in ``folder``."""
        deadline = time.monotonic() + _PATIENCE
        others = [f"__{rank}_*" for rank in range(self._ranks) if rank != self._rank]
        while not any(file.stat().st_size for pattern in others for file in folder.glob(pattern)):
            assert time.monotonic() < deadline, "no other rank has written its shard"
            time.sleep(0.001)


def before(owner: Any, name: str, first: Callable[..., None]) -> None:
    """Have ``first`` called with the same arguments whenever ``owner.name`` is."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def called(*args: Any, **kwargs: Any) -> Any:
        first(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, called)


def lay_out(killer: Killer) -> None:
    """Put the moments into the program."""
    import open_clip
    import torch.distributed.checkpoint as dcp

    from training.loop.step import Stepper

    def in_forward(*_: Any, **__: Any) -> None:
        if killer.is_due(FORWARD):  # between the towers
            killer.kill()

    def before_step(*_: Any, **__: Any) -> None:
        if killer.is_due(LOADER):
            killer.kill(multiprocessing.active_children()[0].pid)

    def before_shard(writer: dcp.FileSystemWriter, *_: Any, **__: Any) -> None:
        if killer.is_due(BETWEEN):
            killer.wait_for_another_shard(Path(writer.path))
            killer.kill()

    def before_reading(*_: Any, **__: Any) -> None:
        if killer.is_due(RESUMING):  # weights and moments are in place, rows are not
            killer.kill()

    before(open_clip.CLIP, "encode_text", in_forward)
    before(Stepper, "__call__", before_step)
    before(dcp.FileSystemWriter, "write_data", before_shard)
    before(dcp.FileSystemReader, "read_data", before_reading)
    take_step, replace = Stepper.__call__, os.replace

    def step(self: Stepper, batch: Any, number: int) -> Any:
        values = take_step(self, batch, number)
        killer.events.add("step", step=number)
        return values

    def put_in_place(source: Any, target: Any) -> None:
        marker = str(target).endswith(".pt")
        if marker and killer.is_due(BEFORE, by=0):
            killer.kill()
        replace(source, target)
        if marker and killer.is_due(AFTER, by=0):
            killer.kill()

    Stepper.__call__, os.replace = step, put_in_place


def main() -> int:
    killer = Killer(
        Path(os.environ["KILL_FOLDER"]),
        int(os.environ["TORCHELASTIC_RESTART_COUNT"]),
        int(os.environ["RANK"]),
        int(os.environ["WORLD_SIZE"]),
    )
    killer.sign_in()
    sys.path[0] = str(Path(__file__).resolve().parents[1] / "src")
    lay_out(killer)
    from training import main as program

    return program.main()


if __name__ == "__main__":
    sys.exit(main())
