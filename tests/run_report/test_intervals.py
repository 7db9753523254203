"""Intervals beside published values, and beside what happens when sets are drawn again and again."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.kept import classes
from training.run_report.intervals import difference, mean_of_classes, of_line, of_metric, wilson


def test_wilsons_interval():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, and 0 of 20.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(0.5, 0) is None and wilson(1.5, 10) is None


def covered(draw, truth, times=2000):
    """How often an interval of what ``draw`` draws holds the truth."""
    rng = np.random.default_rng(0)
    intervals = [draw(rng) for _ in range(times)]
    return np.mean([low <= truth <= high for low, high in intervals])


@pytest.mark.parametrize("per_class", [3, 40])
def test_the_mean_of_classes_is_covered_as_often_as_it_should_be(per_class):
    shares = np.linspace(0.1, 0.9, 50)
    pictures = np.full(50, per_class)

    def draw(rng):
        return mean_of_classes(rng.binomial(pictures, shares), pictures)

    assert 0.93 < covered(draw, shares.mean()) < 0.995


def test_classes_without_pictures_do_not_count():
    some = mean_of_classes(np.array([3, 1]), np.array([4, 4]))
    assert mean_of_classes(np.array([3, 0, 1]), np.array([4, 0, 4])) == pytest.approx(some)
    assert some[0] < 0.5 < some[1]
    assert mean_of_classes(np.zeros(2, int), np.zeros(2, int)) is None


def test_the_difference_on_the_same_pictures_is_covered_as_often_as_it_should_be():
    def draw(rng):
        kind = rng.choice(4, 300, p=[0.5, 0.2, 0.13, 0.17])  # both, only before, only after, neither
        return difference((kind == 0) | (kind == 1), (kind == 0) | (kind == 2))[1]

    assert 0.93 < covered(draw, 0.13 - 0.2) < 0.97
    before, after = np.array([True, True, False, False, True]), np.array([True, False, True, True, True])
    assert difference(before, after)[0] == pytest.approx(0.2)


def test_each_metric_has_the_interval_of_what_it_is_a_share_of():
    metrics = {"acc1": 0.25, "acc5": None, "text_retrieval_recall@1": 0.25, "image_retrieval_recall@1": 0.5}
    metrics |= {"mean_recall@1": 0.375, "F1-macro_all": 0.3}
    counts = {"num_samples": 100, "num_captions": 500}
    assert of_metric("acc1", metrics, counts) == of_metric("text_retrieval_recall@1", metrics, counts)
    assert of_metric("acc1", metrics, counts) == wilson(0.25, 100)
    assert of_metric("image_retrieval_recall@1", metrics, counts) == wilson(0.5, 500)
    assert of_metric("F1-macro_all", metrics, counts) is None and of_metric("acc5", metrics, counts) is None
    assert of_metric("acc1", metrics, {}) is None
    low, high = of_metric("mean_recall@1", metrics, counts)
    error = 1.96 * np.sqrt(0.25 * 0.75 / 100 + 0.5 * 0.5 / 500) / 2
    assert (low, high) == pytest.approx((0.375 - error, 0.375 + error), abs=0.003)


def test_the_counts_of_a_line_belong_to_their_metrics():
    line = {"cifar10-acc1": 0.5, "cifar10-num_samples": 40, "image_to_text_R@1": 0.5, "text_to_image_R@5": 0.5}
    line |= {"num_samples": 100, "num_captions": 300, "imagenet-zeroshot-val-top1": 0.5, "datacomp-average": 0.5}
    line |= {"imagenet-zeroshot-val-num_samples": 1000, "imagenet-zeroshot-val-mean_per_class_recall": 0.5}
    expected = {"cifar10-acc1": 40, "image_to_text_R@1": 100, "text_to_image_R@5": 300}
    for name, n in (expected | {"imagenet-zeroshot-val-top1": 1000}).items():
        assert of_line(name, line, {}) == wilson(0.5, n), name
    assert (
        of_line("datacomp-average", line, {}) is None
        and of_line("cifar10-acc1", {"cifar10-acc1": 0.5}, {}) is None
    )
    kept = classes([0, 0, 1, 1], [[0, 1], [1, 0], [1, 0], [0, 1]])
    name = "imagenet-zeroshot-val-mean_per_class_recall"
    assert of_line(name, line, {"imagenet": kept}) == mean_of_classes(np.array([1, 1]), np.array([2, 2]))
    assert of_line(name, line | {name: 0.75}, {"imagenet": kept}) is None  # what is kept is of another evaluation
