"""WinoGAViL (https://arxiv.org/abs/2207.12576): which of 5 to 12 pictures go with a cue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from training.evaluation.benchmark import measures
from training.evaluation.benchmark.classification import Measured
from training.evaluation.benchmark.encoder import Encoder, TaskFailed, embed_pictures
from training.evaluation.benchmark.measures import Booleans
from training.evaluation.benchmark.retrieval_sets import embed_texts
from training.evaluation.benchmark.sources import PictureSource


@dataclass(frozen=True)
class Instance:
    """One question. ``pictures``: numbers of its candidates; ``right`` [C]: which of them are associated."""

    cue: str
    pictures: Sequence[int]
    right: Sequence[bool]


def instance(
    cue: str, pictures: Sequence[int], candidates: Sequence[str], associations: Sequence[str]
) -> Instance:
    """The question that asks which of ``candidates``, the names of its ``pictures``, are ``associations``."""
    return Instance(cue, pictures, [name in associations for name in candidates])


@dataclass(frozen=True)
class AssociationSet:
    """The questions, and the pictures of all of them."""

    source: PictureSource
    instances: Sequence[Instance]
    remarks: tuple[str, ...] = ()

    def measure(self, encoder: Encoder, key: str, name: str) -> Measured:
        """The mean Jaccard scores. An instance with a picture that cannot be decoded is left out."""
        rows, numbers, skips = embed_pictures(encoder, self.source, name)
        text = embed_texts(encoder, [prompt(one.cue) for one in self.instances], name).double()
        place = {number: i for i, number in enumerate(numbers.tolist())}
        scores, sizes = [], []
        for one, cue in zip(self.instances, text, strict=True):
            if all(number in place for number in one.pictures):
                image = rows[[place[number] for number in one.pictures]].double()
                scores.append(score(image @ cue, np.asarray(one.right)))
                sizes.append(len(one.pictures))
        if not scores:
            raise TaskFailed(f"it contains no usable instance; left out: {skips}")
        return Measured(measures.winogavil(scores, sizes), skips, len(scores))


def prompt(cue: str) -> str:
    """A werewolf, An eagle."""
    word = cue.lower()
    return f"{'An' if word[:1] in tuple('aeiou') else 'A'} {word}"


def score(similarity: Tensor, right: Booleans) -> float:
    """Jaccard score of the most similar candidates, as many as are ``right`` [C]."""
    n = int(right.sum())
    best = similarity.nan_to_num(-np.inf).argsort(stable=True)[len(right) - n :]
    chosen = np.isin(np.arange(len(right)), best.numpy())
    return measures.jaccard(right, chosen)
