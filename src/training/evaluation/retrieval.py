"""Retrieval over M pairs of image and text features: ranks, recalls and the contrastive loss, in tiles.

Pair i's rank among the M candidates is 1 + how many of them are closer to the query than its own partner. The
M x M similarities are never stored: one pass over tiles counts, for both directions, the candidates above the
partner and those tied with it, and keeps the log-sum-exp that the loss needs.

**Ties.** Similarities within ``TIE`` of the partner's are ties, broken at random, and the metrics are the expected
values: with ``a`` candidates above and ``t`` tied, the rank is a + t/2 + 1 and a hit among the first k has
probability clip((k - a)/(t + 1), 0, 1). So features that collapsed to a point score exactly at chance level. Only
the position identifies a pair: where c pictures share one caption, each has one right answer among c tied ones.

NaN counts as worst: a candidate that cannot be compared is counted above the partner.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drrho_clip.float32 import exact_float32

TIE = 1e-6  # above the rounding of a float32 dot product of unit vectors, so tiles and ranks count alike
TILE = 2048
DIRECTIONS = ("image_to_text", "text_to_image")


@dataclass(frozen=True)
class PairCounts:
    """What one rank counted; rows are ``DIRECTIONS``, columns the M pairs. On the CPU.

    ``above``, ``tied``  int64 [2, M], candidates above and tied with the partner (which is not counted).
    ``lse``              float64 [2, M], log-sum-exp over the candidates of scale * similarity.
    """

    above: Tensor
    tied: Tensor
    lse: Tensor


def retrieval_metrics(
    image_features: Tensor, text_features: Tensor, logit_scale: float = 100.0
) -> dict[str, float]:
    """Metrics of M pairs, [M, d] each, row i of one belonging to row i of the other; both are normalized here.

    ``image_to_text_`` and ``text_to_image_`` ``mean_rank``, ``median_rank``, ``R@1``, ``R@5``, ``R@10`` under the
    names of the published code, and ``clip_val_loss``: InfoNCE at ``logit_scale`` = 1/tau with all M pairs as one
    batch (the published code averages over mini-batches, which depends on their size).
    """
    image, text = normalized(image_features), normalized(text_features)
    counts = count_pairs(image, text, logit_scale)
    return summarize(counts, image, text, logit_scale)


def normalized(features: Tensor) -> Tensor:
    """Unit rows in float32."""
    return F.normalize(features.float(), dim=-1)


def count_pairs(
    image: Tensor,
    text: Tensor,
    logit_scale: float,
    *,
    share: tuple[int, int] = (0, 1),
    tile: int = TILE,
    update: Callable[[int], None] = lambda n: None,
) -> PairCounts:
    """The counts over this rank's share of the image rows: blocks k, k + K, ... for ``share`` = (k, K).

    ``image``, ``text`` are normalized [M, d], the same on all ranks. ``merge`` makes the K results one.
    ``update(n)`` is called after every n rows.
    """
    m, device = len(image), image.device
    right = (image.double() * text.double()).sum(1).float()
    above = torch.zeros(2, m, dtype=torch.int64, device=device)
    tied = torch.zeros_like(above)
    lse = torch.full((2, m), -torch.inf, dtype=torch.float64, device=device)
    with torch.no_grad(), exact_float32(device.type):
        for r in range(share[0] * tile, m, share[1] * tile):
            rows = slice(r, min(r + tile, m))
            for c in range(0, m, tile):
                columns = slice(c, min(c + tile, m))
                s = image[rows] @ text[columns].T
                logits = logit_scale * s
                for direction, place, dim in ((0, rows, 1), (1, columns, 0)):
                    own = right[place].unsqueeze(dim)
                    not_above = count(s <= own + TIE, dim)
                    above[direction, place] += s.shape[dim] - not_above
                    tied[direction, place] += not_above - count(s < own - TIE, dim)
                    lse[direction, place] = torch.logaddexp(
                        lse[direction, place], torch.logsumexp(logits, dim=dim).double()
                    )
            tied[:, rows] -= torch.isfinite(right[rows]).long()  # the partner ties with itself
            update(rows.stop - rows.start)
    return PairCounts(above.cpu(), tied.cpu(), lse.cpu())


def count(mask: Tensor, dim: int) -> Tensor:
    """How many elements are true along ``dim``: int32, which the CPU adds up ten times faster than int64."""
    return mask.sum(dim, dtype=torch.int32)


def merge(parts: list[PairCounts]) -> PairCounts:
    """The counts over all rows, from the counts of every rank over its share."""
    return PairCounts(
        above=torch.stack([part.above for part in parts]).sum(0),
        tied=torch.stack([part.tied for part in parts]).sum(0),
        lse=torch.logsumexp(torch.stack([part.lse for part in parts]), dim=0),
    )


def summarize(counts: PairCounts, image: Tensor, text: Tensor, logit_scale: float) -> dict[str, float]:
    """The metrics of complete ``counts`` of ``image`` and ``text`` (normalized [M, d])."""
    metrics: dict[str, float] = {}
    for direction, above, tied in zip(DIRECTIONS, counts.above, counts.tied):
        rank = (above.double() + tied.double() / 2).clamp(max=len(image) - 1)
        metrics[f"{direction}_mean_rank"] = rank.mean().item() + 1
        metrics[f"{direction}_median_rank"] = float(np.floor(np.median(rank.numpy()))) + 1
        for k in (1, 5, 10):
            metrics[f"{direction}_R@{k}"] = expected_hits(above, tied, k).mean().item()
    own = (image.double() * text.double()).sum(1).mean().item()
    metrics["clip_val_loss"] = counts.lse.mean().item() - logit_scale * own
    return metrics


def expected_hits(above: Tensor, tied: Tensor, k: int) -> Tensor:
    """float64: the probability that the partner is among the first ``k`` when ties are broken at random."""
    return ((k - above).double() / (tied + 1)).clamp(0, 1)
