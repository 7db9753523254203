"""What is trained: a cell is one run of the trainer. Which cells answer which claim, the most needed first."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

REFERENCE_SEED = 100  # of references' initial weights and order: no target has it
TUNING_SEED = 50  # of the runs that choose settings: no cell has it


@dataclass(frozen=True)
class Reference:
    """A frozen reference: a run of ``method`` on ``data`` over ``samples`` samples, as it was after ``at``."""

    data: str = "a"
    samples: int = 0
    at: int = 0
    model: str = "small"
    method: str = "openclip"
    batch: int = 128

    @property
    def name(self) -> str:
        return f"{self.data}-{self.samples}@{self.at}" + ("" if self.model == "small" else f"-{self.model}")

    @property
    def cell(self) -> Cell:
        """The run that it is a checkpoint of."""
        return Cell(self.method, self.samples, self.data, self.batch, REFERENCE_SEED, self.model)


@dataclass(frozen=True)
class Cell:
    """One run: ``samples`` is how many the target is trained on, counted with repetition.

    ``settings``: flags of the method that replace the tuned ones; used by the runs that tune.
    """

    method: str
    samples: int
    data: str = "b"
    batch: int = 128
    seed: int = 0
    model: str = "small"
    reference: Reference | None = None
    settings: tuple[tuple[str, str], ...] | None = None

    @property
    def reference_name(self) -> str:
        return self.reference.name if self.reference else ""

    def id(self, settings: str) -> str:
        """The name of the run with these ``settings``: of its folder, and of its row."""
        words = [self.method, self.data, f"{self.samples}", f"b{self.batch}", f"s{self.seed}", self.model]
        words += [self.reference_name] if self.reference else []
        return "_".join([*words, hashlib.sha256(settings.encode()).hexdigest()[:6]])


@dataclass(frozen=True)
class Plan:
    """The sizes of a study, in samples. ``budgets`` ascend; ``strengths`` are the reference's checkpoints."""

    budgets: tuple[int, ...]
    strengths: tuple[int, ...]
    tuning: int
    seeds: int = 5
    few: int = 3
    batch: int = 128
    values: int | None = None  # tried along each axis; None: all

    @property
    def reference(self) -> Reference:
        """The strong one."""
        return Reference("a", self.strengths[-1], self.strengths[-1], batch=self.batch)

    @property
    def other_references(self) -> tuple[Reference, ...]:
        """Of other data, and of a larger tower with half of the samples."""
        half = self.strengths[-2]
        return (
            replace(self.reference, data="b"),
            replace(self.reference, data="a+b"),
            replace(self.reference, data="emoji"),
            replace(self.reference, model="large", samples=half, at=half),
        )

    @property
    def short(self) -> tuple[int, ...]:
        """The budget of comparisons with methods that read more than they train on."""
        return self.budgets[1:2]

    @property
    def middle(self) -> tuple[int, ...]:
        """The budget of most comparisons."""
        return self.budgets[2:3]

    @property
    def long(self) -> tuple[int, ...]:
        """The budget of those that need a long run."""
        return self.budgets[3:4]

    @property
    def longest(self) -> tuple[int, ...]:
        """The largest budget, where it is not that of long runs."""
        return self.budgets[4:]


UNIT = 168 * 256  # samples: half an epoch of b, and a whole number of steps of every batch size from 32 to 1,024
ICONS = Plan(
    budgets=tuple(UNIT * k for k in (1, 2, 4, 8, 16)),
    strengths=tuple(UNIT * k for k in (2, 4, 8, 16, 32)),
    tuning=UNIT * 2,
)
SMOKE = Plan(budgets=(64, 128, 192, 256), strengths=(128, 256), tuning=64, batch=64, values=1)

OTHER_OPENCLIPS = ("openclip_2e-3", "openclip_tau")
MAIN = ("openclip", "fastclip_v3", "drrho_fixed", "drrho_v3")
CLAIMS = {
    "1": "a reference helps",
    "2": "weak to strong",
    "3": "data efficiency",
    "4": "scaling",
    "5": "against heuristics",
    "6": "FastCLIP's own claim",
    "7": "the reference decides",
    "8": "compression costs nothing",
}
# A method whose run is compressed, and the same without.
COMPRESSED = {
    "drrho_stored1e-3": "drrho_fixed",
    "drrho_stored2e-3": "drrho_fixed",
    "drrho_u16": "drrho_fixed",
    "drrho_gather1e-3": "drrho_2ranks",
    "drrho_bf16": "drrho_2ranks",
    "drrho_powersgd": "drrho_2ranks",
}
KEEPS_U = "drrho_u16"


@dataclass(frozen=True)
class Wanted:
    """A cell and the claims that it is for."""

    claims: frozenset[str]
    cell: Cell


def grid(plan: Plan) -> list[Wanted]:
    """All cells, most needed first, each once."""
    found: dict[Cell, frozenset[str]] = {}
    for of, cell in _smoke(plan) if plan is SMOKE else _grid(plan):
        found[cell] = found.get(cell, frozenset()) | frozenset(of.split())
    return [Wanted(of, cell) for cell, of in found.items()]


def _smoke(plan: Plan) -> Iterator[tuple[str, Cell]]:
    """As few cells as the tables and pictures need."""
    for samples in plan.budgets:
        yield "1 4", Cell("openclip", samples, batch=plan.batch)
    for seed in (0, 1):
        yield "1", Cell("openclip", plan.budgets[2], batch=plan.batch, seed=seed)
        yield "1 7", Cell("drrho_fixed", plan.budgets[2], batch=plan.batch, seed=seed, reference=plan.reference)
    yield "3", Cell("openclip", plan.budgets[2], batch=plan.batch, data="b-half")


def _grid(plan: Plan) -> Iterator[tuple[str, Cell]]:
    low, high = plan.budgets[: max(len(plan.budgets) - 3, 1)], plan.budgets[max(len(plan.budgets) - 3, 1) :]
    few, every = range(plan.few), range(plan.seeds)

    def cells(methods: tuple[str, ...], budgets: tuple[int, ...], seeds: range, **other: Any) -> Iterator[Cell]:
        for samples in budgets:
            for seed in seeds:
                for method in methods:
                    cell = Cell(method, samples, seed=seed, batch=plan.batch)
                    yield replace(with_reference(cell, plan.reference), **other)

    def all_of(of: str, found: Iterator[Cell]) -> Iterator[tuple[str, Cell]]:
        return ((of, cell) for cell in found)

    def under(at: int) -> Reference:
        return replace(plan.reference, at=at)

    # Claims 1 and 4, a few seeds, small budgets first. Claim 7: the strength of the reference, and with it claim
    # 2: where a target passes it.
    yield from all_of("1 4", cells(MAIN, low, few))
    yield from all_of("1 4", cells(MAIN, high[:1], few))
    # Claim 8: what is compressed; u where there are many epochs, and so it is read.
    compressed = tuple(name for name in dict.fromkeys([*COMPRESSED.values(), *COMPRESSED]) if name != KEEPS_U)
    yield from all_of("8", cells(compressed, plan.budgets[:1], every))
    yield from all_of("8", cells((KEEPS_U, COMPRESSED[KEEPS_U]), plan.middle, every, data="b-eighth"))
    for at in plan.strengths[:-1]:
        yield from all_of("2 7", cells(("drrho_fixed",), plan.middle, few, reference=under(at)))
    yield from all_of("1 4", cells(MAIN, high[1:2], few))
    yield from all_of("1 4", cells(MAIN, high[2:], range(1)))
    for at in plan.strengths[:2]:
        yield from all_of("2 7", cells(("drrho_fixed",), plan.long, few, reference=under(at)))

    # Claim 3: parts of b, for as long as the others train on all of it.
    for part in ("half", "quarter", "eighth"):
        yield from all_of("3", cells(("openclip", "drrho_fixed"), plan.middle, few, data=f"b-{part}"))

    # Claims 1, 4 and 6: all seeds.
    yield from all_of("1 4", cells(MAIN, plan.budgets[:-1], every))

    # Claim 6: many epochs over a small set, where gamma is below 1. And OpenCLIP at the others' learning rate or
    # temperature.
    yield from all_of("6", cells(("openclip", "fastclip_v3"), plan.long, few, data="b-eighth"))
    for other in OTHER_OPENCLIPS:
        yield from all_of("1 6", cells((other,), (*plan.middle, *plan.long), few))
        yield from all_of("6", cells((other,), plan.long, few, data="b-eighth"))

    # Claim 5: other ways to use a reference. Selection reads five times the samples, and so it trains for less.
    selecting = ("jest", "jest_topk", "drrho_select")
    yield from all_of("5", cells(("distill", "drrho_distill"), plan.middle, few))
    yield from all_of("5", cells(selecting, plan.short, few))
    # Distillation ends at its teacher; a target under a reference may pass it.
    yield from all_of("5", cells(("distill",), (*plan.long, *plan.longest), few))

    # Claim 6: batch sizes.
    for batch in (plan.batch // 4, plan.batch * 8):
        yield from all_of("6", cells(("openclip", "fastclip_v3"), plan.middle, few, batch=batch))

    # Claim 2: a larger tower. Claim 7: noise in the target's captions, the reference's data and size.
    large = cells(("openclip", "drrho_fixed"), plan.middle, few, model="large")
    yield from all_of(
        "2", (replace(cell, reference=under(plan.strengths[1])) if cell.reference else cell for cell in large)
    )
    for noise in ("noise20", "noise40"):
        yield from all_of("7", cells(("openclip", "drrho_fixed"), plan.middle, few, data=f"b-{noise}"))
    for other in plan.other_references:
        yield from all_of("7", cells(("drrho_fixed",), plan.middle, few, reference=other))

    # Claims 6 and 1: the family.
    family = ("siglip", "fastclip_v0", "fastclip_v1", "fastclip_v2", "sogclr", "isogclr")
    yield from all_of("6", cells(family, plan.middle, few))
    yield from all_of("1", cells(("drrho_v1", "drrho_v2"), plan.middle, few))

    # Claims 1 and 4: the largest budget once more.
    yield from all_of("1 4", cells(MAIN, plan.budgets[-1:], few))


def with_reference(cell: Cell, reference: Reference) -> Cell:
    """``cell`` with ``reference`` where its method needs one."""
    from study.methods import METHODS

    return replace(cell, reference=reference if METHODS[cell.method].reference else None)
