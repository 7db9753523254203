"""Meters, and the published line about training."""

from __future__ import annotations

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.ranks import ranks
from tests.test_logger import STATUS
from training.loop.metrics import Meter, distributions, read, train_line
from training.reports import Distribution


class Waits(TorchDispatchMode):
    """Counts the operators that make the host wait for a device value."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_meter_has_the_weighted_mean_and_the_last_value():
    rng = np.random.default_rng(0)
    values, weights = rng.uniform(1, 9, 50), rng.integers(1, 6, 50)
    meters = {"tensor": Meter(), "float": Meter(), "never": Meter()}
    for value, weight in zip(values, weights):
        meters["tensor"].update(torch.tensor(value), int(weight))
        meters["float"].update(float(value), int(weight))
    found = read(meters)
    expected = (values[-1], np.average(values, weights=weights))
    assert found["tensor"] == pytest.approx(expected) and found["float"] == pytest.approx(expected)
    assert all(math.isnan(value) for value in found["never"])


def test_meter_never_waits_and_keeps_no_graph_and_no_alias():
    meter, value = Meter(), torch.tensor(2.0, requires_grad=True)
    with Waits() as waits:
        for _ in range(3):
            meter.update(value * 1.0, 4)
        buffer = torch.tensor(6.0)
        meter.update(buffer, 4)
        buffer.zero_()  # as a captured graph overwrites its outputs
    assert waits.count == 0
    assert not meter.now.requires_grad and not meter.sum.requires_grad
    assert read({"m": meter})["m"] == (6.0, 3.0)


def test_long_sums_keep_their_digits():
    meter = Meter()
    meter.sum, meter.count = torch.tensor(1e8, dtype=torch.float64), 1e8
    for _ in range(1000):
        meter.update(torch.tensor(3.0))
    assert read({"m": meter})["m"][1] == pytest.approx((1e8 + 3000) / (1e8 + 1000), rel=1e-12)


def test_train_line_is_the_published_one():
    number = r"\d+\.\d+(?:e-?\d+)?"
    pattern = (
        rf"Train Epoch: 3 \[ *1280/100000 \(1%\)\] ETA: 1:02:05 Data \(t\): 0\.012 Batch \(t\): 0\.500, "
        rf"{number}/s, {number}/s/gpu LR: 0\.00031250? LR_tau: 0\.0000781\d* Logit Scale: 14\.286 "
        rf"Contrastive_loss: 1\.0000 \(2\.0000\) Loss: 1\.2500 \(2\.5000\)"
    )
    assert re.fullmatch(pattern, train_line(STATUS))


# ------------------------------------------------------------------------------------------- distributions


def spread_on(rank_rows: list[int]) -> dict[str, Distribution]:
    """The distributions of one column over ranks that own some rows each; rows are values of a fixed sequence."""
    rank = dist.get_rank()
    first = sum(rank_rows[:rank])
    column = _column()[first : first + rank_rows[rank]]
    columns = {"log_u_image": column.split(90), "never": [torch.full((2,), torch.nan)], "same": [torch.ones(3)]}
    return distributions({name: partial(iter, blocks) for name, blocks in columns.items()})


def _column() -> torch.Tensor:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 3
    values[::7] = torch.nan
    values[3] = torch.inf
    return values


def test_distributions_are_those_of_all_ranks_rows():
    values = _column().numpy().astype(np.float64)
    values = values[np.isfinite(values)]
    results = ranks(2).run(spread_on, [1000, 0]) + ranks(2).run(spread_on, [300, 700])
    for found in results:
        assert set(found) == {"log_u_image", "same"}  # no finite value: none
        d = found["log_u_image"]
        assert (d.low, d.high, d.count) == (values.min(), values.max(), len(values))
        assert d.total == pytest.approx(values.sum()) and d.squares == pytest.approx((values**2).sum())
        counts, edges = np.histogram(values, len(d.bins))
        assert d.edges == pytest.approx(edges.tolist())
        assert sum(d.bins) == len(values)
        assert np.abs(np.array(d.bins) - counts).sum() <= 2  # a value at an edge
        assert (found["same"].low, found["same"].high, sum(found["same"].bins)) == (1, 1, 6)
