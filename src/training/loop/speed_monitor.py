"""How fast steps are, and whether the loader keeps up: a warning, with advice, where steps wait for data.

The time that ``Data (t)`` shows is what a step waited for its batch. On a GPU steps run behind the program that
queues them, so a wait is lost time only as far as the queue ran empty; a loader that is fast enough shows none.
"""

from __future__ import annotations

import logging
import os
import time

logger = logging.getLogger(__name__)

SHARE = 0.2  # of the time, in waiting, that is worth a word
_EVERY = 10  # log lines from one warning to the next


class DataWait:
    """Follows the share of the time that went into waiting, log line by log line.

    ``workers``: loader processes of a rank; ``ranks``: those of this machine, which share its ``cores``.
    """

    def __init__(self, workers: int, ranks: int, cores: int | None = None) -> None:
        self.workers, self.ranks = workers, ranks
        self.cores = cores or len(os.sched_getaffinity(0))
        self._quiet = 0

    def update(self, waited: float, total: float, first: bool = False) -> None:
        """``waited`` of ``total`` seconds; the ``first`` line of an epoch, when queues fill up, does not count."""
        if first:
            return
        share = waited / total
        if share > SHARE and self._quiet == 0:
            logger.warning(
                f"the loader is the bottleneck: {share:.0%} of the time goes into waiting for data; {self.advice}"
            )
            self._quiet = _EVERY
        self._quiet = max(self._quiet - 1, 0)

    @property
    def advice(self) -> str:
        """What can be done about it here."""
        if self.workers == 0:
            return "--workers 0 decodes between the steps, give --workers 1 or more"
        if self.workers * self.ranks < self.cores:
            return (
                f"raise --workers {self.workers}: {self.ranks} rank(s) with {self.workers} processes each leave "
                f"cores of {self.cores} idle"
            )
        return (
            f"all {self.cores} cores have work with {self.ranks} x {self.workers} processes: store smaller images "
            "in the shards, give the job more cores, or see whether the disk or network is what is slow"
        )


class StepTimes:
    """Wall time since the last log line, and the share of it that went into waiting for data."""

    def __init__(self, first: bool = False) -> None:
        self.first = first
        self._last = time.perf_counter()
        self._waited, self._worked, self._steps = 0.0, 0.0, 0

    def loaded(self) -> None:
        self._waited += self._lap()

    def stepped(self) -> None:
        self._worked += self._lap()
        self._steps += 1

    def resumed(self) -> None:
        """What has passed since ``stepped``, with a checkpoint perhaps, is neither."""
        self._lap()

    def seconds(self) -> float:
        """Per step, up to now."""
        self._worked += self._lap()
        return max(self._waited + self._worked, 1e-9) / self._steps

    def data_seconds(self) -> float:
        """Per step, waiting for the loader."""
        return self._waited / self._steps

    def _lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
