"""Signals that stop a run: how all ranks learn of them at the same step, and how the job is queued again.

    with listen() as interrupts, Agreement() as agreement:
        for step in ...:
            ...
            stop, save = agreement.exchange(interrupts.wanted is not None, save_is_due)
            if save: ...                    # the same step on every rank
            if stop: break

Slurm and users send signals to one rank, to some or to all of them, never to all at the same step. A rank that
saved at its own signal would wait for others that continue to train. So the ranks exchange what they ask for after
every step, and act on the answers one step later: no rank waits, as an exchange has a whole step to complete.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor

from training.distributed import collectives, launcher, once

log = logging.getLogger(__name__)

# Slurm's preemption and cancelling; its warning before a time limit (--signal=USR1@120); a terminal or connection
# that is gone; Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_PR_SET_PDEATHSIG = 1
_ONE_KEYPRESS = 0.5  # seconds in which a terminal and a launcher may both deliver the same Ctrl-C


class Interrupts:
    """The signals that this process received. ``wanted``: the first one's name ('SIGTERM'), None before it."""

    def __init__(self) -> None:
        self.wanted: str | None = None
        self._first_ctrl_c: float | None = None

    def __call__(self, number: int, frame: FrameType | None = None) -> None:
        """The handler. KeyboardInterrupt: a second Ctrl-C, which ends the process at once."""
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first_ctrl_c is None:
                self._first_ctrl_c = now
            elif now - self._first_ctrl_c > _ONE_KEYPRESS:
                raise KeyboardInterrupt
        if self.wanted is None:
            self.wanted = signal.Signals(number).name
            # In a thread: the main thread may be in the middle of a log line. RuntimeError: there can be no more.
            with suppress(RuntimeError):
                threading.Thread(target=self._tell, args=(self.wanted,), daemon=True).start()

    @staticmethod
    def _tell(name: str) -> None:
        """Say at once that the signal has been heard: the step may take long, or stall."""
        again = "; a second Ctrl-C ends it at once, without saving" if name == "SIGINT" else ""
        line = f"{name}: the run saves and stops as soon as the current step, save or evaluation is over{again}"
        once.do(line, lambda: log.warning(line))


@contextmanager
def listen() -> Iterator[Interrupts]:
    """Record ``SIGNALS`` instead of ending at once, until the body ends. SIGHUP stays ignored under nohup.

    Python lets only the main thread handle signals: in another thread nothing is changed and nothing is recorded.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    heard = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupts) for number in heard}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_undisturbed() -> None:
    """Ignore the signals by which Slurm and torchrun now end all ranks: this process is about to end by itself.

    So its messages are printed completely, and its exit code is its own.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)


def leave_to_trainer() -> None:
    """In a loader process: leave the signals that a launcher sends to all processes of a rank to the trainer.

    It kills its loader processes when it needs them no longer.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_with_trainer() -> None:
    """In a loader process, which the trainer has forked: end when it is killed, at once and not seconds later.

    It has the trainer's connections open too, and other ranks notice the trainer's end when the last one closes.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        trainer = multiprocessing.parent_process()
        if trainer is not None and os.getppid() != trainer.pid:  # it has ended before
            os.kill(os.getpid(), signal.SIGKILL)


class Waitable(Protocol):
    """The handle of a collective that was started."""

    def wait(self) -> bool: ...


class Agreement:
    """What any rank asks for, learned by every rank at the same step, one step after the request.

    All ranks call ``exchange`` equally often, and ``close`` (or leave the context) after the last call. A call
    waits only for an exchange that has had a whole step to complete. It runs on the CPU, without the device.
    In a single process a request is answered at once.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, Waitable] | None = None

    def exchange(self, stop: bool, save: bool) -> tuple[bool, bool]:
        """Send this rank's requests after a step; whether any rank asked to (stop, save) at the previous call.

        The first call returns (False, False), as there was no request before it; in a single process, and only
        there, each call returns its own requests.
        """
        requests = torch.tensor([stop, save], dtype=torch.uint8)
        answer = self.close()
        work = collectives.start_all_reduce_max(requests)
        if work is None:
            return stop, save
        self._pending = requests, work
        return answer

    def close(self) -> tuple[bool, bool]:
        """Wait for the exchange in progress, so that none is left when the ranks part; its (stop, save)."""
        if self._pending is None:
            return False, False
        (requests, work), self._pending = self._pending, None
        work.wait()
        stop, save = requests.tolist()
        return bool(stop), bool(save)

    def __enter__(self) -> Agreement:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:  # after an error the others may never answer
            self.close()


def requeue(env: Mapping[str, str] = os.environ) -> bool:
    """Ask Slurm to queue this job again; returns whether it will. If it cannot, the log says why, and what to do.

    All ranks call it together when everything else is done, because Slurm then ends the job: from here on they
    ignore its signals. A job that Slurm is already ending, because its user cancelled it, is not queued again.
    Outside of Slurm nothing is asked; a remark (``config.run``) has been logged.
    """
    job = launcher.slurm_job_alone(env)
    if job is None:
        return False
    end_undisturbed()
    return collectives.on_main(lambda: _requeue(job))


def _requeue(job: str) -> bool:
    try:
        state = _ask("squeue", "--noheader", "--jobs", job, "--format", "%T").strip()
        if state != "RUNNING":
            log.info(
                f"--requeue_on_preempt: job {job} is {state} (ended by its user or a limit) and not queued again"
            )
            return False
        _ask("scontrol", "requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        log.warning(
            f"--requeue_on_preempt: job {job} cannot be queued again ({reason}); submit it with --resume latest, "
            "and give sbatch --requeue so that the next job can be queued again"
        )
        return False
    log.info(f"Slurm has put job {job} back into its queue; it will resume by itself")
    return True


def _ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
