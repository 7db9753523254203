"""The page: HTML that holds all that it needs, and opens without a network."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from importlib import resources

from training.run_report.charts import Chart, Drawing, draw, thinned
from training.run_report.history import History
from training.run_report.page import gallery
from training.run_report.page.metrics import changes, metrics
from training.run_report.page.parts import anchor, duration, escaped, table, written
from training.run_report.pictures import Thumbnails
from training.run_report.samples import Hard, LargestU

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'"
)
_ROWS = 40  # of a chart's table
_SECTIONS = {
    "loss": "Training", "scale": "Training", "gamma": "Training", "lr": "Training", "lr-tau": "Training",
    "rate": "Speed", "data-wait": "Speed", "mfu": "Speed",
    "zero-shot": "Metrics", "zero-shot-5": "Metrics", "recall-1": "Metrics", "recall-5": "Metrics",
    "recall-10": "Metrics", "val-loss": "Metrics", "sets": "Metrics",
}  # fmt: skip
_STATE = "Estimates u of the samples"


def page(
    runs: Sequence[History],
    charts: Sequence[Chart],
    hard: Sequence[LargestU],
    pictures: Thumbnails,
    price: float | None = None,
    signature: str = "",
) -> str:
    """The whole page. ``pictures``: those of evaluation sets. ``price``: of a card for an hour.

    ``signature``: of a page that looks for a newer one.
    """
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"Runs {', '.join(run.name for run in runs)}"
    by_section: dict[str, list[Chart]] = {}
    for chart in charts:
        section = _STATE if chart.key.startswith(("log-u", "tau-")) else _SECTIONS.get(chart.key, "Training")
        by_section.setdefault(section, []).append(chart)
    css = "overview wide" if len(runs) > 2 else "overview"  # then the table needs all of the width
    sections = [
        ("Overview", f'<div class="{css}">{_overview(runs, price)}{gallery.glance(runs, pictures)}</div>'),
        ("Training", _figures(by_section.get("Training", []))),
        ("Metrics", metrics(runs) + _figures(by_section.get("Metrics", []))),
        ("What changed", changes(runs)),
        ("Pictures and their classes", gallery.classes(runs, pictures)),
        ("Confusion of classes", gallery.confusion(runs, pictures)),
        ("Retrieval", gallery.retrieval(runs, pictures)),
        ("Speed", _figures(by_section.get("Speed", []))),
        (_STATE, _figures(by_section.get(_STATE, []))),
        ("Samples with the largest u", "".join(_hard(run, each, runs) for run, each in zip(runs, hard))),
        ("Samples left out", _left_out(runs)),
        ("Restarts and gaps", _launches(runs)),
        ("Flags", _flags(runs)),
        ("Warnings", _notes(runs)),
    ]
    if pictures.remark:
        sections.append(("Missing pictures", f"<p>{escaped(pictures.remark)}.</p>"))
    shown = [(name, content) for name, content in sections if content]
    nav = "".join(f'<li><a href="#{anchor(name)}">{escaped(name)}</a></li>' for name, _ in shown)
    body = "".join(
        f'<section id="{anchor(name)}" aria-labelledby="{anchor(name)}-h">'
        f'<h2 id="{anchor(name)}-h">{escaped(name)}</h2>{content}</section>'
        for name, content in shown
    )
    refresh = '<button type="button" id="refresh" aria-pressed="true">Refreshes</button>' if signature else ""
    made = time.strftime("%Y-%m-%d %H:%M:%S")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escaped(title)}</title><style>{_file('page.css')}</style></head>"
        f'<body data-signature="{escaped(signature)}"><a class="skip" href="#main">Skip to the content</a>'
        f"<header><h1>{escaped(title)}</h1><p>Made {made}.</p>"
        f'<div class="buttons">{refresh}<button type="button" id="theme">Dark colours</button></div></header>'
        f'<nav aria-label="Sections"><ul>{nav}</ul></nav><main id="main" tabindex="-1">{body}</main>'
        f"<script>{_file('page.js')}</script></body></html>"
    )


def _file(name: str) -> str:
    return resources.files("training.run_report.page").joinpath(name).read_text(encoding="utf-8")


def _overview(runs: Sequence[History], price: float | None) -> str:
    facts: dict[str, list[str]] = {}
    for run in runs:
        log = run.log
        spent = sum(launch.seconds for launch in log.launches)
        hours = sum(launch.seconds * launch.ranks for launch in log.launches) / 3600
        kind = "GPU" if any(launch.device == "cuda" for launch in log.launches) else "process"
        last = log.points[-1] if log.points else None
        _, tau = run.temperatures
        state = "complete" if run.done else f"last line {log.launches[-1].end}" if log.launches else "not begun"
        lines = {
            "State": state,
            "Folder": str(run.folder),
            "Model": run.flags.get("model", ""),
            "Epochs": f"{last.x:.2f} of {run.flags.get('epochs', '?')}" if last else "0",
            "Loss": written(last.values["loss"]) if last and "loss" in last.values else "",
            "Temperature τ": written(tau[-1]) if tau else "",
            "Begun": str(log.launches[0].start) if log.launches else "",
            "Time": f"{duration(spent)} in {len(log.launches)} launch{'es' * (len(log.launches) != 1)}",
            "Hardware": next((each.hardware for each in reversed(log.launches) if each.hardware), "")
            or next((f"{each.ranks} × {each.device}" for each in reversed(log.launches) if each.device), ""),
            "Cost": f"{written(hours)} {kind} hours"
            + (f", {written(hours * price)} at {price:g} an hour" if price is not None else ""),
            "Samples left out": f"{sum(sum(each.values()) for each in log.left_out.values()):,}",
            "Could not be read": "; ".join(run.problems),
        }
        for name, value in lines.items():
            facts.setdefault(name, []).append(escaped(value))
    rows = [(name, *values) for name, values in facts.items() if any(values)]
    return table("What the runs are", ["", *(escaped(run.name) for run in runs)], rows)


def _figures(charts: Sequence[Chart]) -> str:
    return f'<div class="charts">{"".join(_figure(chart) for chart in charts)}</div>' if charts else ""


def _figure(chart: Chart) -> str:
    drawing: Drawing = draw(chart)
    series = []
    for each in chart.series:
        x, y = thinned(each.x, each.y)
        series.append({"name": each.name, "x": [round(v, 6) for v in x], "y": [_short(v) for v in y]})
    data = {"frame": drawing.frame, "limits": drawing.limits, "series": series, "x": chart.x_label}
    packed = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    unit = f' <span class="unit">({escaped(chart.unit)})</span>' if chart.unit else ""
    said = [chart.note, "dashed: started again here" if chart.marks else ""]
    note = f'<p class="note">{escaped("; ".join(filter(None, said)))}</p>' if any(said) else ""
    key = escaped(chart.key)
    return (
        f'<figure id="{key}"><figcaption><h3>{escaped(chart.title)}{unit}</h3>{note}</figcaption>'
        f'<div class="plot" role="img" aria-label="{escaped(_described(chart))}">{drawing.svg}</div>'
        f'<input type="range" min="0" value="0" step="1" aria-label="Point of {escaped(chart.title)}">'
        f'<p class="readout" aria-hidden="true"></p>{_points(chart)}'
        f'<script type="application/json">{packed}</script></figure>'
    )


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _described(chart: Chart) -> str:
    """The chart in words."""
    lines = [
        f"{each.name}: {len(each.x)} points, first {written(each.y[0])}, last {written(each.y[-1])}, "
        f"least {written(min(each.y))}, largest {written(max(each.y))}"
        for each in chart.series
    ]
    return f"{chart.title} against {chart.x_label}. {'. '.join(lines)}."


def _points(chart: Chart) -> str:
    rows = []
    for each in chart.series:
        every = max(1, math.ceil(len(each.x) / (_ROWS // min(len(chart.series), 4))))
        chosen = sorted({*range(0, len(each.x), every), len(each.x) - 1})
        rows += [(escaped(each.name), written(each.x[i]), written(each.y[i])) for i in chosen]
    held = table(escaped(chart.title), ["line", escaped(chart.x_label), "value"], rows, css="points")
    return f"<details><summary>Table</summary>{held}</details>"


def _hard(run: History, found: LargestU, runs: Sequence[History]) -> str:
    heading = f"<h3>{escaped(run.name)}</h3>" if len(runs) > 1 else ""
    if not found.checkpoint:
        return f"{heading}<p>{escaped(found.remark)}</p>"
    remark = f'<p class="note">{escaped(found.remark)}</p>' if found.remark else ""
    cards = "".join(map(_card, found.samples))
    return (
        f"{heading}<p>Their own pair is worst among all that they are compared with, on the average of both "
        "directions. Captions of other pictures, placeholders and broken pictures look like that. Of "
        f"{found.rows:,} rows {found.seen:,} have a value, in {escaped(found.checkpoint)}.</p>{remark}"
        f'<ol class="samples">{cards}</ol>'
    )


def _card(hard: Hard) -> str:
    values = ", ".join(f"{escaped(name.removeprefix('log_u_'))} {value:.3f}" for name, value in hard.log_u.items())
    picture = '<div class="none" aria-hidden="true"></div>'
    if hard.picture:
        picture = f'<img src="{hard.picture}" alt="the picture of row {hard.row}" loading="lazy">'
    caption = f"<p>{escaped(hard.caption)}</p>" if hard.caption else ""
    name = f"<p><small>{escaped(hard.name)}</small></p>" if hard.name else ""
    return f"<li>{picture}<div>{caption}<p><small>row {hard.row}; log u: {values}</small></p>{name}</div></li>"


def _left_out(runs: Sequence[History]) -> str:
    rows = []
    for run in runs:
        reasons: dict[str, dict[int, int]] = {}
        for epoch, counts in run.log.left_out.items():
            for reason, n in counts.items():
                reasons.setdefault(reason, {})[epoch] = n
        for reason, by_epoch in sorted(reasons.items(), key=lambda item: -sum(item[1].values())):
            last = max(by_epoch)
            rows.append(
                (
                    escaped(run.name), escaped(reason), f"{sum(by_epoch.values()):,}",
                    f"{by_epoch[last]:,} (epoch {last})", escaped(run.log.examples.get(reason, "")),
                )
            )  # fmt: skip
    if not rows:
        return ""
    head = ["run", "reason", "in all", "in the last epoch with any", "example"]
    return table("Samples left out, by reason", head, rows)


def _launches(runs: Sequence[History]) -> str:
    rows, gaps = [], []
    for run in runs:
        for number, launch in enumerate(run.log.launches):
            before = run.log.launches[number - 1].end if number else None
            word = launch.last_word
            if not word:
                running = number == len(run.log.launches) - 1 and not run.done
                word = "still runs, or was killed" if running else "no last word: killed"
            rows.append(
                (
                    f"{escaped(run.name)}, launch {number + 1}", escaped(launch.start),
                    duration((launch.start - before).total_seconds()) if before else "",
                    f"{launch.begun:.2f}", f"{launch.reached:.2f}", f"{launch.again:.2f}" if launch.again else "",
                    duration(launch.seconds), escaped(launch.hardware or f"{launch.ranks} × {launch.device}"),
                    escaped(word),
                )
            )  # fmt: skip
        gaps += [
            (escaped(run.name), escaped(pause.start), duration(pause.seconds), f"{pause.x:.2f}")
            for pause in run.log.pauses()
        ]
    if not rows:
        return ""
    head = [
        "launch", "start", "after a gap of", "from epoch", "to epoch", "epochs taken again", "time", "hardware",
        "how it ended",
    ]  # fmt: skip
    text = table("Launches", head, rows)
    if gaps:
        heads = ["run", "since", "for", "epoch"]
        text += table("Long times between two lines of one launch (evaluation, saving, waiting)", heads, gaps)
    return text


def _flags(runs: Sequence[History]) -> str:
    keys = sorted({key for run in runs for key in run.flags})
    if not keys:
        return ""
    text = ""
    if len(runs) > 1:
        differing = [key for key in keys if len({run.flags.get(key) for run in runs}) > 1]
        rows = [(f"--{escaped(key)}", *(escaped(run.flags.get(key, "–")) for run in runs)) for key in differing]
        heads = ["flag", *(escaped(run.name) for run in runs)]
        text = table("Flags that differ between the runs", heads, rows) if rows else "<p>All flags are equal.</p>"
    chosen = sorted({key for run in runs for key in run.chosen})
    rows = [(f"--{escaped(key)}", *(escaped(run.flags.get(key, "–")) for run in runs)) for key in chosen]
    held = table("Flags whose values are not the defaults", ["flag", *(escaped(run.name) for run in runs)], rows)
    return text + (f"<details><summary>All chosen flags</summary>{held}</details>" if len(runs) > 1 else held)


def _notes(runs: Sequence[History]) -> str:
    rows = [
        (escaped(run.name), f"{n:,}", escaped(note))
        for run in runs
        for note, n in sorted(run.log.notes.items(), key=lambda item: -item[1])[:50]
    ]
    return (
        table("Warnings and errors of the log, without their numbers", ["run", "times", "message"], rows)
        if rows
        else ""
    )
