"""How the learning rates, the temperature's rate and gamma move, and how long a run is.

Pure functions of the step or the epoch. Steps count optimizer steps from 0. With W warm-up steps, T total steps
and peak rate ``lr``, all schedules of the model's rate begin with ``lr * (step + 1) / W``; from step W on

- cosine:          ``lr_min + (lr - lr_min) * (1 + cos(pi * (step - W) / (T - W))) / 2``, and ``lr_min`` from T on;
- const:           ``lr``;
- const-cooldown:  ``lr`` until C steps before the end, then
  ``end + (lr - end) * (1 - (step - (T - C)) / C) ** power``.

The temperature's rate knows ``step_thresh`` besides (FastCLIP, arXiv:2407.01445): a third of it while the
temperature is at most 0.03.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

TAU_THRESHOLD = 0.03
TAU_DIVISOR = 3.0


def warmup(step: int, *, lr: float, warmup: int) -> float:
    """The linear rise: ``lr / warmup`` at step 0, ``lr`` at step ``warmup - 1`` and after it."""
    return lr * min(1.0, (step + 1) / warmup) if warmup > 0 else lr


def cosine(step: int, *, lr: float, lr_min: float, warmup: int, total: int) -> float:
    """Half a cosine from ``lr`` down to ``lr_min`` after the warm-up; it never rises again past ``total``."""
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return lr_min + 0.5 * (1.0 + math.cos(math.pi * progress)) * (lr - lr_min)


def const_cooldown(
    step: int, *, lr: float, warmup: int, total: int, cooldown: int, power: float, lr_end: float
) -> float:
    """``lr`` after the warm-up, and a polynomial of degree ``power`` down to ``lr_end`` over the last steps."""
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - (total - cooldown)) / cooldown if cooldown > 0 else 0.0
    return lr_end + (1.0 - min(1.0, max(0.0, progress))) ** power * (lr - lr_end)


def step_thresh(tau: float, *, lr: float) -> float:
    """The temperature's rate: ``lr``, divided by 3 while ``tau`` is at most 0.03."""
    return lr / TAU_DIVISOR if tau <= TAU_THRESHOLD else lr


def gamma(epoch: int, *, final: float, schedule: str, decay_epochs: int) -> float:
    """The weight of the new inner value in ``u <- (1 - gamma) u + gamma g`` during ``epoch`` (counted from 0).

    1 in epoch 0, where no sample has a history; ``final`` from ``decay_epochs`` on; between them ``final``
    (``constant``) or half a cosine from 1 to it (``cosine``).
    """
    if epoch == 0:
        return 1.0
    if epoch >= decay_epochs or schedule == "constant":
        return final
    if schedule == "cosine":
        return final + 0.5 * (1.0 + math.cos(math.pi * epoch / decay_epochs)) * (1.0 - final)
    raise ValueError(f"unknown gamma schedule {schedule!r}; known: constant, cosine")


@dataclass(frozen=True)
class Horizon:
    """How long a run is.

    ``total_steps``     what the schedules are laid out for.
    ``end_step``        where this run ends, at most ``total_steps``; earlier with ``stop_epochs``, ``stop_iters``.
    ``cooldown_steps``  the last of ``total_steps`` that const-cooldown spends falling.
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

    A positive ``iters`` is the budget in place of ``epochs``, except that no epochs mean no training at all.
    Positive ``stop_epochs`` and ``stop_iters`` end this run early and leave the schedules as they are, so that
    a later run can go on.
    """
    total = iters if iters > 0 and epochs > 0 else epochs * steps_per_epoch
    end = total
    if stop_epochs > 0:
        end = min(end, stop_epochs * steps_per_epoch)
    if stop_iters > 0:
        end = min(end, stop_iters)
    cooldown = min(total, (epochs_cooldown or 0) * steps_per_epoch)
    return Horizon(total, end, cooldown)
