"""The picture of claim 2: targets beside their references."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from study.analysis import Results
from study.cells import Cell, Plan, with_reference
from study.report import thousands


def weak_to_strong(path: Path, results: Results, plan: Plan) -> bool:
    """Draw the accuracy of targets over that of their references, a line for each budget; whether there were any.

    Dashed: OpenCLIP with the same budget and no reference. Above the diagonal a target has passed its reference.
    """
    figure, axes = plt.subplots(figsize=(7, 6), layout="constrained")
    reached: list[float] = []
    for number, samples in enumerate(plan.budgets):
        points = []
        for at in plan.strengths:
            reference = replace(plan.reference, at=at)
            cell = with_reference(Cell("drrho_fixed", samples, batch=plan.batch), reference)
            mean, row = results.mean(cell), results.references.get(reference.name)
            if mean.n and row is not None:
                points.append((float(row["test_top1"]), mean.mean, mean.half if mean.n > 1 else 0.0))
        if not points:
            continue
        color = f"C{number}"
        strengths, tops, halves = zip(*sorted(points), strict=True)
        axes.errorbar(strengths, tops, halves, color=color, marker="o", capsize=3, label=thousands(samples))
        alone = results.mean(Cell("openclip", samples, batch=plan.batch))
        if alone.n:
            axes.axhline(alone.mean, color=color, linestyle="--", linewidth=1, alpha=0.7)
        reached += [*strengths, *tops]
    if reached:
        ends = (min(reached), max(reached))
        axes.plot(ends, ends, color="0.5", linewidth=1, label="as good as the reference")
        axes.set(xlabel="zero-shot top-1 of the reference, %", ylabel="zero-shot top-1 of the target, %")
        axes.set_ylim(0, 1.1 * max(reached))
        axes.legend(title="samples of the target\n(dashed: OpenCLIP)")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    plt.close(figure)
    return bool(reached)
