"""Lanes: the streams in which the samples of a run arrive, and which process reads which of them.

P virtual ranks times Q virtual workers make P x Q lanes, each named (p, q). Step t of an epoch takes its global
batch from the lanes (0, q) ... (P-1, q) with q = t mod Q: the same number of samples from each, lane after lane.
Which process reads a lane is a separate question: wherever the number of ranks K divides P and the number of
workers W divides Q, every rank and every worker has whole lanes, and the global batches, in the order in which the
ranks gather them, are the same for all such K and W.

The lanes of a run are fixed at its first launch: P is its number of ranks and Q its number of workers per rank,
unless ``--lanes P,Q`` sets them. Checkpoints keep them. K ranks with W workers each can take them over where K
divides P and W divides Q: rank r has P/K consecutive virtual ranks, and each of its workers has the virtual
workers of the steps that it prepares: worker w serves w, w + W, w + 2W and so on (``worker.TrainStream``).
"""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """``ranks`` virtual ranks times ``workers`` virtual workers."""

    ranks: int
    workers: int

    def __str__(self) -> str:
        return f"{self.ranks},{self.workers}"

    def misfit(self, ranks: int, workers: int, batch: int) -> str | None:
        """Why ``ranks`` with ``workers`` each cannot take over the lanes at this global ``batch``, or None."""
        if self.ranks % ranks:
            return f"{ranks} ranks do not divide {self.ranks} virtual ranks"
        if self.workers % max(workers, 1):
            return f"{workers} workers per rank do not divide {self.workers} virtual workers"
        if batch % self.ranks:
            return f"{self.ranks} virtual ranks do not divide a global batch of {batch} samples"
        return None


def default_layout(ranks: int, workers: int) -> Layout:
    """One lane for each loader process of each rank; a rank without loader processes has one lane."""
    return Layout(ranks, max(workers, 1))


class Part(NamedTuple):
    """Part ``number`` of ``parts`` of a set that is read once and in order: every ``parts``-th sample."""

    number: int
    parts: int

    def owns(self, position: int) -> bool:
        """Whether the sample at ``position`` of the list is in this part."""
        return position % self.parts == self.number


class Lane(NamedTuple):
    """Virtual rank ``rank`` of ``ranks`` and virtual worker ``worker`` of ``workers``.

    It serves the steps ``worker``, ``worker + workers``, … of an epoch, with ``share`` samples each.
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
    def lanes(self) -> int:
        return self.ranks * self.workers

    @property
    def batch(self) -> int:
        """The samples of a step, from all ranks."""
        return self.ranks * self.share

    def owns(self, position: int) -> bool:
        """Whether this lane delivers the sample at ``position`` of a list that is dealt to all lanes by sample.

        Step t has the positions t·B … (t+1)·B - 1, in order, whatever the lanes are.
        """
        step, place = divmod(position, self.batch)
        return step % self.workers == self.worker and place // self.share == self.rank

    def position(self, i: int) -> int:
        """The ``i``-th position that this lane owns."""
        turn, place = divmod(i, self.share)
        return (self.worker + turn * self.workers) * self.batch + self.rank * self.share + place

    def samples(self, steps: int) -> int:
        """How many samples this lane delivers in an epoch of ``steps``."""
        return len(range(self.worker, steps, self.workers)) * self.share
