from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from training.order import Lane, Piece, deal, draws, lane_of, permutation, seed_of, shuffled, slots


def test_the_published_order_does_not_drift():
    """These numbers define the order of every run: a change here is a change of all runs."""
    assert seed_of(0, 1, 2) == 8901564848246840783
    assert permutation(8, 2025, 3).tolist() == [0, 6, 4, 2, 1, 7, 5, 3]
    assert draws(6, (1.0, 2.0, 1.0), 7).tolist() == [1, 1, 1, 0, 0, 0]


def test_permutations_are_permutations_and_differ_by_key():
    orders = [permutation(100, *key) for key in ((0,), (1,), (0, 0), (0, 1))]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert seed_of(1, 2) != seed_of(2, 1) and seed_of(-1) < 2**64


def test_draws_follow_the_weights():
    frequencies = np.bincount(draws(40_000, (1, 3, 4), 0), minlength=3) / 40_000
    assert frequencies == pytest.approx([0.125, 0.375, 0.5], abs=0.01)  # 4 standard deviations


@pytest.mark.parametrize(("batch_size", "workers"), [(8, 1), (8, 3), (2, 6), (7, 7), (1, 4)])
def test_slots_fill_every_batch_and_load_workers_evenly(batch_size, workers):
    per_step = [[slots(t, batch_size, w, workers) for w in range(workers)] for t in range(20)]
    assert all(sum(step) == batch_size for step in per_step)
    totals = np.sum(per_step, axis=0)
    assert totals.max() - totals.min() <= 1
    owners = Counter((3 * batch_size + s) % workers for s in range(batch_size))
    assert per_step[3] == [owners[w] for w in range(workers)]


def test_a_list_dealt_by_sample_fills_the_global_batches_in_order():
    ranks, workers, batch_size = 2, 3, 5
    for rank in range(ranks):
        lanes = [lane_of(rank, ranks, w, workers) for w in range(workers)]
        streams = [iter(range(lane.number, 10**6, lane.count)) for lane in lanes]
        for step in range(7):
            got = [p for w in range(workers) for p in islice(streams[w], slots(step, batch_size, w, workers))]
            first = step * batch_size * ranks
            assert sorted(got) == list(range(first + rank, first + batch_size * ranks, ranks))


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 5, 7, 12, 13])
@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 8])
def test_shards_are_dealt_completely_and_evenly(shards, lanes):
    size = 24 * lanes  # equal shards that the lanes can share
    order = permutation(shards, 5).tolist()
    got = []
    for number in range(lanes):
        pieces = deal(order, Lane(number, lanes))
        samples = [(p.shard, i) for p in pieces for i in range(size) if p.holds(i)]
        assert len(samples) == shards * size // lanes
        assert len(pieces) <= shards // lanes + 2
        got += samples
    assert sorted(got) == [(shard, i) for shard in range(shards) for i in range(size)]


def test_pieces_of_short_shards_are_complete_too():
    pieces = [p for number in range(4) for p in deal([0, 1, 2], Lane(number, 4))]
    held = [(p.shard, i) for p in pieces for i in range(3) if p.holds(i)]
    assert sorted(held) == [(shard, i) for shard in range(3) for i in range(3)]
    assert Piece(0, 0, 1, 1).holds(12345)


def test_shuffling_in_windows():
    out = list(shuffled(range(25), 10, 1, 2))
    assert [sorted(out[i : i + 10]) for i in (0, 10, 20)] == [[*range(10)], [*range(10, 20)], [*range(20, 25)]]
    assert out[:10] != list(range(10)) and out[10:20] != [i + 10 for i in out[:10]]
    assert out == list(shuffled(iter(range(25)), 10, 1, 2)) != list(shuffled(range(25), 10, 1, 3))
    assert list(shuffled([], 10, 1)) == []


def test_shuffling_reads_one_window_ahead_at_most():
    read = []
    stream = shuffled((read.append(i) or i for i in range(100)), 10, 0)
    next(stream)
    assert len(read) == 10
