"""error = alpha * compute^beta + floor, fitted to runs, with bootstrap intervals of beta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

FEWEST = 4  # budgets: one more than there are parameters
STEEPEST, FLATTEST = -3.0, -0.01
CANDIDATES, ROUNDS = 60, 6
DRAWS = 1000

Runs = Mapping[float, Sequence[float]]  # compute -> errors of the runs with this budget, one for each seed


@dataclass(frozen=True)
class Law:
    """``alpha`` is at the smallest budget of the fit, ``scale``: error = alpha (compute/scale)^beta + floor."""

    alpha: float
    beta: float
    floor: float
    scale: float

    def __call__(self, compute: np.ndarray) -> np.ndarray:
        return self.alpha * (compute / self.scale) ** self.beta + self.floor


def fit(compute: Sequence[float], error: Sequence[float]) -> Law:
    """The law with the least squared relative errors; alpha is positive, the floor at least 0, beta negative.

    ValueError: fewer than ``FEWEST`` different budgets.
    """
    x = np.asarray(compute, float)
    alpha, beta, floor = _fits(x, np.asarray(error, float)[None])[0].tolist()
    return Law(alpha, beta, floor, float(x.min()))


def largest_deviation(law: Law, runs: Runs) -> float:
    """By how much the mean error of a budget differs from the law, where it does most."""
    return max(abs(float(law(np.asarray(budget))) - float(np.mean(errors))) for budget, errors in runs.items())


def _fits(compute: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """alpha, beta, floor of each row of ``errors``: [D, n] at ``compute`` [n] -> [D, 3].

    For each beta the other two follow from linear least squares; beta is searched on a grid that is refined.
    """
    if len(np.unique(compute)) < FEWEST:
        raise ValueError(f"{len(np.unique(compute))} budgets: a law with three parameters needs at least {FEWEST}")
    x = compute / compute.min()
    every = np.arange(len(errors))
    low = np.full(len(errors), np.log(-FLATTEST))
    high = np.full(len(errors), np.log(-STEEPEST))
    for _ in range(ROUNDS):
        logs = np.linspace(low, high, CANDIDATES, axis=1)  # [D, G]
        loss, alpha, floor = _given_beta(x, errors, -np.exp(logs))
        best, step = loss.argmin(1), logs[:, 1] - logs[:, 0]
        chosen = logs[every, best]
        low = np.maximum(chosen - step, np.log(-FLATTEST))
        high = np.minimum(chosen + step, np.log(-STEEPEST))
    return np.stack([alpha[every, best], -np.exp(chosen), floor[every, best]], 1)


def _given_beta(x: np.ndarray, y: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, alpha and floor, [D, G] each, for ``beta`` [D, G]."""
    weight = (1 / y)[:, None, :]
    falling = x ** beta[:, :, None] * weight
    aa, ab, bb = (falling**2).sum(2), (falling * weight).sum(2), (weight**2).sum(2)
    a, b = falling.sum(2), weight.sum(2)
    determinant = aa * bb - ab**2
    alpha, floor = (a * bb - b * ab) / determinant, (aa * b - ab * a) / determinant
    below = floor < 0  # then the best floor is at its bound
    alpha, floor = np.where(below, a / aa, alpha), np.where(below, 0.0, floor)
    residual = alpha[..., None] * falling + floor[..., None] * weight - 1
    return (residual**2).sum(2), alpha, floor


Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Fitted:
    """A law, and the laws of the bootstrap's draws: float [draws, 3] of alpha, beta, floor.

    ``draws`` is None where a budget has a single run: nothing is known then of how much runs differ.
    """

    law: Law
    draws: np.ndarray | None

    def interval(self, column: int = 1) -> Interval:
        """The 95 % interval of alpha (0), beta (1) or the floor (2)."""
        return None if self.draws is None else _ends(self.draws[:, column])

    def steeper_than(self, other: Fitted) -> Interval:
        """The 95 % interval of beta minus that of ``other``; below 0: the error falls faster."""
        if self.draws is None or other.draws is None:
            return None
        return _ends(self.draws[:, 1] - other.draws[:, 1])


def _ends(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def shown(value: float, interval: Interval, spec: str = ".2f") -> str:
    """'-0.42 (-0.45 to -0.40)'."""
    if interval is None:
        return f"{value:{spec}} (one run in a budget: no interval)"
    low, high = interval
    return f"{value:{spec}} ({low:{spec}} to {high:{spec}})"


def bootstrap(groups: Mapping[str, Runs], draws: int = DRAWS, seed: int = 0) -> dict[str, Fitted]:
    """Each group's law, and the laws of ``draws`` samples of its runs, drawn with replacement in each budget.

    Groups whose budgets hold equally many runs are drawn alike, so that differences between them are paired.
    ValueError: a group has fewer than ``FEWEST`` budgets.
    """
    found = {}
    for name, runs in groups.items():
        rng = np.random.default_rng(seed)
        budgets = sorted(runs)
        law = fit(budgets, [float(np.mean(runs[budget])) for budget in budgets])
        drawn = []
        for budget in budgets:
            errors = np.asarray(runs[budget], float)
            drawn.append(errors[rng.integers(0, len(errors), (draws, len(errors)))].mean(1))
        enough = min(map(len, runs.values())) > 1
        found[name] = Fitted(law, _fits(np.asarray(budgets), np.stack(drawn, 1)) if enough else None)
    return found
