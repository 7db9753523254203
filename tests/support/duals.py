"""The dual problems of distributionally robust risks in float64, solved by scipy or by trying all candidates."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import xlogy


def divergence(q: np.ndarray) -> float:
    """KL(q) against uniform weights."""
    return float(xlogy(q, q * len(q)).sum())


def kl_regularized(m: np.ndarray, tau: float) -> float:
    peak = m.max()
    return float(peak + tau * np.log(np.exp((m - peak) / tau).mean()))


def kl_constrained(m: np.ndarray, rho: float) -> float:
    """min over tau >= 0 of tau log mean exp(m / tau) + tau rho, which is convex in tau."""
    if rho == 0:
        return float(m.mean())  # the limit tau -> infinity
    peak, spread = m.max(), np.ptp(m)
    if spread == 0 or rho >= np.log(len(m) / (m == peak).sum()):
        return float(peak)  # the limit tau -> 0
    scaled = (m - peak) / spread

    def dual(log_tau: np.ndarray) -> np.ndarray:
        tau = np.exp(log_tau)
        return tau * (np.log(np.exp(scaled / tau[..., None]).mean(-1)) + rho)

    # A convex function of tau has one minimum; it lies near the best point of a grid.
    grid = np.linspace(-30, 30, 241)
    best = grid[np.argmin(dual(grid))]
    found = minimize_scalar(dual, bounds=(best - 0.25, best + 0.25), method="bounded", options={"xatol": 1e-10})
    return float(peak + spread * min(found.fun, 0.0))


def cvar(m: np.ndarray, alpha: float) -> float:
    """min over l of l + mean (m - l)_+ / alpha, piecewise linear, so that one of the margins is a solution."""
    return min(float(limit + np.maximum(m - limit, 0).mean() / alpha) for limit in np.unique(m))


def gradient(risk, m: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences of ``risk`` at ``m``."""
    unit = np.eye(len(m)) * step
    return np.array([(risk(m + e) - risk(m - e)) / (2 * step) for e in unit])
