"""What the table of results shows: means over seeds, paired differences, their 95 % intervals, verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from study.cells import Cell

# The 97.5 % points of Student's t by degrees of freedom; beyond, the normal distribution's.
T = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
HOLDS, FAILS, OPEN, ONE, MISSING = "holds", "does not hold", "undecided", "one seed", "not run"
ANYWAY = "also without it"  # above 0, but by no more than a target without a reference


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` seeds and its 95 % interval (Student's t); infinitely wide for one seed."""

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def verdict(self) -> str:
        """Whether the mean is above 0."""
        if self.n == 0:
            return MISSING
        if self.n == 1:
            return ONE
        return HOLDS if self.low > 0 else FAILS if self.high < 0 else OPEN


def estimate(values: Iterable[float]) -> Estimate:
    """The mean of ``values`` and its interval; nan without any."""
    given = list(values)
    n = len(given)
    if not n:
        return Estimate(math.nan, math.inf, 0)
    mean = sum(given) / n
    if n == 1:
        return Estimate(mean, math.inf, 1)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in given) / (n - 1))
    t = T[n - 1] if n - 1 < len(T) else 1.96
    return Estimate(mean, t * deviation / math.sqrt(n), n)


@dataclass(frozen=True)
class Results:
    """The finished cells: a cell without its seed -> seed -> row. Of several rows of a cell the newest counts."""

    runs: Mapping[tuple[object, ...], Mapping[int, Mapping[str, str]]]
    references: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, str]]) -> Results:
        """From the rows of ``table.Table``."""
        runs: dict[tuple[object, ...], dict[int, Mapping[str, str]]] = {}
        references = {}
        for row in rows:
            if row["kind"] == "reference":
                references[row["id"].removeprefix("reference_")] = row
            elif row["kind"] == "cell":
                key = (
                    row["method"],
                    int(row["samples"]),
                    row["data"],
                    int(row["batch"]),
                    row["model"],
                    row["reference"],
                )
                runs.setdefault(key, {})[int(row["seed"])] = row
        return cls(runs, references)

    def seeds(self, cell: Cell, column: str, device: str | None = None) -> dict[int, float]:
        """Seed -> value, of the runs of ``cell`` with any seed, on any device or on ``device``.

        A time is of a run that was not interrupted.
        """
        key = (cell.method, cell.samples, cell.data, cell.batch, cell.model, cell.reference_name)
        rows = sorted(self.runs.get(key, {}).items())
        rows = [(seed, row) for seed, row in rows if device in (None, row["device"])]
        whole = [(seed, row) for seed, row in rows if "seconds" not in column or row["resumed"] == "0"]
        return {seed: float(row[column]) for seed, row in whole}

    def mean(self, cell: Cell, column: str = "test_top1") -> Estimate:
        return estimate(self.seeds(cell, column).values())

    def difference(self, cell: Cell, other: Cell, column: str = "test_top1") -> Estimate:
        """``cell`` minus ``other``, paired: over the seeds that both have."""
        ours, theirs = self.seeds(cell, column), self.seeds(other, column)
        return estimate(ours[seed] - theirs[seed] for seed in ours if seed in theirs)

    def beyond_reference(self, cell: Cell, column: str = "test_top1") -> Estimate:
        """``cell`` minus its reference, whose own error is that of a single run and is not in the interval."""
        row = self.references.get(cell.reference_name)
        if row is None:
            return estimate([])
        return estimate(value - float(row[column]) for value in self.seeds(cell, column).values())
