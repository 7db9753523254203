"""The loop's measurements: meters that stay on the device, and the published log line about training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import Tensor

from training.distributed.collectives import gather_object
from training.logger import RunLog
from training.reports import Distribution, outer_edges

_BINS = 128


class Meter:
    """The last value and the weighted mean of a scalar. They stay on its device: an update never waits for it.

    Values that are not finite belong to skipped steps and are left out of the mean.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.now: Tensor | float = float("nan")
        self.sum: Tensor | float = 0.0
        self.count: Tensor | float = 0.0

    def update(self, value: Tensor | float, n: float = 1) -> None:
        """Add a 0-d ``value`` with weight ``n``. Tensors are copied, since a compiled step reuses its outputs."""
        value = torch.as_tensor(value, dtype=torch.float64).detach().clone()
        finite = value.isfinite()
        self.now = value
        self.sum = self.sum + torch.where(finite, value * n, 0.0)
        self.count = self.count + finite.double() * n


def read(meters: Mapping[str, Meter]) -> dict[str, tuple[float, float]]:
    """``name -> (now, mean)`` as floats, NaN if nothing was added. It takes one copy from the device."""
    return {name: (now, total / n if n else math.nan) for name, (now, total, n) in hold(meters).items()}


def hold(meters: Mapping[str, Meter]) -> dict[str, list[float]]:
    """``name -> [now, sum, count]`` as floats, for a checkpoint. It takes one copy from the device."""
    cells = [cell for meter in meters.values() for cell in (meter.now, meter.sum, meter.count)]
    on_device = [cell.double() for cell in cells if isinstance(cell, Tensor)]
    host = iter(torch.stack([cell.to(on_device[0].device) for cell in on_device]).tolist() if on_device else ())
    values = [next(host) if isinstance(cell, Tensor) else cell for cell in cells]
    return {name: values[3 * i : 3 * i + 3] for i, name in enumerate(meters)}


def held_meters(held: Mapping[str, Sequence[float]]) -> dict[str, Meter]:
    """The inverse of ``hold``."""
    meters = {name: Meter() for name in held}
    for name, meter in meters.items():
        meter.now, meter.sum, meter.count = held[name]
    return meters


@dataclass(frozen=True)
class TrainStatus:
    """The content of one log line about training.

    ``step``           optimizer steps since the start of the run.
    ``seen``           samples of this epoch so far on all ranks, of ``total``.
    ``eta``            seconds to the end of the run.
    ``data_time``      seconds per step spent waiting for data, of ``batch_time``.
    ``rate``           samples per second on all ``gpus`` ranks together.
    ``losses``         name -> (now, mean).
    ``mfu``            model FLOPs utilization (``flops.py``); None: it is not known for this device.
    """

    epoch: int
    step: int
    seen: int
    total: int
    eta: float
    data_time: float
    batch_time: float
    rate: float
    gpus: int
    lr: float
    lr_tau: float
    logit_scale: float
    losses: Mapping[str, tuple[float, float]]
    mfu: float | None = None

    def scalars(self) -> dict[str, float]:
        """The same numbers for TensorBoard and W&B, under the published code's names; new: data_share, mfu."""
        return {
            "train/data_time": self.data_time,
            "train/batch_time": self.batch_time,
            "train/data_share": self.data_time / self.batch_time,
            "train/samples_per_second": self.rate,
            "train/samples_per_second_per_gpu": self.rate / self.gpus,
            "train/scale": self.logit_scale,
            "train/lr": self.lr,
            "train/lr_tau": self.lr_tau,
            **({} if self.mfu is None else {"train/mfu": self.mfu}),
            **{f"train/{name}": now for name, (now, _) in self.losses.items()},
        }


def train_line(status: TrainStatus) -> str:
    """The published code's log line about training. The total loss comes last."""
    s, width = status, len(str(status.total))
    losses = sorted(s.losses.items(), key=lambda item: item[0] == "loss")
    return " ".join(
        [
            f"Train Epoch: {s.epoch} [{s.seen:>{width}}/{s.total} ({100 * s.seen / s.total:.0f}%)]",
            f"ETA: {timedelta(seconds=int(s.eta))}",
            f"Data (t): {s.data_time:.3f}",
            f"Batch (t): {s.batch_time:.3f}, {s.rate:#g}/s, {s.rate / s.gpus:#g}/s/gpu",
            f"LR: {s.lr:.8f}",
            f"LR_tau: {s.lr_tau:.8f}",
            f"Logit Scale: {s.logit_scale:.3f}",
            *(f"{name.capitalize()}: {now:#.5g} ({mean:#.5g})" for name, (now, mean) in losses),
        ]
    )


@dataclass
class EpochSpeed:
    """Samples per second over an epoch, or over what this run trained of it, with all stops but evaluation."""

    started: float = field(default_factory=time.perf_counter)
    samples: int = 0

    def rate(self) -> float:
        """Samples of this rank per second so far."""
        return self.samples / max(time.perf_counter() - self.started, 1e-9)


def epoch_line(epoch: int, rate: float, gpus: int, mfu: float | None) -> str:
    """The log line about the speed of an epoch; ``rate`` in samples per second and GPU."""
    share = "" if mfu is None else f", {mfu:.1%} of the cards' peak (MFU)"
    return f"epoch {epoch}: {rate * gpus:#.4g} samples/s, {rate:#.4g} per GPU{share}"


def report(log: RunLog, status: TrainStatus) -> None:
    """Log the line about training and send its numbers to the writers."""
    log.info(train_line(status))
    log.scalars(status.step, status.scalars())


def distributions(columns: Mapping[str, Callable[[], Iterable[Tensor]]]) -> dict[str, Distribution]:
    """How the values of each column, in blocks of any size on each rank, are spread over all ranks. Collective.

    Values that are not finite (NaN: samples never seen) are left out, and columns without any other value.
    """
    own = {name: _moments(blocks()) for name, blocks in columns.items()}
    parts = gather_object(own)
    total = {name: _together([part[name] for part in parts]) for name in columns}
    spans = {name: (low, high) for name, (low, high, count, *_) in total.items() if count}
    counted = gather_object({name: _count(columns[name](), *span) for name, span in spans.items()})
    return {
        name: Distribution(*total[name], [sum(part[name][i] for part in counted) for i in range(_BINS)])
        for name in spans
    }


def _moments(blocks: Iterable[Tensor]) -> tuple[float, float, int, float, float]:
    """The least and the largest finite value, how many there are, their sum and the sum of their squares."""
    found = [(math.inf, -math.inf, 0, 0.0, 0.0)]
    for part in blocks:
        values = part[part.isfinite()].double()
        if len(values):
            low, high, *sums = torch.stack(
                [values.min(), values.max(), values.sum(), values.square().sum()]
            ).tolist()
            found.append((low, high, len(values), *sums))
    return _together(found)


def _together(
    parts: Sequence[tuple[float, float, int, float, float]],
) -> tuple[float, float, int, float, float]:
    lows, highs, counts, sums, squares = zip(*parts)
    return min(lows), max(highs), sum(counts), sum(sums), sum(squares)


def _count(blocks: Iterable[Tensor], low: float, high: float) -> list[int]:
    """How many values lie in each of the bins from ``low`` to ``high``."""
    low, high = outer_edges(low, high)
    bins = torch.zeros(_BINS, dtype=torch.int64)
    for part in blocks:
        place = (part[part.isfinite()].double() - low) * (_BINS / (high - low))
        # torch.histc has no deterministic implementation on a GPU; bincount without weights has.
        bins += torch.bincount(place.long().clamp_(0, _BINS - 1), minlength=_BINS).cpu()
    return bins.tolist()
