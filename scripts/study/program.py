"""A program of the trainer in a process of its own, forked from one that has imported torch and open_clip already.

That is what ``python -m MODULE FLAGS`` does, without the seconds of processor time that its imports take.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import sys
from multiprocessing.connection import Connection
from pathlib import Path

_IMPORTED = (
    "training.run",
    "training.evaluation.benchmark.program",
    "training.evaluation.reference_check",
    "timm",
)


class Program:
    """``MODULE.main(flags)``, started at once. Its output is appended to ``log``."""

    def __init__(self, module: str, flags: list[str], log: Path, environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_IMPORTED))
        self._told, telling = context.Pipe(duplex=False)
        self._process = context.Process(target=_run, args=(module, flags, log, environment, telling))
        self._process.start()
        telling.close()

    def wait(self) -> tuple[int, float]:
        """The exit code, and the seconds of processor time that it and its loaders took (nan if it died)."""
        try:
            cpu_seconds = self._told.recv()
        except EOFError:
            cpu_seconds = float("nan")
        self._process.join()
        code = self._process.exitcode
        assert code is not None
        return code, cpu_seconds

    def stop(self) -> None:
        """Ask it to save and to end."""
        self._process.terminate()


def _run(module: str, flags: list[str], log: Path, environment: dict[str, str], telling: Connection) -> None:
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.argv = [module, *flags]
    code = importlib.import_module(module).main(flags)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    telling.send(sum(one.ru_utime + one.ru_stime for one in used))
    telling.close()
    sys.exit(code)
