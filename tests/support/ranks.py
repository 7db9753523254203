"""Real gloo process groups that stay alive across tests: ``ranks(4).run(function, *args)``.

Each pool holds K processes with a process group of their own. ``run`` calls ``function(*args)`` on all of them
and returns the K results in rank order; an exception on a rank is raised here with its traceback. Functions
must be importable (module level), arguments and results picklable.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import socket
import traceback
from functools import cache

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_reserved: list[socket.socket] = []


def free_port() -> int:
    """A port that a store can listen at, and that is nobody else's until this process ends."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # so may the store that listens there
    reserved.bind(("127.0.0.1", 0))
    _reserved.append(reserved)
    return reserved.getsockname()[1]


def _serve(rank: int, size: int, port: int | None, pipe) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    if port is not None:
        os.environ["MASTER_PORT"] = str(port)
        dist.init_process_group("gloo", rank=rank, world_size=size)
    while (call := pipe.recv()) is not None:
        function, args, kwargs = call
        try:
            pipe.send((True, function(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    if port is not None:
        dist.destroy_process_group()


class Ranks:
    """A pool of ``size`` processes in one gloo group; not ``joined``: with a launcher's variables alone."""

    def __init__(self, size: int, joined: bool = True, timeout: float = 400.0) -> None:
        self.size, self.timeout = size, timeout
        context, port = mp.get_context("forkserver"), free_port() if joined else None
        context.set_forkserver_preload(
            ["drrho_clip.losses.individual", "drrho_clip.losses.baselines"]
        )  # imported once, not by every rank
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function, *args, **kwargs) -> list:
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        results, failures = [], []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(self.timeout):
                failures.append(f"rank {rank} did not answer within {self.timeout:.0f} s")
                continue
            try:
                good, value = pipe.recv()
            except EOFError:
                good, value = False, "its process has ended"
            (results if good else failures).append(value if good else f"rank {rank}:\n{value}")
        if failures:
            ranks.cache_clear()  # a group that failed half-way is not used again
            self.close()
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            with contextlib.suppress(OSError):
                pipe.send(None)
            process.join(2)
            process.kill()


@cache
def ranks(size: int, joined: bool = True) -> Ranks:
    """The pool of ``size`` ranks, started at its first use and kept until the tests end."""
    pool = Ranks(size, joined)
    atexit.register(pool.close)
    return pool


def run_program(
    size: int, words: list[str], before=None, program: str = "training.main"
) -> list[tuple[int, object]]:
    """The ``program`` with ``words`` on ``size`` ranks that meet anew: the ranks' exit codes.

    ``before()`` is called on each rank before, e.g. to record what happens; its answer comes with the code.
    """
    return ranks(size, joined=False).run(_run_program, words, free_port(), before, program)


def _run_program(words: list[str], port: int, before, program: str) -> tuple[int, object]:
    os.environ["MASTER_PORT"] = str(port)
    seen = before() if before else None
    return importlib.import_module(program).main(words), seen
