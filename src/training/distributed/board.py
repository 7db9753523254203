"""A board that all ranks can read and write while they can take part in no collective: words at a store.

It is the store where the ranks met, over a connection of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from training.distributed import process_group

T = TypeVar("T")

# What the board holds.
FAILED = "failed"  # how the first rank failed
NOTICED = "noticed"  # /RANK: that rank knows of it

PATIENCE = 5.0  # seconds for an answer of the board, for rank 0 to speak first, for the others to notice


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
