"""What of a file is in the kernel's page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

PAGE = mmap.PAGESIZE


def in_memory(path: Path) -> np.ndarray:
    """Whether each page of a file is in the kernel's page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as held:
        pages = -(-len(held) // mmap.PAGESIZE)
        state = (ctypes.c_ubyte * pages)()
        first = ctypes.c_ubyte.from_buffer(held)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(held)), state) == 0
        del first
        return np.array(state) & 1 == 1


def forget(path: Path) -> None:
    """Ask the kernel to drop the file's pages."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
