"""A thread beside the training loop that ends the run when the loop no longer can.

    with Watchdog(world, timeout) as watchdog:
        for step in ...:
            watchdog.beat(step)              # a step begins
            ...
        with watchdog.paused():              # evaluating: no steps for a while
            ...

**A rank hangs.** It waits for a file system, a lock or a device, and all others wait for it in a collective. When
no step begins for ``timeout`` seconds, every rank whose threads still run writes to the board (``board.py``) at
which step and at which lines its main thread is. The first rank that is alive reports. Ranks that wait in a
collective are victims: the report names every rank that does not wait in one, and every rank that does not answer
because it is stopped or its machine is lost. Then all ranks end with the exit code ``HUNG``, so that torchrun or
Slurm can start them again.

A launch's first step, with compilation and the start of the loader, may take ``FIRST`` times as long, and a save
``SAVE`` times. There is no limit between the start and the first beat, nor in a pause without a limit. Time in
which the whole process was stopped (as when Slurm suspends a job) does not count.

**A rank has failed** and has written so on the board. Others would continue to wait for it in a collective or on
the device; their watchdogs end them, also before the first step begins.

No call from the loop waits, and nothing here touches the device.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path

from training.distributed import failures
from training.distributed.board import FAILED, NOTICED, PATIENCE, Board, Unreachable, within
from training.distributed.collectives import barrier
from training.distributed.process_group import World

log = logging.getLogger(__name__)

HUNG = 124  # exit code, as timeout(1) has it
FIRST, SAVE = 4.0, 4.0  # limits of the first step and of a save, in timeouts
_POLL = 2.0  # seconds between checks
_GRACE = 3.0  # seconds for the main thread of a bystander to end by itself

_SRC = Path(__file__).resolve().parents[2]
_HUNG, _STATUS, _REPORTED = "hung", "status", "reported"
# Where a main thread waits for other ranks: frames of these files, and the backward pass that DDP waits in.
_WAITING = ("torch/distributed/", "training/distributed/", "drrho_clip/collectives.py")
_BACKWARD = "_engine_run_backward"
# Collectives of GPUs are waited for where the host next reads from the GPU.
_READ = re.compile(r"\.(item|tolist|cpu|numpy|synchronize)\(|\b(bool|float|int)\(")
_SHOWN = 4  # ranks named one by one
_END = "the run ends: %s"


class Watchdog:
    """Watches the thread that creates it. ``timeout``: seconds; 0: failures are noticed, and hangs are not.

    All ranks enter the context, and leave it together. ``first``: limit of a launch's first step, in timeouts.
    """

    def __init__(self, world: World, timeout: float, *, first: float = FIRST) -> None:
        self._world, self._timeout, self._first = world, timeout, first
        self._poll = min(_POLL, timeout / 4) if timeout else _POLL
        self._main = threading.get_ident()
        self._step = -1
        self._beats = self._turns = 0
        self._limit = 1.0  # of the current step or pause, in timeouts
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._board: Board | None = None

    def beat(self, step: int) -> None:
        """Step ``step`` begins."""
        self._step = step
        self._beats += 1

    @contextmanager
    def paused(self, limit: float = math.inf) -> Iterator[None]:
        """No step is expected to begin during the body, which may take ``limit`` timeouts."""
        before, self._limit = self._limit, limit
        self._turns += 1
        try:
            yield
        finally:
            self._limit = before
            self._turns += 1

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *_: object) -> None:
        if error is None:
            # All leave together: the store may end with rank 0, and another rank's watchdog would take that for
            # a failure.
            barrier()
        self._stopped.set()
        if error is not None and self._world.is_main and (cause := failures.cause(error)):
            log.error(_END, cause)  # otherwise the run's log has only this rank's error
        self._thread.join(PATIENCE)

    # ------------------------------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        seen, idle, last = (0, 0), 0.0, time.monotonic()
        while not self._stopped.wait(self._poll):
            idle, last = idle + _counted(last, 2 * self._poll), time.monotonic()
            failed, hung = self._read() if self._world.distributed else (None, False)
            idle, last = idle + _counted(last, 2 * PATIENCE), time.monotonic()
            now = self._beats, self._turns
            if now != seen or not self._beats:
                seen, idle = now, 0.0
            limit = self._timeout and self._timeout * max(self._limit, self._first * (self._beats == 1))
            if failed:
                return self._end_as_bystander(failed)
            if hung or 0 < limit < idle:
                return self._end_hung(idle)

    def _read(self) -> tuple[str | None, bool]:
        """How a rank has failed, and whether one has noticed a hang."""
        board, self._board = self._board, None
        try:
            self._board = board or Board()
            return self._board.get(FAILED), self._board.has(_HUNG)
        except Unreachable as error:
            if board is None or not error.gone:
                return None, False  # unknown; a step that takes too long will show it
        try:
            self._board = Board()  # tells a broken connection from a board that is gone
        except Unreachable as error:
            return str(error), False
        return None, False

    def _end_as_bystander(self, failed: str) -> None:
        """End, unless the main thread does. The rank that failed has reported ``failed`` itself."""
        with suppress(Unreachable):
            if self._board is not None:
                self._board.put(f"{NOTICED}/{self._world.rank}", "")
        if self._stopped.wait(_GRACE):
            return
        if self._world.is_main:
            _say(_END % failed)
        failures.end(1)

    def _end_hung(self, idle: float) -> None:
        """Report together with the other ranks that still can, and end."""
        status = Status.of(self._main, self._step, idle, on_gpu=self._world.device.type == "cuda")
        if self._world.distributed:
            try:
                self._report(Board() if self._board is None else self._board, status)
            except Unreachable as error:
                # Which ranks are still there is not known. One rank of each node, or two, report what they know.
                if self._world.is_local_main or self._world.rank == 1:
                    whose = "the store belongs to rank 0 or its launcher"
                    _say(f"no step for {idle:.0f} s, and {error}; {whose}\n{status}")
        else:
            _say(f"no step for {idle:.0f} s; the process ends with code {HUNG}\n{status}")
        if not self._stopped.is_set():  # else the main thread has left the hang with an error of its own
            failures.end(HUNG)

    def _report(self, board: Board, status: Status) -> None:
        rank, keys = self._world.rank, [f"{_STATUS}/{r}" for r in range(self._world.world_size)]
        board.put(_HUNG, "")
        board.put(keys[rank], status.dumps())
        if rank == 0:
            board.wait(*keys, seconds=PATIENCE)
        elif board.wait(_REPORTED, seconds=PATIENCE + 1):
            return
        elif any(board.has(key) for key in keys[:rank]):
            board.wait(_REPORTED, seconds=PATIENCE)
            return
        held = {r: board.get(key) for r, key in enumerate(keys)}
        _say(describe({r: Status.loads(text) if text else None for r, text in held.items()}))
        board.put(_REPORTED, "")


@dataclass(frozen=True)
class Status:
    """Where a rank is. ``frames``: (file, line, function, code) of its main thread, the innermost last."""

    step: int
    idle: float
    host: str
    process: int
    waits: bool
    frames: tuple[tuple[str, int, str, str], ...]

    @classmethod
    def of(cls, thread: int, step: int, idle: float, *, on_gpu: bool) -> Status:
        """The status of this process, whose main thread has the identifier ``thread``."""
        frame = sys._current_frames().get(thread)
        stack = [(f.filename, f.lineno or 0, f.name, f.line or "") for f in traceback.extract_stack(frame)]
        return cls(step, idle, socket.gethostname(), os.getpid(), _waits(stack, on_gpu), _excerpt(stack))

    def dumps(self) -> str:
        return json.dumps(astuple(self))

    @classmethod
    def loads(cls, text: str) -> Status:
        step, idle, host, process, waits, frames = json.loads(text)
        stack = tuple((file, line, function, code) for file, line, function, code in frames)
        return cls(step, idle, host, process, waits, stack)

    @property
    def place(self) -> str:
        """The innermost line of this code that does not wait for other ranks; else the innermost line of all."""
        ours = [f for f in self.frames if _is_own_code(f[0]) and not _is_of(f[0], _WAITING)]
        file, line, function, _ = (ours or self.frames)[-1]
        return f"{function} ({Path(file).name}:{line})"

    def __str__(self) -> str:
        stack = traceback.StackSummary.from_list(self.frames)
        return f"step {self.step}, host {self.host}, process {self.process}\n{''.join(stack.format())}".rstrip()


def describe(ranks: Mapping[int, Status | None]) -> str:
    """The report when no step begins any more: which ranks hang, and where. None: that rank does not answer."""
    known = {rank: status for rank, status in ranks.items() if status is not None}
    silent = [rank for rank in ranks if rank not in known]
    busy = [rank for rank, status in known.items() if not status.waits]
    behind = min(status.step for status in known.values())
    late = [rank for rank, status in known.items() if status.step == behind]
    if not (silent or busy or len(late) == len(known)):
        busy = late  # all wait, and these are at an earlier step than the others
    parts = [f"no step for {max(status.idle for status in known.values()):.0f} s"]
    if silent:
        parts.append(
            f"{_ranks(silent)} {'does' if len(silent) == 1 else 'do'} not answer: stopped, or the machine is lost"
        )
    if busy:
        parts.append(f"{_ranks(busy)} {'hangs' if len(busy) == 1 else 'hang'} in {known[busy[0]].place}")
    waiting = [rank for rank in known if rank not in busy]
    if waiting:
        parts.append(f"{_ranks(waiting)} {'waits' if len(waiting) == 1 else 'wait'} in {known[waiting[0]].place}")
    lines = ["; ".join(parts), f"all ranks end with code {HUNG}"]
    lines += [f"rank {rank}, {known[rank]}" for rank in (*busy[:_SHOWN], *waiting[:1])]
    return "\n".join(lines)


def _ranks(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}{more}"


def _waits(stack: Sequence[tuple[str, int, str, str]], on_gpu: bool) -> bool:
    """Whether the innermost frame of this code or of a collective is one that waits for other ranks.

    ``on_gpu``: a read from the GPU is one too.
    """
    for file, _, function, code in reversed(stack):
        if function == _BACKWARD or _is_of(file, _WAITING):
            return True
        if _is_own_code(file):
            return on_gpu and _READ.search(code) is not None
    return False


def _excerpt(stack: Sequence[tuple[str, int, str, str]]) -> tuple[tuple[str, int, str, str], ...]:
    """The innermost frames of this code, and the innermost frames of all."""
    ours = [i for i, frame in enumerate(stack) if _is_own_code(frame[0])][-4:]
    last = range(max(len(stack) - 3, 0), len(stack))
    return tuple(stack[i] for i in sorted({*ours, *last}))


def _is_of(file: str, parts: Sequence[str]) -> bool:
    return any(part in file for part in parts)


def _is_own_code(file: str) -> bool:
    return file.startswith(str(_SRC))


def _counted(since: float, most: float) -> float:
    """Seconds since ``since``, at most ``most``: a longer time means that the process was stopped."""
    return min(time.monotonic() - since, most)


def _say(text: str) -> None:
    try:
        within(2.0, lambda: log.error(text))
    except TimeoutError:  # the main thread hangs while it writes to the log
        os.write(2, f"{text}\n".encode())
