"""What a trained checkpoint knows about the test pictures: Twitter's drawings of all 1,911 names.

Checkpoints are loaded by open_clip alone, the way that other programs load them; ranks and accuracies are counted
by the trainer's own metrics, with ties at their expected value.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import open_clip
import torch
from PIL import Image
from torch import Tensor

from training.evaluation.retrieval import retrieval_metrics
from training.evaluation.zero_shot import zero_shot_metrics

COLUMNS = (
    "image_to_text_R@1",
    "image_to_text_R@5",
    "text_to_image_R@1",
    "text_to_image_R@5",
    "subcategory",
)
BATCH = 256


@dataclass(frozen=True)
class TestSet:
    """M pictures in order; ``labels`` int64 [M] are positions in ``classes``, ``held_out`` is bool [M]."""

    pictures: list[Image.Image]
    names: list[str]
    labels: Tensor
    classes: list[str]
    held_out: Tensor

    @cached_property
    def flags(self) -> Tensor:
        """Flags of countries and regions, and the others of the category: 270 of 1,911."""
        flags = torch.tensor(["flag" in name.split() for name in self.classes])
        return flags[self.labels]

    def chance(self, rows: Tensor) -> dict[str, float]:
        """Expected values of a uniform guess among the names, or the classes, of ``rows`` (bool [M])."""
        names, classes = int(rows.sum()), len(self.labels[rows].unique())
        recalls = {column: int(column.split("@")[1]) / names for column in COLUMNS if "@" in column}
        return recalls | {"subcategory": 1 / classes}

    def largest_class(self, rows: Tensor) -> float:
        """Accuracy of always answering with the class that most of ``rows`` have."""
        return torch.bincount(self.labels[rows]).max().item() / int(rows.sum())


@dataclass(frozen=True)
class Features:
    """Unit rows: pictures [M, d], their names [M, d], the prompts of the classes [C, d]."""

    image: Tensor
    text: Tensor
    classes: Tensor


def read_test_set(retrieval: Path, classification: Path) -> TestSet:
    """The sets that ``scripts/emoji.py retrieval`` and ``… classification`` wrote."""
    pictures, names, subcategories, held_out = [], [], [], []
    for shard in sorted(retrieval.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                content = tar.extractfile(member).read()
                if member.name.endswith(".png"):
                    pictures.append(Image.open(io.BytesIO(content)))
                elif member.name.endswith(".txt"):
                    names.append(content.decode())
                else:
                    about = json.loads(content)
                    subcategories.append(about["subcategory"].replace("-", " "))
                    held_out.append(about["held_out"])
    classes = (classification / "classnames.txt").read_text().splitlines()
    labels = torch.tensor([classes.index(name) for name in subcategories])
    return TestSet(pictures, names, labels, classes, torch.tensor(held_out))


@torch.no_grad()
def embed(model_config: Path, checkpoint: Path, tests: TestSet, template: str) -> Features:
    """The features of ``tests`` under a checkpoint of the model in ``model_config``."""
    open_clip.add_model_config(model_config)
    model, _, preprocess = open_clip.create_model_and_transforms(model_config.stem, pretrained=str(checkpoint))
    model.eval()
    tokenizer = open_clip.get_tokenizer(model_config.stem)
    prompts = [template.replace("{c}", name) for name in tests.classes]
    starts = range(0, len(tests.names), BATCH)
    image = [
        model.encode_image(torch.stack([preprocess(p) for p in tests.pictures[i : i + BATCH]]), normalize=True)
        for i in starts
    ]
    text = [model.encode_text(tokenizer(tests.names[i : i + BATCH]), normalize=True) for i in starts]
    return Features(torch.cat(image), torch.cat(text), model.encode_text(tokenizer(prompts), normalize=True))


def measure(features: Features, tests: TestSet, rows: Tensor) -> dict[str, float]:
    """The COLUMNS over ``rows`` (bool [M]), with only their names and classes to choose from."""
    found = retrieval_metrics(features.image[rows], features.text[rows])
    present, labels = tests.labels[rows].unique(return_inverse=True)
    found["subcategory"] = zero_shot_metrics(features.image[rows], labels, features.classes[present].T)["top1"]
    return {column: found[column] for column in COLUMNS}


def held_out_recall(features: Features, tests: TestSet, k: int) -> float:
    """Image→text recall at ``k`` among all names, over the pictures whose names training never saw."""
    similarity = features.image[tests.held_out] @ features.text.T
    right = tests.held_out.nonzero()
    return (similarity.topk(k).indices == right).any(1).double().mean().item()
