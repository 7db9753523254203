"""Asked to stop: signals, how all ranks hear of them at the same step, and how the run goes on afterwards.

    with listen() as interrupts, Agreement() as agreement:
        for step in ...:
            ...
            stop, save = agreement.exchange(interrupts.wanted is not None, save_is_due)
            if save: ...                    # the same step on every rank
            if stop: break

Slurm and people signal one rank, some ranks or all of them, never all at the same step. A rank that saved on its
own signal would wait for others that go on. So the wishes travel with the steps, and each step brings those of the
step before: nobody waits for them, as an exchange has a whole step to arrive.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor

from training.distributed import collectives, launcher

log = logging.getLogger(__name__)

# Slurm's preemption and cancelling; its warning before a time limit (--signal=USR1@120); Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_PR_SET_PDEATHSIG = 1
_LAST_STEP = 60  # seconds for which a loader process goes on after a signal, for the step that is under way
_ONE_KEYPRESS = 0.5  # seconds in which a terminal and a launcher may both deliver the same Ctrl-C


class Interrupts:
    """What this process was asked by signals. ``wanted``: the first signal's name ('SIGTERM'), None before it."""

    def __init__(self) -> None:
        self.wanted: str | None = None
        self._first_ctrl_c: float | None = None

    def __call__(self, number: int, frame: FrameType | None = None) -> None:
        """The handler. KeyboardInterrupt: a second Ctrl-C, which asks to end here and now."""
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first_ctrl_c is None:
                self._first_ctrl_c = now
            elif now - self._first_ctrl_c > _ONE_KEYPRESS:
                raise KeyboardInterrupt
        if self.wanted is None:
            self.wanted = signal.Signals(number).name


@contextmanager
def listen() -> Iterator[Interrupts]:
    """Note SIGTERM, SIGUSR1 and SIGINT instead of dying of them, until the body ends.

    Python lets only the main thread handle signals: elsewhere nothing is changed and nothing will be noted.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = {number: signal.signal(number, interrupts) for number in SIGNALS}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_undisturbed() -> None:
    """This process is about to end by itself: Slurm and torchrun, which now end all ranks, need not help.

    So what it has to say is said, and its exit code is its own.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)


def leave_to_trainer() -> None:
    """In a loader process: what a launcher sends to all processes of a rank is the trainer's to act on.

    A second SIGTERM ends the process all the same: the trainer sends one to a loader that does not end by itself.
    So does time, where the first one was the trainer's, which then waits for it.
    """

    def wait(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(_LAST_STEP)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, wait)


def end_with_trainer() -> None:
    """In a loader process: end when the trainer is killed, at once and not seconds later.

    It has the trainer's connections open too, and the other ranks feel that it is gone when the last one closes.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Waitable(Protocol):
    """What a collective that was started returns."""

    def wait(self) -> bool: ...


class Agreement:
    """What any rank wishes, known to all ranks at the same step, one step later.

    All ranks call ``exchange`` equally often, and ``close`` (or leave the context) after the last one. No call
    waits for anything but an exchange that has had a whole step to arrive. It runs on the CPU: no device is asked.
    In a single process a wish is known at once.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, Waitable] | None = None

    def exchange(self, stop: bool, save: bool) -> tuple[bool, bool]:
        """This rank's wishes after a step; whether any rank wished to (stop, save) at the previous call.

        The first call returns (False, False), as nothing was wished before it; in a single process, and only
        there, each call returns its own wishes.
        """
        wishes = torch.tensor([stop, save], dtype=torch.uint8)
        answer = self.close()
        work = collectives.start_all_reduce_max(wishes)
        if work is None:
            return stop, save
        self._pending = wishes, work
        return answer

    def close(self) -> tuple[bool, bool]:
        """Wait for the exchange under way, so that none is left when the ranks part; its (stop, save)."""
        if self._pending is None:
            return False, False
        (wishes, work), self._pending = self._pending, None
        work.wait()
        stop, save = wishes.tolist()
        return bool(stop), bool(save)

    def __enter__(self) -> Agreement:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:  # with an error the others may never answer
            self.close()


def requeue(env: Mapping[str, str] = os.environ) -> bool:
    """Ask Slurm to queue this job again; whether it will. Where it cannot, the log says why, and what to do.

    All ranks call it together when all else is done, since Slurm then ends the job: from here on they leave its
    signals alone. A job that Slurm is ending already, as its user has cancelled it, stays ended. Outside of Slurm
    nothing is asked; ``notes.py`` has said so.
    """
    job = launcher.slurm_job(env)
    if job is None:
        return False
    end_undisturbed()
    return collectives.on_main(lambda: _requeue(job))


def _requeue(job: str) -> bool:
    try:
        state = _ask("squeue", "--noheader", "--jobs", job, "--format", "%T").strip()
        if state != "RUNNING":
            log.info(f"--requeue_on_preempt: job {job} is {state}, ended by its user or a limit: not queued again")
            return False
        _ask("scontrol", "requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        log.warning(
            f"--requeue_on_preempt: job {job} cannot be queued again ({reason}); submit it with --resume latest, "
            "and give sbatch --requeue so that it can be the next time"
        )
        return False
    log.info(f"Slurm has job {job} in its queue again; it goes on by itself")
    return True


def _ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
