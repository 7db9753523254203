"""One message for all ranks: the rank that fails first reports why, and the others end without a report.

A rank that has failed cannot take part in collectives any more, and the others may wait for it forever, in a
collective or on the device. The failure is therefore written to the ``Board``, at the store where the ranks met.
Every rank reads it: the main thread when an error reaches ``main.py`` (``tell``, ``report``), and the thread of
``watchdog.py``, which ends a rank that cannot end by itself.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from training.distributed import collectives, launcher, once, process_group, rendezvous
from training.distributed.board import FAILED, NOTICED, PATIENCE, Board, Unreachable, within
from training.distributed.signals import end_undisturbed
from training.machine.shortage import shortage

_REFUSED = "refused"  # the refusal that rank 0 prints

_A_MOMENT = 2.0  # seconds to wait for the report of a rank whose end has been noticed
_LEAVE = 10.0  # seconds that a failed rank may take to leave the others

# What torch's DataLoader raises in the main thread.
_LOADER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([\w ]+)|exited)")
_ADVICE = {
    "Killed": "by a user, or because memory ran out; fewer --workers need less",
    "Bus error": "shared memory (/dev/shm) ran out; start the container with more (docker run --shm-size=16g), or "
    "use fewer --workers or --workers 0",
    "Terminated": "by a user or a launcher",
}


def run(program: Callable[[], int], *, interrupted: str) -> int:
    """The exit code of ``program``, which ranks may run together. What it fails with is told once.

    ``interrupted``: what is said after Ctrl-C. An unforeseen error of a single process is raised.
    """
    code = 1
    try:
        code = program()
    except ValueError as error:
        tell(error)
        code = 2
    except collectives.PeerFailed:
        notice()
    except KeyboardInterrupt:
        if launcher.rank() == 0:
            print(f"interrupted: {interrupted}", file=sys.stderr)
        code = 130
    except Exception as error:
        known = lost_loader(error) or shortage(error)
        if not (process_group.met() or known or launcher.launched()):
            raise
        report(error)
    finally:
        leave(code)
    return code


class LoaderEnded(RuntimeError):
    """A loader process has ended before its time. The message says how, and what can be done."""

    @classmethod
    def by(cls, process: int | None, exit_code: int) -> LoaderEnded:
        """``exit_code``: as multiprocessing has it, the negative number of a signal."""
        if exit_code >= 0:
            return cls(f"loader process {process} has ended by itself (code {exit_code}): see what it has printed")
        name = signal.strsignal(-exit_code) or str(-exit_code)
        return cls(
            f"loader process {process} was killed (signal: {name}): "
            f"{_ADVICE.get(name, 'by an error in a library that it uses, or by a user')}"
        )


def tell(error: ValueError) -> None:
    """Print the ``error`` with which this rank ends, unless another rank prints it.

    An error of all ranks is printed once: by rank 0 or, before the ranks have met, by the first rank of each node
    that gets here. If rank 0 does not print the same error within seconds, this rank prints its own.
    """
    rank = launcher.rank()
    line = f"error (rank {rank}): {error}" if rank else f"error: {error}"
    if not process_group.met():
        if isinstance(error, rendezvous.OwnRefusal):
            print(line, file=sys.stderr, flush=True)
        else:
            once.say(f"error: {error}")
        return
    end_undisturbed()
    board = None
    with suppress(Unreachable):
        board = Board()
        if rank == 0:
            board.put(_REFUSED, str(error))
        elif board.wait(_REFUSED, seconds=PATIENCE) and board.get(_REFUSED) == str(error):
            _notice(board)
            return
    print(line, file=sys.stderr, flush=True)
    with suppress(Unreachable):
        if board is not None:
            board.first(FAILED, f"rank {rank}: {error}")
            _notice(board)


def cause(error: BaseException) -> str | None:
    """How another rank failed, where ``error`` is only the consequence on this one. None if that is unknown."""
    if not collectives.lost_peer(error):
        return None
    try:
        board = Board()
        return board.get(FAILED) if board.wait(FAILED, seconds=_A_MOMENT) else None
    except Unreachable:
        return None


def lost_loader(error: Exception) -> str | None:
    """What happened to a loader process, where ``error`` is torch's report of its end. None: another error.

    The traceback of such an error shows where the main thread happened to be, which has nothing to do with it.
    """
    if isinstance(error, LoaderEnded):
        return str(error)
    found = _LOADER.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    processes, signal = found.groups()
    # torch does not always learn of the signal: then the process may have been killed or have failed.
    how = f"was killed (signal: {signal.strip()})" if signal else "has ended without a report to the trainer"
    advice = _ADVICE.get((signal or "").strip(), "killed, out of memory, or by an error that is printed above")
    return f"loader process {processes} {how}: {advice}"


def report(error: Exception) -> None:
    """Print why the run ends: ``error`` and its traceback, if this rank is the first to fail.

    If a rank or a loader process ended without a report, the first rank that notices it reports it. Every other
    rank prints one line. What the machine has run out of is told without a traceback.
    """
    end_undisturbed()
    rank, bystander = launcher.rank(), collectives.lost_peer(error)
    known = lost_loader(error) or shortage(error)
    own = f"rank {rank} failed: {type(error).__name__}: {error}"
    if bystander:
        own = (
            f"a rank has ended without a report, as rank {rank} noticed: it was killed or out of memory, or its "
            "machine is lost"
        )
    elif known:
        own = f"rank {rank} failed: {known}"
    board = None
    if not process_group.met():
        text = f"error: {own}\n" if known else "".join(traceback.format_exception(error))
        once.do(text, lambda: print(text, end="", file=sys.stderr, flush=True))
        return
    try:
        board = Board()
        if bystander:
            board.wait(FAILED, seconds=_A_MOMENT)
        first = board.first(FAILED, own) == own
    except Unreachable:
        first = not bystander
    if not first:
        print(
            f"rank {rank} ends because another rank has ended: that rank's message says why",
            file=sys.stderr,
            flush=True,
        )
    elif bystander or known:
        print(f"error: {own}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
        sys.stderr.flush()
    with suppress(Unreachable):
        if board is not None:
            _notice(board)


def notice() -> None:
    """This rank ends because of another rank's error, and confirms it: that rank need not wait for it."""
    end_undisturbed()
    with suppress(Unreachable):
        _notice(Board())


def leave(code: int) -> None:
    """Leave the other ranks. After a failure (``code`` not 0), end this process with ``code`` if that takes long.

    The other ranks may be in a collective that this rank has begun too and will not finish.
    """
    if code == 0 or not process_group.met():
        process_group.stop()
        return
    try:
        within(_LEAVE, process_group.stop)
    except TimeoutError:
        end(code)


def end(code: int) -> NoReturn:
    """End this process at once, whatever its threads are waiting for."""
    with suppress(TimeoutError):  # a thread that hangs may hold a lock that flushing needs
        within(1.0, lambda: (sys.stdout.flush(), sys.stderr.flush()))
    os._exit(code)


def _notice(board: Board) -> None:
    """Confirm on the board that this rank knows. The rank whose process holds the board waits for all others."""
    board.put(f"{NOTICED}/{launcher.rank()}", "")
    if process_group.hosts_store():
        board.wait(*(f"{NOTICED}/{rank}" for rank in range(process_group.world_size())), seconds=PATIENCE)
