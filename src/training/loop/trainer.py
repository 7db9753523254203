"""The loop over one epoch: set the learning rates, take a step, and log from time to time.

Between two log lines nothing here waits for the device, because the meters add up on the device, unless steps are
skipped (``nonfinite``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from drrho_clip.batch import Batch
from drrho_clip.schedules import Horizon
from training.data.loader import TrainData
from training.distributed.process_group import World
from training.logger import RunLog
from training.loop.flops import Utilization
from training.loop.learning_rates import LearningRates
from training.loop.metrics import EpochSpeed, Meter, TrainStatus, epoch_line, read, report
from training.loop.profiler import Profiler
from training.loop.speed_monitor import DataWait, StepTimes
from training.loop.step import Stepper


@dataclass
class Trainer:
    """The training loop of a run.

    ``step``     counts optimizer steps from the start of the run, which ends at ``horizon.end_step``.
    ``meters``   add up over the current epoch. A run that resumes inside an epoch starts with its checkpoint's
                 meters.
    ``settled``  whether the gradient buckets have their final order (``Stepper.settle``).
    """

    stepper: Stepper
    rates: LearningRates
    data: TrainData
    horizon: Horizon
    world: World
    log: RunLog
    profiler: Profiler
    data_wait: DataWait
    utilization: Utilization
    log_every: int = 100
    step: int = 0
    meters: dict[str, Meter] = field(default_factory=dict)
    settled: bool = False

    @property
    def finished(self) -> bool:
        """Whether this run has taken all its steps."""
        return self.step >= self.horizon.end_step

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to."""
        return self.step // self.data.steps_per_epoch

    def train_epoch(self, after_step: Callable[[], bool]) -> None:
        """Train from ``step`` to the end of its epoch, or to the end of the run if that comes first.

        ``after_step`` is called after each step. If it returns True, the loop stops after that step.
        """
        epoch, per_epoch = self.epoch, self.data.steps_per_epoch
        stop = min((epoch + 1) * per_epoch, self.horizon.end_step)
        task = self.stepper.task
        task.model.train()
        task.loss.set_epoch(epoch)
        begun = self.step - epoch * per_epoch
        if begun == 0:
            self.meters = {}
        window, speed = StepTimes(first=True), EpochSpeed()
        with self.log.progress(stop - self.step, f"epoch {epoch}", unit="step", every=math.inf) as progress:
            for batch in islice(self.data.epoch(epoch, begun), stop - self.step):
                window.loaded()
                if not self.settled:
                    self.stepper.settle(batch, self.step)
                    self.settled = True
                self.rates.set(self.step, (-task.logit_scale.detach()).exp())
                task.loss.set_temperature_rate(self.rates.lr_tau)
                task.loss.set_progress(self.step / self.horizon.total_steps)
                values = self.stepper(batch, self.step)
                values["logit_scale"] = task.logit_scale.detach().exp()
                for name, value in values.items():
                    self.meters.setdefault(name, Meter()).update(value, len(batch))
                self.step += 1
                speed.samples += len(batch)
                self.profiler.step()
                progress.update()
                window.stepped()
                done = self.step - epoch * per_epoch
                if (done - 1) % self.log_every == 0 or self.step == stop:
                    self._report(epoch, done, batch, window)
                    window = StepTimes()
                if self.step == stop:
                    self._report_speed(epoch, batch, speed)
                if after_step():
                    return
                window.resumed()

    def _report_speed(self, epoch: int, batch: Batch, speed: EpochSpeed) -> None:
        rate = speed.rate()
        mfu = self.utilization.of(self.stepper.task, batch, rate)
        if self.world.is_main:
            self.log.info(epoch_line(epoch, rate, self.world.world_size, mfu))

    def _report(self, epoch: int, done: int, batch: Batch, window: StepTimes) -> None:
        per_step = len(batch) * self.world.world_size
        losses = read(self.meters)  # waits for the device, so the window's times are complete
        seconds = window.seconds()
        scale = losses.pop("logit_scale")[0]
        if (news := self.stepper.skipped.news()) and self.world.is_main:
            self.log.warning(news)
        if self.world.is_main:
            self.data_wait.update(window.data_seconds(), seconds, first=window.first)
        report(
            self.log,
            TrainStatus(
                epoch=epoch,
                step=self.step,
                seen=done * per_step,
                total=self.data.steps_per_epoch * per_step,
                eta=seconds * (self.horizon.end_step - self.step),
                data_time=window.data_seconds(),
                batch_time=seconds,
                rate=per_step / seconds,
                gpus=self.world.world_size,
                lr=self.rates.lr,
                lr_tau=self.rates.lr_tau,
                logit_scale=scale,
                losses=losses,
                mfu=self.utilization.of(self.stepper.task, batch, len(batch) / seconds),
            ),
        )
