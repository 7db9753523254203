"""The tables of docs/study.md, made from the results, and put between its markers.

A block of the page begins with ``<!-- study: NAME -->`` and ends with ``<!-- end -->``; what stands outside is
written by hand. ``blocks`` has every NAME.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from study import power_law, tuning
from study.analysis import FAILS, HOLDS, MISSING, OPEN, Estimate, Results
from study.cells import CLAIMS, COMPRESSED, KEEPS_U, MAIN, Cell, Plan, Reference, Wanted, grid, with_reference
from study.methods import METHODS
from study.power_law import FEWEST, bootstrap

BLOCK = re.compile(r"(<!-- study: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOTHING = "Not run yet."
SELECTING = ("jest", "jest_topk", "drrho_select")
TOLD = {HOLDS: "above 0", FAILS: "below 0", OPEN: "undecided", MISSING: "not run yet"}
PARTS = {"half": "a half", "quarter": "a quarter", "eighth": "an eighth"}
Rows = Mapping[str, Mapping[str, str]]


def fill(page: str, results: Rows, tuned: Rows, plan: Plan) -> str:
    """``page`` with its blocks as the results have them. ValueError: a block that does not exist."""
    made = blocks(results, tuned, plan)

    def block(match: re.Match[str]) -> str:
        if match[2] not in made:
            raise ValueError(f"there is no block {match[2]!r}, but {', '.join(made)}")
        return f"{match[1]}\n{made[match[2]]}\n\n{match[3]}"

    return BLOCK.sub(block, page)


def blocks(results: Rows, tuned: Rows, plan: Plan) -> dict[str, str]:
    """Name -> Markdown."""
    found = Results.of(results.values())
    compared = {claim: list(make(plan)) for claim, make in COMPARISONS.items()}
    made = {
        "costs": _costs(found, plan),
        "runs": _runs(results, tuned),
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


# What is compared


@dataclass(frozen=True)
class Comparison:
    """``ours`` against ``theirs``, a cell or the reference of ours (None), in the row ``label``."""

    label: str
    ours: Cell
    theirs: Cell | None

    def estimate(self, results: Results, column: str = "test_top1") -> Estimate:
        if self.theirs is None:
            return results.beyond_reference(self.ours, column)
        return results.difference(self.ours, self.theirs, column)


def _cell(plan: Plan, method: str, samples: int, reference: Reference | None = None, **other: Any) -> Cell:
    cell = with_reference(Cell(method, samples, batch=plan.batch), reference or plan.reference)
    return replace(cell, **other)


def _name(cell: Cell) -> str:
    return METHODS[cell.method].title


def _against(label: str, ours: Cell, *theirs: Cell) -> Iterator[Comparison]:
    for other in theirs:
        yield Comparison(f"{label}: {_name(ours)} − {_name(other)}", ours, other)


def _helps(plan: Plan) -> Iterator[Comparison]:
    for samples in plan.budgets:
        openclip, v3, *robust = (_cell(plan, method, samples) for method in MAIN)
        for ours in robust:
            yield from _against(thousands(samples), ours, openclip, v3)
    for samples in plan.middle:
        for method in ("drrho_v1", "drrho_v2"):
            label = thousands(samples)
            yield from _against(label, _cell(plan, method, samples), _cell(plan, "openclip", samples))


def _passes(plan: Plan) -> Iterator[Comparison]:
    for samples, at in _strengths(plan):
        weaker = replace(plan.reference, at=at)
        label = f"{thousands(samples)} under a reference of {thousands(at)}: DRRho-CLIP − its reference"
        yield Comparison(label, _cell(plan, "drrho_fixed", samples, weaker), None)
    weaker = replace(plan.reference, at=plan.strengths[1])
    for samples in plan.middle:
        label = f"{thousands(samples)}, larger tower, under a reference of {thousands(weaker.at)}"
        ours = _cell(plan, "drrho_fixed", samples, weaker, model="large")
        yield Comparison(f"{label}: DRRho-CLIP − its reference", ours, None)
        yield from _against(label, ours, _cell(plan, "openclip", samples, model="large"))


def _strengths(plan: Plan) -> Iterator[tuple[int, int]]:
    """The budgets of targets under references of several strengths, and these."""
    for samples in plan.middle:
        yield from ((samples, at) for at in plan.strengths)
    for samples in plan.long:
        yield from ((samples, at) for at in (*plan.strengths[:2], plan.strengths[-1]))


def _parts(plan: Plan) -> Iterator[Comparison]:
    for samples in plan.middle:
        whole = [_cell(plan, method, samples) for method in ("openclip", "fastclip_v3")]
        for part in PARTS:
            ours = _cell(plan, "drrho_fixed", samples, data=f"b-{part}")
            for other in whole:
                label = f"{thousands(samples)}: DRRho-CLIP on {PARTS[part]} − {_name(other)} on all"
                yield Comparison(label, ours, other)
            same = _cell(plan, "openclip", samples, data=f"b-{part}")
            label = f"{thousands(samples)}: DRRho-CLIP on {PARTS[part]} − OpenCLIP on the same"
            yield Comparison(label, ours, same)


def _heuristics(plan: Plan) -> Iterator[Comparison]:
    for samples in plan.middle:
        ours = _cell(plan, "drrho_fixed", samples)
        for method in ("distill", "drrho_distill"):
            yield from _against(f"{thousands(samples)} trained on", ours, _cell(plan, method, samples))
    for samples in plan.short:
        ours = _cell(plan, "drrho_fixed", samples)
        for method in SELECTING:
            yield from _against(f"{thousands(samples)} trained on", ours, _cell(plan, method, samples))
        # What a target learns from as many samples as were read to choose these, or fewer.
        for longer in plan.long:
            ours = _cell(plan, "drrho_fixed", longer)
            for method in SELECTING:
                read = samples * METHODS[method].super_batch
                label = f"{thousands(longer)} − {thousands(samples)} chosen of {thousands(read)}"
                yield from _against(label, ours, _cell(plan, method, samples))


def _family(plan: Plan) -> Iterator[Comparison]:
    for samples in plan.middle:
        for batch in (plan.batch // 4, plan.batch, plan.batch * 8):
            ours, other = (_cell(plan, method, samples, batch=batch) for method in ("fastclip_v3", "openclip"))
            yield from _against(f"{thousands(samples)}, batch {batch}", ours, other)
    for samples in plan.long:
        ours, other = (_cell(plan, method, samples, data="b-eighth") for method in ("fastclip_v3", "openclip"))
        yield from _against(f"{thousands(samples)} on an eighth", ours, other)
    for samples in plan.middle:
        for method in ("siglip", "fastclip_v0", "fastclip_v1", "fastclip_v2", "sogclr", "isogclr"):
            other = _cell(plan, "openclip", samples)
            yield from _against(thousands(samples), _cell(plan, method, samples), other)


def _references_decide(plan: Plan) -> Iterator[Comparison]:
    for samples, at in _strengths(plan):
        label = f"{thousands(samples)} under a reference of {thousands(at)}"
        ours = _cell(plan, "drrho_fixed", samples, replace(plan.reference, at=at))
        yield from _against(label, ours, _cell(plan, "openclip", samples))
    titles = ("trained on b itself", "trained on a and b", "trained on emoji", "with a larger tower")
    for samples in plan.middle:
        for title, reference in zip(titles, plan.other_references, strict=True):
            label = f"{thousands(samples)} under a reference {title}"
            ours = _cell(plan, "drrho_fixed", samples, reference)
            yield from _against(label, ours, _cell(plan, "openclip", samples))
        for noise in (20, 40):
            ours, other = (
                _cell(plan, method, samples, data=f"b-noise{noise}") for method in ("drrho_fixed", "openclip")
            )
            yield from _against(f"{thousands(samples)}, {noise} % of the captions shuffled", ours, other)


def _compressed(plan: Plan) -> Iterator[Comparison]:
    for method, whole in COMPRESSED.items():
        many_epochs = method == KEEPS_U
        data, words = ("b-eighth", " on an eighth") if many_epochs else ("b", "")
        for samples in plan.middle if many_epochs else plan.budgets[:1]:
            ours, other = (_cell(plan, name, samples, data=data) for name in (method, whole))
            yield from _against(f"{thousands(samples)}{words}", ours, other)


COMPARISONS: dict[str, Callable[[Plan], Iterable[Comparison]]] = {
    "1": _helps,
    "2": _passes,
    "3": _parts,
    "5": _heuristics,
    "6": _family,
    "7": _references_decide,
    "8": _compressed,
}


def wanted(plan: Plan, claims: frozenset[str]) -> list[Wanted]:
    """The cells for ``claims`` and those that they are compared with, most needed first."""
    items = [item for claim in sorted(claims & COMPARISONS.keys()) for item in COMPARISONS[claim](plan)]
    compared = {replace(cell, seed=0) for item in items for cell in (item.ours, item.theirs) if cell is not None}
    return [one for one in grid(plan) if one.claims & claims or replace(one.cell, seed=0) in compared]


# Tables


def thousands(samples: int) -> str:
    return f"{samples / 1000:.0f}k" if samples >= 1000 else str(samples)


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
                *(str(top1.n), top1.verdict),
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
        found = [results.mean(_cell(plan, method, samples)) for method in MAIN]
        if any(one.n for one in found):
            rows.append([thousands(samples), *map(shown, found), "/".join(str(one.n) for one in found)])
    return table(("samples", *(METHODS[method].title for method in MAIN), "seeds"), rows)


def _verdicts(results: Results, compared: Mapping[str, Iterable[Comparison]], plan: Plan) -> str:
    rows = []
    for claim, title in CLAIMS.items():
        if claim == "4":
            rows.append([claim, title, _scaling_verdict(results, plan)])
            continue
        counts = Counter(item.estimate(results).verdict for item in compared[claim])
        rows.append([claim, title, _no_loss(counts) if claim == "8" else _in_all(counts)])
    return table(("claim", "", "verdict"), rows)


def _in_all(counts: Counter[str]) -> str:
    """One verdict of many: mixed where some comparisons hold and others do not."""
    if counts[HOLDS] and counts[FAILS]:
        found = "mixed"
    else:
        found = next((one for one in (HOLDS, FAILS, OPEN) if counts[one]), MISSING)
    words = [f"{counts[one]} {told}" for one, told in TOLD.items() if counts[one]]
    return "not run yet" if found == MISSING else f"**{found}**: {', '.join(words)}"


def _no_loss(counts: Counter[str]) -> str:
    """The verdict on differences of which none should lie below 0."""
    run = sum(counts.values()) - counts[MISSING]
    if not run:
        return "not run yet"
    return f"**{FAILS if counts[FAILS] else 'no loss seen'}**: {counts[FAILS]} of {run} below 0"


def passing(results: Results, plan: Plan) -> dict[int, list[tuple[float, Estimate]]]:
    """Budget -> accuracy of a reference and of the targets under it, where there are both; ascending."""
    found = {}
    for samples in plan.budgets:
        points = []
        for at in plan.strengths:
            reference = replace(plan.reference, at=at)
            mean = results.mean(_cell(plan, "drrho_fixed", samples, reference))
            row = results.references.get(reference.name)
            if mean.n and row is not None:
                points.append((float(row["test_top1"]), mean))
        if points:
            found[samples] = sorted(points, key=lambda point: point[0])
    return found


def laws(results: Results, plan: Plan) -> dict[str, dict[float, list[float]]]:
    """Method -> budget -> errors, of the methods of claim 4 with enough budgets."""
    found = {}
    for method in MAIN:
        runs = {
            float(samples): [1 - top1 / 100 for top1 in seeds.values()]
            for samples in plan.budgets
            if (seeds := results.seeds(_cell(plan, method, samples), "test_top1"))
        }
        if len(runs) >= FEWEST:
            found[METHODS[method].title] = runs
    return found


def _scaling(results: Results, plan: Plan) -> str:
    rows, groups = [], laws(results, plan)
    for name, one in bootstrap(groups).items():
        beta = power_law.shown(one.law.beta, one.interval())
        floor = power_law.shown(one.law.floor, one.interval(2), ".3f")
        off = f"{100 * power_law.largest_deviation(one.law, groups[name]):.1f}"
        rows.append([name, beta, f"{one.law.alpha:.3f}", floor, off])
    head = ("", "β (95 %)", f"α at {thousands(plan.budgets[0])}", "floor (95 %)", "off by up to, points")
    return table(head, rows)


def _costs(results: Results, plan: Plan) -> str:
    """What a run of each way to use a reference costs."""
    rows, whole = [], ("openclip", "drrho_fixed", "distill", "drrho_distill")
    compared = ((plan.short, (*whole[:2], *SELECTING)), (plan.middle, whole), (plan.long, whole[:2]))
    for budgets, methods in compared:
        for cell in (_cell(plan, method, samples) for samples in budgets for method in methods):
            seconds = results.mean(cell, "cpu_seconds")
            if seconds.n:
                time = f"{seconds.mean:.0f} s"
                rows.append(
                    [thousands(cell.samples), _name(cell), shown(results.mean(cell)), time, str(seconds.n)]
                )
    return table(("trained on", "", "top-1", "processor time", "seeds"), rows)


def _scaling_verdict(results: Results, plan: Plan) -> str:
    fitted = bootstrap(laws(results, plan))
    base, words = fitted.get(METHODS["openclip"].title), []
    for method in ("drrho_fixed", "drrho_v3"):
        title = METHODS[method].title
        if base is None or title not in fitted:
            continue
        interval = fitted[title].steeper_than(base)
        less = power_law.shown(fitted[title].law.beta - base.law.beta, interval, "+.2f")
        verdict = OPEN if interval is None or interval[0] <= 0 <= interval[1] else HOLDS
        verdict = FAILS if interval is not None and interval[0] > 0 else verdict
        words.append(f"**{verdict}** for {title}, whose β less OpenCLIP's is {less}")
    return "; ".join(words) or "not run yet"


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
    rows = []
    for samples, at in _strengths(plan):
        reference = replace(plan.reference, at=at)
        ours, alone = _cell(plan, "drrho_fixed", samples, reference), _cell(plan, "openclip", samples)
        gain, row = results.difference(ours, alone), results.references.get(reference.name)
        if gain.n == 0 or row is None:
            continue
        strength, without = float(row["test_top1"]), results.mean(alone)
        shares = (
            f"{strength:.1f}",
            shown(without),
            f"{strength / without.mean:.1f}",
            f"{float(row['b_first']):.1f}",
        )
        rows.append((strength / without.mean, [*shares, thousands(samples), shown(gain, sign=True), str(gain.n)]))
    head = ("reference", "target without it", "ratio", "first among 256, %", "samples", "gain", "seeds")
    return table(head, (cells for _, cells in sorted(rows)))


def _methods() -> str:
    rows = []
    for method in METHODS.values():
        reference = ["`--cached_ref_features_dir`"] if method.reference else []
        flags = re.sub(r"(?<!^) --", "` `--", " ".join(method.flags))
        rows.append([method.title, " ".join([f"`{flags}`"] * bool(flags) + reference) or "none"])
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


def _runs(results: Rows, tuned: Rows) -> str:
    rows = [*results.values(), *tuned.values()]
    if not rows:
        return NOTHING
    kinds = Counter(row["kind"] for row in rows)
    hours = sum(float(row["cpu_seconds"]) for row in rows) / 3600
    samples = sum(int(row["samples_read"]) for row in rows if row["kind"] != "reference")
    devices = ", ".join(sorted({row["device"] for row in rows}))
    dates = sorted(row["date"][:10] for row in rows)
    return (
        f"{kinds['cell']} cells, {kinds['tuning']} runs for tuning and {kinds['reference']} checkpoints of "
        f"references, from {dates[0]} to {dates[-1]} on {devices}: {samples / 1e6:.1f} million samples in "
        f"{hours:.1f} hours of processor time."
    )
