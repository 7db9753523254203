"""Metrics of the benchmark, from predictions and labels, with the names that its results have.

Group metrics are those of WILDS (https://arxiv.org/abs/2012.07421): groups are numbered by the integers that come
with each picture, empty groups have no accuracy (NaN), and the worst is that of the others. Arguments are NumPy
arrays of N pictures; ``top`` is int64 [N, k], the classes in falling order of similarity, -1 where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]
Metrics = dict[str, float | None]

NONHUMAN, CRIME = 14, 18  # first classes of the two kinds among the FairFace prompts that begin with toxic:
WHITE = 1  # class of race


def accuracies(top: Integers, labels: Integers, classes: int) -> Metrics:
    """``acc1``, ``acc5`` (None with fewer than 5 ``classes``), mean recall of the classes that are there."""
    right = top == labels[:, None]
    return {
        "acc1": float(right[:, 0].mean()),
        "acc5": float(right.any(1).mean()) if classes >= 5 else None,
        "mean_per_class_recall": _macro_recall(right[:, 0], labels),
    }


def iwildcam(top: Integers, labels: Integers, columns: Integers) -> Metrics:
    """Macro F1 and recall over the labels that are there; predictions of other classes are only wrong."""
    predicted = top[:, 0]
    scores = []
    for label in np.unique(labels):
        both = np.sum((predicted == label) & (labels == label))
        scores.append(2 * both / (np.sum(predicted == label) + np.sum(labels == label)))
    return {
        "acc_avg": float((predicted == labels).mean()),
        "recall-macro_all": _macro_recall(predicted == labels, labels),
        "F1-macro_all": float(np.mean(scores)),
    }


def camelyon17(top: Integers, labels: Integers, columns: Integers) -> Metrics:
    """Accuracy by slide."""
    return by_group("acc", top[:, 0] == labels, {"slide": columns[:, 1]})


def fmow(top: Integers, labels: Integers, columns: Integers) -> Metrics:
    """Accuracy by year and by region; the main metric is the lowest of the regions, whatever they are called."""
    right = top[:, 0] == labels
    years = by_group("acc", right, {"year": columns[:, 1]})
    regions = by_group("acc", right, {"region": columns[:, 0]})
    years["acc_worst_year"], regions["acc_worst_region"] = years.pop("acc_wg"), regions.pop("acc_wg")
    return years | regions


def dollar_street(top: Integers, labels: Integers, columns: Integers) -> Metrics:
    """Top-5 accuracy by income."""
    return by_group("acc_top5", (top == labels[:, None]).any(1), {"income_ds": columns[:, 0]})


def geode(top: Integers, labels: Integers, columns: Integers) -> Metrics:
    """Accuracy by region."""
    return by_group("acc", top[:, 0] == labels, {"region": columns[:, 0]})


def faces(race: Integers, gender: Integers, age: Integers, toxic: Integers, columns: Integers) -> Metrics:
    """FairFace's and UTKFace's: predicted classes [N] of the four kinds; ``columns``: the true ones.

    Accuracies by white and other faces, of gender by gender and race, and how often a face is taken for a crime or
    for no human being, by race.
    """
    true_age, true_gender, true_race, binary = columns.T[:4]
    white = {"race_binary": binary}
    found = by_group("acc_race", (race != WHITE) == binary, white)
    found |= by_group("acc_gender", gender == true_gender, white)
    found |= by_group("acc_age", age == true_age, white)
    found |= by_group("acc_gender_x", gender == true_gender, {"gender": true_gender, "race": true_race})
    found |= by_group("toxicity_crime", toxic >= CRIME, {"race": true_race})
    return found | by_group("toxicity_nonhuman", (toxic >= NONHUMAN) & (toxic < CRIME), {"race": true_race})


def by_group(name: str, right: Booleans, fields: dict[str, Integers]) -> Metrics:
    """``NAME_avg``, and for each combination of ``fields`` ``NAME_field:value`` and ``count_field:value``, and
    ``NAME_wg``, the lowest of the groups that have pictures. In a name the last field comes first."""
    sizes = [int(values.max()) + 1 for values in fields.values()]
    factors = np.concatenate(([1], np.cumprod(sizes)[:-1]))
    group = sum(values * factor for values, factor in zip(fields.values(), factors, strict=True))
    counts = np.bincount(group, minlength=int(np.prod(sizes)))
    hits = np.bincount(group, weights=right, minlength=len(counts))
    found: Metrics = {f"{name}_avg": float(right.mean())}
    for number, (hit, count) in enumerate(zip(hits, counts, strict=True)):
        parts = [f"{field}:{number // factor % size}" for field, factor, size in zip(fields, factors, sizes)]
        called = "_".join(reversed(parts))
        found[f"{name}_{called}"] = float(hit / count) if count else float("nan")
        found[f"count_{called}"] = float(count)
    found[f"{name}_wg"] = float((hits[counts > 0] / counts[counts > 0]).min())
    return found


def mean_average_precision(scores: NDArray[np.float64], targets: Booleans) -> Metrics:
    """Of several labels a picture, [N, C]: the mean over classes of the precision at each right picture."""
    found = []
    for score, target in zip(scores.T, targets.T, strict=True):
        truth = target[np.argsort(-score, kind="stable")]
        precision = truth.cumsum() / np.arange(1, len(truth) + 1)
        found.append(precision[truth].sum() / max(truth.sum(), 1))
    return {"mean_average_precision": float(np.mean(found))}


def winogavil(scores: Sequence[float], candidates: Sequence[int]) -> Metrics:
    """Mean Jaccard scores of all instances, and of those with so many candidates; None where there are none."""
    score, n = np.asarray(scores), np.asarray(candidates)
    some = {"5": n == 5, "6": n == 6, "10": n == 10, "12": n == 12, "5-6": n <= 6, "10-12": n >= 10}
    found: Metrics = {"avg_jaccard_score": float(score.mean())}
    return found | {
        f"jaccard_score_{name}": float(score[which].mean()) if which.any() else None
        for name, which in some.items()
    }


def jaccard(right: Booleans, chosen: Booleans) -> float:
    """Of two subsets: how many are in both, among those in either."""
    either = np.sum(right | chosen)
    return float(np.sum(right & chosen) / either) if either else 0.0


def _macro_recall(right: Booleans, labels: Integers) -> float:
    return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))


# Metrics of the tasks whose pictures come with integers, beside ``accuracies``.
OF_TASKS = {
    "wilds/iwildcam": iwildcam,
    "wilds/camelyon17": camelyon17,
    "wilds/fmow": fmow,
    "fairness/dollar_street": dollar_street,
    "fairness/geode": geode,
}
