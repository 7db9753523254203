"""Time and memory, measured so that what is compared meets the same conditions.

Variants take turns, and each keeps its best time: whatever else the machine does then disturbs all of them alike.
Memory on the CPU is the kernel's own record of the peak resident size (``VmHWM`` in /proc, Linux), reset before
the measurement, in a process that has done nothing else; on a GPU it is the allocator's.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_M_MMAP_THRESHOLD = -3  # malloc.h


def synchronize(device: torch.device) -> None:
    """Wait for all work on ``device``; nothing to do on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    variants: Mapping[str, Callable[[], None]], repeats: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of ``repeats`` runs of each variant, taken in turns after ``warm_up`` runs of each."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warm_up + repeats):
        for name, run in variants.items():
            synchronize(device)
            started = time.perf_counter()
            run()
            synchronize(device)
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


class PeakMemory:
    """``with PeakMemory(device) as peak: ...`` and then ``peak.bytes``: how far memory rose above its start.

    On the CPU use it in a fresh process (``in_fresh_process``).
    """

    bytes: int

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._device.type == "cuda":
            synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            _RESET.write_text("5")  # the peak becomes the present size: proc_pid_clear_refs(5)
            self._before = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            synchronize(self._device)
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self.bytes = _resident("VmHWM") - self._before


def in_fresh_process(function: Callable[..., T], *args: Any) -> T:
    """``function(*args)`` in a process that has imported modules and done nothing else.

    All must be picklable. An exception there is raised here.
    """
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()  # what this process only keeps in reserve is the other's to use
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["open_clip"])  # imported once, not by every process
    with ProcessPoolExecutor(1, mp_context=context, initializer=_show_every_block) as pool:
        return pool.submit(function, *args).result()


def _show_every_block() -> None:
    """Make the C library take each large block from the system and hand it back when it is freed.

    Else freed memory that it keeps would be used again unseen, and the peak would depend on how its heap happens
    to be laid out. glibc does so; others hand large blocks back by themselves.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}: memory on the CPU is measured on Linux only")
