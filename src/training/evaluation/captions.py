"""Ranks of right answers where pictures have several captions.

A picture's rank is that of its best own caption among all captions, a caption's that of its picture. The M x T
similarities are compared in tiles, in float64, and never stored. What is equally similar is in random order, and
ranks and recalls are expected values, as in ``retrieval``: features that collapsed to a point score at chance.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from training.evaluation.retrieval import PairCounts, expected_hits

KS = (1, 5, 10)
TIE = 1e-9  # above the rounding of float64, below the differences of float32 features
TILE = 2048


@dataclass(frozen=True)
class RankCounts:
    """Of the pictures [M] and of the captions [T]: how many wrong answers are above the right one, or tie with it.

    ``own_tied``: how many right captions of a picture are equally good, at least one. On the CPU.
    """

    image_above: Tensor
    image_tied: Tensor
    own_tied: Tensor
    text_above: Tensor
    text_tied: Tensor


def count_ranks(
    image: Tensor, text: Tensor, owner: Tensor, images: range, texts: range, tile: int = TILE
) -> RankCounts:
    """The counts of the queries ``images`` and ``texts``, this rank's shares.

    ``image`` [M, d] and ``text`` [T, d] have unit norm; ``owner`` int64 [T] is the picture of each caption, and
    every picture has one.
    """
    x, y = image.double(), text.double()
    own = torch.cat([(x[o] * t).sum(1) for o, t in zip(owner.split(tile), y.split(tile), strict=True)])
    best = torch.full((len(x),), -torch.inf, dtype=own.dtype, device=own.device)
    best = best.scatter_reduce(0, owner, own, "amax")
    own_tied = torch.zeros(len(x), dtype=torch.int64, device=own.device)
    own_tied.scatter_add_(0, owner, (own >= best[owner] - TIE).long())
    own_tied = own_tied[images.start : images.stop]
    image_above, image_tied = _compare(x, y, best, images, tile)
    text_above, text_tied = _compare(y, x, own, texts, tile)
    image_tied, text_tied = (image_tied - own_tied).clamp(min=0), (text_tied - 1).clamp(min=0)
    return RankCounts(*(part.cpu() for part in (image_above, image_tied, own_tied, text_above, text_tied)))


def of_pairs(counts: PairCounts) -> RankCounts:
    """Of pictures that have one caption each."""
    alone = torch.ones_like(counts.above[0])
    return RankCounts(counts.above[0], counts.tied[0], alone, counts.above[1], counts.tied[1])


def merge_ranks(parts: list[RankCounts]) -> RankCounts:
    """The counts of all queries, from those of each rank, in rank order."""
    names = [field.name for field in fields(RankCounts)]
    return RankCounts(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def recalls(counts: RankCounts) -> tuple[dict[int, float], dict[int, float]]:
    """Recall of the pictures and of the captions, at each of ``KS``."""
    of_images = {k: any_hits(counts.image_above, counts.image_tied, counts.own_tied, k) for k in KS}
    of_texts = {k: expected_hits(counts.text_above, counts.text_tied, k) for k in KS}
    return {k: hits.mean().item() for k, hits in of_images.items()}, {
        k: hits.mean().item() for k, hits in of_texts.items()
    }


def rank_metrics(counts: RankCounts) -> dict[str, float]:
    """Mean and median ranks and recalls, under the names of the published code."""
    found: dict[str, float] = {}
    ranks = (
        counts.image_above.double() + counts.image_tied.double() / (counts.own_tied + 1),
        counts.text_above.double() + counts.text_tied.double() / 2,
    )
    for direction, rank, recall in zip(("image_to_text", "text_to_image"), ranks, recalls(counts), strict=True):
        found[f"{direction}_mean_rank"] = rank.mean().item() + 1
        found[f"{direction}_median_rank"] = float(np.floor(np.median(rank.numpy()))) + 1
        found |= {f"{direction}_R@{k}": value for k, value in recall.items()}
    return found


def any_hits(above: Tensor, others: Tensor, own: Tensor, k: int) -> Tensor:
    """float64: the probability that one of ``own`` right answers is among the first ``k``.

    ``above`` wrong answers come before them, and ``others`` wrong ones are in random order with them.
    """
    missed = torch.ones(len(above), dtype=torch.float64, device=above.device)
    for place in range(k):
        # The place above + ``place`` is taken by a wrong answer, as all before it.
        chance = (others - place).clamp(min=0).double() / (others + own - place).clamp(min=1).double()
        missed = torch.where((above + place < k) & (own > 0), missed * chance, missed)
    return 1 - missed


def _compare(queries: Tensor, candidates: Tensor, right: Tensor, rows: range, tile: int) -> tuple[Tensor, Tensor]:
    """int64 [len(rows)] each: how many candidates are above the query's ``right``, and how many tie with it.

    What cannot be compared, NaN, is above.
    """
    above = torch.zeros(len(rows), dtype=torch.int64, device=queries.device)
    tied = torch.zeros_like(above)
    for start in range(0, len(rows), tile):
        some = slice(start, min(start + tile, len(rows)))
        which = slice(rows.start + some.start, rows.start + some.stop)
        limit = right[which, None]
        for part in candidates.split(tile):
            s = queries[which] @ part.T
            not_above = (s <= limit + TIE).sum(1)
            above[some] += len(part) - not_above
            tied[some] += not_above - (s < limit - TIE).sum(1)
    return above, tied
