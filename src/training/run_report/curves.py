"""Which charts a report has: what the folders of the runs say, as lines over epochs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise

from drrho_clip.schedules import gamma
from training.run_report.charts import Chart, Series
from training.run_report.history import Histogram, History, finite, is_number
from training.run_report.intervals import of_line
from training.run_report.samples import LargestU

_Points = tuple[list[float], list[float]]
_MERGED = 4  # bins of a histogram that are drawn as one
_QUANTILES = (0.05, 0.5, 0.95)
_LINES = 6  # of one run in a chart of metrics; of more, their average is drawn
_AVERAGE = "datacomp-average"
_OF_SETS = r"^(?!.*-zeroshot-val-).*-(acc1|mean_per_class_recall|mean_recall@1|F1-macro_all|acc_\w+|jaccard\S+)$"
_METRICS = (
    (r"zeroshot-val-(top1|mean_per_class_recall)$", "zero-shot", "Zero-shot accuracy"),
    (r"zeroshot-val-top5$", "zero-shot-5", "Zero-shot accuracy among the first five"),
    (_OF_SETS, "sets", "Main metrics of sets"),
    (r"_R@1$", "recall-1", "Retrieval: R@1"),
    (r"_R@5$", "recall-5", "Retrieval: R@5"),
    (r"_R@10$", "recall-10", "Retrieval: R@10"),
    (r"_loss$", "val-loss", "Losses on the validation data"),
)


def charts(runs: Sequence[History], hard: Sequence[LargestU]) -> Iterator[Chart]:
    """All charts for which there is something to draw. ``hard``: what the checkpoint of each run says about u."""
    for chart in (*_training(runs), *_speed(runs), *_metrics(runs), *_state(runs, hard)):
        if chart.series:
            yield chart


def _training(runs: Sequence[History]) -> Iterator[Chart]:
    names = {name: None for run in runs for name in run.log.losses}
    total = "loss" if "loss" in names else ""
    for name in sorted(names, key=lambda each: each != total):
        if len(names) == 2 and name != total and _same(runs, name, total):
            continue
        title = "Loss" if name == total else name.replace("_", " ").capitalize()
        yield _of_log(runs, name, title, "", smooth=True)

    tau = [*_lines(runs, lambda run: run.temperatures)]
    own = any(run.log.series("mean_tau")[0] for run in runs)
    note = "mean of a batch where each sample has its own, else 1 / logit scale" if own else "1 / logit scale"
    yield Chart("scale", "Temperature τ", "", tau, marks=_marks(runs), note=note)
    yield Chart("gamma", "Weight γ of new estimates of u", "", [*_lines(runs, _gamma)])
    yield _of_log(runs, "lr", "Learning rate", "")
    yield _of_log(runs, "lr_tau", "Learning rate of τ", "")


def _speed(runs: Sequence[History]) -> Iterator[Chart]:
    yield _of_log(runs, "rate", "Throughput", "samples/s", smooth=True)

    def share(run: History) -> _Points:
        points = [p for p in run.log.points if p.values.get("batch_time") and "data_time" in p.values]
        return [p.x for p in points], [100 * p.values["data_time"] / p.values["batch_time"] for p in points]

    yield Chart(
        "data-wait", "Waiting for data", "% of the time", [*_lines(runs, share)], marks=_marks(runs), smooth=True
    )
    yield Chart("mfu", "Model FLOPs utilization (MFU)", "% of the cards' peak", [*_lines(runs, _mfu)])


def _metrics(runs: Sequence[History]) -> Iterator[Chart]:
    names = {name: None for run in runs for line in run.evaluations for name in line}
    for pattern, key, title in _METRICS:
        chosen = [name for name in names if re.search(pattern, name)]
        if len(chosen) > _LINES and _AVERAGE in names:
            chosen = [_AVERAGE]
        series = []
        for number, run in enumerate(runs):
            for style, name in enumerate(chosen):
                x, y, low, high = _metric(run, name)
                if x:
                    label = _called(runs, run, _short(name) if len(chosen) > 1 else "")
                    series.append(Series(label, x, y, number, style, low, high))
        yield Chart(key, title, "", series, markers=True, note="" if len(chosen) != 1 else chosen[0])


def _state(runs: Sequence[History], hard: Sequence[LargestU]) -> Iterator[Chart]:
    columns = {name: None for run in runs for name in run.histograms}
    for column in columns:
        value, direction = _said(column)
        series = []
        for number, run in enumerate(runs):
            if found := run.histograms.get(column):
                low, middle, high = ([h.quantile(q) for h in found] for q in _QUANTILES)
                epochs = [float(h.epoch) for h in found]
                series.append(Series(_called(runs, run, ""), epochs, middle, number, 0, low, high))
        yield Chart(
            f"{column.replace('_', '-')}-over-time", f"{value} of {direction} over time", "", series, markers=True,
            note="median; the band holds nine of ten samples",
        )  # fmt: skip
    for column in columns or {name: None for each in hard for name in each.spread}:
        series = []
        for number, run in enumerate(runs):
            found = run.histograms.get(column) or []
            chosen = {0, len(found) // 2, len(found) - 1} if len(runs) == 1 else {len(found) - 1}
            picked = [found[i] for i in sorted(chosen)] if found else []
            for style, histogram in enumerate(reversed(picked)):
                label = _called(runs, run, f"epoch {histogram.epoch}")
                series.append(Series(label, *_density(histogram), run=number, style=style))
            if not found and column in hard[number].spread:
                edges, counts = hard[number].spread[column]
                label = _called(runs, run, "newest checkpoint")
                series.append(Series(label, *_density(Histogram(0, edges, counts)), run=number))
        value, direction = _said(column)
        yield Chart(
            f"{column.replace('_', '-')}-spread", f"How {value} of {direction} is spread", "share of samples",
            series, x_label=value,
        )  # fmt: skip


def _short(metric: str) -> str:
    """A metric's name without what the chart's title says."""
    text = re.sub(r"_(R@\d+)$", "", metric).replace("_to_", "→")
    return text.replace("-zeroshot-val-", " ").replace("_", " ")


def _said(column: str) -> tuple[str, str]:
    """What a column of the sample state holds, and of which side of the pairs."""
    return "log u" if column.startswith("log_u") else "τ", "captions" if column.endswith("text") else "images"


def _of_log(
    runs: Sequence[History],
    name: str,
    title: str,
    unit: str,
    smooth: bool = False,
) -> Chart:
    series = [*_lines(runs, lambda run: run.log.series(name))]
    return Chart(name.replace("_", "-"), title, unit, series, marks=_marks(runs), smooth=smooth)


def _lines(runs: Sequence[History], points: Callable[[History], _Points]) -> Iterator[Series]:
    for number, run in enumerate(runs):
        x, y = finite(*points(run))
        if x:
            yield Series(_called(runs, run, ""), x, y, run=number)


def _called(runs: Sequence[History], run: History, what: str) -> str:
    """How a line is called: by its run where there are several, and by ``what`` it is."""
    return " · ".join(filter(None, (run.name if len(runs) > 1 or not what else "", what)))


def _marks(runs: Sequence[History]) -> list[float]:
    """Where a run was started again, if there is one run."""
    return [launch.begun for launch in runs[0].log.launches[1:]] if len(runs) == 1 else []


def _same(runs: Sequence[History], a: str, b: str) -> bool:
    return all(p.values.get(a) == p.values.get(b) for run in runs for p in run.log.points)


def _gamma(run: History) -> _Points:
    """From the flags, for the epochs that the log is about."""
    epochs = math.ceil(run.log.points[-1].x) if run.log.points else 0
    if run.loss is None or not run.loss.takes("gamma"):
        return [], []
    with suppress(KeyError, ValueError):
        final, schedule = float(run.flags["gamma"]), run.flags["gamma_schedule"]
        decay = int(run.flags["gamma_decay_epochs"])
        values = [gamma(e, final=final, schedule=schedule, decay_epochs=decay) for e in range(epochs)]
        return [float(e) for e in range(epochs) for e in (e, e + 1)], [v for v in values for _ in (0, 1)]
    return [], []


def _mfu(run: History) -> _Points:
    steps = run.log.steps_per_epoch
    if run.mfu and steps:
        return [step / steps for step in sorted(run.mfu)], [100 * run.mfu[step] for step in sorted(run.mfu)]
    return list(run.log.mfu), [100 * share for share in run.log.mfu.values()]


def _metric(run: History, name: str) -> tuple[list[float], list[float], list[float], list[float]]:
    """Epochs, values, and the ends of their 95 % intervals where these are known of all values."""
    lines = [line for line in run.evaluations if is_number(line.get(name))]
    known = [each for line in lines if (each := of_line(name, line, {})) is not None]
    low, high = ([each[end] for each in known] if len(known) == len(lines) else [] for end in (0, 1))
    return [run.place(line) for line in lines], [float(line[name]) for line in lines], low, high


def _density(histogram: Histogram) -> _Points:
    """Middles of bins, and the share of all values in each; a quarter as many bins as there are."""
    edges, total = histogram.edges[::_MERGED], sum(histogram.counts) or 1.0
    counts = [sum(histogram.counts[i : i + _MERGED]) for i in range(0, len(histogram.counts), _MERGED)]
    if len(edges) == len(counts):
        edges.append(histogram.edges[-1])
    return [(a + b) / 2 for a, b in pairwise(edges)], [count / total for count in counts]
