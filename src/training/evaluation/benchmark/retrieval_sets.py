"""Retrieval over pictures with one caption or several each, with clip_benchmark's names of the metrics.

``text_retrieval_recall@k``: pictures of which any own caption is among the k most similar captions;
``image_retrieval_recall@k``: captions whose picture is among the k most similar pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.evaluation.benchmark.classification import Measured
from training.evaluation.benchmark.encoder import Encoder, embed_pictures, together
from training.evaluation.benchmark.measures import Metrics
from training.evaluation.benchmark.sources import PictureSource
from training.evaluation.captions import count_ranks, merge_ranks, recalls
from training.evaluation.neighbours import neighbours


@dataclass(frozen=True)
class CaptionedSet:
    """Pictures, and the ``captions`` of each, one or more."""

    source: PictureSource
    captions: Sequence[Sequence[str]]
    remarks: tuple[str, ...] = ()

    def measure(self, encoder: Encoder, key: str, name: str) -> Measured:
        image, used, skips = embed_pictures(encoder, self.source, name)
        texts = [caption for number in used.tolist() for caption in self.captions[number]]
        owner = torch.repeat_interleave(torch.tensor([len(self.captions[number]) for number in used.tolist()]))
        text = embed_texts(encoder, texts, name)
        shares = encoder.share(len(image)), encoder.share(len(text))
        device = encoder.world.device
        moved = image.to(device), text.to(device), owner.to(device)
        counts = merge_ranks(together(lambda: count_ranks(*moved, *shares)))
        of_images, of_texts = recalls(counts)
        found: Metrics = {f"image_retrieval_recall@{k}": value for k, value in of_texts.items()}
        found |= {f"text_retrieval_recall@{k}": value for k, value in of_images.items()}
        found["mean_recall@1"] = (of_images[1] + of_texts[1]) / 2
        kept = None
        if encoder.world.is_main:
            places = [self.source.place(number) for number in used.tolist()]
            kept = neighbours(key, name, image, text, owner, counts, places, texts)
        return Measured(found, skips, len(image), len(text), kept)


def embed_texts(encoder: Encoder, texts: Sequence[str], name: str) -> Tensor:
    """float32 [T, d] of ``texts``, of which each rank embeds a share, on the CPU. Collective."""
    mine = [texts[i] for i in encoder.share(len(texts))]
    parts = together(lambda: encoder.texts(mine, f"{name} captions").cpu())
    return torch.cat([part for part in parts if len(part)])
