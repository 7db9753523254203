"""Zero-shot classification: pictures, classes and prompts, and what is measured on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from training.data.bad_samples import Skips
from training.evaluation.benchmark import measures
from training.evaluation.benchmark.encoder import Encoder, Templates, embed_pictures
from training.evaluation.benchmark.measures import Booleans, Integers, Metrics
from training.evaluation.benchmark.sources import PictureSource
from training.evaluation.zero_shot import TOP, nearest
from training.predictions import LEFT_OUT, Floats, Kept, classified

FACES = ("race", "gender", "age", "toxic")


@dataclass(frozen=True)
class Measured:
    """What was measured on a set, the same on all ranks.

    ``samples``: the pictures (of WinoGAViL, instances) that ``metrics`` are about, and ``captions``, where it has
    some. ``skips``: what was left out. ``kept``: what a person may look at, on rank 0 alone.
    """

    metrics: Metrics
    skips: Skips
    samples: int
    captions: int | None = None
    kept: Kept | None = None


class EvaluationSet(Protocol):
    """A set that has been opened. ``remarks``: sentences about what it holds and is not used."""

    @property
    def source(self) -> PictureSource: ...

    @property
    def remarks(self) -> tuple[str, ...]: ...

    def measure(self, encoder: Encoder, key: str, name: str) -> Measured:
        """Measure ``encoder``'s model on the set that is called so. Collective. TaskFailed: nothing is left."""
        ...


@dataclass(frozen=True)
class Classes:
    """Names of classes, and their prompts."""

    names: Sequence[str]
    templates: Templates


@dataclass(frozen=True)
class LabelledSet:
    """Pictures with one class each: ``labels`` int64 [N]. ``columns``: int64 [N, F] of ``task``, a key."""

    source: PictureSource
    classes: Classes
    labels: Integers
    columns: Integers | None = None
    task: str = ""
    remarks: tuple[str, ...] = ()

    def measure(self, encoder: Encoder, key: str, name: str) -> Measured:
        ((top, probability),), skips = predictions(encoder, self.source, [self.classes], name)
        kept = None
        if encoder.world.is_main:
            kept = classified(
                key, name, self.classes.names, self.labels, top, probability, place=self.source.place
            )
        used = top[:, 0] != LEFT_OUT
        top, labels = top[used], self.labels[used]
        found = measures.accuracies(top, labels, len(self.classes.names))
        if self.columns is not None and self.task in measures.OF_TASKS:
            found |= measures.OF_TASKS[self.task](top, labels, self.columns[used])
        return Measured(found, skips, len(top), kept=kept)


@dataclass(frozen=True)
class FacesSet:
    """Faces with ``columns`` int64 [N, 4], age, gender, race and white or not; ``classes``: of ``FACES``."""

    source: PictureSource
    classes: Sequence[Classes]
    columns: Integers
    remarks: tuple[str, ...] = ()

    def measure(self, encoder: Encoder, key: str, name: str) -> Measured:
        tops, skips = predictions(encoder, self.source, self.classes, name)
        used = tops[0][0][:, 0] != LEFT_OUT
        race, gender, age, toxic = (top[used, 0] for top, _ in tops)
        found = measures.faces(race, gender, age, toxic, self.columns[used])
        return Measured(found, skips, int(used.sum()))


@dataclass(frozen=True)
class MultilabelSet:
    """Pictures with any number of classes: ``targets`` bool [N, C]."""

    source: PictureSource
    classes: Classes
    targets: Booleans
    remarks: tuple[str, ...] = ()

    def measure(self, encoder: Encoder, key: str, name: str) -> Measured:
        classifier = encoder.classifier(self.classes.names, self.classes.templates, name)

        def rows(features: Tensor) -> Tensor:
            return similarities(features, classifier)

        scores, numbers, skips = embed_pictures(encoder, self.source, name, rows)
        found = measures.mean_average_precision(scores.numpy(), self.targets[numbers.numpy()])
        return Measured(found, skips, len(scores))


def predictions(
    encoder: Encoder, source: PictureSource, classes: Sequence[Classes], name: str
) -> tuple[list[tuple[Integers, Floats]], Skips]:
    """For each of ``classes`` the k ≤ 5 most similar ones of each picture, [N, k], and their probabilities.

    As ``zero_shot.nearest`` says them, and ``LEFT_OUT`` for a picture that is left out. Collective.
    """
    classifiers = [encoder.classifier(one.names, one.templates, name) for one in classes]
    scale = encoder.logit_scale

    def best(features: Tensor) -> Tensor:
        found = [nearest(similarities(features, classifier), scale) for classifier in classifiers]
        return torch.cat([part.double() for pair in found for part in pair], 1)

    rows, numbers, skips = embed_pictures(encoder, source, name, best)
    held = np.full((len(source), rows.shape[1]), LEFT_OUT, dtype=np.float64)
    held[numbers.numpy()] = rows.numpy()
    widths = np.cumsum([min(TOP, len(one.names)) for one in classes for _ in range(2)])
    parts = np.split(held, widths[:-1], axis=1)
    return [(top.astype(np.int64), probability) for top, probability in zip(parts[::2], parts[1::2])], skips


def similarities(features: Tensor, classifier: Tensor) -> Tensor:
    """float64 [n, C] of unit ``features`` [n, d] and ``classifier`` [d, C]."""
    return (features.double() @ classifier.double()).cpu()
