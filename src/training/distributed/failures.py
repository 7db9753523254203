"""One message for all ranks: who failed first says why, the others end without a word of their own.

A rank that fails can take part in no collective any more, and the others may wait for it in one, or on the device,
for ever. So what has gone wrong is written to the store where the ranks met, the ``Board``. Every rank reads it:
the main thread when an error reaches ``main.py`` (``tell``, ``report``), and beside it the thread of
``watchdog.py``, which ends a rank that cannot end by itself.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from contextlib import suppress
from typing import NoReturn

from training.distributed import collectives, launcher, process_group
from training.distributed.board import FAILED, NOTICED, PATIENCE, Board, Unreachable, within
from training.distributed.signals import end_undisturbed

_REFUSED = "refused"  # the refusal that rank 0 tells

_A_MOMENT = 2.0  # seconds for the word of a rank whose end is already felt
_LEAVE = 10.0  # seconds for a rank that failed to part from the others

# What torch's DataLoader raises in the main thread, wherever that is.
_LOADER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([\w ]+)|exited)")
_ADVICE = {
    "Killed": "by hand, or as memory is short: fewer --workers need less",
    "Bus error": "as shared memory is short: raise its limit (/dev/shm), or use fewer --workers",
}


def tell(error: ValueError) -> None:
    """Print the ``error`` with which this rank ends, unless another rank does.

    What all ranks are refused for is told once: by rank 0, and before the ranks have met by the first one of each
    node that comes to it. What rank 0 does not say as well within seconds is told by the rank that has it.
    """
    rank = launcher.rank()
    line = f"error (rank {rank}): {error}" if rank else f"error: {error}"
    if not process_group.met():
        if isinstance(error, process_group.OwnRefusal):
            print(line, file=sys.stderr, flush=True)
        else:
            launcher.say_once(f"error: {error}")
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
    """How another rank has failed, where ``error`` is only what this one feels of it. None: that is not known."""
    if not (isinstance(error, RuntimeError) and collectives.lost_peer(error)):
        return None
    try:
        board = Board()
        return board.get(FAILED) if board.wait(FAILED, seconds=_A_MOMENT) else None
    except Unreachable:
        return None


def lost_loader(error: Exception) -> str | None:
    """What has become of a loader process, where ``error`` is torch's word of its end. None: it is another one.

    Its traceback says where the main thread happened to be, which has nothing to do with it.
    """
    found = _LOADER.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    processes, signal = found.groups()
    # torch does not always learn of the signal: then the process may have been killed or have failed.
    how = f"was killed (signal: {signal.strip()})" if signal else "has ended without a word to the trainer"
    advice = _ADVICE.get((signal or "").strip(), "killed, short of memory, or by an error that is told above")
    return f"loader process {processes} {how}, {advice}"


def report(error: Exception) -> None:
    """Say why the ranks end, which have met: ``error`` and its traceback, where this rank is the first that fails.

    Where a rank or a loader process ended without a word, the first one to feel it says so. Every other rank has
    one line.
    """
    end_undisturbed()
    rank, bystander, loader = launcher.rank(), collectives.lost_peer(error), lost_loader(error)
    own = f"rank {rank} failed: {type(error).__name__}: {error}"
    if bystander:
        own = (
            f"a rank has ended without a word, as rank {rank} felt: killed, out of memory, or its machine is lost"
        )
    elif loader:
        own = f"rank {rank} failed: {loader}"
    board = None
    try:
        board = Board()
        if bystander:
            board.wait(FAILED, seconds=_A_MOMENT)
        first = board.first(FAILED, own) == own
    except Unreachable:
        first = not bystander
    if not first:
        print(f"rank {rank} ends, since another rank has: its own message says why", file=sys.stderr, flush=True)
    elif bystander or loader:
        print(f"error: {own}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
        sys.stderr.flush()
    with suppress(Unreachable):
        if board is not None:
            _notice(board)


def notice() -> None:
    """This rank ends as another one's error has reached it; that one need not wait for it any longer."""
    end_undisturbed()
    with suppress(Unreachable):
        _notice(Board())


def part(code: int) -> None:
    """Leave the other ranks; after a failure (``code`` other than 0) this process ends with it if that takes long.

    They may be in a collective that this rank began too and will not finish.
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
    with suppress(TimeoutError):  # a thread that hangs may hold what flushing needs
        within(1.0, lambda: (sys.stdout.flush(), sys.stderr.flush()))
    os._exit(code)


def _notice(board: Board) -> None:
    """Sign for what the board says. The rank whose process holds the board stays until all others have."""
    board.put(f"{NOTICED}/{launcher.rank()}", "")
    if process_group.hosts_store():
        board.wait(*(f"{NOTICED}/{rank}" for rank in range(process_group.world_size())), seconds=PATIENCE)
