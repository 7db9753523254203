#!/usr/bin/env python3
"""Fits error = alpha * compute^beta + floor to runs of several budgets, and draws it.

    python scripts/scaling_law.py assets/study/results.csv --only openclip drrho_fixed --out logs/law.png \\
        --where kind=cell data=b batch=128 model=small reference=,a-1376256@1376256 \\
        samples=43008,86016,172032,344064

Any csv file with a column for the budget and one for an accuracy in percent will do. Runs with the same budget are
seeds of one point, so --where has to leave out what differs in anything else: several values of a column stand
with commas between them, an empty one too. A group of runs needs at least four budgets; where one of them has a
single run, the law has no interval.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import ScalarFormatter

from study.power_law import Fitted, Runs, bootstrap, shown


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        groups = read(args.results, args.where, args.group, args.x, args.accuracy, args.only)
        fitted = bootstrap(groups, args.draws)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(fitted)))
    if args.out:
        draw(args.out, groups, fitted, args.x)
    return 0


def read(
    path: Path, where: list[str], group: str, x: str, accuracy: str, only: list[str] | None = None
) -> dict[str, Runs]:
    """Group -> budget -> errors (1 - accuracy/100). ValueError: no such file or column, or no such runs."""
    conditions = {}
    for word in where:
        column, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--where {word}: give COLUMN=VALUE")
        conditions[column] = value.split(",")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for column in (*conditions, group, x, accuracy):
        if rows and column not in rows[0]:
            raise ValueError(f"{path}: it has no column {column!r}, but {', '.join(rows[0])}")
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if all(row[column] in values for column, values in conditions.items()):
            found[row[group]][float(row[x])].append(1 - float(row[accuracy]) / 100)
    names = only or sorted(found)
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{path}: there are no runs of {', '.join(missing)}")
    if not names:
        raise ValueError(f"{path}: there are no runs with {' '.join(where)}")
    return {name: {budget: found[name][budget] for budget in sorted(found[name])} for name in names}


def table(fitted: dict[str, Fitted]) -> list[str]:
    """Lines of Markdown: each group's law, and how much steeper than the first one it falls."""
    lines = ["| runs | β (95 %) | α at the smallest budget | floor (95 %) | β less than the first one's (95 %) |"]
    lines.append("|---|---|---|---|---|")
    first = next(iter(fitted.values()))
    for name, one in fitted.items():
        law, against = one.law, "–"
        if one is not first:
            against = shown(law.beta - first.law.beta, one.steeper_than(first), "+.2f")
        beta, floor = shown(law.beta, one.interval()), shown(law.floor, one.interval(2), ".3f")
        lines.append(f"| {name} | {beta} | {law.alpha:.3f} | {floor} | {against} |")
    return lines


def draw(
    path: Path,
    groups: dict[str, Runs],
    fitted: dict[str, Fitted],
    x: str,
    all_runs: Mapping[str, Runs] | None = None,
) -> None:
    """Errors over budgets, on logarithmic scales, with the laws; hollow: those of ``all_runs`` not fitted."""
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for number, (name, runs) in enumerate(groups.items()):
        color = f"C{number}"
        for budget, errors in runs.items():
            axes.plot([budget] * len(errors), errors, "o", color=color, alpha=0.45, markersize=4)
        for budget, errors in (all_runs or {}).get(name, {}).items():
            if budget not in runs:
                axes.plot([budget] * len(errors), errors, "o", color=color, markersize=5, fillstyle="none")
        along = np.geomspace(min(runs), max(runs), 100)
        label = f"{name}: β = {shown(fitted[name].law.beta, fitted[name].interval())}"
        axes.plot(along, fitted[name].law(along), color=color, label=label)
    axes.set(xscale="log", yscale="log", xlabel=x.replace("_", " "), ylabel="error = 1 − accuracy")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="csv file, one run a line")
    parser.add_argument("--x", default="samples", help="column of the budget (default: samples)")
    parser.add_argument("--accuracy", default="test_top1", help="column in percent (default: test_top1)")
    parser.add_argument("--group", default="method", help="column that tells curves apart (default: method)")
    parser.add_argument("--only", nargs="+", help="groups to fit, in this order (default: all)")
    parser.add_argument("--where", nargs="*", default=[], metavar="COLUMN=VALUE[,VALUE]", help="rows to take")
    parser.add_argument("--draws", type=int, default=1000, help="draws of the bootstrap (default: 1000)")
    parser.add_argument("--out", type=Path, help="picture to draw")
    return parser


if __name__ == "__main__":
    sys.exit(main())
