"""Evaluates a model on one set after another: what is done is kept at once, and what fails ends no other set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from training.distributed.collectives import on_main, rank_in
from training.evaluation.benchmark.classification import EvaluationSet, Measured
from training.evaluation.benchmark.encoder import Encoder, TaskFailed, together
from training.evaluation.benchmark.results import headline
from training.evaluation.benchmark.sets import FoundSet

_log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """``failed``: name of a set -> why it has no result. ``idle``: folders that turned out to be no sets."""

    failed: dict[str, str] = field(default_factory=dict)
    idle: dict[str, str] = field(default_factory=dict)


def evaluate_sets(
    encoder: Encoder,
    sets: Sequence[FoundSet],
    done: Callable[[FoundSet, Measured], None],
) -> Outcome:
    """Evaluate ``sets`` in turn. ``done(set, measured)`` is called on rank 0 after each. Collective."""
    outcome = Outcome()
    for one in sets:
        try:
            opened = open_together(one)
        except TaskFailed as failure:
            (outcome.failed if one.sure else outcome.idle)[one.name] = str(failure)
            if one.sure and encoder.world.is_main:
                _log.warning("%s: not evaluated: %s", one.name, failure)
            continue
        try:
            found = opened.measure(encoder, one.key, one.name)
        except TaskFailed as failure:
            outcome.failed[one.name] = str(failure)
            if encoder.world.is_main:
                _log.warning("%s: not evaluated: %s", one.name, failure)
            continue
        if left_out := found.skips.counts.total():
            found = replace(found, metrics={**found.metrics, "left_out": float(left_out)})
        on_main(partial(_report, one, opened, found, done))
    return outcome


def open_together(one: FoundSet) -> EvaluationSet:
    """The set, which rank 0 opens for all. Collective. TaskFailed: it is not valid."""
    opened = together(lambda: one.open() if rank_in() == 0 else None)[0]
    assert opened is not None, "rank 0 has opened it"
    return opened


def _report(
    one: FoundSet, opened: EvaluationSet, found: Measured, done: Callable[[FoundSet, Measured], None]
) -> None:
    for remark in opened.remarks:
        _log.info(remark)
    if one.task is not None and len(opened.source) != one.task.size and not one.task.is_winogavil:
        _log.warning(
            "%s: it has %d pictures, the benchmark's has %d: its value is not comparable",
            *(one.name, len(opened.source), one.task.size),
        )
    if found.skips.counts:
        _log.warning("%s: %d pictures are left out: %s", one.name, found.skips.counts.total(), found.skips)
    done(one, found)
    metric, value = headline(one.key, found.metrics)
    _log.info("%s: %s %s", one.name, metric, "undefined" if value is None else f"{value:.4f}")
