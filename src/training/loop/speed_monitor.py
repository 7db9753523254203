"""The speed of steps, and a warning with advice if they wait for data.

``Data (t)`` in the log is the time that a step waited for its batch. A GPU runs steps later than the program
queues them, so a wait is lost time only if the queue became empty. A loader that is fast enough causes no waits.
"""

from __future__ import annotations

import logging
import time

from training.machine import limits

logger = logging.getLogger(__name__)

SHARE = 0.2  # the share of the time spent waiting above which a warning is logged
_EVERY = 10  # the least number of log lines from one warning to the next


class DataWait:
    """Checks at each log line which share of the time was spent waiting for data.

    ``workers``: loader processes of each rank. ``ranks``: the ranks on this machine, which share its ``cores``.
    """

    def __init__(self, workers: int, ranks: int, cores: int | None = None) -> None:
        self.workers, self.ranks = workers, ranks
        self.cores = cores or limits.cores()
        self._quiet = 0

    def update(self, waited: float, total: float, first: bool = False) -> None:
        """``waited`` of ``total`` seconds were spent waiting. The ``first`` line of an epoch does not count.

        Before it the queues fill up.
        """
        if first:
            return
        share = waited / total
        if share > SHARE and self._quiet == 0:
            logger.warning(
                f"the loader is the bottleneck: {share:.0%} of the time is spent waiting for data; {self.advice}"
            )
            self._quiet = _EVERY
        self._quiet = max(self._quiet - 1, 0)

    @property
    def advice(self) -> str:
        """What the user can do about it on this machine."""
        if self.workers == 0:
            return "with --workers 0 samples are decoded between the steps, so give --workers 1 or more"
        if self.workers * self.ranks < self.cores:
            return (
                f"raise --workers {self.workers}: {self.ranks} rank(s) with {self.workers} processes each leave "
                f"some of the {self.cores} cores idle"
            )
        return (
            f"all {self.cores} cores are in use by {self.ranks} x {self.workers} processes: store smaller images "
            "in the shards, give the job more cores, or check whether the disk or the network is slow"
        )


class StepTimes:
    """The wall time since the last log line, and how much of it was spent waiting for data."""

    def __init__(self, first: bool = False) -> None:
        self.first = first
        self._last = time.perf_counter()
        self._waited, self._worked, self._steps = 0.0, 0.0, 0

    def loaded(self) -> None:
        """Call this when a step has its batch."""
        self._waited += self._lap()

    def stepped(self) -> None:
        """Call this when a step is done."""
        self._worked += self._lap()
        self._steps += 1

    def resumed(self) -> None:
        """Ignore the time since ``stepped``, in which a checkpoint may have been saved."""
        self._lap()

    def seconds(self) -> float:
        """Seconds per step, up to now."""
        self._worked += self._lap()
        return max(self._waited + self._worked, 1e-9) / self._steps

    def data_seconds(self) -> float:
        """Seconds per step spent waiting for the loader."""
        return self._waited / self._steps

    def _lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
