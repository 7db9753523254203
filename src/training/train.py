"""The loop over one epoch: set rates, take a step, now and then say so.

Nothing here waits for the device between two log lines: meters add up where the values are. (With float16 the
gradient scaler does, to learn whether it may step.)
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice

from drrho_clip.schedules import Horizon
from training.data import TrainData
from training.data_wait import DataWait
from training.distributed import World
from training.logger import Meter, RunLog, TrainStatus, read
from training.optimizer import LearningRates
from training.profiling import Profiler
from training.step import Stepper


@dataclass
class Trainer:
    """One run's loop. ``step`` counts optimizer steps from the run's start; ``horizon.end_step`` ends it."""

    stepper: Stepper
    rates: LearningRates
    data: TrainData
    horizon: Horizon
    world: World
    log: RunLog
    profiler: Profiler
    data_wait: DataWait
    log_every: int = 100
    step: int = 0

    @property
    def finished(self) -> bool:
        """Whether this run has taken all steps that it was asked for."""
        return self.step >= self.horizon.end_step

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to."""
        return self.step // self.data.steps_per_epoch

    def train_epoch(self) -> None:
        """From ``step`` to the end of its epoch, or of the run where that comes first."""
        epoch, per_epoch = self.epoch, self.data.steps_per_epoch
        stop = min((epoch + 1) * per_epoch, self.horizon.end_step)
        task = self.stepper.task
        task.model.train()
        task.loss.set_epoch(epoch)
        meters: dict[str, Meter] = defaultdict(Meter)
        window = _Window(first=True)
        with self.log.progress(stop - self.step, f"epoch {epoch}", unit="step", every=math.inf) as progress:
            begun = self.step - epoch * per_epoch
            for batch in islice(self.data.epoch(epoch, begun), stop - self.step):
                window.loaded()
                self.rates.set(self.step, (-task.bare.logit_scale.detach()).exp())
                task.loss.set_temperature_rate(self.rates.lr_tau)
                values = self.stepper(batch, self.step)
                values["logit_scale"] = task.bare.logit_scale.detach().exp()
                for name, value in values.items():
                    meters[name].update(value, len(batch))
                self.step += 1
                self.profiler.step()
                progress.update()
                window.stepped()
                done = self.step - epoch * per_epoch
                if (done - 1) % self.log_every == 0 or self.step == stop:
                    self._report(epoch, done, len(batch), meters, window)
                    window = _Window()

    def _report(self, epoch: int, done: int, batch: int, meters: dict[str, Meter], window: _Window) -> None:
        per_step = batch * self.world.world_size
        losses = read(meters)  # waits for the device, so the window's times are complete
        seconds = window.seconds()
        scale = losses.pop("logit_scale")[0]
        if self.world.is_main:
            self.data_wait.update(window.data_seconds(), seconds, first=window.first)
        self.log.train(
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
            )
        )


class _Window:
    """Wall time since the last log line, and the share of it that went into waiting for data."""

    def __init__(self, first: bool = False) -> None:
        self.first = first
        self.started = self._last = time.perf_counter()
        self._waited, self._steps = 0.0, 0

    def loaded(self) -> None:
        self._waited += time.perf_counter() - self._last

    def stepped(self) -> None:
        self._last = time.perf_counter()
        self._steps += 1

    def seconds(self) -> float:
        """Per step."""
        return max(time.perf_counter() - self.started, 1e-9) / self._steps

    def data_seconds(self) -> float:
        """Per step, waiting for the loader."""
        return self._waited / self._steps
