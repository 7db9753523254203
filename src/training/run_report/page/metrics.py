"""The tables of metrics, with their intervals, and what differs between runs on the same pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training.predictions import Classified, Kept, Retrieved
from training.run_report import picks
from training.run_report.history import History, is_number
from training.run_report.intervals import Interval, of_line, of_metric
from training.run_report.page.parts import escaped, table, written

_NO_METRICS = ("epoch", "step", "num_samples", "num_captions", "num_sets", "left_out")


def metrics(runs: Sequence[History]) -> str:
    """The newest values of each run, and those of the sets in ``eval_results/``."""
    last = [run.evaluations[-1] if run.evaluations else {} for run in runs]
    names = {n: None for line in last for n, v in line.items() if not n.endswith(_NO_METRICS) and is_number(v)}
    rows = []
    for name in names:
        cells = []
        for run, line in zip(runs, last):
            value = line.get(name)
            if not is_number(value):
                cells.append("")
                continue
            cells.append(_value(value, of_line(name, line, run.kept)) + _best(name, value, run.evaluations))
        rows.append((escaped(name), *cells))
    heads = [
        f"{escaped(run.name)}, epoch {written(line['epoch'])}" if line else escaped(run.name)
        for run, line in zip(runs, last)
    ]
    text = ""
    if rows:
        text = table("Newest evaluation of each run, with 95 % intervals", ["metric", *heads], rows)
    return text + _tasks(runs)


def changes(runs: Sequence[History]) -> str:
    """Of each set how many answers each run has right which the first one has wrong, and the reverse."""
    if len(runs) < 2:
        return ""
    rows = []
    kinds: tuple[type[Kept], ...] = (Classified, Retrieved)
    for kind in kinds:
        for each in picks.sets(runs, kind).values():
            first = each[0]
            for run, other in zip(runs[1:], each[1:]):
                if first is not None and other is not None:
                    rows += [_change(first.name, run.name, found) for found in picks.changes(first, other)]
    if not rows:
        return ""
    head = ["set", "asked for", "run", "difference in points", "only this one right", "only the first right"]
    said = (
        f"<p>The same questions were put to all runs, so answers are compared one by one with those of "
        f"<strong>{escaped(runs[0].name)}</strong>. An interval that does not hold 0 is a difference that the "
        "choice of the pictures does not explain.</p>"
    )
    return said + table(f"Differences to {escaped(runs[0].name)}, with 95 % intervals", head, rows)


def _change(name: str, run: str, found: picks.Change) -> tuple[str, ...]:
    low, high = (100 * end for end in found.interval)
    sure = ' class="sure"' if low > 0 or high < 0 else ""
    return (
        escaped(name), escaped(found.what), escaped(run),
        f"<span{sure}>{100 * found.points:+.1f}</span> <small>({low:+.1f} to {high:+.1f})</small>",
        f"{found.gained:,} of {found.n:,}", f"{found.lost:,} of {found.n:,}",
    )  # fmt: skip


def _value(value: float, interval: Interval | None) -> str:
    if interval is None:
        return written(value)
    return f"{written(value)} <small>({interval[0]:.3f} to {interval[1]:.3f})</small>"


def _best(name: str, value: float, lines: Sequence[Mapping[str, Any]]) -> str:
    """The best value so far, where it is not the last one."""
    values = [(line[name], line["epoch"]) for line in lines if is_number(line.get(name))]
    lower = name.endswith(("rank", "loss"))
    best, epoch = (min if lower else max)(values, key=lambda each: float(each[0]))
    return "" if best == value else f"<br><small>best {written(float(best))}, epoch {epoch}</small>"


def _tasks(runs: Sequence[History]) -> str:
    """The main metrics of all sets, a column for each run, and below all metrics of each run."""
    there = [run for run in runs if run.tasks]
    if not there:
        return ""
    by_run = [{str(task.get("dataset") or task.get("key", "")): task for task in run.tasks} for run in there]
    rows = []
    for name in dict.fromkeys(name for tasks in by_run for name in tasks):
        cells = [_main(tasks[name], run) if name in tasks else "" for tasks, run in zip(by_run, there)]
        rows.append((escaped(name), *cells))
    heads = [f"{escaped(run.name)}<br><small>{escaped(run.tasks_file)}</small>" for run in there]
    text = table("Main metrics of single sets, with 95 % intervals", ["set", *heads], rows)
    for run, tasks in zip(there, by_run):
        all_rows = [(escaped(name), _others(task)) for name, task in tasks.items()]
        held = table(f"{escaped(run.name)}: {escaped(run.tasks_file)}", ["set", "metrics"], all_rows)
        text += f"<details><summary>All metrics of {escaped(run.name)}</summary>{held}</details>"
    return text


def _main(task: Mapping[str, Any], run: History) -> str:
    """The main metric; of a set that has none, the first that there is."""
    found = _numbers(task)
    main = found.pop("main_metric", None)
    kept = run.kept.get(str(task.get("key")))
    names = [name for name, value in found.items() if main is None or value == main]
    name = next((n for n in (*_PREFERRED, *names) if n in names), "")
    if not name:
        return "" if main is None else written(main)
    interval = of_metric(name, found, task, kept)
    return f"{_value(found[name], interval)}<br><small>{escaped(name)}</small>"


_PREFERRED = ("mean_recall@1", "acc1", "mean_per_class_recall")


def _numbers(task: Mapping[str, Any]) -> dict[str, float]:
    held = task["metrics"] if isinstance(task["metrics"], dict) else {}
    return {str(name): value for name, value in held.items() if is_number(value)}


def _others(task: Mapping[str, Any]) -> str:
    found = _numbers(task)
    return ", ".join(f"{escaped(k)} {written(v)}" for k, v in found.items() if k != "main_metric")
