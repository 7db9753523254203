"""The processes of a ``DataLoader``: the end of one is told in one way, whenever it comes; none is left behind.

When one of its processes ends, torch raises an error wherever the main thread happens to be: in a save, in a
library, in a destructor that swallows it. Here it is raised where the main thread asks for the next batch, and at
once if it waits there. Processes that are no longer needed are killed: they hold nothing that is worth a wait.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from types import FrameType
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from torch.utils.data import DataLoader

from training.distributed.failures import LoaderEnded, lost_loader
from training.distributed.signals import end_with_trainer, leave_to_trainer

T = TypeVar("T", covariant=True)

_TO_END = 0.5  # seconds in which processes may end by themselves
_A_MOMENT = 1.0  # seconds between what a process leaves behind (a broken connection) and its end
_SHORT = re.compile(r"(?s)(shared memory|/torch_|\bshm\b).*(No space left|Cannot allocate memory)")


class Loader(Generic[T]):
    """``loader``, whose processes are watched. Its ``worker_init_fn`` has to be ``start_worker``."""

    def __init__(self, loader: DataLoader[T]) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Batches[T]:
        return Batches(self._loader)


class Batches(Iterator[T]):
    """One pass over a ``DataLoader``, with processes of its own.

    LoaderEnded: a process was killed, or has ended by itself. ValueError: shared memory is too small. What a
    process raises is raised here too.
    """

    def __init__(self, loader: DataLoader[T]) -> None:
        before = set(multiprocessing.active_children())
        self._seen = _News.ended
        self._processes: list[BaseProcess] = []
        self._chunks: Iterator[T] = iter(())
        self._chunks = iter(loader)
        self._processes = [p for p in multiprocessing.active_children() if p not in before]
        self._handled = bool(self._processes) and threading.current_thread() is threading.main_thread()
        _open.add(self)
        if self._handled:
            signal.signal(signal.SIGCHLD, _on_child)  # torch has set its own

    def __next__(self) -> T:
        if not self._processes:
            return next(self._chunks)
        if self._handled:
            _News.waiting = self
        try:
            if _News.ended != self._seen:
                self.check()
            return next(self._chunks)
        except StopIteration:
            self._processes = []
            raise
        except Exception as error:
            failure = self._explained(error)
        finally:
            _News.waiting = None
        self.end()
        # Its frames hold the iterator of torch; where a process has failed stands in its text.
        raise failure.with_traceback(None)

    def check(self, seconds: float = 0.0) -> None:
        """LoaderEnded: one of the processes has ended, or does so within ``seconds``."""
        self._seen = _News.ended
        for process in self._processes:
            if seconds:
                process.join(seconds / len(self._processes))
            if process.exitcode:  # a process that has nothing more to do ends with 0
                raise LoaderEnded.by(process.pid, process.exitcode)

    def end(self) -> None:
        """End the processes: they are asked to, and killed if they are still there a moment later.

        torch's iterator asks in its destructor, and waits there for seconds or, if a process that held a lock was
        killed, for ever. So that runs in a thread, which nothing waits for.
        """
        processes, self._processes = self._processes, []
        chunks, self._chunks = [self._chunks], iter(())
        if not processes:
            return
        asking = threading.Thread(target=chunks.clear, daemon=True)
        with suppress(RuntimeError):  # the interpreter ends, or no thread can be started
            asking.start()
            asking.join(_TO_END)
        for process in processes:
            process.kill()

    def __del__(self) -> None:
        self.end()

    def _explained(self, error: Exception) -> Exception:
        """The error to raise in place of ``error``."""
        if isinstance(error, LoaderEnded):
            return error
        if _SHORT.search(str(error)):
            return ValueError(shared_memory_is_short(len(self._processes)))
        if "in DataLoader worker process" in str(error):
            return error  # raised by a process, which is still there
        try:
            self.check(_A_MOMENT)
        except LoaderEnded as ended:
            return ended
        told = lost_loader(error)
        return error if told is None else LoaderEnded(told)


class _News:
    """What the handler of SIGCHLD and the main thread tell each other."""

    waiting: Batches[object] | None = None  # the pass whose next batch the main thread waits for
    ended = 0  # how often a child process has ended


_open: WeakSet[Batches[Any]] = WeakSet()


def _on_child(number: int, frame: FrameType | None) -> None:
    """The handler of SIGCHLD. LoaderEnded: of the pass that the main thread waits for."""
    _News.ended += 1
    if _News.waiting is not None:
        _News.waiting.check()


@atexit.register
def _end_all() -> None:
    """At exit, before multiprocessing asks them by a signal, which they ignore, and waits for them."""
    for batches in list(_open):
        batches.end()


def start_method(workers: int) -> str | None:
    """How ``workers`` loader processes are started; None: there are none, or the system decides.

    By fork, on Linux: a server that starts them, Python 3.14's default there, would die of the signals by which a
    launcher asks a rank to save and stop, and they with it.
    """
    return "fork" if workers and sys.platform == "linux" else None


def start_worker(_: int) -> None:
    """The beginning of a loader process."""
    leave_to_trainer()
    end_with_trainer()
    for number in (signal.SIGCHLD, signal.SIGBUS, signal.SIGSEGV):
        signal.signal(number, signal.SIG_DFL)  # the trainer tells it; torch's handler would print the same
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process per core already
    Queue._on_queue_feeder_error = staticmethod(_end_unsent)  # type: ignore[attr-defined]


def _end_unsent(error: Exception, what: object) -> None:
    """End the process, whose batch cannot be sent: the trainer would wait for it."""
    if isinstance(error, OSError) or _SHORT.search(str(error)):
        os.write(2, f"error: a loader process cannot hand over a batch: {error}\n".encode())
    else:
        import traceback

        os.write(2, "".join(traceback.format_exception(error)).encode())
    os._exit(1)


def shared_memory_is_short(processes: int, needed: int = 0) -> str:
    """What to do where /dev/shm cannot hold the batches, ``needed`` bytes, of ``processes`` loader processes."""
    size = shared_memory()
    has = "" if size is None else f" ({size / 2**20:,.0f} MB)"
    need = f", which need at least {needed / 2**20:,.0f} MB" if needed else ""
    return (
        f"--workers {processes}: /dev/shm{has} has too little room for the batches of the loader processes{need}: "
        "start the container with more of it (docker run --shm-size=16g or --ipc=host), or give fewer "
        "--workers, or --workers 0"
    )


def shared_memory() -> int | None:
    """The size of this machine's shared memory in bytes; None: not known."""
    with suppress(OSError, AttributeError):
        found = os.statvfs("/dev/shm")
        return found.f_blocks * found.f_frsize
    return None
