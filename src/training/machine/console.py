"""Standard streams that a program outlives, whatever has become of the terminal, pipe or disk behind them.

A stream that is closed, a reader that has left (``| head``), a terminal that is gone and a full disk end no run,
and what the stream's encoding cannot show is escaped (``\\xe9``). Without this, each of them is an error of
whatever happens to print: a progress bar, a warning, the log.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from training.machine.prepare import Unfit

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


@contextmanager
def lasting_streams() -> Iterator[None]:
    """``sys.stdout`` and ``sys.stderr`` are such streams in the body. Also a decorator.

    A stream that is no file of this process, such as a notebook's, stays as it is.
    """
    _occupy_closed()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _lasting(sys.stdout, 1), _lasting(sys.stderr, 2)
    ours = sys.stdout, sys.stderr
    try:
        yield
    finally:
        for stream in ours:
            stream.flush()
        if (sys.stdout, sys.stderr) == ours:  # else somebody has replaced them since
            sys.stdout, sys.stderr = before


def show(text: str) -> None:
    """Print on stdout what the user has asked for. Unfit: it cannot be written there.

    A reader that has left has seen all that it wanted to.
    """
    print(text, flush=True)
    failure = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "failure", None)
    if failure is not None and failure.errno != errno.EPIPE:
        raise Unfit(f"standard output cannot be written ({failure.strerror})")


class _LastingFile(io.FileIO):
    """Writes to a descriptor that belongs to somebody else. ``failure``: the first write that failed."""

    failure: OSError | None = None

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            while (written := super().write(data)) is None:  # another program has made it non-blocking
                select.select([], [self], [], 1.0)
            return written
        except OSError as error:
            self.failure = self.failure or error
            return memoryview(data).nbytes


def _lasting(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream is not None:
        try:
            descriptor = stream.fileno()
        except (AttributeError, OSError, ValueError):
            return stream
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_LastingFile(descriptor)),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=getattr(stream, "line_buffering", True),
        write_through=getattr(stream, "write_through", False),
    )


def _occupy_closed() -> None:
    """Give descriptors 0, 1 and 2 to /dev/null where they are closed.

    The next file to be opened would get them otherwise, and messages of libraries would be written into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest one that is free
