"""Risks of per-sample losses on the device, under autocast: what the CPU gives, without waiting for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from drrho_clip import risk

BATCH, OTHERS = 32, 9
RISKS = {
    "regularized": lambda device: risk.KLRegularized(0.7),
    "constrained": lambda device: risk.KLConstrained(0.4),
    "cvar": lambda device: risk.CVaR(0.3),
    "moving regularized": lambda device: risk.MovingAverageKLRegularized(0.7, 0.3),
    "moving constrained": lambda device: risk.MovingAverageKLConstrained(0.4, 0.3),
    "threshold": lambda device: risk.ThresholdCVaR(0.3),
    "per-sample regularized": lambda device: risk.PerSampleKLRegularized(50, 0.7, 0.3, device=device),
    "per-sample constrained": lambda device: risk.PerSampleKLConstrained(50, 0.4, 0.3, device=device),
    "per-sample cvar": lambda device: risk.PerSampleCVaR(50, 0.3, 0.1, device=device),
}


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """An error where the host waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def steps(made: nn.Module, device: torch.device, per_sample: bool) -> list[torch.Tensor]:
    """Values, gradients and the state after three steps, on the CPU."""
    found, generator = [], torch.Generator().manual_seed(0)
    for _ in range(3):
        shape = (BATCH, OTHERS) if per_sample else (BATCH,)
        losses, reference = (torch.randn(shape, generator=generator).bfloat16().to(device) for _ in range(2))
        index = {"index": torch.randint(50, (BATCH,), generator=generator)} if per_sample else {}
        losses.requires_grad_()
        with no_waiting(device), torch.autocast(device.type, dtype=torch.bfloat16):
            value = made(losses, reference, **index)
        value.backward()
        found += [value.detach(), losses.grad.float()]
    return [x.cpu() for x in (*found, *made.state_dict().values())]


@pytest.mark.parametrize("name", RISKS)
def test_the_device_gives_what_the_cpu_gives(device, name):
    per_sample = name.startswith("per-sample")
    ours = steps(RISKS[name](device).to(device), device, per_sample)
    expected = steps(RISKS[name]("cpu"), torch.device("cpu"), per_sample)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2 if one.ndim else 1e-5, atol=1e-5, equal_nan=True)
