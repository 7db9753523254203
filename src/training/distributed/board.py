"""The board: a key-value store that all ranks can read and write, even when they cannot take part in collectives.

It is the rendezvous store where the ranks met, over a separate connection.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from training.distributed import rendezvous

T = TypeVar("T")

# What the board holds.
FAILED = "failed"  # how the first rank failed
NOTICED = "noticed"  # /RANK: that rank knows of it

PATIENCE = 5.0  # seconds for an answer of the board, for rank 0 to report first, for the others to confirm


class Unreachable(RuntimeError):
    """The board does not answer. ``gone``: its process has ended; else it may be stopped, or its machine lost."""

    def __init__(self, message: str, gone: bool) -> None:
        super().__init__(message)
        self.gone = gone


class Board:
    """Entries (key -> text) in the store where the ranks met, over a separate connection.

    No call takes longer than ``PATIENCE``, and each may raise ``Unreachable``. If the store's process is stopped,
    its client waits forever, whatever its timeout; each call therefore runs in a thread, which is then abandoned.
    """

    def __init__(self) -> None:
        self._lost: Unreachable | None = None
        self._store = self._ask(rendezvous.reconnect)

    def put(self, key: str, text: str) -> None:
        self._ask(lambda: self._store.set(key, text))

    def first(self, key: str, text: str) -> str:
        """The text of ``key``, which is ``text`` unless a rank has written another one before."""
        return self._ask(lambda: self._store.compare_set(key, "", text)).decode()

    def has(self, *keys: str) -> bool:
        """Whether all of ``keys`` have an entry."""
        return self._ask(lambda: self._store.check(list(keys)))

    def get(self, key: str) -> str | None:
        """The text of ``key``; None where it has no entry."""
        return self._ask(lambda: self._store.get(key).decode() if self._store.check([key]) else None)

    def wait(self, *keys: str, seconds: float) -> bool:
        """Whether all of ``keys`` have an entry, now or within ``seconds``."""
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
            self._lost = Unreachable(f"the store where the ranks met does not answer: {error}", gone=False)
        except (RuntimeError, LookupError) as error:
            self._lost = Unreachable(f"the store where the ranks met is gone: {error}", gone=True)
        raise self._lost


def within(seconds: float, question: Callable[[], T]) -> T:
    """What ``question()`` returns or raises. TimeoutError: it took too long, and the caller stops waiting."""
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
