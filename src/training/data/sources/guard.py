"""A process beside one that reads shards from commands: it ends the commands when the reader has ended.

Commands notice that their reader is gone when they write next, and one that waits for its network or its disk does
not. They do not end by signals to a rank either: a reader that is killed can pass none on. So this program, which
the reader starts in a session of its own, gets the numbers of its commands, a line each, and lives until its input
ends, which is when the reader ends, in whatever way. It needs no package, and starts in milliseconds.
"""

import os
import signal
import sys
from collections.abc import Iterable, Iterator


def main(lines: Iterable[str]) -> None:
    """Kill the commands of ``lines`` with all that they have started, after the last line."""
    commands = []
    for line in lines:
        process = int(line)
        commands.append((process, _began(process)))
    for process, began in commands:
        if began is not None and _began(process) == began:  # else the number is another process's by now
            _kill(process)


def _kill(process: int) -> None:
    """Kill ``process`` and its descendants, from the top, so that none can start another meanwhile."""
    try:
        os.kill(process, signal.SIGSTOP)
        children = list(_children(process))
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return
    for child in children:
        _kill(child)


def _children(process: int) -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdecimal() and (stat := _stat(int(name))) and int(stat[1]) == process:
            yield int(name)


def _began(process: int) -> str | None:
    """When ``process`` was started, in ticks since the system was; None: there is no such process."""
    stat = _stat(process)
    return stat[19] if stat else None


def _stat(process: int) -> list[str]:
    """What /proc knows of ``process``, from its state on."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


if __name__ == "__main__":
    main(sys.stdin)
