"""The rates that are set before each step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.loop.test_optimizer import CPU, SCHEDULE, Toy, groups
from tests.support.stepping import OPTIM
from training.config.optim import ScheduleConfig
from training.loop.learning_rates import LearningRates
from training.loop.optimizer import create_optimizer


def rates(schedule: ScheduleConfig, steps: range, tau=None, **kwargs) -> list[tuple[float, float]]:
    optimizer = create_optimizer(Toy(), OPTIM, CPU)
    learning_rates = LearningRates(optimizer, OPTIM, schedule, total_steps=20, **kwargs)
    seen = []
    for step in steps:
        learning_rates.set(step, tau)
        by_name = groups(optimizer)
        assert by_name["decay"]["lr"] == by_name["no_decay"]["lr"] == learning_rates.lr
        assert by_name["logit_scale"]["lr"] == learning_rates.lr_tau
        seen.append((by_name["decay"]["lr"], by_name["logit_scale"]["lr"]))
    return seen


def test_cosine_rates_share_warmup_and_minimum():
    seen = rates(SCHEDULE, range(21))
    assert seen[0] == pytest.approx((OPTIM.lr / 4, OPTIM.lr_tau / 4))
    assert seen[4] == pytest.approx((OPTIM.lr, OPTIM.lr_tau))
    assert seen[12] == pytest.approx(((OPTIM.lr + 1e-3) / 2, (OPTIM.lr_tau + 1e-3) / 2))
    assert seen[20] == pytest.approx((1e-3, 1e-3))


def test_constant_temperature_rates_have_no_warmup():
    const = replace(SCHEDULE, lr_scheduler="const", lr_tau_scheduler="const")
    seen = rates(const, range(5))
    assert [r for r, _ in seen] == pytest.approx([OPTIM.lr * min(1, (k + 1) / 4) for k in range(5)])
    assert [r for _, r in seen] == [OPTIM.lr_tau] * 5
    thresh = replace(SCHEDULE, lr_tau_scheduler="step_thresh")
    assert [r for _, r in rates(thresh, range(3), tau=torch.tensor(0.029))] == pytest.approx([1e-3] * 3)
    assert [r for _, r in rates(thresh, range(3), tau=0.07)] == [3e-3] * 3


def test_skip_scheduler_leaves_the_peaks():
    skip = replace(SCHEDULE, skip_scheduler=True, lr_tau_scheduler="step_thresh")
    assert set(rates(skip, range(0, 30, 7), tau=0.01)) == {(OPTIM.lr, OPTIM.lr_tau)}


def test_cooldown_falls_over_the_last_steps_and_needs_its_length():
    cooldown = replace(SCHEDULE, lr_scheduler="const-cooldown", lr_cooldown_end=2e-3)
    seen = [r for r, _ in rates(cooldown, range(21), cooldown_steps=8)]
    assert seen[4:13] == [OPTIM.lr] * 9
    assert seen[16] == pytest.approx((OPTIM.lr + 2e-3) / 2)
    assert seen[20] == pytest.approx(2e-3)
    with pytest.raises(ValueError, match="--epochs-cooldown"):
        rates(cooldown, range(1))


def test_unknown_schedules_are_refused():
    with pytest.raises(ValueError, match="--lr-scheduler linear"):
        rates(replace(SCHEDULE, lr_scheduler="linear"), range(1))
    with pytest.raises(ValueError, match="--lr_tau_scheduler linear"):
        rates(replace(SCHEDULE, lr_tau_scheduler="linear"), range(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="reads the temperature on a GPU")
def test_on_a_gpu_the_temperature_is_read_one_step_late_without_a_sync():
    device = torch.device("cuda")
    optimizer = create_optimizer(Toy().to(device), OPTIM, device)
    thresh = replace(SCHEDULE, lr_tau_scheduler="step_thresh")
    learning_rates = LearningRates(optimizer, OPTIM, thresh, total_steps=20)
    high, low = torch.tensor(0.07, device=device), torch.tensor(0.02, device=device)
    learning_rates.set(0, high)
    seen = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, tau in enumerate((low, low, high, high), start=1):
            learning_rates.set(step, tau)
            seen.append(learning_rates.lr_tau)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen == pytest.approx([3e-3, 1e-3, 1e-3, 3e-3])
