"""16 bits per number: the promised bound in float64, the ends, NaN, and which bounds are possible."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from drrho_clip.state.fixed_point import FixedPoint

MOST = math.log(torch.finfo(torch.float32).max)
LEAST = math.log(1e-14)
VALUES = st.one_of(st.floats(width=32), st.floats(-130, 130, width=32), st.sampled_from([0.0, -0.0, LEAST, MOST]))


@st.composite
def codes(draw) -> tuple[FixedPoint, float]:
    """A code, and the bound that was asked for."""
    least = draw(st.floats(-1e4, 1e3))
    most = least + draw(st.floats(1e-3, 1e4))
    bound = FixedPoint.least_bound(least, most) * 10 ** draw(st.floats(0, 3))
    return FixedPoint.of_bound(bound, least, most), bound


@given(codes(), arrays.arrays(np.float32, st.integers(0, 40), elements=VALUES))
@settings(max_examples=200, deadline=None)
@example((FixedPoint.of_bound(1e-3, LEAST, MOST), 1e-3), np.float32([math.nan, math.inf, -math.inf, LEAST, MOST]))
def test_the_bound_holds_between_the_ends(made, x):
    code, bound = made
    # Values of the code's own range, and those that are there.
    x = torch.from_numpy(np.concatenate([x, np.linspace(code.least, code.most, 7, dtype=np.float32)]))
    kept = code.encode(x)
    back = code.decode(kept)
    assert kept.dtype == torch.int16 and back.dtype == torch.float32
    assert torch.equal(back.isnan(), x.isnan())
    seen = ~x.isnan()
    nearest = x.double().clamp(code.least, code.most)
    assert ((back.double() - nearest)[seen].abs() <= bound).all()
    assert torch.equal(
        code.outside(x) & seen,
        ((x.double() < code.least) | (x.double() > code.most)) & ((x.double() - nearest).abs() > code.step / 2),
    )
    # What has come back does not change any more, however often a row is written again.
    assert torch.equal(code.encode(back), kept)


def test_log_u_of_every_float32_fits_at_the_default():
    code = FixedPoint.of_bound(1e-3, LEAST, MOST)
    assert code.least <= LEAST and code.most >= MOST and code.bound <= 1e-3
    ends = code.decode(code.encode(torch.tensor([-math.inf, -200.0, LEAST, 0.0, MOST, 200.0, math.inf])))
    assert ends.tolist() == pytest.approx([code.least] * 3 + [0.0, MOST] + [code.most] * 2, abs=1e-3)


@given(st.floats(-1e4, 1e3), st.floats(1e-3, 1e4))
@settings(max_examples=100, deadline=None)
def test_the_least_bound_is_possible_and_a_smaller_one_is_refused_with_it(least, width):
    bound = FixedPoint.least_bound(least, least + width)
    FixedPoint.of_bound(bound, least, least + width)
    with pytest.raises(ValueError, match=f"needs more than 16 bits .*give at least {bound:g}".replace("+", r"\+")):
        FixedPoint.of_bound(bound * 0.98, least, least + width)
