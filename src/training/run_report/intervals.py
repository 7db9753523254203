"""95 % intervals: how far a metric may be from what it would be on endlessly many pictures of the same kind.

They are about the choice of the pictures alone, not about the seed of the training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from training.predictions import Booleans, Classified, Integers
from training.run_report.history import is_number

Interval = tuple[float, float]

_Z = 1.959964  # of the normal distribution: 95 %
_SAMPLES, _CAPTIONS = "num_samples", "num_captions"
# Metrics that are shares of the pictures, or of the captions.
_OF_PICTURES = re.compile(r"top[15]|acc[15]|acc_avg|image_to_text_R@\d+|text_retrieval_recall@\d+")
_OF_CAPTIONS = re.compile(r"text_to_image_R@\d+|image_retrieval_recall@\d+")


def wilson(share: float, n: int) -> Interval | None:
    """Wilson's interval of a share of ``n`` (JASA 22, 1927); None with ``n`` 0, or where ``share`` is none."""
    if n < 1 or not 0 <= share <= 1:
        return None
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def mean_of_classes(right: Integers, pictures: Integers) -> Interval | None:
    """Of the mean recall of the classes [C] that have ``pictures``: normal, with a variance for each class.

    Recalls are drawn towards the share of all pictures, as if each class had two pictures more, before variances
    are taken of them: a class of one picture, whose recall is 0 or 1, is not certain.
    """
    there = pictures > 0
    if not there.any():
        return None
    n, hits = pictures[there].astype(float), right[there].astype(float)
    p = (hits + 2 * (hits.sum() + 1) / (n.sum() + 2)) / (n + 2)
    half = _Z * math.sqrt(float((p * (1 - p) / n).sum())) / len(n)
    mean = float((hits / n).mean())
    return max(mean - half, 0.0), min(mean + half, 1.0)


def difference(before: Booleans, after: Booleans) -> tuple[float, Interval]:
    """By how much the share of right answers has risen on the same pictures, [N] each, and its interval.

    That of Agresti and Min for pairs (Statistics in Medicine 24, 2005), which adds half a picture to each of the
    four kinds.
    """
    n = len(before)
    gained, lost = int((~before & after).sum()), int((before & ~after).sum())
    a, b, m = gained + 0.5, lost + 0.5, n + 2
    half = _Z * math.sqrt(a + b - (a - b) ** 2 / m) / m
    return (gained - lost) / max(n, 1), ((a - b) / m - half, (a - b) / m + half)


def of_line(name: str, line: Mapping[str, Any], kept: Mapping[str, Any]) -> Interval | None:
    """Of the metric ``name`` in a line of ``eval_results.jsonl``, which has counts beside it.

    ``kept``: key of a set -> what was kept of it.
    """
    prefixes = [key.removesuffix(_SAMPLES) for key in line if key.endswith(_SAMPLES)]
    prefix = max((p for p in prefixes if name.startswith(p)), key=len, default=None)
    if prefix is None:
        return None
    own = {key.removeprefix(prefix): value for key, value in line.items() if key.startswith(prefix)}
    key = re.sub(r"-(zeroshot-val-)?$", "", prefix)
    return of_metric(name.removeprefix(prefix), own, own, kept.get(key))


def of_metric(
    name: str, metrics: Mapping[str, Any], counts: Mapping[str, Any], kept: object = None
) -> Interval | None:
    """Of one of ``metrics``; None where none is known. ``counts``: ``num_samples``, ``num_captions``."""
    value, samples = metrics.get(name), counts.get(_SAMPLES)
    captions = counts.get(_CAPTIONS, samples)
    if not is_number(value) or not is_number(samples) or not is_number(captions):
        return None
    if _OF_PICTURES.fullmatch(name):
        return wilson(value, int(samples))
    if _OF_CAPTIONS.fullmatch(name):
        return wilson(value, int(captions))
    if name == "mean_recall@1":
        return _mean_of_recalls(metrics, int(samples), int(captions))
    if name == "mean_per_class_recall" and isinstance(kept, Classified):
        there = kept.class_pictures > 0
        own = float(np.mean(kept.class_right[there] / kept.class_pictures[there])) if there.any() else math.nan
        # Else what is kept is of another evaluation.
        return mean_of_classes(kept.class_right, kept.class_pictures) if abs(own - value) < 1e-6 else None
    return None


def _mean_of_recalls(metrics: Mapping[str, Any], pictures: int, captions: int) -> Interval | None:
    """Normal, as if the two recalls were independent."""
    recalls = [metrics.get(f"{kind}_retrieval_recall@1") for kind in ("text", "image")]
    shares = [wilson(value, n) for value, n in zip(recalls, (pictures, captions)) if is_number(value)]
    if len(shares) < 2 or None in shares:
        return None
    halves = [(each[1] - each[0]) / 2 for each in shares if each is not None]
    mean, half = float(metrics["mean_recall@1"]), math.hypot(*halves) / 2
    return max(mean - half, 0.0), min(mean + half, 1.0)
