"""Worst-case weights: feasible, and as good as the float64 solution of the dual, which proves them optimal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drrho_clip import worst_case
from tests.support import duals

# float32 up to its limits, with ties: a few values that the margins are drawn from, or any.
FLOATS = st.floats(-(2.0**120), 2.0**120, width=32)
MARGINS = st.one_of(
    st.lists(FLOATS, min_size=1, max_size=30),
    st.lists(st.sampled_from([-3.0, 0.0, 0.5, 0.5000001, 2.0]), min_size=1, max_size=30),
    st.builds(lambda n, seed, scale: list(np.random.default_rng(seed).normal(size=n) * scale),
              st.integers(2, 60), st.integers(0, 10**6), st.sampled_from([1e-6, 1.0, 1e4])),
)  # fmt: skip
MANY = settings(max_examples=150, deadline=None)


def size_of(m: np.ndarray) -> float:
    return float(np.abs(m).max()) + 1e-300


@MANY
@given(margins=MARGINS, rho=st.one_of(st.just(0.0), st.floats(1e-10, 8.0)))
def test_kl_ball(margins, rho):
    m = np.asarray(margins, dtype=np.float32).astype(np.float64)
    q = worst_case.kl_constrained(torch.from_numpy(m), rho).numpy()
    assert (q >= 0).all() and q.sum() == pytest.approx(1, abs=1e-12)
    assert duals.divergence(q) <= rho + 1e-12
    assert q @ m == pytest.approx(duals.kl_constrained(m, rho), abs=2e-9 * size_of(m))


@MANY
@given(margins=MARGINS, alpha=st.floats(0.001, 1.0))
def test_cvar(margins, alpha):
    m = np.asarray(margins, dtype=np.float32).astype(np.float64)
    q = worst_case.cvar(torch.from_numpy(m), alpha).numpy()
    assert (q >= 0).all() and q.sum() == pytest.approx(1, abs=1e-12)
    assert (q <= 1 / (alpha * len(m)) * (1 + 1e-12)).all()
    assert q @ m == pytest.approx(duals.cvar(m, alpha), abs=1e-12 * size_of(m))


@MANY
@given(margins=MARGINS, tau=st.floats(1e-6, 1e6))
def test_kl_penalty(margins, tau):
    m = np.asarray(margins, dtype=np.float32).astype(np.float64)
    q = worst_case.kl_regularized(torch.from_numpy(m), tau).numpy()
    assert (q >= 0).all() and q.sum() == pytest.approx(1, abs=1e-12)
    primal = q @ m - tau * duals.divergence(q)
    assert primal == pytest.approx(duals.kl_regularized(m, tau), abs=1e-12 * (size_of(m) + tau))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_problems_of_their_own(dtype):
    rows = torch.randn(3, 5, 17, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for solve, limit in (
        (worst_case.kl_regularized, 0.3),
        (worst_case.kl_constrained, 0.4),
        (worst_case.cvar, 0.25),
    ):
        together = solve(rows, limit)
        assert together.dtype == dtype
        for i in range(3):
            for j in range(5):
                torch.testing.assert_close(together[i, j], solve(rows[i, j], limit))


def test_equal_margins_share_evenly():
    m = torch.tensor([1.0, 5.0, 5.0, 5.0, 2.0])
    sharp = torch.tensor([0, 1 / 3, 1 / 3, 1 / 3, 0])
    torch.testing.assert_close(worst_case.kl_constrained(m, 9.0), sharp)
    torch.testing.assert_close(worst_case.cvar(m, 0.5), sharp)
    torch.testing.assert_close(worst_case.cvar(m, 0.01), sharp)
    flat = torch.full((5,), 0.2)
    torch.testing.assert_close(worst_case.kl_constrained(m, 0.0), flat)
    torch.testing.assert_close(worst_case.cvar(m, 1.0), flat)
    torch.testing.assert_close(worst_case.kl_constrained(torch.full((5,), 3.0), 0.7), flat)
