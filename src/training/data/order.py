"""How the shards of a turn, in the order in which the source visits them, are dealt to the lanes.

An epoch starts with turn 0, one pass over the data. A lane that reaches the end of its share continues with turns
1, 2, …, each in an order of its own, until the epoch's steps are full: no lane runs out of samples. (Small data
sets are dealt one sample at a time instead, see ``Lane.owns``. What a lane does with its share of the shards is
decided by the source, see ``sources.webdataset``.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from training.data.lanes import Lane

ENDLESS = 2**62  # more than any shard has samples


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


def deal(shards: Sequence[int] | np.ndarray, lane: Lane) -> list[Piece]:
    """The lane's share of ``shards``: whole shards as long as all lanes get equally many, then parts of the rest.

    Each of the last R = len(shards) mod L shards is cut by position into L parts, and each of the L lanes gets R
    consecutive parts. A lane therefore opens at most two of these shards, and no lane is left without samples.
    """
    number, lanes = lane.number, lane.lanes
    evenly = len(shards) // lanes * lanes
    pieces = [Piece(shard) for shard in shards[number:evenly:lanes]]
    rest = shards[evenly:]
    begin, end = number * len(rest), (number + 1) * len(rest)
    for r, shard in enumerate(rest):
        first, stop = max(begin - r * lanes, 0), min(end - r * lanes, lanes)
        if first < stop:
            pieces.append(Piece(shard, first, stop, lanes))
    return pieces


def deal_exactly(shards: Sequence[int] | np.ndarray, sizes: Sequence[int], lane: Lane, steps: int) -> list[Piece]:
    """As many samples as the lane delivers in ``steps``, none of which goes to another lane.

    ``sizes``: samples per shard number. The sequence of shards is cut into the lanes' shares by sample, so that a
    lane reads at most two shards in part.
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
