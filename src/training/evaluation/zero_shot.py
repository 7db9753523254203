"""Labelled pictures for zero-shot classification, and what is counted on them.

A set is a folder in one of two layouts. Both can be read at any position, so that ranks share single pictures:

* ``CLASS/PICTURE``, as ImageNet is distributed. Labels count the class folders in order. Class names are those of
  ``classnames.txt`` (a line per class, in that order) where the folder has one, else those that ``class_folders``
  finds.
* DataComp's webdataset ``wds_TASK_test/``: ``classnames.txt``, ``zeroshot_classification_templates.txt``,
  ``test/nshards.txt`` and ``test/0.tar``, ... with ``NAME.jpg|png|webp`` and ``NAME.cls``, a class number.

Prompts are the lines of ``zeroshot_classification_templates.txt`` (``{c}`` stands for the class, or ``{}``), or
OpenAI's 80. Pictures that cannot be decoded are left out and counted, as in training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from drrho_clip.float32 import exact_float32
from training.data.bad_samples import Skips
from training.data.decode import decode
from training.data.samples import RawSample
from training.data.sources.text_file import GIT_LFS, open_text
from training.data.worker import decode_or_skip
from training.evaluation.class_folders import PICTURES, find_classes, readable
from training.evaluation.retrieval import TIE, count, expected_hits
from training.evaluation.shard_index import SHARD_PICTURES, ShardSample, index_shard

TOP = 5
CLASSNAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
PROBES = 8  # pictures that are decoded before a run

_CODE = re.compile(r"""\s*(lambda\b|f?["'].*["']\s*(,|\.format.*)?\s*$|[-*#]\s|\d+[.)]\s|\w+\s*=)""")  # or a list


@dataclass(frozen=True)
class Labelled:
    """One picture: ``size`` bytes of ``path`` from ``offset`` (-1: the whole file)."""

    path: str
    label: int
    offset: int = 0
    size: int = -1


@dataclass(frozen=True)
class ClassificationSet:
    """``pictures`` with labels 0..C-1, ``classnames`` [C], ``templates``: class name -> prompt.

    ``remarks``: sentences about what was found and is not used.
    """

    pictures: list[Labelled]
    classnames: list[str]
    templates: Sequence[Callable[[str], str]]
    remarks: tuple[str, ...] = ()


class PictureBatch(NamedTuple):
    """``image`` [n, 3, H, W] of the pictures of a batch that can be decoded, their ``label`` int64 [n] and their
    ``number`` int64 [n] among all pictures of the loader."""

    image: Tensor
    label: Tensor
    number: Tensor
    skips: Skips


class UnusablePicture(ValueError):
    """A picture that cannot be read or decoded; ``skips`` has the reason and its name."""

    def __init__(self, skips: Skips) -> None:
        super().__init__(f"a picture cannot be used: {skips}")
        self.skips = skips


class Pictures(Dataset[tuple[Tensor, int]]):
    """Decoded and transformed ``(image, label)`` of ``pictures``. UnusablePicture: it cannot be decoded."""

    def __init__(self, pictures: Sequence[Labelled], transform: Callable[[Image.Image], Tensor]) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        picture, skips = self.pictures[i], Skips()
        image = _decoded(picture, skips)
        if image is None:
            raise UnusablePicture(skips)
        return self.transform(image), picture.label


class PictureBatches(Dataset[PictureBatch]):
    """``pictures`` in batches of ``size``, without those that cannot be decoded, which are counted."""

    def __init__(self, pictures: Pictures, size: int) -> None:
        self.pictures, self.size = pictures, size

    def __len__(self) -> int:
        return -(-len(self.pictures) // self.size)

    def __getitem__(self, i: int) -> PictureBatch:
        images, labels, numbers, skips = [], [], [], Skips()
        for number in range(len(self.pictures))[i * self.size : (i + 1) * self.size]:
            try:
                image, label = self.pictures[number]
            except UnusablePicture as unusable:
                skips.merge(unusable.skips)
            else:
                images.append(image)
                labels.append(label)
                numbers.append(number)
        pixels = torch.stack(images) if images else torch.empty(0)
        return PictureBatch(pixels, torch.tensor(labels), torch.tensor(numbers), skips)


def _decoded(picture: Labelled, skips: Skips) -> Image.Image | None:
    def read() -> bytes:
        with open(picture.path, "rb") as file:
            file.seek(picture.offset)
            return file.read(picture.size)

    name = readable(picture.path) + (f", byte {picture.offset}" if picture.offset else "")
    return decoded_or_skipped(name, read, skips)


def decoded_or_skipped(name: str, read: Callable[[], bytes], skips: Skips) -> Image.Image | None:
    """The RGB picture that ``read`` gives; None where it cannot be read or decoded, which ``skips`` counts."""
    try:
        data = read()
    except OSError as error:
        skips.add("undecodable image", f"{name}: {error.strerror or error}")
        return None
    if data.startswith(GIT_LFS):
        skips.add("undecodable image", f"{name}: it is a pointer of Git LFS; run git lfs pull")
        return None
    return decode_or_skip(RawSample(data, "", 0, 0, name), skips, decode)


def open_set(folder: str, flag: str) -> ClassificationSet:
    """The set in ``folder``.

    ValueError, with ``flag``: it has neither layout, its files do not agree, or its pictures cannot be decoded.
    """
    path, said = Path(folder).expanduser(), f"{flag} {folder}"
    if path.is_file():
        raise ValueError(
            f"{said}: it is a file, not a folder of pictures; give a folder, unpack it if it is an archive"
        )
    if not path.is_dir():
        raise ValueError(f"{said}: there is no such folder; check the path")
    shards = (path / "test" / "nshards.txt").is_file() or any((path / "test").glob("*.tar"))
    found = _open_shards(path, said) if shards else _open_folders(path, said)
    if not found.pictures:
        raise ValueError(f"{said}: it contains no pictures ({', '.join(SHARD_PICTURES if shards else PICTURES)})")
    _probe(found.pictures, said)
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


def nearest(similarity: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The most similar classes of each picture, int64 [n, k] with k ≤ ``TOP``, and their probabilities [n, k].

    ``similarity`` float64 [n, C]; probabilities are those of a softmax over all classes at ``scale``, 1/τ. Both
    are -1 throughout for a picture whose similarities are not all numbers.
    """
    # Stable: of classes that are equally similar the first is taken, on every device.
    order = similarity.sort(dim=1, descending=True, stable=True).indices[:, :TOP]
    probability = (scale * similarity).softmax(1).gather(1, order)
    unknown = similarity.isnan().any(1, keepdim=True)
    return order.masked_fill(unknown, -1), probability.masked_fill(unknown, -1)


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


def _probe(pictures: list[Labelled], said: str) -> None:
    """ValueError: of some pictures, evenly chosen, none can be decoded."""
    some = pictures[:: max(1, len(pictures) // PROBES)][:PROBES]
    skips = Skips()
    if not any(_decoded(picture, skips) for picture in some):
        raise ValueError(
            f"{said}: of {len(some)} pictures that were looked at none can be used: {skips}; copy them again"
        )


def _open_folders(path: Path, said: str) -> ClassificationSet:
    found = find_classes(path, said, read_classnames(path, said))
    pictures = [Labelled(file, label) for label, files in enumerate(found.pictures) for file in files]
    return ClassificationSet(pictures, found.names, read_templates(path, said), found.remarks)


def _open_shards(path: Path, said: str) -> ClassificationSet:
    names = read_classnames(path, said)
    if names is None or not (path / TEMPLATES).is_file():
        raise ValueError(f"{said}: {CLASSNAMES if names is None else TEMPLATES} is missing next to test/")
    pictures: list[Labelled] = []
    for number in range(count_shards(path / "test", said)):
        for sample in index_labelled(path / "test" / f"{number}.tar", said):
            assert sample.picture is not None
            label = class_number(sample, len(names), said)
            pictures.append(Labelled(sample.shard, label, *sample.picture))
    return ClassificationSet(pictures, names, read_templates(path, said))


def count_shards(folder: Path, said: str) -> int:
    """The number in ``nshards.txt``. ValueError: there are more shards, or no number."""
    file = folder / "nshards.txt"
    if not file.is_file():
        raise ValueError(f"{said}: test/nshards.txt is missing; write the number of the shards in test/ into it")
    text = file.read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal():
        raise ValueError(f"{said}: test/nshards.txt holds {text[:20]!r}, not the number of its shards; correct it")
    if (folder / f"{int(text)}.tar").is_file():
        raise ValueError(
            f"{said}: test/nshards.txt counts {text} shards, but there is {int(text)}.tar; correct it"
        )
    return int(text)


def index_labelled(
    shard: Path, said: str, label: str = ".cls", read: tuple[str, ...] = (".cls",)
) -> list[ShardSample]:
    """The samples of one tar file, with the contents of the parts ``read``; each has a picture and a ``label``."""
    if not shard.is_file():
        raise ValueError(f"{said}: {shard.name} is missing, but test/nshards.txt counts it")
    samples = index_shard(shard, said, read)
    for sample in samples:
        if sample.picture is None or label not in sample.contents:
            raise ValueError(f"{said}: {sample.key} in {shard.name} has no picture, or no {label} file")
    return samples


def class_number(sample: ShardSample, classes: int, said: str) -> int:
    """The class in its ``.cls``. ValueError: it is none of 0 to ``classes`` - 1."""
    text = sample.contents[".cls"].decode(errors="replace").strip()
    if not text.isdecimal() or int(text) >= classes:
        raise ValueError(
            f"{said}: {sample.key}.cls holds {text!r}, not a class number 0..{classes - 1} (lines of "
            "classnames.txt)"
        )
    return int(text)


def read_classnames(path: Path, said: str) -> list[str] | None:
    """The names in ``classnames.txt``, None where there is none; a line's number is that of its class."""
    if not (path / CLASSNAMES).is_file():
        return None
    names = [line.strip() for line in read_lines(path / CLASSNAMES, said)]
    if "" in names:
        line = names.index("") + 1
        raise ValueError(
            f"{said}: line {line} of {CLASSNAMES} is empty; remove it, or write the name of its class"
        )
    return names


def read_templates(path: Path, said: str) -> Sequence[Callable[[str], str]]:
    file = path / TEMPLATES
    if not file.is_file():
        return [_OpenaiTemplate(number) for number in range(len(OPENAI_IMAGENET_TEMPLATES))]
    lines = [(number, line) for number, line in enumerate(read_lines(file, said), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{said}: {TEMPLATES} has no prompts; write one per line, or remove it")
    return [template(line.strip(), f"{said}: line {number} of {TEMPLATES}, {line!r},") for number, line in lines]


@dataclass(frozen=True)
class _OpenaiTemplate:
    """One of open_clip's templates by its number: they are lambdas, which cannot be sent to another rank."""

    number: int

    def __call__(self, name: str) -> str:
        return OPENAI_IMAGENET_TEMPLATES[self.number](name)


def template(line: str, said: str) -> Callable[[str], str]:
    """What puts a class in the place of ``{c}``, or of ``{}``. ValueError, beginning with ``said``: no prompt."""
    places = [place for place in ("{c}", "{}") if place in line]
    if _CODE.match(line):
        raise ValueError(
            f"{said} looks like code or an item of a list; write the prompt alone, as a photo of a {{c}}."
        )
    if not places:
        raise ValueError(f"{said} has no {{c}}; put it in place of the class")
    if len(places) > 1 or re.search(r"[{}]", line.replace(places[0], "")):
        raise ValueError(
            f"{said} has other braces than those of {places[0]}; write {{c}} in place of the class only"
        )
    return partial(_fill, line, places[0])


def _fill(line: str, place: str, classname: str) -> str:
    return line.replace(place, classname)


def read_lines(file: Path, said: str) -> list[str]:
    """The lines of a text file, without those at the end that are empty."""
    with open_text(str(file), f"{said}: {file.name}") as text:
        lines = [line.rstrip("\r\n") for line in text]
    while lines and not lines[-1].strip():
        lines.pop()
    try:
        held = json.loads("\n".join(lines))
    except ValueError:
        return lines
    if isinstance(held, (list, dict)):
        raise ValueError(
            f"{said}: {file.name} holds JSON; write one entry per line, without brackets and quote signs"
        )
    return lines
