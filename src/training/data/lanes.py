"""Lanes: the streams that a run's samples flow through, and who works for which of them.

Virtual rank p of P times virtual worker q of Q make P x Q lanes. Step t of an epoch takes its global batch from
the lanes (0, q) ... (P-1, q) with q = t mod Q, the same number of samples from each, one after the other. Who
works for a lane is another matter: wherever K ranks divide P and W workers divide Q, every rank and worker has
whole lanes, and the global batches, in the order in which ranks gather them, are the same for all such K and W.

The lanes of a run are fixed at its first launch, P = its ranks and Q = its workers per rank, unless
``--lanes P,Q`` says otherwise, and kept in its checkpoints. K ranks and W workers can take them over where K
divides P and W divides Q: rank r has P/K virtual ranks in a row, and each of its workers the virtual workers of
those steps that it prepares, every W-th.
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
        """Why ``ranks`` of ``workers`` each cannot take the lanes over with this global ``batch``, or None."""
        if self.ranks % ranks:
            return f"{ranks} ranks do not divide {self.ranks} virtual ones"
        if self.workers % max(workers, 1):
            return f"{workers} workers per rank do not divide {self.workers} virtual ones"
        if batch % self.ranks:
            return f"a global batch of {batch} samples cannot be shared by {self.ranks} virtual ranks"
        return None


def default_layout(ranks: int, workers: int) -> Layout:
    """One lane for each loader process of each rank; without such processes the rank itself has one."""
    return Layout(ranks, max(workers, 1))


class Part(NamedTuple):
    """Part ``number`` of ``parts``, for sets that are read once and in order: every ``parts``-th sample."""

    number: int
    parts: int

    def owns(self, position: int) -> bool:
        """Whether the sample at ``position`` of the list is in this part."""
        return position % self.parts == self.number


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
    def lanes(self) -> int:
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
