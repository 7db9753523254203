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
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

from training.distributed import launcher, process_group
from training.distributed.signals import end_undisturbed

T = TypeVar("T")

# What the board holds.
FAILED = "failed"  # how the first rank failed
NOTICED = "noticed"  # /RANK: that rank knows of it
_REFUSED = "refused"  # the refusal that rank 0 tells

PATIENCE = 5.0  # seconds for an answer of the board, for rank 0 to speak first, for the others to notice
_A_MOMENT = 2.0  # seconds for the word of a rank whose end is already felt
_LEAVE = 10.0  # seconds for a rank that failed to part from the others

# What torch's DataLoader raises in the main thread, wherever that is.
_LOADER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([\w ]+)|exited)")
_ADVICE = {
    "Killed": "by hand, or as memory is short: fewer --workers need less",
    "Bus error": "as shared memory is short: raise its limit (/dev/shm), or use fewer --workers",
}


class Unreachable(RuntimeError):
    """The board does not answer. ``gone``: its process has ended. Else it may be stopped, or its machine lost."""

    def __init__(self, message: str, gone: bool) -> None:
        super().__init__(message)
        self.gone = gone


class Board:
    """Words at the store where the ranks met, over a connection of its own.

    No call takes longer than ``PATIENCE``, each may raise ``Unreachable``. A store whose process is stopped leaves
    callers waiting for good, whatever its time limit says; so each call has a thread, which is left behind then.
    """

    def __init__(self) -> None:
        self._lost: Unreachable | None = None
        self._store = self._ask(process_group.meeting_store)

    def put(self, key: str, text: str) -> None:
        self._ask(lambda: self._store.set(key, text))

    def first(self, key: str, text: str) -> str:
        """What ``key`` holds: the text of whoever came first, which is ``text`` where nobody had."""
        return self._ask(lambda: self._store.compare_set(key, "", text)).decode()

    def has(self, *keys: str) -> bool:
        """Whether all of ``keys`` hold something."""
        return self._ask(lambda: self._store.check(list(keys)))

    def get(self, key: str) -> str | None:
        return self._ask(lambda: self._store.get(key).decode() if self._store.check([key]) else None)

    def wait(self, *keys: str, seconds: float) -> bool:
        """Whether all of ``keys`` hold something, now or within ``seconds``."""
        deadline = time.monotonic() + seconds
        while not self.has(*keys):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _ask(self, question: Callable[[], T]) -> T:
        if self._lost is not None:
            raise self._lost
        try:
            return within(PATIENCE, question)
        except TimeoutError as error:
            self._lost = Unreachable(f"the store where the ranks met is silent: {error}", gone=False)
        except (RuntimeError, LookupError) as error:
            self._lost = Unreachable(f"the store where the ranks met is gone: {error}", gone=True)
        raise self._lost


def within(seconds: float, question: Callable[[], T]) -> T:
    """``question()``, whatever it raises included. TimeoutError: no answer yet; nobody waits for it any longer."""
    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append((True, question()))
        except Exception as error:
            answer.append((False, error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answer:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    succeeded, value = answer[0]
    if not succeeded:
        raise value
    return value


def tell(error: ValueError) -> None:
    """Print the ``error`` with which this rank ends, unless another rank does.

    What all ranks are refused for is told once: by rank 0, and before the ranks have met by the first one of each
    node. What rank 0 does not say as well within seconds is told by the rank that has it.
    """
    rank = launcher.rank()
    line = f"error (rank {rank}): {error}" if rank else f"error: {error}"
    if not process_group.met():
        if launcher.local_rank() == 0 or isinstance(error, process_group.OwnRefusal):
            print(line, file=sys.stderr)
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
    if not (isinstance(error, RuntimeError) and process_group.lost_peer(error)):
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
    rank, bystander, loader = launcher.rank(), process_group.lost_peer(error), lost_loader(error)
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
