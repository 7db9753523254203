"""Ranks with several captions, beside orders of one query at a time and of ties drawn at random."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from training.evaluation.captions import any_hits, count_ranks, merge_ranks, rank_metrics

M, COUNTS = 9, (1, 3, 2, 1, 4, 1, 2, 5, 1)


@pytest.fixture(scope="module")
def features():
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(M, 6, generator=generator), dim=1)
    owner = torch.repeat_interleave(torch.arange(M), torch.tensor(COUNTS))
    text = F.normalize(image[owner] + 0.8 * torch.randn(len(owner), 6, generator=generator), dim=1)
    shuffled = torch.randperm(len(owner), generator=generator)  # captions of a picture need not stand together
    return image, text[shuffled], owner[shuffled]


def place(row, right):
    order = row.argsort(descending=True).tolist()
    return min(order.index(i) for i in right)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_equals_sorting_each_row(features, ranks):
    image, text, owner = features
    t = len(text)
    parts = [
        count_ranks(
            image, text, owner, range(r * M // ranks, (r + 1) * M // ranks),
            range(r * t // ranks, (r + 1) * t // ranks), tile=4,
        )
        for r in range(ranks)
    ]  # fmt: skip
    found = rank_metrics(merge_ranks(parts))
    s = image @ text.T
    of_images = [place(s[i], [j for j in range(t) if owner[j] == i]) for i in range(M)]
    of_texts = [place(s[:, j], [int(owner[j])]) for j in range(t)]
    for direction, places in (("image_to_text", of_images), ("text_to_image", of_texts)):
        assert found[f"{direction}_mean_rank"] == pytest.approx(sum(places) / len(places) + 1)
        for k in (1, 5, 10):
            assert found[f"{direction}_R@{k}"] == pytest.approx(sum(p < k for p in places) / len(places))


def test_collapsed_features_score_at_chance(features):
    _, _, owner = features
    image, text = torch.ones(M, 4) / 2, torch.ones(len(owner), 4) / 2
    counts = count_ranks(image, text, owner, range(M), range(len(owner)))
    found = rank_metrics(counts)
    assert found["text_to_image_R@1"] == pytest.approx(1 / M)
    assert found["image_to_text_R@1"] == pytest.approx(sum(c / sum(COUNTS) for c in COUNTS) / M)


def test_features_that_are_no_numbers_find_nothing(features):
    image, text, owner = features
    image = image.clone()
    image[2] = torch.nan
    counts = count_ranks(image, text, owner, range(M), range(len(owner)))
    assert any_hits(counts.image_above, counts.image_tied, counts.own_tied, 10)[2] == 0


def test_the_chance_of_a_hit_is_the_share_of_orders_that_have_one():
    for above, others, own, k in itertools.product((0, 1, 2), (0, 1, 3), (1, 2), (1, 2, 4)):
        tied = [False] * others + [True] * own
        orders = list(itertools.permutations(tied))
        expected = sum(any(order[: max(k - above, 0)]) for order in orders) / len(orders)
        numbers = (torch.tensor([n]) for n in (above, others, own))
        assert any_hits(*numbers, k).item() == pytest.approx(expected), (above, others, own, k)
