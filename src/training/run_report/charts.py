"""The charts of a report, drawn by matplotlib: as SVG in the colours of the page, and as PNG."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

_WIDTH, _HEIGHT = 4.6, 2.75  # inches, of which the page's drawing has 72 units each
_MOST = 600  # points of a line; of more, the least and the largest of equal parts are kept
_SMOOTHED = 80  # points from which on a line is drawn faint, under its running mean
COLOURS = 6
# Colours that stand for variables of the page: ink, grid, and one for each series.
_INK, _GRID, _SERIES = "#010101", "#020202", "#0301{:02x}"
ON_WHITE = ("#222222", "#dddddd", ("#0b6fb8", "#c2410c", "#15803d", "#7c3aed", "#be185d", "#0f766e"))
_DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1.3)),
    (0, (6, 2, 1, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (8, 3)),
)


@dataclass(frozen=True)
class Series:
    """One line: ``x`` and ``y`` [n]. ``run``: the number of its run, which decides its colour.

    ``style``: the number of its kind of line, where a run has several. ``low``, ``high`` [n]: a band around it.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    run: int = 0
    style: int = 0
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """A chart and what it is called. ``marks``: x -> what happened there (restarts).

    ``key``: letters, digits, hyphens and underscores, as its file and its place in the page are called by it.
    ``markers``: each point is drawn. ``smooth``: a long line is drawn faint, under its running mean.
    """

    key: str
    title: str
    unit: str
    series: Sequence[Series]
    x_label: str = "epochs"
    markers: bool = False
    marks: Sequence[float] = ()
    note: str = ""
    smooth: bool = False


@dataclass(frozen=True)
class Drawing:
    """``svg`` for the page. ``frame``: left, right, top, bottom of the axes in its units; ``limits``: of x."""

    svg: str
    frame: tuple[float, float, float, float]
    limits: tuple[float, float]


@contextmanager
def texts_as_written() -> Iterator[None]:
    """For all that makes texts and saves them: captions and names of runs and classes are no formulas.

    matplotlib draws "$20, now $15" as one, and "$lr_$x" is an error.
    """
    with matplotlib.rc_context(
        {"text.parse_math": False, "text.usetex": False, "axes.formatter.use_mathtext": False}
    ):
        yield


def thinned(x: Sequence[float], y: Sequence[float], most: int = _MOST) -> tuple[list[float], list[float]]:
    """About ``most`` of the points: both ends, and the least and the largest of equal parts: no peak is lost."""
    if len(x) <= most:
        return list(x), list(y)
    values = np.asarray(y, float)
    kept = {0, len(x) - 1}
    for a, b in pairwise(np.linspace(0, len(x), most // 2 + 1).astype(int)):
        part = values[a:b]
        kept |= {a + int(part.argmin()), a + int(part.argmax())}
    chosen = sorted(kept)
    return [x[i] for i in chosen], [y[i] for i in chosen]


@texts_as_written()
def draw(chart: Chart) -> Drawing:
    """The chart for the page."""
    figure, axes = _figure(chart, _INK, _GRID, [_SERIES.format(i) for i in range(COLOURS)])
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.key}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = svg.replace(_INK, "var(--ink)").replace(_GRID, "var(--line)")
    svg = re.sub(r"#0301([0-9a-f]{2})", lambda match: f"var(--s{int(match[1], 16)})", svg)
    key = html.escape(chart.key)
    svg = re.sub(r'(\bid="|url\(#|href="#)', lambda match: f"{match[1]}{key}-", svg)
    box, (width, height) = axes.get_position(), (72 * inches for inches in _size(chart))
    frame = box.x0 * width, box.x1 * width, (1 - box.y1) * height, (1 - box.y0) * height
    return Drawing(svg, frame, axes.get_xlim())


@texts_as_written()
def png(chart: Chart) -> bytes:
    """The chart as a file of its own, with its title, on white."""
    figure, axes = _figure(chart, *ON_WHITE)
    axes.set_title(f"{chart.title} ({chart.unit})" if chart.unit else chart.title, fontsize=10, color=ON_WHITE[0])
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160)
    return file.getvalue()


def _keyed(chart: Chart) -> bool:
    """Whether lines have to be told apart."""
    return len(chart.series) > 1


def _columns(chart: Chart) -> int:
    """Columns of the names of the lines."""
    return 2 if max(len(each.name) for each in chart.series) < 22 else 1


def _size(chart: Chart) -> tuple[float, float]:
    """Width and height in inches; the names of the lines have their own room."""
    rows = -(-len(chart.series) // _columns(chart)) if _keyed(chart) else 0
    return _WIDTH, _HEIGHT + 0.19 * rows


def _figure(chart: Chart, ink: str, grid: str, colours: Sequence[str]) -> tuple[Figure, Any]:
    figure = Figure(figsize=_size(chart), layout="constrained")
    axes = figure.add_subplot()
    lines = plot(axes, chart, ink, grid, colours)
    if _keyed(chart):
        names = [series.name for series in chart.series]
        legend(figure, lines, names, loc="outside upper left", ncols=_columns(chart), fontsize=9, labelcolor=ink)
    return figure, axes


def legend(figure: FigureBase, lines: Sequence[Line2D], names: Sequence[str], **look: Any) -> None:
    """The names of the lines, all of them: matplotlib by itself leaves out those that begin with an underscore."""
    made = figure.legend(lines, ["-"] * len(lines), frameon=False, **look)
    for text, name in zip(made.get_texts(), names):
        text.set_text(name)


def plot(axes: Any, chart: Chart, ink: str, grid: str, colours: Sequence[str]) -> list[Line2D]:
    """Draw the lines of a chart into matplotlib's ``axes``, without their names. Returns one for each series."""
    lines: list[Line2D] = []
    styled = any(series.style for series in chart.series)  # else runs differ in more than colour
    for mark in chart.marks:
        axes.axvline(mark, color=ink, linewidth=0.8, linestyle=(0, (2, 2)), alpha=0.6)
    for series in chart.series:
        x, y = thinned(series.x, series.y)
        dash = _DASHES[(series.style if styled else series.run) % len(_DASHES)]
        look: dict[str, Any] = {"color": colours[series.run % COLOURS], "linestyle": dash, "linewidth": 1.6}
        if chart.markers or len(x) == 1:
            look |= {"marker": "o", "markersize": 3.5}
        if len(series.low):
            axes.fill_between(series.x, series.low, series.high, color=look["color"], alpha=0.18, linewidth=0)
        if chart.smooth and len(x) >= _SMOOTHED:
            axes.plot(x, y, **(look | {"linewidth": 0.8, "alpha": 0.35}))
            x, y = thinned(series.x, _running_mean(series.y))
        lines += axes.plot(x, y, **look)
    axes.set_xlabel(chart.x_label, color=ink, fontsize=10)
    dress(axes, ink, grid)
    if chart.markers and chart.x_label == "epochs":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        epochs = [x for series in chart.series for x in series.x]
        if len(set(epochs)) == 1:
            axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
    return lines


def dress(axes: Any, ink: str, grid: str) -> None:
    """Colours of axes, and lines at their ticks."""
    axes.tick_params(colors=ink, labelsize=10, length=3)
    axes.grid(color=grid, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)


def _running_mean(y: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours, a thirtieth of all; ``y`` is finite."""
    n, half = len(y), max(1, len(y) // 60)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(y, float))])
    low, high = np.maximum(np.arange(n) - half, 0), np.minimum(np.arange(n) + half + 1, n)
    return ((sums[high] - sums[low]) / (high - low)).tolist()
