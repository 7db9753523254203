"""Rows in host memory for steps on a device: the values of rows on the device, without a wait."""

from __future__ import annotations

import torch

from drrho_clip.sample_state import SampleState, StateUpdate
from drrho_clip.state.fixed_point import FixedPoint
from drrho_clip.state.host_state import HostSampleState

N, COLUMNS = 500, ("log_u_image", "tau_image")
CODES = {"log_u_image": FixedPoint.of_bound(1e-3, -33, 89)}


def steps(state: SampleState, device: torch.device, chosen: bool) -> list[torch.Tensor]:
    """What 30 steps of 64 rows have seen, most of them rows of the steps before."""
    random, seen = torch.Generator().manual_seed(0), []
    on_gpu = device.type == "cuda"
    batches = [torch.randint(N // (1 + step % 5), (64,), generator=random) for step in range(31)]
    batches = [batch.pin_memory() for batch in batches] if on_gpu else batches
    keep = torch.arange(0, 64, 2, device=device)
    for step, index in enumerate(batches[:-1]):
        state.announce(batches[step + 1])
        if on_gpu and step == 3:  # by then all memory is there
            torch.cuda.set_sync_debug_mode("error")
        if chosen:
            state.choose_from(index)
            index = index.to(device, non_blocking=True)[keep]
        everywhere, values = state.fetch(index)
        seen.append(torch.stack(list(values.values())))
        new = {name: value.nan_to_num(1.0) / 2 + everywhere % 7 + step for name, value in values.items()}
        state.commit(StateUpdate(everywhere, new), (everywhere.sum() + step) % 3 != 0)
    if on_gpu:
        torch.cuda.set_sync_debug_mode("default")
    return [*seen, *state.values().values()]


def test_rows_in_host_memory_are_those_on_the_device_and_nothing_waits(device):
    for chosen in (False, True):
        expected = steps(SampleState(N, COLUMNS, device, CODES), device, chosen)
        found = steps(HostSampleState(N, COLUMNS, device, CODES), device, chosen)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=0, atol=0, equal_nan=True)
