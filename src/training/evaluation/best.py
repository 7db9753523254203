"""The best value of each metric that a run has reached, and after which epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from training.metric_names import is_count, lower_is_better

Best = Mapping[str, Sequence[float]]


def update(best: Best, metrics: Mapping[str, float | None], epoch: int) -> dict[str, list[float]]:
    """``best`` (metric -> [value, epoch]) and ``metrics`` after ``epoch``; the first of equal values is kept."""
    found = {name: list(entry) for name, entry in best.items()}
    for name, value in metrics.items():
        if is_count(name) or value is None or value != value:
            continue
        if name not in found or _sign(name) * value > _sign(name) * found[name][0]:
            found[name] = [value, epoch]
    return found


def describe(best: Best) -> str:
    """One line for the log."""
    return "Best so far: " + "\t".join(
        f"{name}: {value:.4g} (epoch {epoch})" for name, (value, epoch) in best.items()
    )


def _sign(name: str) -> int:
    return -1 if lower_is_better(name) else 1
