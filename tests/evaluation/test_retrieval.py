"""Retrieval metrics in tiles, against a float64 oracle with the whole matrix and every order of the ties."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from training.evaluation.retrieval import count_pairs, merge, normalized, retrieval_metrics, summarize


def trained_like(m, d=16, noise=0.7, seed=0):
    """Pairs that mostly find each other, as after some training."""
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(m, d, generator=g)
    return image, image + noise * torch.randn(m, d, generator=g)


def oracle(image, text, scale):
    """All metrics from the full float64 matrix; ties are averaged over the places that they can take."""
    x = image.double().numpy() / np.linalg.norm(image.double().numpy(), axis=1, keepdims=True)
    y = text.double().numpy() / np.linalg.norm(text.double().numpy(), axis=1, keepdims=True)
    similarity, metrics, losses = x @ y.T, {}, []
    for name, s in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        places = []
        for i, row in enumerate(s):
            others = np.delete(row, i) - row[i]
            first = int((others > 1e-9).sum())
            places.append(np.arange(first, first + int((np.abs(others) <= 1e-9).sum()) + 1))
            losses.append(math.log(np.exp(scale * (row - row[i])).sum()))
        ranks = np.array([p.mean() for p in places])
        metrics[f"{name}_mean_rank"] = ranks.mean() + 1
        metrics[f"{name}_median_rank"] = math.floor(np.median(ranks)) + 1
        for k in (1, 5, 10):
            metrics[f"{name}_R@{k}"] = np.mean([np.mean(p < k) for p in places])
    metrics["clip_val_loss"] = np.mean(losses)
    return metrics


@pytest.mark.parametrize("m", [1, 9, 200])
def test_equals_oracle(m):
    image, text = trained_like(m)
    expected = oracle(image, text, 20.0)
    assert retrieval_metrics(image, text, 20.0) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert m < 200 or 1 / m < expected["image_to_text_R@1"] < 1  # the case says something


@pytest.mark.parametrize("tile", [3, 64, 1000])
@pytest.mark.parametrize("shares", [1, 3])
def test_tiles_and_shares_do_not_matter_even_with_ties(tile, shares):
    image, text = trained_like(130)
    text[40:60] = text[20:40]  # pairs of equal captions
    image[7:10] = image[7]
    text[7:10] = text[7]
    image, text = normalized(image), normalized(text)
    parts = [count_pairs(image, text, 14.0, share=(k, shares), tile=tile) for k in range(shares)]
    metrics = summarize(merge(parts), image, text, 14.0)
    assert metrics == pytest.approx(oracle(image, text, 14.0), rel=1e-5, abs=1e-5)


def test_duplicate_captions_share_the_hit():
    """Four pictures under one caption: each finds its own first in one of four orders."""
    text = torch.eye(8)
    text[1:4] = text[0]
    metrics = retrieval_metrics(text.clone(), text)
    assert metrics["image_to_text_R@1"] == pytest.approx((4 * 0.25 + 4) / 8)
    assert metrics["image_to_text_R@5"] == 1.0
    assert metrics["image_to_text_mean_rank"] == pytest.approx((4 * 2.5 + 4) / 8)


def test_collapsed_features_score_chance():
    metrics = retrieval_metrics(torch.ones(500, 8), torch.ones(500, 8), 50.0)
    assert metrics["image_to_text_R@1"] == pytest.approx(1 / 500)
    assert metrics["text_to_image_R@10"] == pytest.approx(10 / 500)
    assert metrics["image_to_text_mean_rank"] == pytest.approx(250.5)
    assert metrics["clip_val_loss"] == pytest.approx(math.log(500), rel=1e-5)


def test_nan_is_worst_not_best():
    image, text = trained_like(20)
    metrics = retrieval_metrics(torch.full_like(image, float("nan")), text)
    assert metrics["image_to_text_R@10"] == 0.0
    assert metrics["text_to_image_mean_rank"] == 20.0
    assert math.isnan(metrics["clip_val_loss"])


def test_progress_adds_up_to_the_rows():
    image, text = (normalized(x) for x in trained_like(50))
    seen = []
    count_pairs(image, text, 1.0, tile=16, update=seen.append)
    assert sum(seen) == 50 and len(seen) == 4


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_nothing_larger_than_a_tile_or_the_features():
    image, text = (normalized(x) for x in trained_like(900, d=32))
    with Largest() as largest:
        count_pairs(image, text, 10.0, tile=128)
    assert largest.elements == 900 * 32


def test_full_precision_inside_autocast_and_the_setting_is_put_back():
    image, text = (normalized(x) for x in trained_like(64))
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            metrics = retrieval_metrics(image, text, 30.0)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert metrics == pytest.approx(oracle(image, text, 30.0), rel=1e-5, abs=1e-5)
