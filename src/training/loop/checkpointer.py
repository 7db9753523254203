"""After each step: is it time to save, was the run asked to stop? And what a run that stops leaves behind.

All ranks decide alike at the same step: step counts are the same everywhere, and what only one of them knows (its
clock, a signal) goes through an ``Agreement``.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
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

_REQUEUED = ("SIGTERM", "SIGUSR1")  # Slurm's; who presses Ctrl-C wants the run to end


class Checkpointer:
    """Keeps ``state`` up to date with ``trainer`` and has ``saver`` save it.

    ``stopped``: the run was asked to stop and did, with steps left to take.
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
        self._note_save()

    def after_step(self) -> bool:
        """Save where it is time to; whether the run is to stop here."""
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
        """Save what the flags ask for after an epoch, or at the run's end."""
        self.capture()
        if self._saver.save_epoch(self._state, final=self._trainer.finished):
            self._note_save()

    def asked_to_stop(self) -> bool:
        """Whether a signal came since the last step: evaluation may take longer than a launcher's patience."""
        before = self._agreement.exchange(self._interrupts.wanted is not None, False)
        after = self._agreement.exchange(False, False)  # brings what was wished just now
        self.stopped = before[0] or after[0]
        return self.stopped

    def leave(self, log: RunLog, folder: Path) -> bool:
        """Save a run that was asked to stop, and say how it goes on. Whether Slurm is to queue it again.

        Where that save fails, the run goes on from an earlier one.
        """
        self.capture()
        if self._state.step != self._saved_step and (
            self._state.epoch_step or not self._saver.save_epoch(self._state, final=False)
        ):
            self._saver.save(self._state, [f"step_{self._trainer.step}"])
        with suppress(SaveFailed, PeerFailed):  # told already
            self._saver.close()
        signal = next(filter(None, gather_object(self._interrupts.wanted)), "")
        log.info(how_to_resume(signal, self._state.step, self._state.name, catalog.find_latest(folder)))
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

    def _save(self, names: list[str]) -> None:
        with self._watchdog.paused(SAVE):  # the save before may take its time
            self.capture()
            self._saver.save(self._state, names)
        self._note_save()

    def _note_save(self) -> None:
        """The clock starts again; a wish is made once, as it comes back a step later."""
        self._saved, self._asked, self._saved_step = time.monotonic(), False, self._trainer.step

    def _epoch_is_due(self) -> bool:
        return self._saver.due(self._trainer.step // self._trainer.data.steps_per_epoch)


def how_to_resume(signal_name: str, step: int, name: str, checkpoint: str | os.PathLike[str] | None) -> str:
    """The last line of a run that was stopped after ``step`` steps: what is saved, and how to go on with it.

    ``signal_name``: ``Interrupts.wanted``, or '' where another rank was signalled. ``name``: the run's folder.
    ``checkpoint``: None where nothing was saved.
    """
    by = f" by {signal_name}" if signal_name else ""
    if checkpoint is None:
        return f"stopped{by} after {step} steps; nothing was saved: start again with the same command"
    return (
        f"stopped{by} after {step} steps, all of it saved in {os.fspath(checkpoint)}; go on with the same command "
        f"and --name {name} --resume latest"
    )
