"""Schedules of the model's learning rate, the temperature's learning rate and gamma, and the length of a run.

All are pure functions of the step or the epoch. ``step`` counts optimizer steps from 0. With W warm-up steps, T
total steps and the peak rate ``lr``, all schedules of the model's rate start with ``lr * (step + 1) / W``. From
step W on the rate is

- cosine:          ``lr_min + (lr - lr_min) * (1 + cos(pi * (step - W) / (T - W))) / 2``, and ``lr_min`` from T on;
- const:           ``lr``;
- const-cooldown:  ``lr`` until C steps before the end, then
  ``end + (lr - end) * (1 - (step - (T - C)) / C) ** power``.

The temperature's rate has one more schedule, ``step_thresh`` (FastCLIP, arXiv:2407.01445): it is divided by 3
while the temperature is at most 0.03.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

TAU_THRESHOLD = 0.03
TAU_DIVISOR = 3.0
_BOUND_STAGES = 16


def warmup(step: int, *, lr: float, warmup: int) -> float:
    """The linear warm-up: ``lr / warmup`` at step 0, ``lr`` from step ``warmup - 1`` on."""
    return lr * min(1.0, (step + 1) / warmup) if warmup > 0 else lr


def cosine(step: int, *, lr: float, lr_min: float, warmup: int, total: int) -> float:
    """Half a cosine from ``lr`` down to ``lr_min`` after the warm-up; ``lr_min`` from step ``total`` on."""
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return lr_min + 0.5 * (1.0 + math.cos(math.pi * progress)) * (lr - lr_min)


def const_cooldown(
    step: int, *, lr: float, warmup: int, total: int, cooldown: int, power: float, lr_end: float
) -> float:
    """``lr`` after the warm-up, then a polynomial of degree ``power`` to ``lr_end`` over the last steps."""
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - (total - cooldown)) / cooldown if cooldown > 0 else 0.0
    return lr_end + (1.0 - min(1.0, max(0.0, progress))) ** power * (lr - lr_end)


def step_thresh(tau: float, *, lr: float) -> float:
    """The temperature's rate: ``lr``, divided by 3 while ``tau`` is at most 0.03."""
    return lr / TAU_DIVISOR if tau <= TAU_THRESHOLD else lr


@dataclass(frozen=True)
class ErrorBounds:
    """Error bounds of what ranks exchange, each (at the start of the run, at its end); None: none, it is float32.

    ``image``, ``text``: of the target's embeddings; ``ref``: of the reference's.
    """

    image: tuple[float, float] | None = None
    text: tuple[float, float] | None = None
    ref: tuple[float, float] | None = None

    def at(self, kind: str, progress: float) -> float | None:
        """The bound of ``kind`` where the share ``progress`` of the run, 0 to 1, is done.

        From the first to the last it takes 16 steps of equal ratio, so that few formats occur in a run.
        """
        span: tuple[float, float] | None = getattr(self, kind)
        if span is None:
            return None
        stage = min(int(progress * _BOUND_STAGES), _BOUND_STAGES - 1)
        first, last = span
        return last if stage == _BOUND_STAGES - 1 else first * (last / first) ** (stage / (_BOUND_STAGES - 1))


def gamma(epoch: int, *, final: float, schedule: str, decay_epochs: int) -> float:
    """The weight of the new inner value in ``u <- (1 - gamma) u + gamma g`` during ``epoch`` (counted from 0).

    It is 1 in epoch 0, where no sample has a history, and ``final`` from epoch ``decay_epochs`` on. Between them
    it is ``final`` if ``schedule`` is 'constant', or half a cosine from 1 to ``final`` if it is 'cosine'.
    ValueError: ``schedule`` is unknown.
    """
    if schedule not in ("constant", "cosine"):
        raise ValueError(f"unknown gamma schedule {schedule!r}: choose constant or cosine")
    if epoch == 0:
        return 1.0
    if epoch >= decay_epochs or schedule == "constant":
        return final
    return final + 0.5 * (1.0 + math.cos(math.pi * epoch / decay_epochs)) * (1.0 - final)


@dataclass(frozen=True)
class Horizon:
    """The length of a run.

    ``total_steps``     the number of steps that the schedules are made for.
    ``end_step``        the step at which this run ends: ``total_steps``, or earlier with ``stop_epochs`` or
                        ``stop_iters``.
    ``cooldown_steps``  how many of the last steps const-cooldown takes to lower the rate.
    """

    total_steps: int
    end_step: int
    cooldown_steps: int


def horizon(
    steps_per_epoch: int,
    *,
    epochs: int,
    iters: int = -1,
    stop_epochs: int = -1,
    stop_iters: int = -1,
    epochs_cooldown: int | None = None,
) -> Horizon:
    """The length of a run in steps.

    A positive ``iters`` is the number of steps and replaces ``epochs``; but if ``epochs`` is 0, there is no
    training at all. Positive ``stop_epochs`` and ``stop_iters`` end this run early without changing the schedules,
    so that a later run can resume it.
    """
    total = iters if iters > 0 and epochs > 0 else epochs * steps_per_epoch
    end = total
    if stop_epochs > 0:
        end = min(end, stop_epochs * steps_per_epoch)
    if stop_iters > 0:
        end = min(end, stop_iters)
    cooldown = min(total, (epochs_cooldown or 0) * steps_per_epoch)
    return Horizon(total, end, cooldown)
