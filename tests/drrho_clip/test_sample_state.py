"""The sharded table compared with a replicated one; resharding; the errors."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from drrho_clip import collectives
from drrho_clip.losses.compositional import moving_average
from drrho_clip.sample_state import SampleState, StateUpdate
from drrho_clip.state.fixed_point import FixedPoint
from tests.support.ranks import ranks

COLUMNS = ("log_u_image", "log_u_text", "tau_image")
N = 37  # rows do not divide evenly over 2, 3 or 4 ranks
BOUND = 1e-3
CODE = FixedPoint.of_bound(BOUND, math.log(1e-14), math.log(torch.finfo(torch.float32).max))
CODES = {"log_u_image": CODE, "log_u_text": CODE}


def _batches(steps, b, k, seed=0):
    """The same random global batches on every rank: indices [k * b] with repeats, values for distinct indices."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        index = torch.from_numpy(rng.integers(0, N - 5, k * b))  # the last rows are never seen
        table = torch.from_numpy(rng.normal(size=(len(COLUMNS), N)).astype(np.float32))
        yield index, {c: table[i][index] for i, c in enumerate(COLUMNS)}


def _against_replicated(steps, b, codes):
    """Take the same steps with the sharded and with a replicated table, and compare every fetch bit for bit."""
    k, r = collectives.world_size(), collectives.rank()
    sharded = SampleState(N, COLUMNS, codes=codes)
    replicated = {c: torch.full((N,), torch.nan) for c in COLUMNS}
    for step, (index, values) in enumerate(_batches(steps, b, k)):
        everyone, fetched = sharded.fetch(index[r * b : (r + 1) * b])
        assert torch.equal(everyone, index)
        for c in COLUMNS:
            np.testing.assert_array_equal(fetched[c], replicated[c][index])
        taken = None if step % 3 else torch.tensor(step % 2 == 0)
        sharded.commit(StateUpdate(index, values), taken)
        if taken is None or taken:
            for c in COLUMNS:
                replicated[c][index] = codes[c].rounded(values[c]) if c in codes else values[c]
    seen = ~replicated["tau_image"].isnan()
    assert 0 < seen.sum() <= N - 5
    return sharded.bytes_per_rank


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize(("codes", "per_row"), [({}, 12), (CODES, 8)])
def test_equals_a_replicated_table(k, codes, per_row):
    run = ranks(k).run if k > 1 else lambda f, *a: [f(*a)]
    sizes = run(_against_replicated, 60, 6, codes)
    assert sum(sizes) == per_row * N
    assert max(sizes) == per_row * -(-N // k)


ESTIMATES = {
    "as they are": lambda t: torch.full((N,), 3.7),
    "falling": lambda t: torch.linspace(20, 80, N) - 2.0 * t,
    "rising": lambda t: torch.linspace(-30, -10, N) + 1.5 * t,
    "noisy": lambda t: 8 * torch.randn(N, generator=torch.Generator().manual_seed(t)),
}


@pytest.mark.parametrize("estimates", ESTIMATES)
@pytest.mark.parametrize("gamma", [0.01, 0.2, 0.8])
def test_errors_of_many_visits_add_up_to_what_the_docstring_says(gamma, estimates):
    """150 visits of every row, against float64 sums of all estimates, weighted as the two bounding averages do."""
    state = SampleState(N, COLUMNS[:1], codes=CODES)
    index, gammas, visits = torch.arange(N), torch.tensor(gamma), 150
    exact, least, most = [], [], []  # log of the terms of u: exactly, and with errors that are all of one sign
    for t in range(visits):
        log_f = ESTIMATES[estimates](t).clamp(-32, 88)
        _, held = state.fetch(index)
        state.commit(StateUpdate(index, {COLUMNS[0]: moving_average(log_f, held[COLUMNS[0]], gammas, 1e-30)}))
        keep = math.log(1 - gamma)
        for terms, error in ((exact, 0.0), (least, -BOUND), (most, BOUND)):
            terms[:] = [term + keep + error for term in terms]
            terms.append(log_f.double() + (math.log(gamma) if t else 0.0) + error)
    exact, least, most = (torch.stack(terms).logsumexp(0) for terms in (exact, least, most))
    found = state.values()[COLUMNS[0]].double()
    rounding = visits * 1e-5  # of float32's logarithms, which are not this test's
    assert (found >= least - rounding).all() and (found <= most + rounding).all()
    if estimates == "as they are":
        assert ((found - exact).abs() <= BOUND / gamma).all()
    assert (most - exact).max() < {0.01: 0.2, 0.2: 0.16, 0.8: 0.16}[gamma]


def test_a_falling_value_does_not_stay_where_it_is():
    """gamma forgets little more from visit to visit than half a step of the code."""
    state, gamma = SampleState(1, COLUMNS[:1], codes=CODES), 1.5 * BOUND
    index, log_u = torch.tensor([0]), []
    for t in range(400):
        _, held = state.fetch(index)
        new = moving_average(
            torch.tensor([0.0 if t == 0 else -30.0]), held[COLUMNS[0]], torch.tensor(gamma), 1e-14
        )
        state.commit(StateUpdate(index, {COLUMNS[0]: new}))
        log_u.append(new.item())
    slope = (log_u[-1] - log_u[0]) / 399
    assert math.log1p(-gamma) - BOUND <= slope <= math.log1p(-gamma) + BOUND < 0


@pytest.mark.parametrize("then", [{}, CODES, {"log_u_text": FixedPoint(0.01, -4000)}])
@pytest.mark.parametrize("now", [{}, CODES])
def test_a_state_kept_in_another_way_is_converted(then, now):
    old, index = _filled(then), torch.arange(N)
    held, found = old.state_dict(), SampleState(N, COLUMNS, codes=now)
    found.load_state_dict(held)
    for c in COLUMNS:
        was, value = old.values()[c], found.values()[c]
        assert torch.equal(value.isnan(), index % 2 == 1)
        exact = c not in now or now.get(c) == then.get(c)
        torch.testing.assert_close(value, was, rtol=0, atol=0 if exact else BOUND, equal_nan=True)
        assert held[c].dtype == (torch.int16 if c in then else torch.float32)


def test_a_column_in_16_bits_without_its_code_is_refused():
    held = _filled(CODES).state_dict()
    del held["log_u_text.code"]
    with pytest.raises(ValueError, match=r"'log_u_text' is torch\.int16: a column in 16 bits has its code"):
        SampleState(N, COLUMNS).load_state_dict(held)


def _filled(codes=None):
    state = SampleState(N, COLUMNS, codes=codes)
    index = torch.arange(0, N, 2)
    values = {c: 20.0 * i + index.float() for i, c in enumerate(COLUMNS)}
    state.commit(StateUpdate(index, values))
    return state


def _save(path):
    dcp.save(_filled().state_dict(), checkpoint_id=path)


def _load(path):
    state = SampleState(N, COLUMNS)
    columns = state.state_dict()
    dcp.load(columns, checkpoint_id=path)
    state.load_state_dict(columns)
    k, r = collectives.world_size(), collectives.rank()
    own = torch.arange(r, N // k * k, k)
    _, fetched = state.fetch(own)
    return {c: v.numpy() for c, v in fetched.items()}, own.numpy()


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(4, 3), (4, 2), (4, 1), (1, 4)])
def test_reshards_to_another_world_size(tmp_path, saved_on, loaded_on):
    def run(k, function):
        return ranks(k).run(function, tmp_path) if k > 1 else [function(tmp_path)]

    run(saved_on, _save)
    loaded = run(loaded_on, _load)
    index = np.concatenate([own for _, own in loaded])
    for fetched, _ in loaded:
        for i, c in enumerate(COLUMNS):
            expected = np.where(index % 2 == 0, 20.0 * i + index, np.nan)
            np.testing.assert_array_equal(fetched[c], expected)


@pytest.mark.parametrize("bad", [-1, N, 10**12])
def test_an_index_outside_is_named_before_anything_is_written(bad):
    state = _filled()
    before = {c: v.clone() for c, v in state.state_dict().items()}
    with pytest.raises(IndexError, match=rf"index {bad} .*0\.\.{N - 1}"):
        state.fetch(torch.tensor([3, bad, 5]))
    for c, v in state.state_dict().items():
        np.testing.assert_array_equal(v, before[c])


def test_an_index_outside_that_could_not_be_checked_gives_no_finite_value():
    """As on a GPU, where the host would have to wait for the check."""
    state = _filled()
    with mock.patch.object(state, "check"):
        _, values = state.fetch(torch.tensor([4, N, -1]))
    for i, column in enumerate(COLUMNS):
        assert values[column].tolist() == [20.0 * i + 4, math.inf, math.inf]


def test_loading_refuses_other_columns_and_sizes():
    state = _filled()
    with pytest.raises(ValueError, match="lacks the columns"):
        state.load_state_dict({"log_u_image": torch.zeros(N)})
    with pytest.raises(ValueError, match="--data_size"):
        state.load_state_dict({c: torch.zeros(N + 1) for c in COLUMNS})
    with pytest.raises(ValueError, match="num_samples"):
        SampleState(0, COLUMNS)
