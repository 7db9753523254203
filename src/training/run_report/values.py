"""The metrics of runs as they are shown: newest values, intervals, the best so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.metric_names import is_count, lower_is_better
from training.run_report.history import History, is_number
from training.run_report.intervals import Interval, of_line, of_metric

# What stands for a set that has no main metric.
_PREFERRED = ("mean_recall@1", "acc1", "mean_average_precision")


@dataclass(frozen=True)
class MetricValue:
    """``value`` of the metric ``name``, with its 95 % interval where one is known.

    ``epoch``: after how many it was measured. ``best``: the best value and its epoch, where it is another one.
    """

    name: str
    value: float
    interval: Interval | None = None
    epoch: float | None = None
    best: tuple[float, float] | None = None


def evaluated(runs: Sequence[History]) -> dict[str, list[MetricValue | None]]:
    """Metric -> its newest value of each run, of those in ``eval_results.jsonl``."""
    names = {
        name: None
        for run in runs
        for line in reversed(run.evaluations)
        for name, value in line.items()
        if not is_count(name) and is_number(value)
    }
    return {name: [_newest(name, run) for run in runs] for name in names}


def _newest(name: str, run: History) -> MetricValue | None:
    lines = [line for line in run.evaluations if is_number(line.get(name))]
    if not lines:
        return None
    line, value = lines[-1], lines[-1][name]
    best = (min if lower_is_better(name) else max)(lines, key=lambda each: float(each[name]))
    other = None if best[name] == value else (best[name], run.place(best))
    return MetricValue(name, value, of_line(name, line, run.kept), run.place(line), other)


def of_sets(runs: Sequence[History]) -> dict[str, list[MetricValue | None]]:
    """Set -> the main metric of each run, of those in the newest file in ``eval_results/``."""
    by_run = [{set_name(task): task for task in run.tasks} for run in runs]
    names = dict.fromkeys(name for tasks in by_run for name in tasks)
    return {
        name: [_main(tasks[name], run) if name in tasks else None for tasks, run in zip(by_run, runs)]
        for name in names
    }


def set_name(task: Mapping[str, Any]) -> str:
    """What a line of results calls its set."""
    return str(task.get("dataset") or task.get("key", ""))


def numbers(task: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a line of results."""
    held = task["metrics"] if isinstance(task["metrics"], dict) else {}
    return {str(name): value for name, value in held.items() if is_number(value)}


def _main(task: Mapping[str, Any], run: History) -> MetricValue | None:
    """The main metric; of a set that has none, one that is like it."""
    found = numbers(task)
    main = found.pop("main_metric", None)
    names = [name for name, value in found.items() if main is None or value == main]
    name = next((n for n in (*_PREFERRED, *names) if n in names), "")
    if not name:
        return None if main is None else MetricValue("", main)
    return MetricValue(name, found[name], of_metric(name, found, task, run.kept.get(str(task.get("key")))))
