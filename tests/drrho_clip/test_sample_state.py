"""The sharded table compared with a replicated one; resharding; the errors."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from drrho_clip import collectives
from drrho_clip.sample_state import SampleState, StateUpdate
from tests.support.ranks import ranks

COLUMNS = ("log_u_image", "log_u_text", "tau_image")
N = 37  # rows do not divide evenly over 2, 3 or 4 ranks


def _batches(steps, b, k, seed=0):
    """The same random global batches on every rank: indices [k * b] with repeats, values for distinct indices."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        index = torch.from_numpy(rng.integers(0, N - 5, k * b))  # the last rows are never seen
        table = torch.from_numpy(rng.normal(size=(len(COLUMNS), N)).astype(np.float32))
        yield index, {c: table[i][index] for i, c in enumerate(COLUMNS)}


def _against_replicated(steps, b):
    """Take the same steps with the sharded and with a replicated table, and compare every fetch bit for bit."""
    k, r = collectives.world_size(), collectives.rank()
    sharded = SampleState(N, COLUMNS)
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
                replicated[c][index] = values[c]
    seen = ~replicated["tau_image"].isnan()
    assert 0 < seen.sum() <= N - 5
    return sharded.bytes_per_rank


@pytest.mark.parametrize("k", [1, 2, 4])
def test_equals_a_replicated_table(k):
    run = ranks(k).run if k > 1 else lambda f, *a: [f(*a)]
    sizes = run(_against_replicated, 60, 6)
    assert sum(sizes) == 4 * N * len(COLUMNS)
    assert max(sizes) == 4 * -(-N // k) * len(COLUMNS)


def _filled():
    state = SampleState(N, COLUMNS)
    index = torch.arange(0, N, 2)
    values = {c: 100.0 * i + index.float() for i, c in enumerate(COLUMNS)}
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
            expected = np.where(index % 2 == 0, 100.0 * i + index, np.nan)
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
        assert values[column].tolist() == [100.0 * i + 4, math.inf, math.inf]


def test_loading_refuses_other_columns_and_sizes():
    state = _filled()
    with pytest.raises(ValueError, match="lacks the columns"):
        state.load_state_dict({"log_u_image": torch.zeros(N)})
    with pytest.raises(ValueError, match="--data_size"):
        state.load_state_dict({c: torch.zeros(N + 1) for c in COLUMNS})
    with pytest.raises(ValueError, match="num_samples"):
        SampleState(0, COLUMNS)
