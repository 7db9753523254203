"""``--profile``: a trace of a few training steps in ``profile/`` of the run's folder.

Every rank writes ``rankR.json.gz``, which Perfetto and chrome://tracing can open, ``rankR.txt``, one page on where
the time went, and ``rankR_operators.txt``, the operators that took longest. The first steps are not traced: they
compile, tune kernels and fill the loaders.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from training.distributed.process_group import World
from training.loop.breakdown import breakdown

SKIPPED, WARMUP, TRACED = 8, 2, 3  # numbers of steps

logger = logging.getLogger(__name__)


class Profiler:
    """A context manager around the loop, whose ``step`` is called after every step. This one measures nothing."""

    def step(self) -> None:
        """Call this after each training step."""

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


class StepProfiler(Profiler):
    """Traces ``TRACED`` steps once, after the first ``SKIPPED`` + ``WARMUP`` steps."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.rank, self.written = folder / "profile", world.rank, False
        self._done = 0
        self.on_cuda = world.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_cuda
        self.profile = profile(
            activities=activities,
            schedule=schedule(wait=SKIPPED, warmup=WARMUP, active=TRACED, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )

    def step(self) -> None:
        self._done += 1
        if self.on_cuda and self._done == SKIPPED + WARMUP:
            torch.cuda.synchronize()  # else work of the steps before would count as that of the traced ones
        self.profile.step()

    def __enter__(self) -> Profiler:
        self.profile.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.profile.__exit__(kind, error, trace)
        if not self.written and error is None:
            steps = SKIPPED + WARMUP + 1
            logger.warning(f"--profile: no trace was written, because the run ended before its step {steps}")

    def _write(self, measured: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.written = True
        measured.export_chrome_trace(str(self.folder / f"rank{self.rank}.json.gz"))
        order = "self_cuda_time_total" if self.on_cuda else "self_cpu_time_total"
        table = measured.key_averages().table(sort_by=order, row_limit=40)
        (self.folder / f"rank{self.rank}_operators.txt").write_text(table)
        found = breakdown(measured, on_cuda=self.on_cuda)
        (self.folder / f"rank{self.rank}.txt").write_text(f"{TRACED} steps were traced\n{found}")
        logger.info(f"--profile: the trace of {TRACED} steps was written to {self.folder}")


def open_profiler(enabled: bool, folder: Path, world: World) -> Profiler:
    """The profiler that ``--profile`` asks for, or one that does nothing."""
    return StepProfiler(folder, world) if enabled else Profiler()
