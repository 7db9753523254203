"""``--ref_features_cache_mb``: a part of the reference's features that stays in the memory of every node.

A run reads each row once in an epoch. The kernel's page cache drops what was read longest ago, so that of features
that are larger than it, a row is dropped before its turn comes again; and the shards stream through the same
cache. A fixed part that is never dropped is found as often as it is large: half of the reads with half of the
features.

The part is the first files' pages in that very page cache, locked into it (``mlock``): one process of the node
reads them, in a thread of its own, and all find them, without a copy or another lookup. The kernel lets go of them
when the process ends, however it ends.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from training.machine import limits

FLAG = "--ref_features_cache_mb"
MB = 2**20  # bytes
_CHUNK = 16 * MB  # read and locked at a time
_LEFT = 0.1  # of the memory, for everything else


def plan(megabytes: int, files: Sequence[Path]) -> tuple[int, str]:
    """The bytes of ``files`` that ``megabytes`` keep in memory, and a remark on it for the log.

    ValueError: this machine cannot, or may not.
    """
    size = sum(path.stat().st_size for path in files)
    wanted = min(megabytes * MB, size)
    there, allowed = limits.memory(), limits.lockable()
    if wanted > (1 - _LEFT) * there:
        raise ValueError(
            f"{FLAG} {megabytes}: it would keep {_mb(wanted)} in the memory of each node, and this process and "
            f"those beside it have {_mb(there)} for everything: give less, and leave room for training itself"
        )
    if wanted > allowed:
        raise ValueError(
            f"{FLAG} {megabytes}: a process may lock no more than {_mb(allowed)} of memory here, of the "
            f"{_mb(wanted)} that it would keep: raise the limit (ulimit -l unlimited; with Docker: --ulimit "
            "memlock=-1), or leave the flag out and let the kernel decide what it keeps"
        )
    return wanted, f"{FLAG} {megabytes}: {_mb(wanted)} of their {_mb(size)} stay in the memory of each node"


class Resident:
    """Keeps the first ``size`` bytes of ``files``, taken as one, in memory while the context is open.

    ``held`` is how many there are so far. What goes wrong on the way is told in the log: training goes on without.
    """

    def __init__(self, files: Sequence[Path], size: int) -> None:
        self.files, self.size, self.held = files, size, 0
        self._maps: list[np.ndarray] = []
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name=FLAG, daemon=True)

    def __enter__(self) -> Resident:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._leaving.set()
        self._thread.join()
        self._maps.clear()

    def wait(self, seconds: float | None = None) -> None:
        """Until all is there, an error has ended it, or so long."""
        self._thread.join(seconds)

    def _run(self) -> None:
        started = time.monotonic()
        try:
            for path, length in self._parts():
                self._keep(path, length)
        except (OSError, ValueError) as error:
            logging.warning(
                f"{FLAG}: {_mb(self.held)} of the reference's features are kept in memory and no more "
                f"({error}); training goes on"
            )
        else:
            if not self._leaving.is_set():
                logging.info(
                    f"{_mb(self.held)} of the reference's features are in memory, after "
                    f"{time.monotonic() - started:.0f} s"
                )

    def _parts(self) -> Iterator[tuple[Path, int]]:
        left = self.size
        for path in self.files:
            length = min(path.stat().st_size, left)
            left -= length
            if length:
                yield path, length

    def _keep(self, path: Path, length: int) -> None:
        with path.open("rb") as file:
            mapped = np.frombuffer(mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ), np.uint8)
            self._maps.append(mapped)
            for begin in range(0, length, _CHUNK):
                if self._leaving.is_set():
                    return
                # In long reads, the next one on its way: locking would wait for every page by itself.
                os.posix_fadvise(file.fileno(), begin, 2 * _CHUNK, os.POSIX_FADV_WILLNEED)
                size = min(_CHUNK, length - begin)
                _lock(mapped.ctypes.data + begin, size)
                self.held += size


def _lock(address: int, size: int) -> None:
    """Lock pages into memory, after reading those that are not there. OSError: the kernel refuses."""
    if _LIBC.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _mb(size: float) -> str:
    return f"{size / MB:,.{0 if size >= 10 * MB else 1}f} MB"


_LIBC = ctypes.CDLL(None, use_errno=True)
