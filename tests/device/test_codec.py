"""Rows that one device has encoded and another decodes keep the bound."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from drrho_clip.codec import Encoded, decode, encode


def moved(encoded: Encoded, device: torch.device) -> Encoded:
    names = ("rows", "offset", "kept", "exact")
    there = {name: None if (t := getattr(encoded, name)) is None else t.to(device) for name in names}
    return replace(encoded, **there)


@pytest.mark.parametrize("promise", [{}, {"limit": 1.0}, {"norm": 1.0}])
def test_the_bound_holds_from_any_device_to_any_other(device, promise):
    torch.manual_seed(0)
    common = torch.randn(520)
    x = F.normalize(torch.randn(300, 520) + common, dim=1)
    for bound in (1e-4, 2e-3):
        for there in (device, torch.device("cpu")):
            encoded = encode(x.to(there), bound, **promise)
            assert encoded.rows.device.type == there.type
            for back in (device, torch.device("cpu")):
                decoded = decode(moved(encoded, back)).cpu()
                assert ((decoded.double() - x.double()).abs() <= bound).all()
