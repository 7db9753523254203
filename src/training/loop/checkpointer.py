"""Decides after each step whether to save and whether to stop, and saves a run that was asked to stop.

All ranks decide the same at the same step. Step counts are equal on all ranks, and what only one rank knows (its
clock, a signal) is exchanged in an ``Agreement``.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

from training.checkpoint import catalog
from training.checkpoint.run_state import RunState
from training.checkpoint.saver import SaveFailed, Saver
from training.config.run import RunConfig
from training.distributed.collectives import PeerFailed, gather_object
from training.distributed.signals import Agreement, Interrupts
from training.distributed.watchdog import SAVE, Watchdog
from training.logger import RunLog
from training.loop.metrics import hold
from training.loop.trainer import Trainer

_REQUEUED = ("SIGTERM", "SIGUSR1")  # the signals that Slurm sends; after Ctrl-C a run is not queued again


class Checkpointer:
    """Keeps ``state`` up to date with ``trainer`` and saves it with ``saver``.

    ``stopped``: whether the run was asked to stop and stopped before its last step.
    """

    def __init__(
        self,
        config: RunConfig,
        trainer: Trainer,
        state: RunState,
        saver: Saver,
        interrupts: Interrupts,
        agreement: Agreement,
        watchdog: Watchdog,
    ) -> None:
        self.stopped = False
        self._asked = False
        self._config, self._trainer, self._state, self._saver = config, trainer, state, saver
        self._interrupts, self._agreement, self._watchdog = interrupts, agreement, watchdog
        self._every = 60 * config.save_every_minutes if config.save_every_minutes else math.inf
        self._restart_clock()

    def after_step(self) -> bool:
        """Save if a save is due. Returns whether the run must stop here."""
        trainer, n = self._trainer, self._config.save_every_n_steps
        overdue = trainer.world.is_main and not self._asked and time.monotonic() - self._saved >= self._every
        self._asked = self._asked or overdue
        stop, save = self._agreement.exchange(self._interrupts.wanted is not None, overdue)
        save = save or (n is not None and trainer.step % n == 0)
        self.stopped = stop and not trainer.finished
        at_boundary = trainer.step % trainer.data.steps_per_epoch == 0
        if save and not self.stopped and not trainer.finished and not (at_boundary and self._epoch_is_due()):
            self._save([f"step_{trainer.step}"])
        return self.stopped

    def after_epoch(self) -> None:
        """Save what the flags ask for after an epoch or at the end of the run."""
        self.capture()
        if self._saver.save_epoch(self._state, final=self._trainer.finished):
            self._restart_clock()

    def asked_to_stop(self) -> bool:
        """Whether a signal arrived since the last step, so that the run stops before a long evaluation.

        A launcher may kill the run before an evaluation ends.
        """
        before = self._agreement.exchange(self._interrupts.wanted is not None, False)
        after = self._agreement.exchange(False, False)  # returns the requests of the exchange before
        self.stopped = before[0] or after[0]
        self._asked = False  # a save that was asked for in these exchanges has not been made
        return self.stopped

    def leave(self, log: RunLog, folder: Path) -> bool:
        """Save a run that was asked to stop and log how to resume it. Returns whether Slurm must queue it again.

        If this save fails, the run can be resumed from an earlier checkpoint.
        """
        self.capture()
        if self._state.step != self._saved_step and (
            self._state.epoch_step or not self._saver.save_epoch(self._state, final=False)
        ):
            self._saver.save(self._state, [f"step_{self._trainer.step}"])
        saved = True
        try:
            self._saver.close()
        except (SaveFailed, PeerFailed):  # the saver has logged it
            saved = False
        signal = next(filter(None, gather_object(self._interrupts.wanted)), "")
        # What was just written is not read again: a large checkpoint takes longer than a launcher waits.
        latest = self._saver.committed if saved else None
        latest = latest or catalog.find_latest(folder)
        log.info(how_to_resume(signal, self._state.step, self._state.name, latest, saved=saved))
        return self._config.requeue_on_preempt and signal in _REQUEUED

    def capture(self) -> None:
        """Bring the state up to date. Collective."""
        trainer, state = self._trainer, self._state
        global_batch = self._config.batch_size * trainer.world.world_size
        state.samples_seen += (trainer.step - state.step) * global_batch
        state.step = trainer.step
        state.epoch, state.epoch_step = divmod(trainer.step, trainer.data.steps_per_epoch)
        state.stream = trainer.data.state_dict()
        state.meters = hold(trainer.meters) if state.epoch_step else {}
        state.skipped = trainer.stepper.skipped.state_dict()
        if state.compression is not None:
            state.compression.average()

    def _save(self, names: list[str]) -> None:
        with self._watchdog.paused(SAVE):  # it may have to wait for the save before
            self.capture()
            self._saver.save(self._state, names)
        self._restart_clock()

    def _restart_clock(self) -> None:
        """Measure the time to the next save from now on, and allow one new request for it.

        A request takes effect one step later, so it must not be repeated before.
        """
        self._saved, self._asked, self._saved_step = time.monotonic(), False, self._trainer.step

    def _epoch_is_due(self) -> bool:
        return self._saver.due(self._trainer.step // self._trainer.data.steps_per_epoch)


def how_to_resume(
    signal_name: str, step: int, name: str, checkpoint: str | os.PathLike[str] | None, *, saved: bool = True
) -> str:
    """The last log line of a run that was stopped after ``step`` steps: what was saved, and how to resume.

    ``signal_name``: ``Interrupts.wanted``, or '' if it is unknown. ``name``: the name of the run's folder.
    ``checkpoint``: the newest one; None if there is none. ``saved``: whether it holds all of the steps.
    """
    by = f" by {signal_name}" if signal_name else ""
    if checkpoint is None:
        return f"stopped{by} after {step} steps; nothing was saved: start the run again with the same command"
    if not saved:
        return (
            f"stopped{by} after {step} steps, the last of which could not be saved; resume from the newest "
            f"checkpoint, {os.fspath(checkpoint)}, with the same command and --name {name} --resume latest"
        )
    return (
        f"stopped{by} after {step} steps, which are saved in {os.fspath(checkpoint)}; resume with the same "
        f"command and --name {name} --resume latest"
    )
