"""Errors that say that the machine has run out of something or forbids it, as a sentence for the user."""

from __future__ import annotations

import errno
import os
import re
import resource

_MEMORY = re.compile(
    r"CUDA out of memory. Tried to allocate (?P<gpu>[\d.]+ \w+)|can't allocate memory: you tried to allocate "
    r"(?P<bytes>\d+) bytes"
)


_UNUSABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR),
)


def shortage(error: BaseException) -> str | None:
    """What this machine has run out of or does not allow, and what helps; None: ``error`` is another one."""
    number = error.errno if isinstance(error, OSError) else None
    memory = _MEMORY.search(str(error)) if isinstance(error, RuntimeError) else None
    if memory and memory["gpu"]:
        return (
            f"the GPU's memory is used up ({memory['gpu']} more were needed): give a smaller --batch-size, a "
            "larger --accum-freq or --grad-checkpointing"
        )
    if memory or number == errno.ENOMEM or isinstance(error, MemoryError):
        wanted = f" ({int(memory['bytes']) / 1e6:,.0f} MB more were needed)" if memory else ""
        return (
            f"memory ran out{wanted}: give fewer --workers or a smaller --batch-size, or raise the limit of the "
            "job, container or shell (ulimit -v)"
        )
    if number in (errno.EMFILE, errno.ENFILE):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"too many files are open (the limit is {limit}): raise it (ulimit -n), or give fewer --workers"
    if (number == errno.EAGAIN and not _file(error)) or "can't start new thread" in str(error):
        return (
            "no more processes or threads may be started: give fewer --workers or a smaller OMP_NUM_THREADS, or "
            "raise the limit (ulimit -u, or the container's limit on processes)"
        )
    if number in _UNUSABLE:
        return f"{_file(error) or 'a file'} cannot be used ({os.strerror(number)}): check the disk and the path"
    return None


def _file(error: BaseException) -> str:
    return str(getattr(error, "filename", None) or "")
