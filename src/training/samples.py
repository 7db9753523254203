"""What the sources of samples (shards, csv, synthetic) hand to the loader, and what they report as unusable."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from PIL import Image

from training.order import Lane

log = logging.getLogger(__name__)

LIMIT_IN_A_ROW = 20_000  # more than one bad shard, or a disk that was away for a while, can explain


class RawSample(NamedTuple):
    """One sample before decoding.

    ``image`` is an encoded image, the path of one, or the picture itself; ``index`` its row of the sample state
    (negative where the run keeps no state: then only a name of the sample); ``turn`` tells the visits of one epoch
    apart; ``name`` is for messages.
    """

    image: bytes | str | Image.Image
    text: str
    index: int
    turn: int
    name: str


class NothingUsable(ValueError):
    """The data is readable by name only: what came was left out, without a usable sample in between."""


@dataclass
class Skips:
    """Samples left out, by reason, and the first name of each reason; a lane's own count."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    in_a_row: int = 0

    def add(self, reason: str, name: str) -> None:
        """Count one."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, name)
        self.in_a_row += 1

    def check(self) -> None:
        """NothingUsable: far too many in a row."""
        if self.in_a_row > LIMIT_IN_A_ROW:
            raise NothingUsable(f"{self.in_a_row} samples or shards in a row are unusable: {self}")

    def take(self) -> Skips:
        """What has been counted since the last call."""
        taken = Skips(self.counts.copy(), self.examples.copy())
        self.counts.clear()
        self.examples.clear()
        return taken

    def __str__(self) -> str:
        reasons = (f"{n} {reason} (e.g. {self.examples[reason]})" for reason, n in self.counts.most_common())
        return ", ".join(reasons) or "none"


class SkipLog:
    """The run's count of skipped samples. Logs it when a reason is new and whenever the total has doubled."""

    def __init__(self) -> None:
        self.total = Skips()
        self._next_report = 1

    def update(self, skips: Skips) -> None:
        """Add what a lane has counted, and log if it is time to."""
        if not skips.counts:
            return
        new_reason = bool(skips.counts.keys() - self.total.counts.keys())
        self.total.counts.update(skips.counts)
        self.total.examples = {**skips.examples, **self.total.examples}
        seen = self.total.counts.total()
        if new_reason or seen >= self._next_report:
            log.warning("skipped %d samples so far: %s", seen, self.total)
            while self._next_report <= seen:
                self._next_report *= 2


class Source(Protocol):
    """Training data as a stream of samples in a fixed order. Picklable: loader processes get a copy."""

    def stream(self, epoch: int, lane: Lane, skips: Skips) -> Iterator[RawSample | None]:
        """The lane's samples of an epoch, turn after turn without an end; None at the end of every turn.

        Unusable samples are counted in ``skips`` and left out; ``skips.check()`` between shards stops a source in
        which there is nothing else.
        """

    def describe(self, lanes: int) -> str:
        """One line for the log: what there is and how it is dealt to ``lanes`` lanes."""
