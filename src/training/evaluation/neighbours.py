"""What is found for single pictures and captions: the most similar ones, and at which rank the right one is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training.evaluation.captions import RankCounts, any_hits
from training.evaluation.retrieval import expected_hits
from training.predictions import QUERIES, TOP, Place, Retrieved, evenly, shortened


def neighbours(
    key: str,
    name: str,
    image: Tensor,
    text: Tensor,
    owner: Tensor,
    counts: RankCounts,
    places: Sequence[Place],
    captions: Sequence[str],
) -> Retrieved:
    """What is kept of the set ``key``, which is called ``name``.

    ``image`` [M, d] and ``text`` [T, d] have unit norm, ``owner`` int64 [T] is the picture of each caption;
    ``counts`` are those of all queries. ``places`` [M], ``captions`` [T].
    """
    owner = owner.cpu()
    queries = torch.from_numpy(evenly(len(image), QUERIES)), torch.from_numpy(evenly(len(text), QUERIES))
    image_score, image_top = _best(image, text, queries[0])
    text_score, text_top = _best(text, image, queries[1])
    own = _best_own(image, text, owner, queries[0])
    pictures = {*queries[0].tolist(), *text_top.flatten().tolist(), *owner[queries[1]].tolist()}
    shown = {*queries[1].tolist(), *image_top.flatten().tolist(), *own.tolist()}
    return Retrieved(
        key=key,
        name=name,
        image_right=(any_hits(counts.image_above, counts.image_tied, counts.own_tied, 1) > 0.5).numpy(),
        text_right=(expected_hits(counts.text_above, counts.text_tied, 1) > 0.5).numpy(),
        image_query=queries[0].numpy(),
        image_top=image_top.numpy(),
        image_score=image_score.numpy(),
        image_rank=counts.image_above[queries[0]].long().numpy() + 1,
        image_own=own.numpy(),
        image_hits=(owner[image_top] == queries[0][:, None]).numpy(),
        text_query=queries[1].numpy(),
        text_top=text_top.numpy(),
        text_score=text_score.numpy(),
        text_rank=counts.text_above[queries[1]].long().numpy() + 1,
        text_own=owner[queries[1]].numpy(),
        pictures={number: places[number] for number in sorted(pictures)},
        captions={number: shortened(captions[number]) for number in sorted(shown)},
    )


def _best(queries: Tensor, candidates: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines float64 and numbers int64, [Q, k] each, of the candidates most similar to ``queries[rows]``."""
    similarity = queries[rows.to(queries.device)].double() @ candidates.double().T
    found = similarity.cpu().nan_to_num(-torch.inf).topk(min(TOP, len(candidates)), dim=1)
    return found.values, found.indices


def _best_own(image: Tensor, text: Tensor, owner: Tensor, rows: Tensor) -> Tensor:
    """int64 [Q]: of the captions of each picture in ``rows`` the most similar one."""
    found = []
    for row in rows.tolist():
        own = (owner == row).nonzero()[:, 0]
        similarity = text[own.to(text.device)].double() @ image[row].double()
        found.append(own[similarity.cpu().nan_to_num(-torch.inf).argmax()])
    return torch.stack(found)
