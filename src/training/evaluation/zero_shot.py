"""Labelled pictures for zero-shot classification, and what is counted on them.

A set is a folder in one of two layouts. Both can be read at any position, so that ranks share single pictures:

* ``CLASS/PICTURE``, as ImageNet is distributed. Labels count the class folders in order, numerically where all
  names are numbers (ImageNet-V2). Class names are those of ``classnames.txt`` (a line per class, in that order)
  where the folder has one; open_clip's where the folders are ImageNet's 1000; else the folders' names.
* DataComp's webdataset ``wds_TASK_test/``: ``classnames.txt``, ``zeroshot_classification_templates.txt``,
  ``test/nshards.txt`` and ``test/0.tar``, ... with ``NAME.jpg|png|webp`` and ``NAME.cls``, a class number.

Prompts are the lines of ``zeroshot_classification_templates.txt`` (``{c}`` stands for the class), or OpenAI's 80.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from drrho_clip.float32 import exact_float32
from training.data.decode import decode
from training.evaluation.retrieval import TIE, count, expected_hits

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
MORE_PICTURES = (*PICTURES, ".bmp", ".ppm", ".tif", ".tiff")
FIRST_SYNSET, LAST_SYNSET = "n01440764", "n15075141"  # of ImageNet's 1000, in the order of their names


@dataclass(frozen=True)
class Labelled:
    """One picture: ``size`` bytes of ``path`` from ``offset`` (-1: the whole file)."""

    path: str
    label: int
    offset: int = 0
    size: int = -1


@dataclass(frozen=True)
class ClassificationSet:
    """``pictures`` with labels 0..C-1, ``classnames`` [C], ``templates``: class name -> prompt."""

    pictures: list[Labelled]
    classnames: list[str]
    templates: Sequence[Callable[[str], str]]


class Pictures(Dataset[tuple[Tensor, int]]):
    """Decoded and transformed ``(image, label)`` of ``pictures``. ValueError names one that cannot be decoded."""

    def __init__(self, pictures: Sequence[Labelled], transform: Callable[[Image.Image], Tensor]) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        picture = self.pictures[i]
        with open(picture.path, "rb") as file:
            file.seek(picture.offset)
            data = file.read(picture.size)
        try:
            image = decode(data)
        except Exception as error:  # Pillow's decoders raise many kinds
            where = f"{picture.path}, byte {picture.offset}" if picture.offset else picture.path
            raise ValueError(f"{where}: the picture cannot be decoded ({error})") from error
        return self.transform(image), picture.label


def open_set(folder: str, flag: str) -> ClassificationSet:
    """The set in ``folder``. ValueError, with ``flag``: it has neither layout, or its files do not agree."""
    path, said = Path(folder), f"{flag} {folder}"
    if not path.is_dir():
        raise ValueError(f"{said}: there is no such folder; check the path")
    found = _open_shards(path, said) if (path / "test" / "nshards.txt").is_file() else _open_folders(path, said)
    if not found.pictures:
        raise ValueError(f"{said}: it contains no pictures ({', '.join(PICTURES)})")
    return found


def hits(image: Tensor, labels: Tensor, classifier: Tensor) -> Tensor:
    """Per class hits at 1, hits at 5 and pictures: float64 [3, C].

    ``image`` [b, d] and the columns of ``classifier`` [d, C] have unit norm, ``labels`` int64 [b]. Ties and NaN
    are counted as in ``retrieval``.
    """
    with exact_float32(image.device.type):
        similarity = image.float() @ classifier.float()
    right = similarity.gather(1, labels[:, None])
    not_above = count(similarity <= right + TIE, 1)
    above = classifier.shape[1] - not_above
    tied = (not_above - count(similarity < right - TIE, 1) - 1).clamp(min=0)
    each = torch.stack([expected_hits(above, tied, 1), expected_hits(above, tied, 5), torch.ones_like(above)])
    return torch.zeros(3, classifier.shape[1], dtype=torch.float64, device=image.device).index_add_(
        1, labels, each.double()
    )


def accuracies(counts: Tensor) -> dict[str, float]:
    """``top1``, ``top5``, ``mean_per_class_recall`` (of the classes that have pictures) from summed ``hits``."""
    top1, top5, pictures = counts.cpu()
    present = pictures > 0
    return {
        "top1": (top1.sum() / pictures.sum()).item(),
        "top5": (top5.sum() / pictures.sum()).item(),
        "mean_per_class_recall": (top1[present] / pictures[present]).mean().item(),
    }


def zero_shot_metrics(image_features: Tensor, labels: Tensor, classifier: Tensor) -> dict[str, float]:
    """``accuracies`` of M pictures: [M, d], int64 [M]; ``classifier`` [d, C] as open_clip builds it."""
    image = torch.nn.functional.normalize(image_features.float(), dim=1)
    return accuracies(hits(image, labels, classifier))


def _open_folders(path: Path, said: str) -> ClassificationSet:
    folders = [child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")]
    if not folders:
        raise ValueError(
            f"{said}: it has neither a folder per class nor the files of DataComp's webdataset (classnames.txt, "
            "test/nshards.txt)"
        )
    folders.sort(key=int if all(name.isdecimal() for name in folders) else None)
    pictures = [
        Labelled(str(file), label)
        for label, name in enumerate(folders)
        for file in sorted((path / name).rglob("*"))
        if file.suffix.lower() in MORE_PICTURES
    ]
    return ClassificationSet(pictures, _names_of(folders, path, said), _templates(path))


def _names_of(folders: list[str], path: Path, said: str) -> list[str]:
    """The names of the classes whose sorted folders are ``folders``."""
    if (path / "classnames.txt").is_file():
        names = _lines(path / "classnames.txt")
        if len(names) != len(folders):
            raise ValueError(f"{said}: classnames.txt has {len(names)} lines for {len(folders)} class folders")
        return names
    synsets = all(re.fullmatch(r"n\d{8}", name) for name in folders)
    if len(folders) == len(IMAGENET_CLASSNAMES):
        numbered = [int(name) if name.isdecimal() else -1 for name in folders] == list(range(len(folders)))
        if numbered or (synsets and (folders[0], folders[-1]) == (FIRST_SYNSET, LAST_SYNSET)):
            return list(IMAGENET_CLASSNAMES)
    if synsets:
        raise ValueError(
            f"{said}: {len(folders)} class folders are named by WordNet numbers, but are not ImageNet's 1000; put "
            "the class names into a classnames.txt in that folder, one per line, in the order of the folders"
        )
    return [name.replace("_", " ") for name in folders]


def _open_shards(path: Path, said: str) -> ClassificationSet:
    for needed in ("classnames.txt", "zeroshot_classification_templates.txt"):
        if not (path / needed).is_file():
            raise ValueError(f"{said}: {needed} is missing next to test/")
    names = _lines(path / "classnames.txt")
    pictures: list[Labelled] = []
    for number in range(int((path / "test" / "nshards.txt").read_text())):
        pictures += _index_shard(path / "test" / f"{number}.tar", len(names), said)
    return ClassificationSet(pictures, names, _templates(path))


def _index_shard(shard: Path, classes: int, said: str) -> list[Labelled]:
    """The pictures of one tar file, by their position in it; only the class numbers are read."""
    if not shard.is_file():
        raise ValueError(f"{said}: {shard.name} is missing, but test/nshards.txt counts it")
    places: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            name, _, extension = member.name.rpartition(".")
            if f".{extension.lower()}" in PICTURES:
                places[name] = (member.offset_data, member.size)
            elif extension == "cls" and (file := tar.extractfile(member)) is not None:
                labels[name] = _class_number(file.read(), classes, f"{said}: {member.name}")
    unpaired = sorted(places.keys() ^ labels.keys())
    if unpaired:
        raise ValueError(f"{said}: {unpaired[0]} in {shard.name} has no picture, or no .cls file")
    return [Labelled(str(shard), labels[name], *places[name]) for name in places]


def _class_number(data: bytes, classes: int, said: str) -> int:
    text = data.decode(errors="replace").strip()
    if not text.isdecimal() or int(text) >= classes:
        raise ValueError(f"{said} holds {text!r}, not a class number 0..{classes - 1} (lines of classnames.txt)")
    return int(text)


def _templates(path: Path) -> Sequence[Callable[[str], str]]:
    file = path / "zeroshot_classification_templates.txt"
    return [partial(_fill, line) for line in _lines(file)] if file.is_file() else OPENAI_IMAGENET_TEMPLATES


def _fill(template: str, classname: str) -> str:
    return template.replace("{c}", classname)


def _lines(file: Path) -> list[str]:
    """The lines of a text file, without those at the end that are empty."""
    return file.read_text(encoding="utf-8").rstrip().splitlines()
