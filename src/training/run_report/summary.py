"""One picture about the runs: curves, metrics with intervals, some pictures, what is found for some captions."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from PIL import Image

from training.predictions import Place, Retrieved
from training.run_report import picks, values
from training.run_report.charts import COLOURS, ON_WHITE, Chart, dress, legend, plot, texts_as_written
from training.run_report.history import History
from training.run_report.pictures import Thumbnails
from training.run_report.values import MetricValue

# The charts that say most, in this order.
_CHOSEN = ("loss", "zero-shot", "sets", "recall-1", "val-loss", "log-u-text-over-time", "scale", "rate")
_CHARTS, _METRICS, _LOOKS, _ANSWERS, _QUERIES = 4, 10, 10, 5, 2
_WIDTH = 13.0  # inches
_INK, _GRID, _COLOURS = ON_WHITE
_GOOD, _QUIET = "#15803d", "#666666"
_MOST = 28  # characters of a name


@texts_as_written()
def summary(runs: Sequence[History], charts: Sequence[Chart], pictures: Thumbnails) -> bytes:
    """A PNG, on white; parts for which there is nothing are left out."""
    by_key = {chart.key: chart for chart in charts}
    chosen = [by_key[key] for key in _CHOSEN if key in by_key][:_CHARTS]
    metrics = _chosen_metrics(runs)
    title, looks = picks.first_look(runs, _LOOKS)
    seen = [(look, image) for look in looks if (image := _opened(pictures, look.place)) is not None]
    queries = _chosen_queries(runs, pictures)
    heights = {
        "names": 0.5,
        "curves": 2.5 * bool(chosen),
        "metrics": (0.9 + len(metrics) * max(0.26, 0.22 * len(runs))) * bool(metrics),
        "looks": 2.1 * bool(seen),
        "queries": 0.35 * bool(queries) + 1.15 * len(queries),
    }
    parts = [name for name, height in heights.items() if height]
    figure = Figure(figsize=(_WIDTH, sum(heights.values())), layout="constrained")
    ratios = [heights[name] for name in parts]
    pieces = figure.subfigures(len(parts), 1, height_ratios=ratios, squeeze=False)[:, 0]
    of = dict(zip(parts, pieces))
    _draw_names(of["names"], runs)
    if chosen:
        _draw_curves(of["curves"], chosen)
    if metrics:
        _draw_metrics(of["metrics"], metrics)
    if seen:
        _draw_looks(of["looks"], title, seen)
    if queries:
        _draw_queries(of["queries"], queries)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def _draw_names(part: SubFigure, runs: Sequence[History]) -> None:
    handles = [Line2D([], [], color=_COLOURS[i % COLOURS], linewidth=5) for i in range(len(runs))]
    names = [run.name for run in runs]
    legend(part, handles, names, loc="center left", ncols=len(runs), fontsize=13, labelcolor=_INK)


def _draw_curves(part: SubFigure, charts: Sequence[Chart]) -> None:
    # As wide as four, so that one curve alone is not drawn across the page.
    for axes, chart in zip(part.subplots(1, _CHARTS), [*charts, *[None] * (_CHARTS - len(charts))]):
        if chart is None:
            axes.axis("off")
            continue
        plot(axes, chart, *ON_WHITE)
        axes.set_title(f"{chart.title} ({chart.unit})" if chart.unit else chart.title, fontsize=11, color=_INK)


def _chosen_metrics(runs: Sequence[History]) -> dict[str, list[MetricValue | None]]:
    """Shares of right answers: of sets, and of the evaluation during the run."""
    found: dict[str, list[MetricValue | None]] = {}
    for name, each in values.of_sets(runs).items():
        metric = next((value.name for value in each if value is not None and value.name), "")
        found[f"{name} {metric}".strip()] = each
    for name, each in values.evaluated(runs).items():
        if name.endswith(("top1", "R@1")):
            found[name.replace("-zeroshot-val-", " ").replace("_", " ")] = each
    shares = {
        name: each
        for name, each in found.items()
        if all(value is None or 0 <= value.value <= 1 for value in each) and any(each)
    }
    return dict(list(shares.items())[:_METRICS])


def _draw_metrics(part: SubFigure, metrics: dict[str, list[MetricValue | None]]) -> None:
    """Points with their intervals, and the numbers beside them."""
    axes = part.subplots()
    runs = max(map(len, metrics.values()))
    for row, each in enumerate(metrics.values()):
        for number, found in enumerate(each):
            if found is None:
                continue
            y, colour = row + (number - (runs - 1) / 2) * 0.7 / runs, _COLOURS[number % COLOURS]
            low, high = found.interval or (found.value, found.value)
            axes.plot([100 * low, 100 * high], [y, y], color=colour, linewidth=2.2, solid_capstyle="round")
            axes.plot([100 * found.value], [y], "o", color=colour, markersize=5)
            text = f"{100 * found.value:.1f}"
            if found.interval is not None:
                text += f" ({100 * low:.1f} to {100 * high:.1f})"
            axes.annotate(
                text, (1.005, y), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=colour
            )
    axes.set_yticks(range(len(metrics)), [_cut(name) for name in metrics])
    axes.set_ylim(len(metrics) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_title("Right answers in percent, with 95 % intervals", fontsize=11, color=_INK)
    dress(axes, _INK, _GRID)


def _draw_looks(part: SubFigure, title: str, seen: Sequence[tuple[picks.Look, Image.Image]]) -> None:
    part.suptitle(title, fontsize=11, color=_INK)
    for axes, each in zip(part.subplots(1, _LOOKS), [*seen, *[None] * (_LOOKS - len(seen))]):
        axes.axis("off")
        if each is not None:
            look, image = each
            _show(axes, image)
            axes.set_title(_cut(look.label, 16), fontsize=9, color=_INK, fontweight="bold")
            colour = _GOOD if look.said == "✓" else _QUIET
            axes.text(
                0.5, -0.06, _wrapped(look.said), transform=axes.transAxes, ha="center", va="top", fontsize=8,
                color=colour,
            )  # fmt: skip


# A caption, the run, the rank of the right picture, the most similar ones and whether they are it, and it itself.
_Answers = tuple[str, str, int, list[tuple[Image.Image, bool]], Image.Image]


def _chosen_queries(runs: Sequence[History], pictures: Thumbnails) -> list[_Answers]:
    """Some captions and the pictures that the last run finds for them."""
    for kept in picks.sets(runs, Retrieved).values():
        found = []
        for query in picks.queries(kept, "text", 2 * _QUERIES):
            run, last = [(run, each) for run, each in zip(runs, kept) if each is not None][-1]
            answers = picks.found(last, "text", query)
            images = [(_opened(pictures, last.pictures[n]), hit) for n, hit in zip(answers.numbers, answers.hits)]
            held = [(image, hit) for image, hit in images if image is not None]
            own = _opened(pictures, last.pictures[answers.own])
            if len(held) == len(images) and own is not None:
                found.append((last.captions[query], run.name, answers.rank, held, own))
        return found[:_QUERIES]
    return []


def _draw_queries(part: SubFigure, queries: Sequence[_Answers]) -> None:
    part.suptitle(f"What {queries[0][1]} finds for a caption", fontsize=11, color=_INK)
    grid = part.subplots(len(queries), _ANSWERS + 3, width_ratios=[2.6, *[1] * _ANSWERS, 1.6, 1], squeeze=False)
    for row, (caption, _, rank, found, own) in zip(grid, queries):
        for axes in row:
            axes.axis("off")
        _write(row[0], _wrapped(caption, 36), 11)
        for axes, (image, hit) in zip(row[1:], found):
            _show(axes, image, _GOOD if hit else None)
        if not any(hit for _, hit in found):
            _write(row[-2], f"the right one\nhas rank {rank:,}", 9)
            _show(row[-1], own, _GOOD)


def _write(axes: Any, text: str, size: int) -> None:
    axes.text(0.97, 0.5, text, transform=axes.transAxes, ha="right", va="center", fontsize=size, color=_INK)


def _show(axes: Any, image: Image.Image, frame: str | None = None) -> None:
    axes.imshow(image, interpolation="bicubic")
    if frame is not None:
        axes.axis("on")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=frame, linewidth=4)


def _opened(pictures: Thumbnails, place: Place) -> Image.Image | None:
    data = pictures.small(place)
    return Image.open(io.BytesIO(data)).convert("RGB") if data else None


def _cut(text: str, most: int = _MOST) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _wrapped(text: str, width: int = 18) -> str:
    return "\n".join(textwrap.wrap(text, width)[:3])
