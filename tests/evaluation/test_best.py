"""The best of each metric."""

from pathlib import Path

import pytest

from training.evaluation.best import describe, update
from training.run_report.history import History
from training.run_report.values import evaluated


def test_higher_is_better_but_for_losses_and_ranks_and_the_first_of_equals_stays():
    results = [
        {"image_to_text_R@1": 0.2, "clip_val_loss": 1.0, "image_to_text_mean_rank": 9.0, "num_samples": 5},
        {"image_to_text_R@1": 0.3, "clip_val_loss": 2.0, "image_to_text_mean_rank": 3.0, "num_samples": 5},
        {"image_to_text_R@1": 0.3, "clip_val_loss": None, "image_to_text_mean_rank": 4.0, "epoch": 3},
    ]
    best = {}
    for epoch, metrics in enumerate(results, 1):
        best = update(best, metrics, epoch)
    assert best == {"image_to_text_R@1": [0.3, 2], "clip_val_loss": [1.0, 1], "image_to_text_mean_rank": [3.0, 2]}
    assert update(best, {"clip_val_loss": float("nan"), "imagenet-zeroshot-val-top1": 0.1}, 4)[
        "clip_val_loss"
    ] == [1.0, 1]
    assert describe({"a": [0.25, 2]}) == "Best so far: a: 0.25 (epoch 2)"


@pytest.mark.parametrize(
    "name, best",
    [
        ("wds_blossoms_test-acc1", 0.9),
        ("wds_franklin_test-mean_recall@1", 0.9),
        ("clip_val_loss", 0.1),
        ("image_to_text_median_rank", 0.1),
    ],
)
def test_the_name_of_a_set_decides_nothing_and_the_page_says_what_the_log_does(name, best):
    lines = [{name: value, "epoch": epoch} for epoch, value in enumerate((0.5, 0.1, 0.9, 0.4), 1)]
    logged = {}
    for line in lines:
        logged = update(logged, line, line["epoch"])
    assert logged[name][0] == best
    (shown,) = evaluated([History(Path("run"), "run", evaluations=lines)])[name]
    assert list(shown.best) == logged[name]
