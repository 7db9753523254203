"""``--ref_features_cache_mb``: a part of the reference's features that stays in the memory of every node.

A run reads each row once in an epoch. The kernel's page cache drops what was read longest ago, so that of features
that are larger than it, a row is dropped before its turn comes again; and the shards stream through the same
cache. A fixed part that is not dropped is found as often as it is large: half of the reads with half of the
features.

The part is the first files' pages in that very page cache, locked into it (``mlock``): one process of the node
reads them, in a thread of its own, and all find them, without a copy or another lookup. The kernel lets go of them
when the process ends, however it ends. (A network file system that takes a file for changed reads it again.)
"""

from __future__ import annotations

import errno
import logging
import mmap
import resource
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from training.machine import limits
from training.machine.mapped import MappedFile, may_lock

FLAG = "--ref_features_cache_mb"
MB = 2**20  # bytes
_CHUNK = 16 * MB  # read and locked at a time
_LEFT = 0.1  # of the memory, for everything else
_PATIENCE = 5.0  # seconds for a read that hangs, when the run ends
_CURE = (
    "raise the hard limit of `ulimit -l`, as administrators do (limits.conf; LimitMEMLOCK of slurmd; with Docker "
    "--ulimit memlock=-1; in Kubernetes the capability IPC_LOCK), or leave the flag out: the kernel then decides "
    "what it keeps"
)


def plan(megabytes: int, size: int) -> tuple[int, str]:
    """The bytes, of features of ``size``, that ``megabytes`` keep in memory, and a remark on it for the log.

    ValueError: this machine cannot, or may not.
    """
    wanted = min(megabytes * MB, size)
    whole = limits.memory()
    room = max(min(whole, limits.available_memory()) - _LEFT * whole, 0)
    if wanted > room:
        raise ValueError(
            f"{FLAG} {megabytes}: it would keep {_mb(wanted)} in the memory of each node, and of this one "
            f"{_mb(room)} are to be had: give less, and leave room for training itself"
        )
    if not may_lock(wanted):
        hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
        told = "no more" if hard == resource.RLIM_INFINITY else f"no more than {_mb(hard)}"
        raise ValueError(
            f"{FLAG} {megabytes}: it would keep {_mb(wanted)} in memory, and processes here may lock {told}: "
            f"{_CURE}"
        )
    return wanted, f"{FLAG} {megabytes}: {_mb(wanted)} of their {_mb(size)} stay in the memory of each node"


class Resident:
    """Keeps the first ``size`` bytes of ``files``, taken as one, in memory while the context is open.

    ``held`` is how many there are so far. What goes wrong on the way is told in the log: training goes on without.
    """

    def __init__(self, files: Sequence[Path], size: int) -> None:
        self.files, self.size, self.held = files, size, 0
        self._mapped: list[MappedFile] = []
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name=FLAG, daemon=True)

    def __enter__(self) -> Resident:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._leaving.set()
        if error is None:  # else it comes first; the kernel lets go of all at the process's end
            self._thread.join(_PATIENCE)
            self._mapped.clear()

    def wait(self, seconds: float | None = None) -> None:
        """Until all is there, an error has ended it, or so long."""
        self._thread.join(seconds)

    def _run(self) -> None:
        started = time.monotonic()
        try:
            self._keep_all()
        except (OSError, ValueError) as problem:
            refused = isinstance(problem, OSError) and problem.errno in (errno.ENOMEM, errno.EPERM, errno.EAGAIN)
            cure = f": {_CURE}" if refused else ""
            logging.warning(
                f"{FLAG}: {_mb(self.held)} of the reference's features are kept in memory and no more "
                f"({problem}), and training goes on{cure}"
            )
        else:
            if not self._leaving.is_set():
                logging.info(
                    f"{_mb(self.held)} of the reference's features are in memory, after "
                    f"{time.monotonic() - started:.0f} s"
                )

    def _keep_all(self) -> None:
        most, piece = _most_maps() // 2, memoryview(bytearray(_CHUNK))
        for path in self.files:
            if self.held >= self.size or self._leaving.is_set():
                return
            if len(self._mapped) >= most:
                raise ValueError(f"half of the {2 * most:,} files that a process may map, by vm.max_map_count")
            self._keep(path, min(self.size - self.held, path.stat().st_size), piece)

    def _keep(self, path: Path, length: int, piece: memoryview) -> None:
        """The first bytes of a file. They are read in long pieces first: locking alone would wait page by page."""
        if not length:
            return
        with path.open("rb", buffering=0) as file:
            mapped = MappedFile(path, length)
            mapped.advise(mmap.MADV_DONTFORK)
            self._mapped.append(mapped)
            for start in range(0, length, _CHUNK):
                if self._leaving.is_set():
                    return
                if limits.available_memory() < _LEFT * limits.memory():
                    raise ValueError(f"the machine has {_mb(limits.available_memory())} left for everything else")
                size = min(_CHUNK, length - start)
                file.readinto(piece[:size])
                mapped.lock(start, size)
                self.held += size


def _most_maps() -> int:
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return 65_530


def _mb(size: float) -> str:
    return f"{size / MB:,.{0 if size >= 10 * MB else 1}f} MB"
