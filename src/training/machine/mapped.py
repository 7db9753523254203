"""Files mapped into memory, without an open file for each.

Python's ``mmap`` keeps the file open for as long as the map lives. A store has thousands of files, and a process
may often not open more than 1,024 or 4,096.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

# What ``mmap`` lacks: of <sys/mman.h> on Linux.
_PROT_NONE, _ONFAULT, _NORESERVE = 0, 1, 0x4000


class MappedFile:
    """The first ``length`` bytes of a file (default: all), to be read only. OSError: it cannot be read.

    Arrays of it keep it mapped; it is unmapped with the last of them.
    """

    def __init__(self, path: Path, length: int | None = None) -> None:
        with path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size if length is None else length
            self._address = _map(self.size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno())
        self._bytes = (ctypes.c_ubyte * self.size).from_address(self._address)
        weakref.finalize(self._bytes, _LIBC.munmap, self._address, self.size).atexit = False

    def array(self, dtype: np.dtype[Any] | type, shape: tuple[int, ...], start: int = 0) -> np.ndarray:
        """What is stored from byte ``start`` on. ValueError: there are fewer bytes."""
        count = int(np.prod(shape))
        held = memoryview(self._bytes)
        found = np.frombuffer(held, dtype, count, start) if count else np.empty(0, dtype)
        found.flags.writeable = False
        return found.reshape(shape)

    def advise(self, advice: int, start: int = 0, size: int | None = None) -> None:
        """``madvise`` on ``size`` bytes from ``start``, a multiple of the page size. OSError: it is refused."""
        _check(_LIBC.madvise(self._address + start, self.size - start if size is None else size, advice))

    def lock(self, start: int, size: int) -> None:
        """Read bytes into memory and keep them there while the file is mapped. OSError: the kernel refuses."""
        _check(_LIBC.mlock(self._address + start, size))


def may_lock(size: int) -> bool:
    """Whether this process may lock so many bytes more: the kernel is asked, and reads nothing for it.

    The limit is first raised as far as the process may.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    if not hasattr(_LIBC, "mlock2"):
        return True
    _LIBC.mlock2.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    try:
        address = _map(size, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE, -1)
    except OSError:
        return False
    try:
        return _LIBC.mlock2(address, size, _ONFAULT) == 0
    finally:
        _LIBC.munmap(address, size)


def _map(size: int, protection: int, flags: int, file: int) -> int:
    address = _LIBC.mmap(None, size, protection, flags, file, 0)
    if address in (None, _FAILED):
        _check(-1)
    return address


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


_FAILED = ctypes.c_void_p(-1).value
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [*(ctypes.c_void_p, ctypes.c_size_t), *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.munmap.argtypes = _LIBC.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
