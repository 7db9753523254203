"""Retrieval over pictures with one caption or several each, with clip_benchmark's names of the metrics.

``text_retrieval_recall@k``: pictures of which any own caption is among the k most similar captions;
``image_retrieval_recall@k``: captions whose picture is among the k most similar pictures. The M x T similarities
are compared in tiles, in float64, and never stored. What is equally similar is in random order, and recalls are
expected values: features that collapsed to a point score at chance level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.bad_samples import Skips
from training.evaluation.benchmark.encoder import Encoder, embed_pictures, together
from training.evaluation.benchmark.measures import Metrics
from training.evaluation.benchmark.sources import PictureSource
from training.evaluation.retrieval import expected_hits

KS = (1, 5, 10)
TIE = 1e-9  # above the rounding of float64, below the differences of float32 features
TILE = 2048


@dataclass(frozen=True)
class CaptionedSet:
    """Pictures, and the ``captions`` of each, one or more."""

    source: PictureSource
    captions: Sequence[Sequence[str]]
    remarks: tuple[str, ...] = ()

    def measure(self, encoder: Encoder, name: str) -> tuple[Metrics, Skips]:
        image, used, skips = embed_pictures(encoder, self.source, name)
        texts = [caption for number in used.tolist() for caption in self.captions[number]]
        owner = torch.repeat_interleave(torch.tensor([len(self.captions[number]) for number in used.tolist()]))
        text = embed_texts(encoder, texts, name)
        share_of_texts, share_of_images = encoder.share(len(text)), encoder.share(len(image))
        device = encoder.world.device
        moved = image.to(device), text.to(device), owner.to(device)
        hits = sum(together(lambda: recall_hits(*moved, images=share_of_images, texts=share_of_texts)))
        of_images, of_texts = (hits / torch.tensor([[len(image)], [len(text)]])).tolist()
        found: Metrics = {f"image_retrieval_recall@{k}": value for k, value in zip(KS, of_texts, strict=True)}
        found |= {f"text_retrieval_recall@{k}": value for k, value in zip(KS, of_images, strict=True)}
        return {**found, "mean_recall@1": (of_images[0] + of_texts[0]) / 2}, skips


def embed_texts(encoder: Encoder, texts: Sequence[str], name: str) -> Tensor:
    """float32 [T, d] of ``texts``, of which each rank embeds a share, on the CPU. Collective."""
    mine = [texts[i] for i in encoder.share(len(texts))]
    parts = together(lambda: encoder.texts(mine, f"{name} captions").cpu())
    return torch.cat([part for part in parts if len(part)])


def recall_hits(
    image: Tensor, text: Tensor, owner: Tensor, *, images: range, texts: range, tile: int = TILE
) -> Tensor:
    """float64 [2, 3]: summed hits at 1, 5, 10 of the queries ``images`` and of the queries ``texts``.

    ``image`` [M, d] and ``text`` [T, d] have unit norm; ``owner`` int64 [T] is the picture of each text.
    """
    x, y = image.double(), text.double()
    own = torch.cat([(x[o] * t).sum(1) for o, t in zip(owner.split(tile), y.split(tile), strict=True)])
    best = torch.full((len(x),), -torch.inf, dtype=own.dtype, device=own.device)
    best = best.scatter_reduce(0, owner, own, "amax")
    own_tied = torch.zeros(len(x), dtype=torch.int64, device=own.device)
    own_tied.scatter_add_(0, owner, (own >= best[owner] - TIE).long())

    above, tied = _compare(x, y, best, images, tile)
    at = slice(images.start, images.stop)
    of_images = [any_hits(above, tied - own_tied[at], own_tied[at], k) for k in KS]
    above, tied = _compare(y, x, own, texts, tile)
    of_texts = [expected_hits(above, (tied - 1).clamp(min=0), k) for k in KS]
    return torch.stack([torch.stack([hit.sum() for hit in hits]) for hits in (of_images, of_texts)]).cpu()


def any_hits(above: Tensor, others: Tensor, own: Tensor, k: int) -> Tensor:
    """float64: the probability that one of ``own`` right answers is among the first ``k``.

    ``above`` wrong answers come before them, and ``others`` wrong ones are in random order with them.
    """
    missed = torch.ones(len(above), dtype=torch.float64, device=above.device)
    for place in range(k):
        # The place above + ``place`` is taken by a wrong answer, as all before it.
        chance = ((others - place).double() / (others + own - place).clamp(min=1).double()).clamp(min=0)
        missed = torch.where(above + place < k, missed * chance, missed)
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
