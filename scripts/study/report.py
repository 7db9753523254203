"""The tables of docs/study.md, made from the results, and put between its markers.

A block of the page begins with ``<!-- study: NAME -->`` and ends with ``<!-- end -->``; what stands outside is
written by hand. ``blocks`` has every NAME.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from study import power_law, tuning
from study.analysis import ANYWAY, FAILS, HOLDS, MISSING, ONE, OPEN, Estimate, Results, estimate
from study.cells import CLAIMS, MAIN, Plan
from study.comparisons import COMPARISONS, SELECTING, Comparison, cell_of, name_of, strengths, thousands
from study.methods import METHODS
from study.power_law import FEWEST, bootstrap

BLOCK = re.compile(r"(<!-- study: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOTHING = "Not run yet."
TOLD = {
    HOLDS: "above 0",
    FAILS: "below 0",
    OPEN: "undecided",
    ANYWAY: ANYWAY,
    ONE: "of one seed",
    MISSING: "not run yet",
}
Rows = Mapping[str, Mapping[str, str]]


def fill(page: str, results: Rows, tuned: Rows, plan: Plan, again: Rows = MappingProxyType({})) -> str:
    """``page`` with its blocks as the results have them. ValueError: a block that does not exist."""
    made = blocks(results, tuned, plan, again)

    def block(match: re.Match[str]) -> str:
        if match[2] not in made:
            raise ValueError(f"there is no block {match[2]!r}, but {', '.join(made)}")
        return f"{match[1]}\n{made[match[2]]}\n\n{match[3]}"

    return BLOCK.sub(block, page)


def blocks(results: Rows, tuned: Rows, plan: Plan, again: Rows = MappingProxyType({})) -> dict[str, str]:
    """Name -> Markdown. ``again``: rows of ``results`` that were trained once more, on another device."""
    found = Results.of(results.values())
    compared = {claim: list(make(plan)) for claim, make in COMPARISONS.items()}
    made = {
        "costs": _costs(found, plan),
        "runs": _runs(results, tuned),
        "devices": _devices(results, again),
        "methods": _methods(),
        "settings": _settings(tuned, plan),
        "references": _references(found),
        "verdicts": _verdicts(found, compared, plan),
        "means": _means(found, plan),
        "choosing": _choosing(found, plan),
        "scaling": _scaling(found, plan),
    }
    made |= {f"claim_{claim}": _differences(found, items) for claim, items in compared.items()}
    for block, name, alt, drawn in (
        ("claim_2", "weak_to_strong", "Accuracy of targets over that of their references", passing(found, plan)),
        ("scaling", "scaling_law", "Errors over samples, with the laws that were fitted", laws(found, plan)),
    ):
        made[block] += f"\n\n![{alt}](../assets/{name}.png)" if drawn else ""
    return made


# Tables


def shown(one: Estimate, sign: bool = False) -> str:
    """'24.6 ± 0.8': the half of the 95 % interval; one seed has none."""
    if one.n == 0:
        return "–"
    mean = f"{one.mean:+.1f}" if sign else f"{one.mean:.1f}"
    return f"{mean} ± {one.half:.1f}" if math.isfinite(one.half) else mean


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown; ``NOTHING`` without rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    names = list(head)
    return "\n".join([f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", *lines]) if lines else NOTHING


def _differences(results: Results, items: Iterable[Comparison]) -> str:
    rows, missing = [], 0
    for item in items:
        top1, recall = item.estimate(results), item.estimate(results, "test_recall1")
        if top1.n == 0:
            missing += 1
            continue
        rows.append(
            [
                *(item.label, shown(results.mean(item.ours)), shown(top1, sign=True), shown(recall, sign=True)),
                *(str(top1.n), item.verdict(results)),
            ]
        )
    made = table(("comparison", "top-1", "difference", "of recall@1", "seeds", "above 0"), rows)
    if not rows:
        return NOTHING
    left = f"{missing} comparison{'s' * (missing > 1)}"
    return f"{made}\n\nNot run yet: {left}." if missing else made


def _means(results: Results, plan: Plan) -> str:
    rows = []
    for samples in plan.budgets:
        found = [results.mean(cell_of(plan, method, samples)) for method in MAIN]
        if any(one.n for one in found):
            rows.append([thousands(samples), *map(shown, found), "/".join(str(one.n) for one in found)])
    return table(("samples", *(METHODS[method].title for method in MAIN), "seeds"), rows)


def _verdicts(results: Results, compared: Mapping[str, Iterable[Comparison]], plan: Plan) -> str:
    rows = []
    for claim, title in CLAIMS.items():
        if claim == "4":
            rows.append([claim, title, _scaling_verdict(results, plan)])
            continue
        if claim == "8":
            tops, recalls = (
                [item.estimate(results, column) for item in compared[claim]]
                for column in ("test_top1", "test_recall1")
            )
            rows.append([claim, title, _no_loss(tops, recalls)])
        else:
            rows.append([claim, title, _in_all(item.verdict(results) for item in compared[claim] if item.counts)])
    return table(("claim", "", "verdict"), rows)


def _in_all(found: Iterable[str]) -> str:
    """One verdict of many: a claim holds where most comparisons lie above 0, and none below."""
    counts = Counter(found)
    judged = sum(counts[one] for one in (HOLDS, FAILS, OPEN, ANYWAY))
    if counts[HOLDS] and counts[FAILS]:
        verdict = "mixed"
    else:
        verdict = next((one for one in (HOLDS, FAILS) if 2 * counts[one] > judged), OPEN)
    words = [f"{counts[one]} {told}" for one, told in TOLD.items() if counts[one]]
    return f"**{verdict}**: {', '.join(words)}" if judged else ", ".join(words)


def _no_loss(tops: Iterable[Estimate], recalls: Iterable[Estimate]) -> str:
    """The verdict on differences of which none should lie below 0."""
    top, recall = (Counter(one.verdict for one in found) for found in (tops, recalls))
    run = sum(top.values()) - top[MISSING]
    if not run:
        return "not run yet"
    seen = "mixed" if recall[FAILS] else "no loss seen"
    below = f"of {run}, {top[FAILS]} lie below 0 in top-1 and {recall[FAILS]} in recall@1"
    return f"**{FAILS if top[FAILS] else seen}**: {below}"


def passing(results: Results, plan: Plan) -> dict[int, list[tuple[float, Estimate]]]:
    """Budget -> accuracy of a reference and of the targets under it, where there are both; ascending."""
    found = {}
    for samples in plan.budgets:
        points = []
        for at in plan.strengths:
            reference = replace(plan.reference, at=at)
            mean = results.mean(cell_of(plan, "drrho_fixed", samples, reference))
            row = results.references.get(reference.name)
            if mean.n and row is not None:
                points.append((float(row["test_top1"]), mean))
        if points:
            found[samples] = sorted(points, key=lambda point: point[0])
    return found


def errors_of(results: Results, plan: Plan) -> dict[str, dict[float, list[float]]]:
    """Method -> budget -> errors of its runs, of the methods of claim 4."""
    found = {}
    for method in MAIN:
        runs = {samples: results.seeds(cell_of(plan, method, samples), "test_top1") for samples in plan.budgets}
        errors = {float(samples): [1 - top1 / 100 for top1 in seeds.values()] for samples, seeds in runs.items()}
        found[METHODS[method].title] = {samples: seen for samples, seen in errors.items() if seen}
    return found


def laws(results: Results, plan: Plan) -> dict[str, dict[float, list[float]]]:
    """Method -> budget -> errors, of the methods of claim 4 with enough budgets.

    A budget of which a method has a single run, that has no spread, is left out for all where the others suffice.
    """
    found = errors_of(results, plan)
    single = {samples for runs in found.values() for samples, seen in runs.items() if len(seen) == 1}
    several = {name: {at: seen for at, seen in runs.items() if at not in single} for name, runs in found.items()}
    enough = {name: runs for name, runs in several.items() if len(runs) >= FEWEST}
    return enough or {name: runs for name, runs in found.items() if len(runs) >= FEWEST}


def _scaling(results: Results, plan: Plan) -> str:
    rows, groups = [], laws(results, plan)
    for name, one in bootstrap(groups).items():
        beta = power_law.shown(one.law.beta, one.interval())
        interval = one.interval(2)
        at_bound = one.law.floor == 0 and (interval is None or interval[1] == 0)
        floor = "at its bound, 0" if at_bound else power_law.shown(one.law.floor, interval, ".3f")
        off = f"{100 * power_law.largest_deviation(one.law, groups[name]):.1f}"
        rows.append([name, beta, f"{one.law.alpha:.3f}", floor, off])
    head = ("", "β (95 %)", f"α at {thousands(plan.budgets[0])}", "floor (95 %)", "off by up to, points")
    return table(head, rows)


def _costs(results: Results, plan: Plan) -> str:
    """What a run of each way to use a reference costs, on the device that most runs were on."""
    devices = Counter(row["device"] for seeds in results.runs.values() for row in seeds.values())
    common = max(devices, key=lambda device: devices[device], default="")
    rows, whole = [], ("openclip", "drrho_fixed", "distill", "drrho_distill")
    compared = ((plan.short, (*whole[:2], *SELECTING)), (plan.middle, whole), (plan.long, whole[:3]))
    for budgets, methods in compared:
        for cell in (cell_of(plan, method, samples) for samples in budgets for method in methods):
            timed = results.seeds(cell, "cpu_seconds", common).values()
            if timed:
                time = f"{min(timed):.0f} s"
                rows.append(
                    [thousands(cell.samples), name_of(cell), shown(results.mean(cell)), time, str(len(timed))]
                )
    return table(("trained on", "", "top-1", "processor time", "runs timed"), rows)


def _scaling_verdict(results: Results, plan: Plan) -> str:
    groups, openclip = laws(results, plan), METHODS["openclip"].title
    fitted = bootstrap(groups)
    base, words = fitted.get(openclip), []
    for method in ("drrho_fixed", "drrho_v3"):
        title = METHODS[method].title
        if base is None or title not in fitted:
            continue
        interval = fitted[title].steeper_than(base)
        less = power_law.shown(fitted[title].law.beta - base.law.beta, interval, "+.2f")
        off = max(power_law.largest_deviation(fitted[name].law, groups[name]) for name in (title, openclip))
        bad = [name for name in (title, openclip) if not _fits(fitted[name].law, groups[name])]
        verdict = OPEN if interval is None or interval[0] <= 0 <= interval[1] else HOLDS
        verdict = FAILS if interval is not None and interval[0] > 0 else verdict
        misfit = f"; no law fits {' and '.join(bad)}" if bad else ""
        words.append(
            f"**{OPEN if bad else verdict}** for {title}, whose β minus OpenCLIP's is {less}, of laws that miss "
            f"means by up to {100 * off:.1f} points{misfit}"
        )
    return "; ".join(words) or "not run yet"


def _fits(law: power_law.Law, runs: power_law.Runs) -> bool:
    """Whether the law goes through the 95 % interval of every budget's mean."""
    found = {budget: estimate(errors) for budget, errors in runs.items()}
    return all(abs(float(law(np.asarray(at))) - one.mean) <= one.half for at, one in found.items())


def _references(results: Results) -> str:
    rows = []
    for name, row in sorted(results.references.items(), key=lambda one: (one[1]["model"], int(one[1]["samples"]))):
        rows.append(
            [
                *(name, row["data"], row["model"], thousands(int(row["samples"]))),
                *(f"{float(row[column]):.1f}" for column in ("test_top1", "test_recall1", "b_first")),
                f"{float(row['b_loss_spread']):.2f}",
            ]
        )
    head = (
        "reference",
        "data",
        "model",
        "samples",
        "top-1",
        "recall@1",
        "first among 256 of b, %",
        "spread of losses",
    )
    return table(head, rows)


def _choosing(results: Results, plan: Plan) -> str:
    """What references gave, from the one that is weakest beside what the target reaches without it."""
    own = [(samples, replace(plan.reference, at=at)) for samples, at in strengths(plan)]
    others = [(samples, reference) for samples in plan.middle for reference in plan.other_references]
    rows = []
    for samples, reference in (*own, *others):
        ours, alone = cell_of(plan, "drrho_fixed", samples, reference), cell_of(plan, "openclip", samples)
        gain, row = results.difference(ours, alone), results.references.get(reference.name)
        if gain.n == 0 or row is None:
            continue
        strength, without = float(row["test_top1"]), results.mean(alone)
        rows.append(
            [
                *(f"{reference.data}, {thousands(reference.at)}", reference.model, f"{strength:.1f}"),
                *(shown(without), f"{strength / without.mean:.1f}", f"{float(row['b_first']):.1f}"),
                *(f"{float(row['b_loss_spread']):.2f}", thousands(samples), shown(gain, sign=True), str(gain.n)),
            ]
        )
    head = (
        *("reference", "model", "its top-1", "target without it", "ratio", "first among 256 of b, %"),
        *("spread of losses", "target's samples", "gain", "seeds"),
    )
    return table(head, sorted(rows, key=lambda cells: float(cells[4])))


def _methods() -> str:
    rows = []
    for method in METHODS.values():
        reference = ["`--cached_ref_features_dir`"] if method.reference else []
        flags = re.sub(r"(?<!^) --", "` `--", " ".join(method.flags))
        words = " ".join([f"`{flags}`"] * bool(flags) + reference) or "none"
        entries = ", ".join(f"`{name}` {value:.3g}" for name, value in method.model)
        rows.append([method.title, words + (f"; in the model's config {entries}" if entries else "")])
    return table(("method", "its own flags"), rows)


def _settings(tuned: Rows, plan: Plan) -> str:
    rows = []
    for name, method in METHODS.items():
        if method.tuned_as:
            continue
        for epochs in (True, False):
            try:
                found = tuning.settings(name, plan, tuned, epochs=epochs)
            except tuning.Untuned:
                continue
            trials = sum(row["method"] == name for row in tuned.values())
            words = " ".join(f"`{flag} {value}`" for flag, value in found.items())
            later = any(axis.needs_epochs for axis in method.axes) and not epochs
            rows.append([method.title, words + (", γ not yet" if later else ""), str(trials)])
            break
    return table(("method", "chosen", "runs"), rows)


def _devices(results: Rows, again: Rows) -> str:
    """How runs of one cell and seed differ between devices."""
    pairs: dict[tuple[str, str], list[tuple[Mapping[str, str], Mapping[str, str]]]] = {}
    for name, row in again.items():
        if name in results:
            pairs.setdefault((row["device"], results[name]["device"]), []).append((row, results[name]))
    rows = []
    for (there, here), runs in sorted(pairs.items()):
        top1, recall = (
            [float(second[column]) - float(first[column]) for second, first in runs]
            for column in ("test_top1", "test_recall1")
        )
        found = [shown(estimate(values), sign=True) for values in (top1, recall)]
        largest = f"{max(top1, key=abs):+.1f}"
        rows.append([f"{there} − {here}", str(len(runs)), found[0], largest, found[1]])
    return table(("", "cells", "top-1", "the largest", "recall@1"), rows)


def _runs(results: Rows, tuned: Rows) -> str:
    rows = [*results.values(), *tuned.values()]
    if not rows:
        return NOTHING
    kinds = Counter(row["kind"] for row in rows)
    # Of a reference's checkpoints the last one: they are of one run.
    last: dict[str, Mapping[str, str]] = {}
    for row in sorted(rows, key=lambda row: int(row["samples_read"])):
        name = row["id"].rpartition("@")[0] if row["kind"] == "reference" else row["id"]
        last[name] = row
    hours = sum(float(row["cpu_seconds"]) for row in last.values()) / 3600
    samples = sum(int(row["samples_read"]) for row in last.values())
    devices = ", ".join(sorted({row["device"] for row in rows}))
    dates = sorted(row["date"][:10] for row in rows)
    return (
        f"{kinds['cell']} cells, {kinds['tuning']} runs for tuning and {kinds['reference']} checkpoints of "
        f"references, from {dates[0]} to {dates[-1]} on {devices}: {samples / 1e6:.1f} million samples in "
        f"at least {hours:.1f} hours of processor time."
    )
