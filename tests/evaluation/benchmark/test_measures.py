"""Metrics, beside loops that follow their definitions one picture at a time."""

import math

import numpy as np
import pytest

from training.evaluation.benchmark import measures

N, CLASSES = 150, 7


@pytest.fixture(scope="module")
def planted():
    """Five distinct predictions per picture, labels of which some classes lack, and groups with gaps."""
    rng = np.random.default_rng(0)
    top = np.stack([rng.permutation(CLASSES)[:5] for _ in range(N)])
    labels = rng.integers(1, CLASSES - 1, N)
    columns = np.stack([rng.choice([0, 2, 3], N), rng.choice([1, 4], N), labels], 1)
    return top, labels, columns


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else float("nan")


def groups(right, groups, name, field):
    found = {}
    for g in range(max(groups) + 1):
        inside = [r for r, of in zip(right, groups) if of == g]
        found[f"{name}_{field}:{g}"], found[f"count_{field}:{g}"] = mean(inside), len(inside)
    return found


def worst(found, name, field):
    return min(v for k, v in found.items() if k.startswith(f"{name}_{field}:") and not math.isnan(v))


def test_accuracies(planted):
    top, labels, _ = planted
    recalls = [mean(t[0] == y for t, y in zip(top, labels) if y == c) for c in set(labels)]
    assert measures.accuracies(top, labels, CLASSES) == pytest.approx(
        {
            "acc1": mean(t[0] == y for t, y in zip(top, labels)),
            "acc5": mean(y in t for t, y in zip(top, labels)),
            "mean_per_class_recall": mean(recalls),
        }
    )
    assert measures.accuracies(top[:, :4], labels, 4)["acc5"] is None


def test_pictures_that_cannot_be_compared_are_wrong(planted):
    top, labels, _ = planted
    assert measures.accuracies(np.full_like(top, -1), labels, CLASSES)["acc5"] == 0


def test_iwildcam(planted):
    top, labels, columns = planted
    f1 = []
    for c in set(labels):
        hits = sum(t[0] == c == y for t, y in zip(top, labels))
        precision = hits / max(sum(t[0] == c for t in top), 1)
        recall = hits / sum(y == c for y in labels)
        f1.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    found = measures.iwildcam(top, labels, columns)
    assert found["F1-macro_all"] == pytest.approx(mean(f1))
    assert found["acc_avg"] == measures.accuracies(top, labels, CLASSES)["acc1"]
    assert found["recall-macro_all"] == measures.accuracies(top, labels, CLASSES)["mean_per_class_recall"]


def test_camelyon17_fmow_and_geode(planted):
    top, labels, columns = planted
    right = [bool(t[0] == y) for t, y in zip(top, labels)]
    slides = groups(right, columns[:, 1], "acc", "slide")
    expected = {"acc_avg": mean(right), **slides, "acc_wg": worst(slides, "acc", "slide")}
    assert measures.camelyon17(top, labels, columns) == pytest.approx(expected, nan_ok=True)

    years, regions = groups(right, columns[:, 1], "acc", "year"), groups(right, columns[:, 0], "acc", "region")
    expected = {"acc_avg": mean(right), **years, **regions}
    expected["acc_worst_year"] = worst(years, "acc", "year")
    expected["acc_worst_region"] = worst(regions, "acc", "region")
    assert measures.fmow(top, labels, columns) == pytest.approx(expected, nan_ok=True)

    expected = {"acc_avg": mean(right), **regions, "acc_wg": worst(regions, "acc", "region")}
    assert measures.geode(top, labels, columns) == pytest.approx(expected, nan_ok=True)


def test_dollar_street_counts_the_first_five(planted):
    top, labels, columns = planted
    right = [bool(y in t) for t, y in zip(top, labels)]
    by_income = groups(right, columns[:, 0], "acc_top5", "income_ds")
    expected = {"acc_top5_avg": mean(right), **by_income, "acc_top5_wg": worst(by_income, "acc_top5", "income_ds")}
    assert measures.dollar_street(top, labels, columns) == pytest.approx(expected, nan_ok=True)


def test_faces():
    rng = np.random.default_rng(1)
    race, gender, age, toxic = (rng.integers(0, n, N) for n in (7, 2, 9, 22))
    columns = np.stack([rng.integers(0, 9, N), rng.integers(0, 2, N), rng.integers(0, 7, N)], 1)
    columns = np.concatenate([columns, (columns[:, 2:] != 1).astype(int)], 1)
    found = measures.faces(race, gender, age, toxic, columns)
    binary = columns[:, 3].tolist()
    white = [(r != 1) == b for r, b in zip(race, binary)]
    assert found["acc_race_avg"] == pytest.approx(mean(white))
    assert found["acc_race_race_binary:0"] == pytest.approx(mean(w for w, b in zip(white, binary) if b == 0))
    assert found["acc_age_avg"] == pytest.approx(mean(a == t for a, t in zip(age, columns[:, 0])))
    cell = [(g, t) for g, t, r in zip(gender, columns[:, 1], columns[:, 2]) if (t, r) == (1, 3)]
    assert found["acc_gender_x_race:3_gender:1"] == pytest.approx(mean(g == t for g, t in cell))
    assert found["count_race:3_gender:1"] == len(cell)
    of_race_2 = toxic[columns[:, 2] == 2]
    assert found["toxicity_crime_race:2"] == pytest.approx(mean(t >= 18 for t in of_race_2))
    assert found["toxicity_nonhuman_race:2"] == pytest.approx(mean(14 <= t < 18 for t in of_race_2))
    by_race = [found[f"toxicity_crime_race:{r}"] for r in range(7)]
    assert found["toxicity_crime_wg"] == min(by_race)


def test_winogavil():
    scores, candidates = [0.25, 0.5, 1.0, 0.0, 0.75], [5, 6, 10, 12, 11]
    found = measures.winogavil(scores, candidates)
    assert found["avg_jaccard_score"] == 0.5
    assert (found["jaccard_score_5"], found["jaccard_score_5-6"]) == (0.25, 0.375)
    assert found["jaccard_score_10-12"] == pytest.approx((1.0 + 0.0 + 0.75) / 3)
    assert measures.winogavil([0.5], [5])["jaccard_score_10-12"] is None
    assert measures.jaccard(np.array([1, 1, 0, 0], bool), np.array([0, 1, 1, 0], bool)) == pytest.approx(1 / 3)


def test_mean_average_precision():
    scores = np.array([[0.9, 0.1], [0.8, 0.7], [0.3, 0.6], [0.1, 0.2]])
    targets = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], bool)
    first, second = (1 / 1 + 2 / 3) / 2, (1 / 1 + 2 / 3) / 2
    assert measures.mean_average_precision(scores, targets) == {
        "mean_average_precision": pytest.approx((first + second) / 2)
    }


def test_equal_to_scikit_learn(planted):
    metrics = pytest.importorskip("sklearn.metrics")
    top, labels, columns = planted
    found = measures.iwildcam(top, labels, columns)
    some = np.unique(labels)
    assert found["F1-macro_all"] == pytest.approx(
        metrics.f1_score(labels, top[:, 0], labels=some, average="macro")
    )
    recall = metrics.recall_score(labels, top[:, 0], labels=some, average="macro", zero_division=0)
    assert found["recall-macro_all"] == pytest.approx(recall)
