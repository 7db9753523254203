"""Which pictures and queries are shown, and what is said about differences between runs."""

from __future__ import annotations

import numpy as np

from tests.support.kept import classes, retrieval, run
from training.predictions import Classified, Retrieved
from training.run_report import picks

LABELS = [0, 0, 0, 1, 1, 2, 2, 2]
BEFORE = [[0, 1], [1, 0], [2, 0], [1, 0], [0, 1], [0, 2], [2, 1], [1, 2]]
AFTER = [[0, 1], [0, 2], [0, 1], [0, 1], [0, 2], [2, 0], [2, 1], [0, 2]]
SURE = [[0.9, 0.1], [0.5, 0.4], [0.7, 0.2], [0.6, 0.3], [0.8, 0.1], [0.6, 0.4], [0.9, 0.1], [0.55, 0.1]]


def shown(found):
    return [each.number for each in found]


def test_only_right_is_what_one_run_has_right_and_another_wrong():
    """The surest first, and of other classes before a second one of the same class."""
    kept = [classes(LABELS, BEFORE, SURE), classes(LABELS, AFTER, SURE)]
    assert shown(picks.only_right(kept, 1, 0, 9)) == [2, 5, 1]
    assert shown(picks.only_right(kept, 1, 0, 2)) == [2, 5]
    assert shown(picks.only_right(kept, 0, 1, 9)) == [3]
    (first, *_) = picks.only_right(kept, 1, 0, 9)
    assert (first.label, first.place) == ("class 0", ("file", "2.png", 0, -1))
    before, after = first.guesses
    assert (before.names, before.right) == (["class 2", "class 0"], False)
    assert (after.names, list(after.probabilities), after.right) == (["class 0", "class 1"], [0.7, 0.2], True)


def test_surest_mistakes_are_those_of_all_runs():
    kept = [classes(LABELS, BEFORE, SURE), classes(LABELS, AFTER, SURE)]
    assert shown(picks.surest_mistakes(kept, 9)) == [4, 7]
    assert shown(picks.surest_mistakes([kept[0], None], 9)) == [4, 2, 5, 7, 1]
    assert picks.surest_mistakes([kept[0], None], 1)[0].guesses[1] is None


def test_drawn_evenly_says_nothing_about_right_and_wrong():
    kept = [classes(LABELS, BEFORE), classes(LABELS, AFTER)]
    assert shown(picks.evenly_drawn(kept, 4)) == [0, 2, 4, 6]
    assert shown(picks.evenly_drawn(kept, 99)) == list(range(8))


def test_differences_are_counted_on_the_same_pictures():
    left_out = [[-2, -2] if i == 1 else row for i, row in enumerate(BEFORE)]
    runs = [run("a", classes(LABELS, left_out)), run("b", classes(LABELS, AFTER)), run("c")]
    ((name, other, found),) = picks.differences(runs)
    assert (name, other.name, found.what, found.n) == ("The set", "b", "class", 7)
    assert (found.gained, found.lost) == (2, 1)
    assert found.points == np.float64(1 / 7) and found.interval[0] < 1 / 7 < found.interval[1]


def test_other_sets_of_the_same_name_are_not_compared():
    first = classes(LABELS, BEFORE)
    for other in (
        classes(LABELS[:-1], AFTER[:-1], names=first.classes),
        classes([2, *LABELS[1:]], AFTER),
        classes(LABELS, AFTER, names=["x", "y", "z"]),
    ):
        assert picks.sets([run("a", first), run("b", other)], Classified) == {"set": [first, None]}
    assert picks.sets([run("a", first), run("b", retrieval(np.eye(3)))], Classified) == {"set": [first, None]}
    pairs = retrieval(np.eye(3))
    (kept,) = picks.sets([run("a", pairs), run("b", retrieval(np.eye(3), list("xyz")))], Retrieved).values()
    assert kept == [pairs, None]


def test_queries_are_first_those_that_only_some_runs_answer():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(12, 12))
    better = base + 9 * np.diag(np.arange(12) % 3 == 0)
    kept = [retrieval(base), retrieval(better)]
    differing = {i for i in range(12) if (kept[0].text_rank[i] == 1) != (kept[1].text_rank[i] == 1)}
    found = picks.queries(kept, "text", 6)
    assert len(found) == 6 and len(differing & set(found)) >= min(3, len(differing)) > 0
    assert picks.queries([kept[0], None], "text", 4) == [0, 3, 6, 9]
    assert picks.queries(kept, "image", 99) == list(range(12))


def test_what_was_found_for_a_query():
    similarity = np.array([[0.1, 0.9, 0.5], [0.2, 0.8, 0.3], [0.7, 0.6, 0.4]])
    kept = retrieval(similarity, top=2)
    found = picks.found(kept, "image", 0)
    assert (found.numbers, found.hits, found.rank, found.own) == ([1, 2], [False, False], 3, 0)
    found = picks.found(kept, "text", 1)
    assert (found.numbers, found.hits, found.rank) == ([0, 1], [False, True], 2)


def test_the_first_look_is_at_what_changed():
    a, b = run("a", classes(LABELS, BEFORE, SURE)), run("b", classes(LABELS, AFTER, SURE))
    title, looks = picks.first_look([a, b], 2)
    assert title == "b is right, a is wrong"
    assert [(look.label, look.said) for look in looks] == [("class 0", "not class 2"), ("class 2", "not class 0")]
    title, looks = picks.first_look([a], 3)
    assert title == "What a says about pictures"
    assert [look.said for look in looks] == ["✓", "taken for class 2", "taken for class 0"]
    assert picks.first_look([run("a")], 3) == ("", [])
