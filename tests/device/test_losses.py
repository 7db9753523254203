"""The objectives in every precision, tile by tile and kept, eager and compiled, with samples that come twice."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from drrho_clip.losses.pair_kernels import Kernels
from drrho_clip.sample_state import SampleState, StateUpdate
from tests.support.objectives import BUDGETS, SCHEMES, check_oracle, check_published_numbers
from training.loop.metrics import distributions

AUTOCAST = {"fp32": None, "amp_bf16": torch.bfloat16, "amp": torch.float16}


def autocast(precision, device):
    dtype = AUTOCAST[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@pytest.mark.parametrize("budget", ["tiled", "kept"])
@pytest.mark.parametrize("precision", AUTOCAST)
@pytest.mark.parametrize("name", ["v1", "v3", "v2"])
def test_the_oracles_step(device, name, precision, budget):
    kernels, context = Kernels(budget=BUDGETS[budget]), autocast(precision, device)
    check_oracle(name, kernels, reference=True, duplicates=True, device=device, context=context)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_the_published_numbers(device, scheme, precision):
    kernels, context = Kernels(budget=BUDGETS["first-kept"]), autocast(precision, device)
    check_published_numbers(scheme, kernels, device, context)


@pytest.mark.parametrize("name, budget", [("v3", "tiled"), ("v2", "kept")])
def test_compiled_by_inductor(device, name, budget):
    kernels = Kernels.compiled(BUDGETS[budget])
    for precision in AUTOCAST:
        context = autocast(precision, device)
        check_oracle(name, kernels, reference=True, duplicates=True, device=device, context=context)


def test_rows_are_kept_where_the_device_writes_them(device):
    state = SampleState(1000, ("log_u_image", "log_u_text"), device)
    index = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:64].to(device)
    values = {name: torch.randn(64, device=device) for name in state.columns}
    state.commit(StateUpdate(index, values), torch.tensor(False, device=device))
    assert all(column.isnan().all() for column in state.state_dict().values())
    state.commit(StateUpdate(index, values), torch.tensor(True, device=device))
    _, found = state.fetch(index)
    whole = state.state_dict()
    for name, given in values.items():
        assert torch.equal(found[name], given)
        assert whole[name].isnan().sum() == 1000 - 64
        assert torch.equal(whole[name].to(device)[index], given)


def test_distributions_are_counted_under_deterministic_algorithms(device):
    column = torch.linspace(-3, 5, 10_001, device=device)
    column[::10] = torch.nan
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        found = distributions({"log_u_image": partial(column.split, 4096)})["log_u_image"]
    finally:
        torch.use_deterministic_algorithms(before)
    kept = column[column.isfinite()].cpu().double()
    counts = torch.histc(kept, len(found.bins), found.low, found.high)
    assert (torch.tensor(found.bins) - counts).abs().sum() <= 4  # two values at an edge
    assert sum(found.bins) == len(kept)
    assert (found.count, found.low, found.high) == (len(kept), kept.min().item(), kept.max().item())
