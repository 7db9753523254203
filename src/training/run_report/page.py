"""The page: HTML that holds all that it needs, and opens without a network."""

from __future__ import annotations

import html
import json
import math
import time
from collections.abc import Iterable, Sequence
from importlib import resources

from training.run_report.charts import Chart, Drawing, draw, thinned
from training.run_report.history import History, is_number
from training.run_report.samples import Hard, LargestU

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'"
)
_ROWS = 40  # of a chart's table
_Z = 1.96  # of the normal distribution: 95 %
_SECTIONS = {
    "loss": "Training", "scale": "Training", "gamma": "Training", "lr": "Training", "lr-tau": "Training",
    "rate": "Speed", "data-wait": "Speed", "mfu": "Speed",
    "zero-shot": "Metrics", "zero-shot-5": "Metrics", "recall-1": "Metrics", "recall-5": "Metrics",
    "recall-10": "Metrics",
    "val-loss": "Metrics",
}  # fmt: skip
_STATE = "Estimates u of the samples"


def page(
    runs: Sequence[History],
    charts: Sequence[Chart],
    hard: Sequence[LargestU],
    price: float | None = None,
    signature: str = "",
) -> str:
    """The whole page. ``price``: of a card for an hour. ``signature``: of a page that looks for a newer one."""
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"Runs {', '.join(run.name for run in runs)}"
    by_section: dict[str, list[Chart]] = {}
    for chart in charts:
        section = _STATE if chart.key.startswith(("log-u", "tau-")) else _SECTIONS.get(chart.key, "Training")
        by_section.setdefault(section, []).append(chart)
    sections = [
        ("Overview", _overview(runs, price)),
        ("Training", _figures(by_section.get("Training", []))),
        ("Speed", _figures(by_section.get("Speed", []))),
        ("Metrics", _metrics(runs) + _figures(by_section.get("Metrics", []))),
        (_STATE, _figures(by_section.get(_STATE, []))),
        ("Samples with the largest u", "".join(_hard(run, each, runs) for run, each in zip(runs, hard))),
        ("Samples left out", _left_out(runs)),
        ("Restarts and gaps", _launches(runs)),
        ("Flags", _flags(runs)),
        ("Warnings", _notes(runs)),
    ]
    shown = [(name, content) for name, content in sections if content]
    nav = "".join(f'<li><a href="#{_id(name)}">{_text(name)}</a></li>' for name, _ in shown)
    body = "".join(
        f'<section id="{_id(name)}" aria-labelledby="{_id(name)}-h"><h2 id="{_id(name)}-h">{_text(name)}</h2>'
        f"{content}</section>"
        for name, content in shown
    )
    refresh = '<button type="button" id="refresh" aria-pressed="true">Refreshes</button>' if signature else ""
    made = time.strftime("%Y-%m-%d %H:%M:%S")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{_text(title)}</title><style>{_file('page.css')}</style></head>"
        f'<body data-signature="{_text(signature)}"><a class="skip" href="#main">Skip to the content</a>'
        f"<header><h1>{_text(title)}</h1><p>Made {made}.</p>"
        f'<div class="buttons">{refresh}<button type="button" id="theme">Dark colours</button></div></header>'
        f'<nav aria-label="Sections"><ul>{nav}</ul></nav><main id="main" tabindex="-1">{body}</main>'
        f"<script>{_file('page.js')}</script></body></html>"
    )


def _file(name: str) -> str:
    return resources.files("training.run_report").joinpath(name).read_text(encoding="utf-8")


def _text(value: object) -> str:
    # Names of files need not be text.
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode())


def _id(name: str) -> str:
    return name.lower().replace(" ", "-")


def _number(value: float) -> str:
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.3g}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, css: str = "") -> str:
    """``head`` and cells are HTML. The first cell of a row is its heading; the table scrolls by itself."""
    body = "".join(f'<tr><th scope="row">{row[0]}</th>{"".join(map(_cell, row[1:]))}</tr>' for row in rows)
    heads = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return (
        f'<div class="table {css}" role="region" aria-label="{caption}" tabindex="0"><table><caption>{caption}'
        f"</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(content: str) -> str:
    return f'<td class="long">{content}</td>' if len(content) > 40 else f"<td>{content}</td>"


def _overview(runs: Sequence[History], price: float | None) -> str:
    facts: dict[str, list[str]] = {}
    for run in runs:
        log = run.log
        spent = sum(launch.seconds for launch in log.launches)
        hours = sum(launch.seconds * launch.ranks for launch in log.launches) / 3600
        kind = "GPU" if any(launch.device == "cuda" for launch in log.launches) else "process"
        last = log.points[-1] if log.points else None
        state = "complete" if run.done else f"last line {log.launches[-1].end}" if log.launches else "not begun"
        lines = {
            "State": state,
            "Folder": str(run.folder),
            "Model": run.flags.get("model", ""),
            "Epochs": f"{last.x:.2f} of {run.flags.get('epochs', '?')}" if last else "0",
            "Loss": _number(last.values["loss"]) if last and "loss" in last.values else "",
            "Temperature τ": _number(1 / last.values["scale"]) if last and last.values.get("scale") else "",
            "Begun": str(log.launches[0].start) if log.launches else "",
            "Time": f"{_duration(spent)} in {len(log.launches)} launch{'es' * (len(log.launches) != 1)}",
            "Hardware": next((each.hardware for each in reversed(log.launches) if each.hardware), "")
            or next((f"{each.ranks} × {each.device}" for each in reversed(log.launches) if each.device), ""),
            "Cost": f"{_number(hours)} {kind} hours"
            + (f", {_number(hours * price)} at {price:g} an hour" if price is not None else ""),
            "Samples left out": f"{sum(sum(each.values()) for each in log.left_out.values()):,}",
            "Could not be read": "; ".join(run.problems),
        }
        for name, value in lines.items():
            facts.setdefault(name, []).append(_text(value))
    rows = [(name, *values) for name, values in facts.items() if any(values)]
    return _table("What the runs are", ["", *(_text(run.name) for run in runs)], rows)


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
    unit = f' <span class="unit">({_text(chart.unit)})</span>' if chart.unit else ""
    said = [chart.note, "dashed: started again here" if chart.marks else ""]
    note = f'<p class="note">{_text("; ".join(filter(None, said)))}</p>' if any(said) else ""
    key = _text(chart.key)
    return (
        f'<figure id="{key}"><figcaption><h3>{_text(chart.title)}{unit}</h3>{note}</figcaption>'
        f'<div class="plot" role="img" aria-label="{_text(_described(chart))}">{drawing.svg}</div>'
        f'<input type="range" min="0" value="0" step="1" aria-label="Point of {_text(chart.title)}">'
        f'<p class="readout" aria-hidden="true"></p>{_points(chart)}'
        f'<script type="application/json">{packed}</script></figure>'
    )


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _described(chart: Chart) -> str:
    """The chart in words."""
    lines = [
        f"{each.name}: {len(each.x)} points, first {_number(each.y[0])}, last {_number(each.y[-1])}, "
        f"least {_number(min(each.y))}, largest {_number(max(each.y))}"
        for each in chart.series
    ]
    return f"{chart.title} against {chart.x_label}. {'. '.join(lines)}."


def _points(chart: Chart) -> str:
    rows = []
    for each in chart.series:
        every = max(1, math.ceil(len(each.x) / (_ROWS // min(len(chart.series), 4))))
        chosen = sorted({*range(0, len(each.x), every), len(each.x) - 1})
        rows += [(_text(each.name), _number(each.x[i]), _number(each.y[i])) for i in chosen]
    table = _table(_text(chart.title), ["line", _text(chart.x_label), "value"], rows, css="points")
    return f"<details><summary>Table</summary>{table}</details>"


def _metrics(runs: Sequence[History]) -> str:
    last = [run.evaluations[-1] if run.evaluations else {} for run in runs]
    best = [run.evaluations for run in runs]
    counts = ("epoch", "step", "num_samples")
    names = {n: None for line in last for n, value in line.items() if n not in counts and is_number(value)}
    rows = []
    for name in names:
        cells = []
        for line, all_lines in zip(last, best):
            value = line.get(name)
            if not is_number(value):
                cells.append("")
                continue
            n = line.get("num_samples") if "_R@" in name else None
            interval = _wilson(value, int(n)) if is_number(n) and 0 <= value <= 1 else None
            around = f" <small>({interval[0]:.3f} to {interval[1]:.3f})</small>" if interval else ""
            cells.append(_number(value) + around + _best(name, value, all_lines))
        rows.append((_text(name), *cells))
    heads = [
        f"{_text(run.name)}, epoch {_number(line['epoch'])}" if line else _text(run.name)
        for run, line in zip(runs, last)
    ]
    text = ""
    if rows:
        text = _table("Newest evaluation of each run (recalls with 95 % intervals)", ["metric", *heads], rows)
    for run in runs:
        if run.tasks:
            text += _tasks(run)
    return text


def _best(name: str, value: float, lines: Sequence[dict[str, object]]) -> str:
    """The best value so far, where it is not the last one."""
    values = [(line[name], line["epoch"]) for line in lines if is_number(line.get(name))]
    lower = name.endswith(("rank", "loss"))
    best, epoch = (min if lower else max)(values, key=lambda each: float(str(each[0])))
    return "" if best == value else f"<br><small>best {_number(float(str(best)))}, epoch {epoch}</small>"


def _wilson(share: float, n: int) -> tuple[float, float] | None:
    """Wilson's 95 % interval of a share of ``n`` (Wilson, JASA 1927)."""
    if n < 1:
        return None
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _tasks(run: History) -> str:
    rows = []
    for task in run.tasks:
        metrics = task["metrics"] if isinstance(task["metrics"], dict) else {}
        main = metrics.get("main_metric")
        others = ", ".join(
            f"{_text(k)} {_number(v)}" for k, v in metrics.items() if k != "main_metric" and is_number(v)
        )
        shown = _number(main) if is_number(main) else ""
        rows.append((_text(task.get("dataset") or task.get("key", "")), shown, others))
    return _table(f"{_text(run.name)}: {_text(run.tasks_file)}", ["set", "main metric", "others"], rows)


def _hard(run: History, found: LargestU, runs: Sequence[History]) -> str:
    heading = f"<h3>{_text(run.name)}</h3>" if len(runs) > 1 else ""
    if not found.checkpoint:
        return f"{heading}<p>{_text(found.remark)}</p>"
    remark = f'<p class="note">{_text(found.remark)}</p>' if found.remark else ""
    cards = "".join(map(_card, found.samples))
    return (
        f"{heading}<p>Their own pair is worst among all that they are compared with, on the average of both "
        "directions. Captions of other pictures, placeholders and broken pictures look like that. Of "
        f"{found.rows:,} rows {found.seen:,} have a value, in {_text(found.checkpoint)}.</p>{remark}"
        f'<ol class="samples">{cards}</ol>'
    )


def _card(hard: Hard) -> str:
    values = ", ".join(f"{_text(name.removeprefix('log_u_'))} {value:.3f}" for name, value in hard.log_u.items())
    picture = '<div class="none" aria-hidden="true"></div>'
    if hard.picture:
        picture = f'<img src="{hard.picture}" alt="the picture of row {hard.row}" loading="lazy">'
    caption = f"<p>{_text(hard.caption)}</p>" if hard.caption else ""
    name = f"<p><small>{_text(hard.name)}</small></p>" if hard.name else ""
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
                    _text(run.name), _text(reason), f"{sum(by_epoch.values()):,}",
                    f"{by_epoch[last]:,} (epoch {last})", _text(run.log.examples.get(reason, "")),
                )
            )  # fmt: skip
    if not rows:
        return ""
    head = ["run", "reason", "in all", "in the last epoch with any", "example"]
    return _table("Samples left out, by reason", head, rows)


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
                    f"{_text(run.name)}, launch {number + 1}", _text(launch.start),
                    _duration((launch.start - before).total_seconds()) if before else "",
                    f"{launch.begun:.2f}", f"{launch.reached:.2f}", f"{launch.again:.2f}" if launch.again else "",
                    _duration(launch.seconds), _text(launch.hardware or f"{launch.ranks} × {launch.device}"),
                    _text(word),
                )
            )  # fmt: skip
        gaps += [
            (_text(run.name), _text(pause.start), _duration(pause.seconds), f"{pause.x:.2f}")
            for pause in run.log.pauses()
        ]
    if not rows:
        return ""
    head = [
        "launch", "start", "after a gap of", "from epoch", "to epoch", "epochs taken again", "time", "hardware",
        "how it ended",
    ]  # fmt: skip
    text = _table("Launches", head, rows)
    if gaps:
        heads = ["run", "since", "for", "epoch"]
        text += _table("Long times between two lines of one launch (evaluation, saving, waiting)", heads, gaps)
    return text


def _flags(runs: Sequence[History]) -> str:
    keys = sorted({key for run in runs for key in run.flags})
    if not keys:
        return ""
    text = ""
    if len(runs) > 1:
        differing = [key for key in keys if len({run.flags.get(key) for run in runs}) > 1]
        rows = [(f"--{_text(key)}", *(_text(run.flags.get(key, "–")) for run in runs)) for key in differing]
        heads = ["flag", *(_text(run.name) for run in runs)]
        text = _table("Flags that differ between the runs", heads, rows) if rows else "<p>All flags are equal.</p>"
    chosen = sorted({key for run in runs for key in run.chosen})
    rows = [(f"--{_text(key)}", *(_text(run.flags.get(key, "–")) for run in runs)) for key in chosen]
    table = _table("Flags whose values are not the defaults", ["flag", *(_text(run.name) for run in runs)], rows)
    return text + (f"<details><summary>All chosen flags</summary>{table}</details>" if len(runs) > 1 else table)


def _notes(runs: Sequence[History]) -> str:
    rows = [
        (_text(run.name), f"{n:,}", _text(note))
        for run in runs
        for note, n in sorted(run.log.notes.items(), key=lambda item: -item[1])[:50]
    ]
    return (
        _table("Warnings and errors of the log, without their numbers", ["run", "times", "message"], rows)
        if rows
        else ""
    )
