"""Evaluates a model on one set after another: what is done is kept at once, and what fails ends no other set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from training.data.bad_samples import Skips
from training.distributed.collectives import on_main, rank_in
from training.evaluation.benchmark.classification import EvaluationSet
from training.evaluation.benchmark.encoder import Encoder, TaskFailed, together
from training.evaluation.benchmark.measures import Metrics
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
    done: Callable[[FoundSet, Metrics], None],
) -> Outcome:
    """Evaluate ``sets`` in turn. ``done(set, metrics)`` is called on rank 0 after each. Collective."""
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
            metrics, skips = opened.measure(encoder, one.name)
        except TaskFailed as failure:
            outcome.failed[one.name] = str(failure)
            if encoder.world.is_main:
                _log.warning("%s: not evaluated: %s", one.name, failure)
            continue
        if left_out := skips.counts.total():
            metrics = {**metrics, "left_out": float(left_out)}
        on_main(partial(_report, one, opened, metrics, skips, done))
    return outcome


def open_together(one: FoundSet) -> EvaluationSet:
    """The set, which rank 0 opens for all. Collective. TaskFailed: it is not valid."""
    opened = together(lambda: one.open() if rank_in() == 0 else None)[0]
    assert opened is not None, "rank 0 has opened it"
    return opened


def _report(
    one: FoundSet, opened: EvaluationSet, metrics: Metrics, skips: Skips, done: Callable[[FoundSet, Metrics], None]
) -> None:
    for remark in opened.remarks:
        _log.info(remark)
    if one.task is not None and len(opened.source) != one.task.size and not one.task.is_winogavil:
        _log.warning(
            "%s: it has %d pictures, the benchmark's has %d: its value is not comparable",
            *(one.name, len(opened.source), one.task.size),
        )
    if skips.counts:
        _log.warning("%s: %d pictures are left out: %s", one.name, skips.counts.total(), skips)
    done(one, metrics)
    metric, value = headline(one.key, metrics)
    _log.info("%s: %s %s", one.name, metric, "undefined" if value is None else f"{value:.4f}")
