"""Samples that cannot be used: they are counted and named, and too many of them end the run.

Bad samples are left out, counted by reason and named. Each is counted when the order reaches it, together with the
good sample next to it: samples that are read ahead, or read again after a resume, change no count. Two checks end
the run: a loader process gives up when it meets more bad samples in a row than a window may have
(``NothingUsable``; otherwise it would keep searching without a message), and the run ends when a window of samples
has more bad ones than it may have (``Tolerance``).
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from training.data.samples import Fault, Item, RawSample

log = logging.getLogger(__name__)

REPAIR = "Repair the data (python -m training.check_data lists its faults)"
WINDOW = range(1_000, 100_000)  # shortest and longest window, in samples; bad samples may be a share of it


class NothingUsable(ValueError):
    """Too much data in a row was left out, without a usable sample in between."""


class TooManyBad(ValueError):
    """More of the data is bad than ``--max_bad_fraction`` allows."""


class WrongRow(ValueError):
    """A sample and its row do not belong together.

    Two samples share the row, or the values stored under it are missing or belong to another sample.
    """


class Allowance(NamedTuple):
    """``--max_bad_fraction``: of any ``window`` samples in a row, the share ``fraction`` may be bad."""

    fraction: float = 1.0
    window: int = WINDOW.start

    @property
    def samples(self) -> int:
        """How many bad samples a window may have."""
        return int(self.fraction * self.window)


def allowance(fraction: float, samples_per_epoch: int) -> Allowance:
    """The window is an epoch of one rank, within ``WINDOW``: one bad shard must not end the run."""
    return Allowance(fraction, min(max(samples_per_epoch, WINDOW.start), WINDOW.stop))


@dataclass
class Skips:
    """Samples that were left out, counted by reason, with an example of each reason.

    It is the first one of which more is known than the reason, or else the first one. More than ``limit`` in a row
    are too many; the code that finds a good sample sets ``in_a_row`` to 0.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    explained: set[str] = field(default_factory=set)
    in_a_row: int = 0
    limit: int = WINDOW.stop

    def add(self, reason: str, name: str, why: str = "") -> None:
        """Count a sample or shard that is left out because of ``reason``; ``why`` says more."""
        self.counts[reason] += 1
        self._example(reason, f"{name}: {why}" if why else name, explained=bool(why))
        self.in_a_row += 1

    def extend(self, faults: Iterable[Fault]) -> None:
        """Count each of ``faults``."""
        for fault in faults:
            self.add(*fault)

    def merge(self, other: Skips) -> None:
        """Add the counts of ``other``; the earlier example of a reason is kept."""
        self.counts.update(other.counts)
        for reason, example in other.examples.items():
            self._example(reason, example, explained=reason in other.explained)

    def check(self) -> None:
        """NothingUsable: there are more than ``limit`` in a row."""
        if self.in_a_row > self.limit:
            raise NothingUsable(
                f"--max_bad_fraction: {self.in_a_row} samples or shards in a row are unusable; left out: {self}. "
                f"{REPAIR}, or raise the fraction"
            )

    def take(self) -> Skips:
        """The counts since the last call."""
        taken = Skips(self.counts.copy(), self.examples.copy(), self.explained.copy())
        self.counts.clear()
        self.examples.clear()
        self.explained.clear()
        return taken

    def held(self) -> dict[str, Any]:
        """The same as plain values, for a checkpoint."""
        return {
            "counts": dict(self.counts),
            "examples": dict(self.examples),
            "explained": sorted(self.explained),
        }

    @classmethod
    def of(cls, held: Mapping[str, Any]) -> Skips:
        """The inverse of ``held``."""
        return cls(Counter(held["counts"]), dict(held["examples"]), set(held["explained"]))

    def _example(self, reason: str, example: str, *, explained: bool) -> None:
        if reason not in self.examples or (explained and reason not in self.explained):
            self.examples[reason] = example
        if explained:
            self.explained.add(reason)

    def __str__(self) -> str:
        reasons = (f"{n} {reason} (e.g. {self.examples[reason]})" for reason, n in self.counts.most_common())
        return ", ".join(reasons) or "none"


class Tolerance:
    """Ends the run when too much of the data is bad.

    Bad samples are compared with what a full window may have, so that three bad ones among the first ten do not
    end a run, while a flood of them ends it at once.
    """

    def __init__(self, allowed: Allowance) -> None:
        self.allowed = allowed
        self._recent: deque[tuple[int, int]] = deque()
        self._bad = self._seen = 0

    def update(self, used: int, skips: Skips) -> None:
        """Add the samples ``used`` and left out since the last call. TooManyBad: the window has too many."""
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
                f"unusable, more than {self.allowed.samples} in {self.allowed.window}; the latest are {skips}. "
                f"{REPAIR}, or raise the fraction"
            )


class SkipLog:
    """The run's count of skipped samples. It is logged when a reason is new and whenever the total has doubled."""

    def __init__(self, allowed: Allowance | None = None) -> None:
        self.total = Skips()
        self.epoch = Skips()  # since the last ``take_epoch``; a resume inside an epoch begins with what it had
        self._tolerance = Tolerance(allowed or Allowance())
        self._next_report = 1

    def update(self, skips: Skips, used: int = 0) -> None:
        """Add what a lane has left out while it delivered ``used`` samples, and log the count if it is time.

        TooManyBad: the window then has too many bad samples.
        """
        if skips.counts:
            new_reason = bool(skips.counts.keys() - self.total.counts.keys())
            self.total.merge(skips)
            self.epoch.merge(skips)
            seen = self.total.counts.total()
            if new_reason or seen >= self._next_report:
                log.warning("skipped %d samples so far: %s", seen, str(self.total))
                while self._next_report <= seen:
                    self._next_report *= 2
        self._tolerance.update(used, self._explained(skips))

    def take_epoch(self) -> Skips:
        """The samples left out since the last call."""
        return self.epoch.take()

    def _explained(self, skips: Skips) -> Skips:
        """``skips`` with earlier examples of its reasons, where more is known of those."""
        unknown = skips.counts.keys() - skips.explained
        earlier = {reason: self.total.examples[reason] for reason in unknown & self.total.explained}
        return Skips(skips.counts, skips.examples | earlier) if earlier else skips


def usable(items: Iterable[Item], skips: Skips) -> Iterator[RawSample]:
    """The samples of ``items``; their faults are counted in ``skips``."""
    for item in items:
        skips.extend(item.faults)
        if item.sample is not None:
            yield item.sample
