"""Commands that this process reads shards from (``pipe:``, curl and others) end when it ends, however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from typing import TypeVar

from training.data.sources import guard

T = TypeVar("T")

_guards: dict[int, subprocess.Popen[str]] = {}  # process that reads -> its guard; a fork inherits its parent's


def end_with_reader(stream: T) -> T:
    """``stream``, as webdataset opens it; where it reads from a command, that does not outlive this process."""
    command = getattr(stream, "proc", None)
    if isinstance(command, subprocess.Popen) and sys.platform == "linux":
        with suppress(OSError):  # the shard can be read nevertheless
            lines = _guard().stdin
            assert lines is not None, "it is a pipe"
            lines.write(f"{command.pid}\n")
            lines.flush()
    return stream


def _guard() -> subprocess.Popen[str]:
    own = _guards.get(os.getpid())
    if own is None or own.poll() is not None:
        _guards.clear()
        own = _guards[os.getpid()] = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
    return own
