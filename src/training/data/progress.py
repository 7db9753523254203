"""Where the lanes of a run stand: the part of its state that is about data, as plain values for a checkpoint.

A place is valid in one order of samples only. So the state contains what that order depends on (``Identity``), and
a run with a different order can notice it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from training.data.lanes import Layout


class Place(NamedTuple):
    """Where a lane stands in an epoch: ``taken`` samples into window ``window`` of turn ``turn``.

    ``before`` is the number of the epoch's samples before this window. The first sample of the window is at
    ``position`` of the ``visit``-th shard of the turn, and its header begins at byte ``offset`` of the tar.
    Sources that can read any sample directly only use ``taken``.
    """

    turn: int = 0
    window: int = 0
    before: int = 0
    visit: int = 0
    position: int = 0
    offset: int = 0
    taken: int = 0


BEGIN = Place()
VERSION = 1  # of the packed state


@dataclass
class Progress:
    """Where a stream stands: ``step`` steps into ``epoch``, with the ``places`` of the lanes that have begun it.

    Lanes are named by (virtual rank, virtual worker).
    """

    epoch: int = 0
    step: int = 0
    places: dict[tuple[int, int], Place] = field(default_factory=dict)


@dataclass(frozen=True)
class Identity:
    """What the order of samples depends on. If any of it differs, places belong to another order."""

    layout: Layout
    seed: int
    steps_per_epoch: int
    global_batch: int
    source: Sequence[str | int]

    def difference(self, state: Mapping[str, Any]) -> str | None:
        """What differs from this order in ``state``, which ``pack`` made; None if it is of this order."""
        theirs, ours = self._fields(state), self._fields(self.held())
        names = [f"{name} ({theirs[name]} then, {ours[name]} now)" for name in ours if theirs[name] != ours[name]]
        return ", ".join(names) or None

    def held(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "version": VERSION,
            "lanes": list(self.layout),
            "seed": self.seed,
            "steps_per_epoch": self.steps_per_epoch,
            "global_batch": self.global_batch,
            "source": list(self.source),
        }

    def _fields(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return {name.replace("_", " "): state.get(name) for name in self.held()}


def pack(identity: Identity, parts: Sequence[Progress]) -> dict[str, Any]:
    """The state of a stream from the ``parts`` of all ranks: plain values, for a checkpoint."""
    places = {name: place for part in parts for name, place in part.places.items()}
    return {
        **identity.held(),
        "epoch": parts[0].epoch,
        "step": parts[0].step,
        "places": [{"lane": list(name), **place._asdict()} for name, place in sorted(places.items())],
    }


def unpack(state: Mapping[str, Any]) -> Progress:
    """The inverse of ``pack``."""
    places = {tuple(held["lane"]): Place(*(held[name] for name in Place._fields)) for held in state["places"]}
    return Progress(state["epoch"], state["step"], places)
