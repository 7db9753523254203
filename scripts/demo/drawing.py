"""The picture of the demo: curves on the left, test pictures with every model's top caption on the right."""

from __future__ import annotations

import random
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import SubFigure

from measure import Features, TestSet

COLORS = {"reference": "#888888", "openclip": "#1f77b4", "fastclip_v3": "#e08214", "drrho_clip": "#2a9d5c"}
RIGHT, NEAR, WRONG = "#1b7837", "#b8860b", "#b2182b"
CURVES = {
    "image_to_text_R@1": "image→text R@1, %",
    "image_to_text_R@5": "image→text R@5, %",
    "imagenet-zeroshot-val-top1": "subcategory accuracy, %",
}
GRID = (5, 5)  # rows, columns
LETTERS = 30  # of a caption


def draw(
    path: Path,
    titles: dict[str, str],
    curves: dict[str, list[dict[str, float]]],
    features: dict[str, Features],
    tests: TestSet,
    chance: dict[str, float],
) -> None:
    """``titles``: run → its name; ``curves``: run → its evaluations; ``features``: of the runs to compare."""
    figure = plt.figure(figsize=(19, 14), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2.6), wspace=0.03)
    _draw_curves(left, titles, curves, chance)
    _draw_grid(right, titles, features, tests)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_curves(figure: SubFigure, titles: dict, curves: dict, chance: dict[str, float]) -> None:
    figure.suptitle("Test on Twitter's art during training", fontsize=14)
    for axes, (metric, label) in zip(figure.subplots(len(CURVES), 1), CURVES.items()):
        for run, points in curves.items():
            epochs = [point["epoch"] for point in points]
            values = [100 * point[metric] for point in points]
            style = "--" if run == "reference" else "-"
            axes.plot(epochs, values, style, color=COLORS[run], label=titles[run], marker="o", markersize=3)
        axes.axhline(100 * chance[metric], color="black", linewidth=0.8, linestyle=":", label="chance")
        axes.set(ylabel=label, xlabel="epoch", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=9, loc="upper left")


def _draw_grid(figure: SubFigure, titles: dict, features: dict[str, Features], tests: TestSet) -> None:
    rows, columns = GRID
    chosen = sorted(random.Random(0).sample(range(len(tests.names)), rows * columns))
    answers = {run: (f.image[chosen] @ f.text.T).topk(5).indices for run, f in features.items()}
    figure.suptitle(
        f"{len(chosen)} test pictures drawn at random, each model's first caption:   "
        "✓ right   ○ right among its first five   ✗ wrong   († a name not in training)",
        fontsize=12,
    )
    for place, (axes, picture) in enumerate(zip(figure.subplots(rows, columns).flat, chosen)):
        axes.imshow(tests.pictures[picture], interpolation="lanczos")
        axes.axis("off")
        unseen = " †" if tests.held_out[picture] else ""
        axes.set_title(_shorten(tests.names[picture]) + unseen, fontsize=10, fontweight="bold")
        for line, run in enumerate(features):
            best = answers[run][place]
            sign, color = _verdict(best, picture)
            text = f"{sign} {titles[run]}: {_shorten(tests.names[int(best[0])])}"
            axes.text(
                0.5,
                -0.04 - 0.13 * line,
                text,
                color=color,
                fontsize=8,
                ha="center",
                va="top",
                transform=axes.transAxes,
            )


def _verdict(best: torch.Tensor, right: int) -> tuple[str, str]:
    if best[0] == right:
        return "✓", RIGHT
    return ("○", NEAR) if right in best else ("✗", WRONG)


def _shorten(text: str) -> str:
    return text if len(text) <= LETTERS else text[: LETTERS - 1].rstrip() + "…"
