"""The tables of metrics, with their intervals, and what differs between runs on the same pictures."""

from __future__ import annotations

from collections.abc import Sequence

from training.run_report import picks, values
from training.run_report.history import History
from training.run_report.page.parts import breakable, escaped, table, written
from training.run_report.values import MetricValue


def metrics(runs: Sequence[History]) -> str:
    """The newest values of each run, and those of the sets in ``eval_results/``."""
    last = [run.place(run.evaluations[-1]) if run.evaluations else None for run in runs]
    rows = [
        (breakable(name), *(_cell(found, epoch) for found, epoch in zip(each, last)))
        for name, each in values.evaluated(runs).items()
    ]
    text = ""
    if rows:
        heads = [
            escaped(run.name) if epoch is None else f"{escaped(run.name)}, epoch {written(epoch)}"
            for run, epoch in zip(runs, last)
        ]
        text = table("Newest values of each run, with 95 % intervals", ["metric", *heads], rows)
    return text + _sets(runs)


def _cell(found: MetricValue | None, epoch: float | None) -> str:
    if found is None:
        return ""
    remarks = [] if found.epoch == epoch else [f"epoch {written(found.epoch or 0)}"]
    if found.best is not None:
        remarks.append(f"best {written(found.best[0])}, epoch {written(found.best[1])}")
    return "<br>".join([_value(found), *(f"<small>{remark}</small>" for remark in remarks)])


def _value(found: MetricValue) -> str:
    if found.interval is None:
        return written(found.value)
    low, high = found.interval
    return f"{written(found.value)} <small>({low:.3f} to {high:.3f})</small>"


def changes(runs: Sequence[History]) -> str:
    """Of each set how many answers each run has right which the first one has wrong, and the reverse."""
    rows = []
    for name, run, found in picks.differences(runs):
        low, high = (100 * end for end in found.interval)
        sure = ' class="sure"' if low > 0 or high < 0 else ""
        rows.append(
            (
                escaped(name), escaped(found.what), escaped(run.name),
                f"<span{sure}>{_points(100 * found.points)}</span> "
                f"<small>({_points(low)} to {_points(high)})</small>",
                f"{found.gained:,} of {found.n:,}", f"{found.lost:,} of {found.n:,}",
            )
        )  # fmt: skip
    if not rows:
        return ""
    head = ["set", "asked for", "run", "difference in points", "only this one right", "only the first right"]
    said = (
        f"<p>The same questions were put to all runs, so answers are compared one by one with those of "
        f"<strong>{escaped(runs[0].name)}</strong>. An interval that does not hold 0 is a difference that the "
        "choice of the pictures does not explain.</p>"
    )
    return said + table(f"Differences to {escaped(runs[0].name)}, with 95 % intervals", head, rows)


def _points(value: float) -> str:
    """With its sign, as it is typeset."""
    return f"{value:+.{1 if abs(value) >= 1 else 2}f}".replace("-", "−")


def _sets(runs: Sequence[History]) -> str:
    """The main metrics of all sets, a column for each run, and below all metrics of each run."""
    there = [run for run in runs if run.tasks]
    if not there:
        return ""
    rows = []
    for name, each in values.of_sets(there).items():
        cells = ["" if v is None else f"{_value(v)}<br><small>{breakable(v.name)}</small>" for v in each]
        rows.append((escaped(name), *cells))
    heads = [f"{escaped(run.name)}<br><small>{escaped(run.tasks_file)}</small>" for run in there]
    text = table("Main metrics of single sets, with 95 % intervals", ["set", *heads], rows)
    for run in there:
        all_rows = []
        for task in run.tasks:
            found = [f"{escaped(k)} {written(v)}" for k, v in values.numbers(task).items() if k != "main_metric"]
            all_rows.append((escaped(values.set_name(task)), ", ".join(found)))
        held = table(f"{escaped(run.name)}: {escaped(run.tasks_file)}", ["set", "metrics"], all_rows)
        text += f"<details><summary>All metrics of {escaped(run.name)}</summary>{held}</details>"
    return text
