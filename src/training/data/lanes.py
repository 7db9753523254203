"""Who works for which lanes, and where the lanes stand: the part of a run's state that is about data.

The lanes of a run (``order``) are fixed at its first launch, P = its ranks and Q = its workers per rank, unless
``--lanes P,Q`` says otherwise, and kept in its checkpoints. K ranks and W workers can take them over where K
divides P and W divides Q: rank r has P/K virtual ranks in a row, and each of its workers the virtual workers of
those steps that it prepares, every W-th.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from training.data.order import Place

VERSION = 1


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
    """What an order depends on: places are those of another order where any of it differs."""

    layout: Layout
    seed: int
    steps_per_epoch: int
    global_batch: int
    source: Sequence[str | int]

    def difference(self, state: Mapping[str, Any]) -> str | None:
        """What makes ``state``, of ``pack``, that of another order; None: it is of this one."""
        theirs, ours = self._fields(state), self._fields(self.held())
        names = [f"{name} ({theirs[name]} then, {ours[name]} now)" for name in ours if theirs[name] != ours[name]]
        return ", ".join(names) or None

    def held(self) -> dict[str, Any]:
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
