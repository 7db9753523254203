"""Samples that cannot be used: counted, named, and how many of them end a run.

Bad samples are left out, counted by reason and named. Each is counted when the order comes to it, together with
the good one beside it: what has been read ahead, or is read once more after a resume, changes no count. Too many
end the run. Two guards see to that: a loader process gives up where a whole allowance of bad samples comes in a
row (``NothingUsable``: it would search on without a word), and the run ends where the allowance is used up within
a window of samples (``Tolerance``).
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from training.data.samples import Fault, Item, RawSample

log = logging.getLogger(__name__)

WINDOW = range(1_000, 100_000)  # shortest and longest window of samples that bad ones are a share of


class NothingUsable(ValueError):
    """The data is readable by name only: what came was left out, without a usable sample in between."""


class TooManyBad(ValueError):
    """More of the data is bad than ``--max_bad_fraction`` allows."""


class WrongRow(ValueError):
    """A sample and its row do not belong together.

    Two samples share the row, or what is stored under it is missing or another sample's.
    """


class Allowance(NamedTuple):
    """``--max_bad_fraction``: of any ``window`` samples in a row, ``fraction`` may be bad."""

    fraction: float = 1.0
    window: int = WINDOW.start

    @property
    def samples(self) -> int:
        """How many bad samples a window may hold."""
        return int(self.fraction * self.window)


def allowance(fraction: float, samples_per_epoch: int) -> Allowance:
    """The window is an epoch of one rank, within ``WINDOW``: long, so that one spoiled shard is no disaster."""
    return Allowance(fraction, min(max(samples_per_epoch, WINDOW.start), WINDOW.stop))


@dataclass
class Skips:
    """Samples left out, by reason, and the first name of each reason; a lane's own count.

    More than ``limit`` in a row are too many; whoever finds a good one sets ``in_a_row`` back.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    in_a_row: int = 0
    limit: int = WINDOW.stop

    def add(self, reason: str, name: str) -> None:
        """Count one."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, name)
        self.in_a_row += 1

    def extend(self, faults: Iterable[Fault]) -> None:
        """Count some."""
        for fault in faults:
            self.add(*fault)

    def merge(self, other: Skips) -> None:
        """Add what another one has counted; the earlier example of a reason stays."""
        self.counts.update(other.counts)
        self.examples = {**other.examples, **self.examples}

    def check(self) -> None:
        """NothingUsable: far too many in a row."""
        if self.in_a_row > self.limit:
            raise NothingUsable(
                f"--max_bad_fraction: {self.in_a_row} samples or shards in a row are unusable; left out: {self}"
            )

    def take(self) -> Skips:
        """What has been counted since the last call."""
        taken = Skips(self.counts.copy(), self.examples.copy())
        self.counts.clear()
        self.examples.clear()
        return taken

    def __str__(self) -> str:
        reasons = (f"{n} {reason} (e.g. {self.examples[reason]})" for reason, n in self.counts.most_common())
        return ", ".join(reasons) or "none"


class Tolerance:
    """Ends the run where too much of the data is bad.

    Bad samples are compared with what a full window may hold, so that three bad ones among the first ten do not
    end a run, and a flood of them does at once.
    """

    def __init__(self, allowed: Allowance) -> None:
        self.allowed = allowed
        self._recent: deque[tuple[int, int]] = deque()
        self._bad = self._seen = 0

    def update(self, used: int, skips: Skips) -> None:
        """TooManyBad: the samples ``used`` and left out since the last call make it so."""
        bad = skips.counts.total()
        self._recent.append((bad, used + bad))
        self._bad += bad
        self._seen += used + bad
        while len(self._recent) > 1 and self._seen - self._recent[0][1] >= self.allowed.window:
            old_bad, old_seen = self._recent.popleft()
            self._bad -= old_bad
            self._seen -= old_seen
        if self._bad > self.allowed.samples and self.allowed.fraction < 1:
            raise TooManyBad(
                f"--max_bad_fraction {self.allowed.fraction:g}: {self._bad} of the last {self._seen} samples are "
                f"unusable, more than {self.allowed.samples} in {self.allowed.window}; lately: {skips}. "
                "Mend the data (python -m training.check_data names what is wrong with it), or allow more"
            )


class SkipLog:
    """The run's count of skipped samples. Logs it when a reason is new and whenever the total has doubled."""

    def __init__(self, allowed: Allowance | None = None) -> None:
        self.total = Skips()
        self._epoch = Skips()
        self._tolerance = Tolerance(allowed or Allowance())
        self._next_report = 1

    def update(self, skips: Skips, used: int = 0) -> None:
        """Add what a lane has left out while it delivered ``used`` samples, and log if it is time to.

        TooManyBad: that makes too many.
        """
        if skips.counts:
            new_reason = bool(skips.counts.keys() - self.total.counts.keys())
            self.total.merge(skips)
            self._epoch.merge(skips)
            seen = self.total.counts.total()
            if new_reason or seen >= self._next_report:
                log.warning("skipped %d samples so far: %s", seen, str(self.total))
                while self._next_report <= seen:
                    self._next_report *= 2
        self._tolerance.update(used, skips)

    def take_epoch(self) -> Skips:
        """What has been left out since the last call."""
        return self._epoch.take()


def usable(items: Iterable[Item], skips: Skips) -> Iterator[RawSample]:
    """The samples of ``items``; their faults are counted in ``skips``."""
    for item in items:
        skips.extend(item.faults)
        if item.sample is not None:
            yield item.sample
