"""What the study compares, claim by claim, and the cells that this needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from study.analysis import ANYWAY, HOLDS, Estimate, Results
from study.cells import (
    COMPRESSED,
    KEEPS_U,
    MAIN,
    OTHER_OPENCLIPS,
    Cell,
    Plan,
    Reference,
    Wanted,
    grid,
    with_reference,
)
from study.methods import METHODS

HEURISTICS = ("jest", "jest_topk")
SELECTING = (*HEURISTICS, "drrho_select")
PARTS = {"half": "a half", "quarter": "a quarter", "eighth": "an eighth"}


@dataclass(frozen=True)
class Comparison:
    """``ours`` against ``theirs``, a cell or the reference of ours (None), in the row ``label``.

    ``alone``   the target without a reference: what is not above it was not gained by one.
    ``counts``  in the claim's verdict.
    """

    label: str
    ours: Cell
    theirs: Cell | None
    alone: Cell | None = None
    counts: bool = True

    def estimate(self, results: Results, column: str = "test_top1") -> Estimate:
        if self.theirs is None:
            return results.beyond_reference(self.ours, column)
        return results.difference(self.ours, self.theirs, column)

    def verdict(self, results: Results) -> str:
        found = self.estimate(results).verdict
        if found == HOLDS and self.alone and results.difference(self.ours, self.alone).verdict != HOLDS:
            return ANYWAY
        return found


def cell_of(plan: Plan, method: str, samples: int, reference: Reference | None = None, **other: Any) -> Cell:
    """A cell of the plan's batch size, under its strong reference unless another one is given."""
    cell = with_reference(Cell(method, samples, batch=plan.batch), reference or plan.reference)
    return replace(cell, **other)


def name_of(cell: Cell) -> str:
    return METHODS[cell.method].title


def _against(label: str, ours: Cell, *theirs: Cell, counts: bool = True) -> Iterator[Comparison]:
    for other in theirs:
        yield Comparison(f"{label}: {name_of(ours)} − {name_of(other)}", ours, other, counts=counts)


def _helps(plan: Plan) -> Iterator[Comparison]:
    for samples in plan.budgets:
        openclip, v3, *robust = (cell_of(plan, method, samples) for method in MAIN)
        for ours in robust:
            yield from _against(thousands(samples), ours, openclip, v3)
    for samples in (*plan.middle, *plan.long):
        ours, *others = (cell_of(plan, method, samples) for method in ("drrho_fixed", *OTHER_OPENCLIPS))
        yield from _against(thousands(samples), ours, *others)
    for samples in plan.middle:
        for method in ("drrho_v1", "drrho_v2"):
            label = thousands(samples)
            yield from _against(label, cell_of(plan, method, samples), cell_of(plan, "openclip", samples))


def _passes(plan: Plan) -> Iterator[Comparison]:
    for samples, at in strengths(plan):
        weaker = replace(plan.reference, at=at)
        ours, alone = cell_of(plan, "drrho_fixed", samples, weaker), cell_of(plan, "openclip", samples)
        label = f"{thousands(samples)} under a reference of {thousands(at)}: {name_of(ours)} − its reference"
        yield Comparison(label, ours, None, alone)
    weaker = replace(plan.reference, at=plan.strengths[1])
    for samples in plan.middle:
        label = f"{thousands(samples)}, larger tower, under a reference of {thousands(weaker.at)}"
        ours = cell_of(plan, "drrho_fixed", samples, weaker, model="large")
        alone = cell_of(plan, "openclip", samples, model="large")
        yield Comparison(f"{label}: {name_of(ours)} − its reference", ours, None, alone)
        yield from _against(label, ours, alone, counts=False)


def strengths(plan: Plan) -> Iterator[tuple[int, int]]:
    """The budgets of targets under references of several strengths, and these."""
    for samples in plan.middle:
        yield from ((samples, at) for at in plan.strengths)
    for samples in plan.long:
        yield from ((samples, at) for at in (*plan.strengths[:2], plan.strengths[-1]))
    for samples in plan.longest:
        yield samples, plan.strengths[-1]


def _parts(plan: Plan) -> Iterator[Comparison]:
    for samples in plan.middle:
        whole = [cell_of(plan, method, samples) for method in ("openclip", "openclip_tau", "fastclip_v3")]
        for part in PARTS:
            ours = cell_of(plan, "drrho_fixed", samples, data=f"b-{part}")
            label = f"{thousands(samples)}: {name_of(ours)} on {PARTS[part]}"
            for other in whole:
                yield Comparison(f"{label} − {name_of(other)} on all", ours, other)
            same = cell_of(plan, "openclip", samples, data=f"b-{part}")
            yield Comparison(f"{label} − {name_of(same)} on the same", ours, same)


def _heuristics(plan: Plan) -> Iterator[Comparison]:
    """Of the combinations, which are no heuristics, what each adds is a row, and not in the verdict."""
    for samples in (*plan.middle, *plan.long, *plan.longest):
        ours = cell_of(plan, "drrho_fixed", samples)
        yield from _against(f"{thousands(samples)} trained on", ours, cell_of(plan, "distill", samples))
    for samples in plan.middle:
        yield from _combined(plan, "drrho_distill", samples)
    for samples in plan.short:
        ours = cell_of(plan, "drrho_fixed", samples)
        for method in HEURISTICS:
            yield from _against(f"{thousands(samples)} trained on", ours, cell_of(plan, method, samples))
        yield from _combined(plan, "drrho_select", samples)
        # What a target learns from as many samples as were read to choose these, or fewer.
        for longer in plan.long:
            ours = cell_of(plan, "drrho_fixed", longer)
            for method in SELECTING:
                read = samples * METHODS[method].super_batch
                label = f"{thousands(longer)} − {thousands(samples)} chosen of {thousands(read)}"
                yield from _against(label, ours, cell_of(plan, method, samples), counts=method in HEURISTICS)


def _combined(plan: Plan, method: str, samples: int) -> Iterator[Comparison]:
    ours, alone = cell_of(plan, method, samples), cell_of(plan, "drrho_fixed", samples)
    yield from _against(f"{thousands(samples)} trained on", ours, alone, counts=False)


def _family(plan: Plan) -> Iterator[Comparison]:
    for samples in plan.budgets:
        yield from _against(
            thousands(samples), cell_of(plan, "fastclip_v3", samples), cell_of(plan, "openclip", samples)
        )
    for samples in (*plan.middle, *plan.long):
        ours, *others = (cell_of(plan, method, samples) for method in ("fastclip_v3", *OTHER_OPENCLIPS))
        yield from _against(thousands(samples), ours, *others)
    for samples in plan.middle:
        for batch in (plan.batch // 4, plan.batch * 8):
            ours, other = (cell_of(plan, method, samples, batch=batch) for method in ("fastclip_v3", "openclip"))
            yield from _against(f"{thousands(samples)}, batch {batch}", ours, other)
    for samples in plan.long:
        ours, *others = (
            cell_of(plan, method, samples, data="b-eighth")
            for method in ("fastclip_v3", "openclip", *OTHER_OPENCLIPS)
        )
        yield from _against(f"{thousands(samples)} on an eighth", ours, *others)
    for samples in plan.middle:
        for method in ("siglip", "fastclip_v0", "fastclip_v1", "fastclip_v2", "sogclr", "isogclr"):
            other = cell_of(plan, "openclip", samples)
            yield from _against(thousands(samples), cell_of(plan, method, samples), other)


def _references_decide(plan: Plan) -> Iterator[Comparison]:
    """What a stronger reference gives over the weakest; and what each gives, which alone would decide nothing."""

    def under(samples: int, at: int) -> Cell:
        return cell_of(plan, "drrho_fixed", samples, replace(plan.reference, at=at))

    weakest = plan.strengths[0]
    for samples, at in strengths(plan):
        if at != weakest and samples not in plan.longest:
            label = (
                f"{thousands(samples)}: under a reference of {thousands(at)} − under one of {thousands(weakest)}"
            )
            yield Comparison(label, under(samples, at), under(samples, weakest))
    for samples, at in strengths(plan):
        label = f"{thousands(samples)} under a reference of {thousands(at)}"
        yield from _against(label, under(samples, at), cell_of(plan, "openclip", samples), counts=False)
    titles = ("trained on b itself", "trained on a and b", "trained on emoji", "with a larger tower")
    for samples in plan.middle:
        for title, reference in zip(titles, plan.other_references, strict=True):
            label = f"{thousands(samples)} under a reference {title}"
            ours = cell_of(plan, "drrho_fixed", samples, reference)
            yield from _against(label, ours, cell_of(plan, "openclip", samples), counts=False)
            best = plan.strengths[-1]
            label = f"{thousands(samples)}: under a reference {title} − under one of {thousands(best)}"
            yield Comparison(label, ours, under(samples, best), counts=False)
        for noise in (20, 40):
            ours, other = (
                cell_of(plan, method, samples, data=f"b-noise{noise}") for method in ("drrho_fixed", "openclip")
            )
            label = f"{thousands(samples)}, {noise} % of the captions shuffled"
            yield from _against(label, ours, other, counts=False)


def _compressed(plan: Plan) -> Iterator[Comparison]:
    for method, whole in COMPRESSED.items():
        many_epochs = method == KEEPS_U
        data, words = ("b-eighth", " on an eighth") if many_epochs else ("b", "")
        for samples in plan.middle if many_epochs else plan.budgets[:1]:
            ours, other = (cell_of(plan, name, samples, data=data) for name in (method, whole))
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


def thousands(samples: int) -> str:
    return f"{samples / 1000:.0f}k" if samples >= 1000 else str(samples)
