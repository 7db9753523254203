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

TOP = 5
FACES = ("race", "gender", "age", "toxic")


class EvaluationSet(Protocol):
    """A set that has been opened. ``remarks``: sentences about what it holds and is not used."""

    @property
    def source(self) -> PictureSource: ...

    @property
    def remarks(self) -> tuple[str, ...]: ...

    def measure(self, encoder: Encoder, name: str) -> tuple[Metrics, Skips]:
        """Its metrics, and what was left out, the same on all ranks. Collective. TaskFailed: nothing is left."""
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

    def measure(self, encoder: Encoder, name: str) -> tuple[Metrics, Skips]:
        (top,), skips = predictions(encoder, self.source, [self.classes], name)
        used = top[:, 0] != _UNSEEN
        top, labels = top[used], self.labels[used]
        found = measures.accuracies(top, labels, len(self.classes.names))
        if self.columns is not None and self.task in measures.OF_TASKS:
            found |= measures.OF_TASKS[self.task](top, labels, self.columns[used])
        return found, skips


@dataclass(frozen=True)
class FacesSet:
    """Faces with ``columns`` int64 [N, 4], age, gender, race and white or not; ``classes``: of ``FACES``."""

    source: PictureSource
    classes: Sequence[Classes]
    columns: Integers
    remarks: tuple[str, ...] = ()

    def measure(self, encoder: Encoder, name: str) -> tuple[Metrics, Skips]:
        tops, skips = predictions(encoder, self.source, self.classes, name)
        used = tops[0][:, 0] != _UNSEEN
        race, gender, age, toxic = (top[used, 0] for top in tops)
        return measures.faces(race, gender, age, toxic, self.columns[used]), skips


@dataclass(frozen=True)
class MultilabelSet:
    """Pictures with any number of classes: ``targets`` bool [N, C]."""

    source: PictureSource
    classes: Classes
    targets: Booleans
    remarks: tuple[str, ...] = ()

    def measure(self, encoder: Encoder, name: str) -> tuple[Metrics, Skips]:
        classifier = encoder.classifier(self.classes.names, self.classes.templates, name)

        def rows(features: Tensor) -> Tensor:
            return similarities(features, classifier)

        scores, numbers, skips = embed_pictures(encoder, self.source, name, rows)
        return measures.mean_average_precision(scores.numpy(), self.targets[numbers.numpy()]), skips


_UNSEEN = -2  # of a picture that is left out; -1: one whose similarities cannot be compared


def predictions(
    encoder: Encoder, source: PictureSource, classes: Sequence[Classes], name: str
) -> tuple[list[Integers], Skips]:
    """For each of ``classes`` int64 [N, k]: the k ≤ 5 most similar classes of each picture. Collective.

    -1 throughout for a picture whose similarities are not all numbers, -2 for one that is left out.
    """
    classifiers = [encoder.classifier(one.names, one.templates, name) for one in classes]

    def best(features: Tensor) -> Tensor:
        return torch.cat([_top(features, classifier) for classifier in classifiers], 1)

    rows, numbers, skips = embed_pictures(encoder, source, name, best)
    found = np.full((len(source), rows.shape[1]), _UNSEEN, dtype=np.int64)
    found[numbers.numpy()] = rows.numpy()
    widths = np.cumsum([min(TOP, len(one.names)) for one in classes])
    return np.split(found, widths[:-1], axis=1), skips


def similarities(features: Tensor, classifier: Tensor) -> Tensor:
    """float64 [n, C] of unit ``features`` [n, d] and ``classifier`` [d, C]."""
    return (features.double() @ classifier.double()).cpu()


def _top(features: Tensor, classifier: Tensor) -> Tensor:
    similarity = similarities(features, classifier)
    # Stable: of classes that are equally similar the first is taken, on every device.
    top = similarity.sort(dim=1, descending=True, stable=True).indices[:, :TOP]
    return top.masked_fill(similarity.isnan().any(1, keepdim=True), -1)
