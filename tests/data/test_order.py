from __future__ import annotations

import numpy as np
import pytest

from training.data.lanes import Lane
from training.data.order import Piece, deal, deal_exactly
from training.rng import draws, permutation, seed_of


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


@pytest.mark.parametrize(("ranks", "workers", "share"), [(1, 1, 3), (2, 3, 5), (3, 2, 1), (4, 1, 2)])
def test_a_list_dealt_by_sample_fills_the_global_batches_in_order(ranks, workers, share):
    batch = ranks * share
    lanes = [Lane(p, ranks, q, workers, share) for q in range(workers) for p in range(ranks)]
    assert [lane.number for lane in lanes] == list(range(lanes[0].lanes))
    owner = {}
    for lane in lanes:
        own = [i for i in range(20 * batch) if lane.owns(i)]
        assert own == [lane.position(k) for k in range(len(own))]
        assert len(own) == lane.samples(20)
        owner |= dict.fromkeys(own, lane)
    for step in range(20):
        places = range(step * batch, (step + 1) * batch)
        assert [owner[i].rank for i in places] == [p for p in range(ranks) for _ in range(share)]
        assert {owner[i].worker for i in places} == {step % workers}


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
    assert Piece(0).holds(12345)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 1), (1, 3), (4, 2)])
def test_dealing_exactly_gives_every_lane_what_it_delivers(ranks, workers):
    sizes = [7, 1, 0, 30, 12, 5, 5]
    steps, share = sum(sizes) // (ranks * 2), 2
    got = []
    for q in range(workers):
        for p in range(ranks):
            lane = Lane(p, ranks, q, workers, share)
            pieces = deal_exactly(permutation(7, 3), sizes, lane, steps)
            own = [(piece.shard, i) for piece in pieces for i in range(sizes[piece.shard]) if piece.holds(i)]
            assert len(own) == lane.samples(steps)
            assert all(piece.ends_before(i) for piece in pieces for i in range(piece.stop, 40))
            partial = [piece for piece in pieces if (piece.first, piece.stop) != (0, sizes[piece.shard])]
            assert len(partial) <= 2
            got += own
    assert len(set(got)) == len(got) == steps * ranks * share
