"""The order of training samples, as pure functions of (seed, epoch, turn, lane).

A run's samples flow through **lanes**, one per loader process: rank ``r`` of ``K`` with workers ``0..W-1`` has the
lanes ``q·K + r``. Slot ``j`` of a rank's endless row of batch places is filled by its worker ``j mod W``, so every
lane gives its share to every step, and one ordered list dealt by ``position mod (K·W)`` puts position ``i`` into
slot ``i // K`` of rank ``i mod K``: whatever K and W are, step t takes positions ``t·B .. (t+1)·B - 1``.

An epoch starts at turn 0, one pass over the data. A lane that has come to the end of its share goes on with
turns 1, 2, …, each in an order of its own, until the epoch's steps are full: no lane runs dry.

Randomness is a keyed hash (BLAKE2b) or a counter-based generator keyed by it (Philox), whose outputs are fixed by
their definitions: the order does not change with the release of a library or with what else draws random numbers.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from typing import NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class Lane(NamedTuple):
    """Lane ``number`` of ``count``."""

    number: int
    count: int


class Piece(NamedTuple):
    """The samples at positions i of a shard with ``first <= i mod of < stop``."""

    shard: int
    first: int
    stop: int
    of: int

    def holds(self, position: int) -> bool:
        """Whether the sample at ``position`` of the shard is in this piece."""
        return self.first <= position % self.of < self.stop


def lane_of(rank: int, ranks: int, worker: int, workers: int) -> Lane:
    """The lane of one loader process, so that position i of an order fills slot i // K of rank i mod K."""
    return Lane(worker * ranks + rank, workers * ranks)


def seed_of(*parts: int) -> int:
    """An unsigned 64-bit seed for ``parts``, integers in the range of int64."""
    return int.from_bytes(
        hashlib.blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=8).digest(), "little"
    )


def permutation(n: int, *key: int) -> np.ndarray:
    """A random order of 0..n-1, int64 [n], fixed by ``key``: the argsort of n words of the generator."""
    return np.argsort(_generator(*key).random_raw(n), kind="stable")


def draws(n: int, weights: Sequence[float], *key: int) -> np.ndarray:
    """``n`` draws with replacement of 0..len(weights)-1, by ``weights``, fixed by ``key``; int64 [n]."""
    uniform = (_generator(*key).random_raw(n) >> np.uint64(11)) * 2.0**-53
    ends = np.cumsum(np.asarray(weights, dtype=np.float64))
    return np.searchsorted(ends / ends[-1], uniform, side="right")


def slots(step: int, batch_size: int, worker: int, workers: int) -> int:
    """How many of the rank's ``batch_size`` places of this step its worker fills; every place is filled by one."""

    def filled_before(slot: int) -> int:
        return (slot - worker + workers - 1) // workers

    return filled_before((step + 1) * batch_size) - filled_before(step * batch_size)


def deal(shards: Sequence[int], lane: Lane) -> list[Piece]:
    """The lane's share of ``shards``: whole ones as long as all lanes get as many, then parts of the rest.

    Of the R = len(shards) mod L last ones each lane gets the R/L-th part, cut by position in the shard (L parts
    per shard, R of them in a row per lane), so that a lane opens two of them at most and none stays empty.
    """
    number, lanes = lane
    evenly = len(shards) // lanes * lanes
    pieces = [Piece(shard, 0, 1, 1) for shard in shards[number:evenly:lanes]]
    rest = shards[evenly:]
    begin, end = number * len(rest), (number + 1) * len(rest)
    for r, shard in enumerate(rest):
        first, stop = max(begin - r * lanes, 0), min(end - r * lanes, lanes)
        if first < stop:
            pieces.append(Piece(shard, first, stop, lanes))
    return pieces


def shuffled(samples: Iterable[T], window: int, *key: int) -> Iterator[T]:
    """``samples`` in windows of ``window``, each in a random order fixed by ``key`` and the window's number."""
    samples = iter(samples)
    for number in count():
        block: list[T | None] = list(islice(samples, window))
        if not block:
            return
        for i in permutation(len(block), *key, number):
            sample, block[i] = block[i], None  # what has been read is no longer held here
            yield sample


def _generator(*key: int) -> np.random.Philox:
    return np.random.Philox(key=seed_of(*key))
