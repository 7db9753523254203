"""Schedules compared with torch's own schedulers and with values computed by hand; their properties."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, PolynomialLR

from drrho_clip import schedules


def rates_of_torch(make, lr: float, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_is_torchs_cosine_annealing_between_warmup_and_end():
    expected = rates_of_torch(lambda o: CosineAnnealingLR(o, T_max=40, eta_min=1e-4), 3e-3, 41)
    ours = [schedules.cosine(10 + k, lr=3e-3, lr_min=1e-4, warmup=10, total=50) for k in range(41)]
    assert ours == pytest.approx(expected, rel=1e-9)


def test_cooldown_is_torchs_polynomial_over_the_last_steps():
    expected = rates_of_torch(lambda o: PolynomialLR(o, total_iters=20, power=2.0), 1.0, 21)
    settings_ = {"warmup": 5, "total": 100, "cooldown": 20, "power": 2.0}
    ours = [schedules.const_cooldown(80 + k, lr=1.0, lr_end=0.0, **settings_) for k in range(21)]
    assert ours == pytest.approx(expected, abs=1e-12)
    shifted = [schedules.const_cooldown(80 + k, lr=1.5, lr_end=0.5, **settings_) for k in range(21)]
    assert shifted == pytest.approx([r + 0.5 for r in expected])
    assert schedules.const_cooldown(79, lr=1.0, lr_end=0.0, **settings_) == 1.0


def test_every_model_schedule_warms_up_linearly_from_its_first_step():
    expected = [0.1, 0.2, 0.3, 0.4]
    assert [schedules.warmup(k, lr=0.4, warmup=4) for k in range(4)] == pytest.approx(expected)
    assert [schedules.cosine(k, lr=0.4, lr_min=0.0, warmup=4, total=9) for k in range(4)] == pytest.approx(
        expected
    )
    cooldown = {"lr_end": 0.0, "power": 1.0, "total": 9, "cooldown": 2}
    assert [schedules.const_cooldown(k, lr=0.4, warmup=4, **cooldown) for k in range(4)] == pytest.approx(expected)
    assert schedules.warmup(1000, lr=0.4, warmup=4) == schedules.warmup(0, lr=0.4, warmup=0) == 0.4


@settings(max_examples=60, deadline=None)
@given(lr=st.floats(1e-6, 1), share=st.floats(0, 1), warmup=st.integers(0, 50), length=st.integers(0, 200))
def test_cosine_never_leaves_its_bounds_and_stays_down_past_the_end(lr, share, warmup, length):
    total, lr_min = warmup + length, share * lr
    rates = [
        schedules.cosine(k, lr=lr, lr_min=lr_min, warmup=warmup, total=total) for k in range(warmup, total + 60)
    ]
    assert all(lr_min * (1 - 1e-9) <= r <= lr * (1 + 1e-9) for r in rates)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))
    if length:
        assert rates[length:] == [lr_min] * 60


def test_step_thresh_takes_a_third_while_tau_is_at_most_0_03():
    rates = [schedules.step_thresh(tau, lr=3e-4) for tau in (0.07, 0.0301, 0.03, 0.01)]
    assert rates == pytest.approx([3e-4, 3e-4, 1e-4, 1e-4])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 0.2, 0.2, 0.2, 0.2, 0.2]),
        ("cosine", [1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5), 0.2, 0.2]),
    ],
)
def test_gamma_by_epoch(schedule, expected):
    values = [schedules.gamma(e, final=0.2, schedule=schedule, decay_epochs=4) for e in range(6)]
    assert values == pytest.approx(expected)


def test_gamma_of_epoch_0_is_1_whatever_the_flags():
    assert schedules.gamma(0, final=0.2, schedule="cosine", decay_epochs=0) == 1.0
    assert schedules.gamma(0, final=0.2, schedule="constant", decay_epochs=0) == 1.0
    with pytest.raises(ValueError, match="linear"):
        schedules.gamma(1, final=0.2, schedule="linear", decay_epochs=4)


@pytest.mark.parametrize(
    ("flags", "total", "end"),
    [
        ({"epochs": 5}, 50, 50),
        ({"epochs": 5, "iters": 23}, 23, 23),  # the run ends at --iters, inside the third epoch
        ({"epochs": 5, "iters": 80}, 80, 80),
        ({"epochs": 30, "stop_epochs": 3}, 300, 30),  # one part of a long run
        ({"epochs": 5, "stop_iters": 12}, 50, 12),
        ({"epochs": 5, "stop_epochs": 9, "stop_iters": 900}, 50, 50),
        ({"epochs": 5, "iters": 23, "stop_epochs": 1}, 23, 10),
        ({"epochs": 0}, 0, 0),
        ({"epochs": 0, "iters": 23}, 0, 0),  # evaluation only
    ],
)
def test_horizon(flags, total, end):
    horizon = schedules.horizon(10, **flags)
    assert (horizon.total_steps, horizon.end_step) == (total, end)


def test_cooldown_is_counted_in_epochs():
    assert schedules.horizon(10, epochs=5, epochs_cooldown=2).cooldown_steps == 20
    assert schedules.horizon(10, epochs=5).cooldown_steps == 0
