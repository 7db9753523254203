"""Each method's own settings, chosen by short runs on the validation sets, which are neither training nor test.

Coordinate search: along one axis after the other, all its values are tried with the best ones so far, and the best
is kept. Gamma comes last and is tried on ``GAMMA_DATA``, in as many runs of the same length: over its many epochs,
since gamma is 1 throughout the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from study.cells import TUNING_SEED, Cell, Plan, with_reference
from study.methods import METHODS

GAMMA_DATA = "b-eighth"
Row = Mapping[str, object]


class Untuned(Exception):
    """A run that the choice depends on is missing."""


def shown(settings: Mapping[str, str]) -> str:
    """The settings as a table has them: ``--lr 2e-3 --rho 8.5``."""
    return " ".join(f"{flag} {value}" for flag, value in settings.items())


def score(row: Row) -> float:
    """What is maximized: zero-shot top-5 accuracy on the validation set, the least noisy measure of short runs."""
    return float(str(row["val_top5"]))


def settings(
    name: str, plan: Plan, rows: Mapping[str, Row], *, epochs: bool, trial: Callable[[Cell], Row] | None = None
) -> dict[str, str]:
    """The settings of method ``name``: flag -> value.

    ``epochs``: whether to choose those that act from the second epoch on, too. ``trial`` runs what is not in
    ``rows``; Untuned: something is not there, and ``trial`` is None.
    """
    method = METHODS[METHODS[name].tuned_as or name]
    chosen: dict[str, str] = {}
    known = dict(rows)
    first = {axis.flag: axis.values[0] for axis in method.axes if not axis.needs_epochs}
    for axis in method.axes:
        if axis.needs_epochs and not epochs:
            continue
        if len(axis.values) == 1:
            chosen[axis.flag] = axis.values[0]
            continue
        scores: dict[str, float] = {}
        for value in axis.values[: plan.values]:
            tried = first | chosen | {axis.flag: value}
            data = GAMMA_DATA if axis.needs_epochs else "b"
            cell = Cell(method.name, plan.tuning, data, plan.batch, TUNING_SEED, settings=tuple(tried.items()))
            cell = with_reference(cell, plan.reference)
            run = cell.id(shown(tried))
            if run not in known:
                if trial is None:
                    raise Untuned(name)
                known[run] = trial(cell)
            scores[value] = score(known[run])
        chosen[axis.flag] = max(scores, key=lambda value: scores[value])
    return chosen
