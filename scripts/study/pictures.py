"""The picture of claim 2: targets beside their references."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from study.analysis import Results
from study.cells import Cell, Plan
from study.report import passing, thousands


def weak_to_strong(path: Path, results: Results, plan: Plan) -> bool:
    """Draw the accuracy of targets over that of their references, a line for each budget; whether there were any.

    Dashed: OpenCLIP with the same budget and no reference. Above the diagonal a target has passed its reference.
    """
    found = passing(results, plan)
    if not found:
        return False
    figure, axes = plt.subplots(figsize=(7, 6), layout="constrained")
    for number, (samples, points) in enumerate(found.items()):
        color = f"C{number}"
        strengths = [strength for strength, _ in points]
        halves = [mean.half if mean.n > 1 else 0.0 for _, mean in points]
        tops = [mean.mean for _, mean in points]
        axes.errorbar(strengths, tops, halves, color=color, marker="o", capsize=3, label=thousands(samples))
        alone = results.mean(Cell("openclip", samples, batch=plan.batch))
        if alone.n:
            axes.axhline(alone.mean, color=color, linestyle="--", linewidth=1, alpha=0.7)
    reached = [value for points in found.values() for strength, mean in points for value in (strength, mean.mean)]
    ends = (0, 1.1 * max(reached))
    axes.plot(ends, ends, color="0.5", linewidth=1, label="as good as the reference")
    axes.set(xlabel="zero-shot top-1 of the reference, %", ylabel="zero-shot top-1 of the target, %", ylim=ends)
    axes.legend(title="samples of the target\n(dashed: OpenCLIP)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
