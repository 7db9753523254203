"""Pictures of a set that can be read in any order, and batches of them on this rank.

Pictures that cannot be decoded are left out and counted, as in training.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from training.data.bad_samples import Skips
from training.evaluation.class_folders import readable
from training.evaluation.zero_shot import decoded_or_skipped
from training.predictions import Place


class PictureSource(Protocol):
    """The encoded pictures 0 to n - 1 of a set. It is pickled, and used in loader processes."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """What a message calls the picture."""
        ...

    def place(self, number: int) -> Place:
        """Where the picture is, for ``sets.read_picture``."""
        ...

    def read(self, number: int) -> bytes:
        """The file of the picture. OSError: it cannot be read."""
        ...


class FileSpan(NamedTuple):
    """``size`` bytes of the file ``path`` from ``offset``; -1: all of it."""

    path: str
    offset: int = 0
    size: int = -1


class FilePictures:
    """Pictures that are files, or lie in one piece in tar files."""

    def __init__(self, spans: Sequence[FileSpan]) -> None:
        self.spans = spans

    def __len__(self) -> int:
        return len(self.spans)

    def name(self, number: int) -> str:
        span = self.spans[number]
        return readable(span.path) + (f", byte {span.offset}" if span.offset else "")

    def place(self, number: int) -> Place:
        path, offset, size = self.spans[number]
        return file_place(path, offset, size)

    def read(self, number: int) -> bytes:
        span = self.spans[number]
        with open(span.path, "rb") as file:
            file.seek(span.offset)
            return file.read(span.size)


def file_place(path: str, offset: int, size: int) -> Place:
    """The place of a picture that is a file, or lies in one piece in it."""
    return ("file", readable(os.path.abspath(path)), offset, size)


def member_place(name: str) -> Place:
    """The place of the picture of the sample ``name``, ``SHARD.tar/KEY``; it is looked for in that shard."""
    shard, _, key = name.partition(".tar/")
    return ("sample", readable(os.path.abspath(f"{shard}.tar")), key)


class NumberedBatch(NamedTuple):
    """``image`` [n, 3, H, W] and the ``number`` int64 [n] in the set, of the pictures that can be decoded."""

    image: Tensor
    number: Tensor
    skips: Skips


class NumberedBatches(Dataset[NumberedBatch]):
    """The pictures ``numbers`` of ``source`` in batches of ``size``."""

    def __init__(
        self, source: PictureSource, numbers: range, size: int, transform: Callable[[Image.Image], Tensor]
    ) -> None:
        self.source, self.numbers, self.size, self.transform = source, numbers, size, transform

    def __len__(self) -> int:
        return -(-len(self.numbers) // self.size)

    def __getitem__(self, i: int) -> NumberedBatch:
        images, numbers, skips = [], [], Skips()
        for number in self.numbers[i * self.size : (i + 1) * self.size]:
            if (image := decoded(self.source, number, skips)) is not None:
                images.append(self.transform(image))
                numbers.append(number)
        return NumberedBatch(torch.stack(images) if images else torch.empty(0), torch.tensor(numbers), skips)


def decoded(source: PictureSource, number: int, skips: Skips) -> Image.Image | None:
    """The RGB picture; None where it cannot be read or decoded, which is counted in ``skips``."""
    return decoded_or_skipped(source.name(number), lambda: source.read(number), skips)
