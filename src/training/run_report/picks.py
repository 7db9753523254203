"""Which pictures and captions of an evaluation are shown, and what several runs say about the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from training.predictions import Booleans, Classified, Integers, Kept, Place, Retrieved
from training.run_report.history import History
from training.run_report.intervals import Interval, difference

K = TypeVar("K", bound=Kept)
Side = Literal["text", "image"]  # what is asked with: a caption, for its picture, or a picture, for its caption


@dataclass(frozen=True)
class Guess:
    """What a model says about a picture: the most similar classes and their probabilities, [k] each."""

    names: Sequence[str]
    probabilities: Sequence[float]
    right: bool


@dataclass(frozen=True)
class ShownPicture:
    """A picture of a set, its class, and what each of the runs says; None: nothing is known."""

    number: int
    label: str
    place: Place
    guesses: Sequence[Guess | None]


@dataclass(frozen=True)
class Findings:
    """What a model finds for one query: ``numbers`` [k] of pictures or captions, and ``hits`` [k], the right ones.

    ``rank``: of the best right one, from 1, and ``own``: its number.
    """

    numbers: Sequence[int]
    hits: Sequence[bool]
    rank: int
    own: int


@dataclass(frozen=True)
class Change:
    """How the answers of two runs to the same questions differ.

    ``points``: by how much the share of right answers has risen, with its interval; ``gained``, ``lost``: answers
    of ``n`` that only the second, or only the first, has right. ``what`` was asked.
    """

    what: str
    n: int
    gained: int
    lost: int
    points: float
    interval: Interval


def sets(runs: Sequence[History], kind: type[K]) -> dict[str, list[K | None]]:
    """Key of a set -> what each of ``runs`` has kept of it; None: nothing, or of other pictures than the first."""
    found: dict[str, list[K | None]] = {}
    for key in dict.fromkeys(key for run in runs for key in run.kept):
        each = [kept if isinstance(kept := run.kept.get(key), kind) else None for run in runs]
        first = next((kept for kept in each if kept is not None), None)
        if first is not None:
            found[key] = [kept if kept is not None and comparable(first, kept) else None for kept in each]
    # What can be compared comes first.
    return dict(sorted(found.items(), key=lambda item: item[1].count(None)))


def comparable(a: Kept, b: Kept) -> bool:
    """Whether two evaluations were of the same pictures, as far as can be told."""
    if isinstance(a, Classified) and isinstance(b, Classified):
        if len(a.used) != len(b.used) or list(a.classes) != list(b.classes):
            return False
        _, i, j = np.intersect1d(a.number, b.number, return_indices=True)
        return bool((a.label[i] == b.label[j]).all())
    if isinstance(a, Retrieved) and isinstance(b, Retrieved):
        same = len(a.image_right) == len(b.image_right) and len(a.text_right) == len(b.text_right)
        return same and all(b.captions.get(i, text) == text for i, text in a.captions.items())
    return False


def changes(before: Kept, after: Kept) -> Iterator[Change]:
    """What differs between two evaluations of the same pictures."""
    if isinstance(before, Classified) and isinstance(after, Classified):
        both = before.used & after.used
        yield _change("class", before.right[both], after.right[both])
    elif isinstance(before, Retrieved) and isinstance(after, Retrieved):
        yield _change("picture of a caption", before.text_right, after.text_right)
        yield _change("caption of a picture", before.image_right, after.image_right)


def differences(runs: Sequence[History]) -> Iterator[tuple[str, History, Change]]:
    """Set, run, and how its answers differ from those of the first of ``runs``."""
    kinds: tuple[type[Kept], ...] = (Classified, Retrieved)
    for kind in kinds:
        for first, *others in sets(runs, kind).values():
            for run, other in zip(runs[1:], others):
                if first is not None and other is not None:
                    for change in changes(first, other):
                        yield first.name, run, change


def _change(what: str, before: Booleans, after: Booleans) -> Change:
    points, interval = difference(before, after)
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return Change(what, len(before), gained, lost, points, interval)


@dataclass(frozen=True)
class Look:
    """A picture, its class, and in a few words what is said about it."""

    place: Place
    label: str
    said: str


def first_look(runs: Sequence[History], most: int) -> tuple[str, list[Look]]:
    """A title and some pictures of the first set: what the last run has right and the first one wrong.

    Of one run, or where there are no such pictures, they are drawn evenly.
    """
    for kept in sets(runs, Classified).values():
        there = [number for number, each in enumerate(kept) if each is not None]
        first, last = there[0], there[-1]
        if gained := only_right(kept, last, first, most) if last != first else []:
            title = f"{runs[last].name} is right, {runs[first].name} is wrong"
            return title, [Look(s.place, s.label, f"not {g.names[0]}") for s in gained if (g := s.guesses[first])]
        drawn = evenly_drawn(kept, most)
        looks = [
            Look(s.place, s.label, "✓" if g.right else f"taken for {g.names[0]}")
            for s in drawn
            if (g := s.guesses[last])
        ]
        return f"What {runs[last].name} says about pictures", looks
    return "", []


def evenly_drawn(kept: Sequence[Classified | None], most: int) -> list[ShownPicture]:
    """Examples that are evenly spaced over the set, whatever was said about them."""
    common = _common(kept)
    return _shown(kept, common[:: max(1, len(common) // max(most, 1))][:most].tolist())


def surest_mistakes(kept: Sequence[Classified | None], most: int) -> list[ShownPicture]:
    """Examples that all of the runs get wrong, those of which the first one is surest first; of varied classes."""
    first = next(each for each in kept if each is not None)
    order = first.number[np.argsort(-first.probability[:, 0], kind="stable")]
    wrong = set.intersection(*(set(each.number[~_right(each)].tolist()) for each in kept if each is not None))
    return _shown(kept, _varied(first, [n for n in order.tolist() if n in wrong], most))


def only_right(kept: Sequence[Classified | None], one: int, other: int, most: int) -> list[ShownPicture]:
    """Examples that run ``one`` has right and run ``other`` wrong; those of which ``one`` is surest first."""
    a, b = kept[one], kept[other]
    if a is None or b is None:
        return []
    wrong = set(b.number[~_right(b)].tolist())
    order = np.argsort(-a.probability[:, 0], kind="stable")
    chosen = [int(a.number[i]) for i in order if _right(a)[i] and int(a.number[i]) in wrong]
    return _shown(kept, _varied(a, chosen, most))


def queries(kept: Sequence[Retrieved | None], side: Side, most: int) -> list[int]:
    """Queries of a side: half of them such that one run finds the right answer and another does not, as far as
    there are such; the others are evenly spaced.
    """
    there = [_of(each, side) for each in kept if each is not None]
    numbers = there[0].numbers
    first = np.stack([each.rank == 1 for each in there])
    differing = numbers[first.any(0) & ~first.all(0)]
    chosen = differing[:: max(1, len(differing) // max(most // 2, 1))][: most // 2].tolist()
    left = [n for n in numbers.tolist() if n not in set(chosen)]
    rest = most - len(chosen)
    return sorted(chosen + left[:: max(1, len(left) // max(rest, 1))][:rest])


def found(kept: Retrieved, side: Side, query: int) -> Findings:
    """What was found for a query."""
    of = _of(kept, side)
    (i,) = np.flatnonzero(of.numbers == query)
    return Findings(of.top[i].tolist(), of.hits[i].tolist(), int(of.rank[i]), int(of.own[i]))


@dataclass(frozen=True)
class _Queries:
    """The queries of one side, as in ``Retrieved``."""

    numbers: Integers
    top: Integers
    hits: Booleans
    rank: Integers
    own: Integers


def _of(kept: Retrieved, side: Side) -> _Queries:
    if side == "image":
        return _Queries(kept.image_query, kept.image_top, kept.image_hits, kept.image_rank, kept.image_own)
    hits = kept.text_top == kept.text_own[:, None]
    return _Queries(kept.text_query, kept.text_top, hits, kept.text_rank, kept.text_own)


def _right(kept: Classified) -> Booleans:
    """bool [E]: of the examples."""
    return kept.top[:, 0] == kept.label


def _common(kept: Sequence[Classified | None]) -> Integers:
    """The examples that every run has."""
    there = [each.number for each in kept if each is not None]
    common = there[0]
    for numbers in there[1:]:
        common = np.intersect1d(common, numbers)
    return common


def _varied(kept: Classified, numbers: Sequence[int], most: int) -> list[int]:
    """Of ``numbers`` the first of each class, then the second of each, and so on, up to ``most``."""
    label = dict(zip(kept.number.tolist(), kept.label.tolist()))
    met: dict[int, int] = {}
    turn = []
    for number in numbers:
        turn.append(met.get(label[number], 0))
        met[label[number]] = turn[-1] + 1
    order = sorted(range(len(numbers)), key=lambda i: turn[i])
    return [numbers[i] for i in order[:most]]


def _shown(kept: Sequence[Classified | None], numbers: Sequence[int]) -> list[ShownPicture]:
    first = next(each for each in kept if each is not None)
    rows = [{n: i for i, n in enumerate(each.number.tolist())} if each else {} for each in kept]
    shown = []
    for number in numbers:
        guesses = [_guess(each, row[number]) if each and number in row else None for each, row in zip(kept, rows)]
        source, row = next((each, row) for each, row in zip(kept, rows) if each and number in row)
        i = row[number]
        shown.append(ShownPicture(number, first.classes[int(source.label[i])], source.places[i], guesses))
    return shown


def _guess(kept: Classified, i: int) -> Guess:
    names = ["not a number" if c < 0 else kept.classes[c] for c in kept.top[i].tolist()]
    return Guess(names, kept.probability[i].tolist(), bool(kept.top[i, 0] == kept.label[i]))
