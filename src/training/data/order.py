"""The order of training samples, as pure functions of (seed, epoch, turn, lane).

A run's samples flow through **lanes**: virtual rank p of P times virtual worker q of Q. Step t of an epoch takes
its global batch from the lanes (0, q) … (P-1, q) with q = t mod Q, the same number from each, one after the other.
Who works for a lane is another matter: wherever K ranks divide P and W workers divide Q, every rank and worker has
whole lanes, and the global batches, in the order in which ranks gather them, are the same for all such K and W.

An epoch starts at turn 0, one pass over the data. A lane that has come to the end of its share goes on with
turns 1, 2, …, each in an order of its own, until the epoch's steps are full: no lane runs dry.

Randomness is a keyed hash (BLAKE2b) or a counter-based generator keyed by it (Philox), whose outputs are fixed by
their definitions: the order does not change with the release of a library or with what else draws random numbers.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ENDLESS = 2**62  # more than any shard has samples


class Part(NamedTuple):
    """Part ``number`` of ``count``, for sets that are read once and in order: every ``count``-th sample."""

    number: int
    count: int

    def owns(self, position: int) -> bool:
        """Whether the sample at ``position`` of the list is in this part."""
        return position % self.count == self.number


class Lane(NamedTuple):
    """Virtual rank ``rank`` of ``ranks`` and virtual worker ``worker`` of ``workers``.

    Of an epoch's steps it serves ``worker``, ``worker + workers``, …, with ``share`` samples each.
    """

    rank: int = 0
    ranks: int = 1
    worker: int = 0
    workers: int = 1
    share: int = 1

    @property
    def number(self) -> int:
        return self.worker * self.ranks + self.rank

    @property
    def count(self) -> int:
        return self.ranks * self.workers

    @property
    def batch(self) -> int:
        """Samples of a step, of all ranks."""
        return self.ranks * self.share

    def owns(self, position: int) -> bool:
        """Whether this lane delivers the sample at ``position`` of one list that is dealt to all by sample.

        Step t has the positions t·B … (t+1)·B - 1, in order, whatever the lanes.
        """
        step, place = divmod(position, self.batch)
        return step % self.workers == self.worker and place // self.share == self.rank

    def position(self, i: int) -> int:
        """The ``i``-th position that it owns."""
        turn, place = divmod(i, self.share)
        return (self.worker + turn * self.workers) * self.batch + self.rank * self.share + place

    def samples(self, steps: int) -> int:
        """How many samples it delivers in an epoch of ``steps``."""
        return len(range(self.worker, steps, self.workers)) * self.share


class Place(NamedTuple):
    """Where a lane stands in an epoch: ``taken`` samples into window ``window`` of turn ``turn``.

    ``before`` counts the epoch's samples ahead of this window. The window's first one is at ``position`` of the
    ``visit``-th shard of the turn, where its header begins at byte ``offset`` of the tar. Sources that have all
    their samples at hand use ``taken`` alone.
    """

    turn: int = 0
    window: int = 0
    before: int = 0
    visit: int = 0
    position: int = 0
    offset: int = 0
    taken: int = 0


BEGIN = Place()


class Piece(NamedTuple):
    """The samples at positions i of a shard with ``first <= i mod of < stop``."""

    shard: int
    first: int = 0
    stop: int = 1
    of: int = 1

    def holds(self, position: int) -> bool:
        """Whether the sample at ``position`` of the shard is in this piece."""
        return self.first <= position % self.of < self.stop

    def ends_before(self, position: int) -> bool:
        """Whether no sample from ``position`` on is in this piece."""
        return self.of == ENDLESS and position >= self.stop


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


def deal(shards: Sequence[int], lane: Lane) -> list[Piece]:
    """The lane's share of ``shards``: whole ones as long as all lanes get as many, then parts of the rest.

    Of the R = len(shards) mod L last ones each lane gets the R/L-th part, cut by position in the shard (L parts
    per shard, R of them in a row per lane), so that a lane opens two of them at most and none stays empty.
    """
    number, lanes = lane.number, lane.count
    evenly = len(shards) // lanes * lanes
    pieces = [Piece(shard) for shard in shards[number:evenly:lanes]]
    rest = shards[evenly:]
    begin, end = number * len(rest), (number + 1) * len(rest)
    for r, shard in enumerate(rest):
        first, stop = max(begin - r * lanes, 0), min(end - r * lanes, lanes)
        if first < stop:
            pieces.append(Piece(shard, first, stop, lanes))
    return pieces


def deal_exactly(shards: Sequence[int], sizes: Sequence[int], lane: Lane, steps: int) -> list[Piece]:
    """As many samples as the lane delivers in ``steps``, and no other lane the same ones.

    ``sizes``: samples per shard number. The shards in a row are cut into the lanes' shares by sample, so that a
    lane opens two shards in part at most.
    """
    begin = sum(Lane(0, lane.ranks, w, lane.workers, lane.batch).samples(steps) for w in range(lane.worker))
    begin += lane.rank * lane.samples(steps)
    end = begin + lane.samples(steps)
    ends = np.cumsum([sizes[shard] for shard in shards])
    pieces = []
    for i in range(np.searchsorted(ends, begin, side="right"), len(shards)):
        start = int(ends[i]) - sizes[shards[i]]
        if start >= end:
            break
        pieces.append(Piece(shards[i], max(begin - start, 0), min(end - start, sizes[shards[i]]), ENDLESS))
    return pieces


def _generator(*key: int) -> np.random.Philox:
    return np.random.Philox(key=seed_of(*key))
