"""What a source of samples (shards, a csv file, noise) hands to a loader process."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from PIL import Image
from torch import Tensor

from training.data.lanes import Lane
from training.data.progress import BEGIN, Place


class RawSample(NamedTuple):
    """One sample before decoding.

    ``image`` is an encoded image, the path of one, or the picture itself; ``row`` its row of the sample state
    (negative where the run keeps no state: then only a name of the sample); ``turn`` tells the visits of one epoch
    apart; ``name`` is for messages.
    """

    image: bytes | str | Image.Image
    text: str
    row: int
    turn: int
    name: str


class Fault(NamedTuple):
    """Something that is left out, a sample, a shard or a part of one: the ``reason`` it counts under, its name."""

    reason: str
    name: str


class Item(NamedTuple):
    """What a stream of samples consists of: a ``sample``, the faults that count with it, and the place behind.

    ``sample`` None: a turn is over, and ``faults`` are those of a turn without any usable sample.
    """

    sample: RawSample | None
    place: Place = BEGIN
    faults: Sequence[Fault] = ()


class Unusable(Exception):
    """A sample that cannot be used; the message is the reason under which it is counted."""


class FeatureSource(Protocol):
    """Embeddings of a frozen model that come with the data, by row. Picklable: loader processes get a copy."""

    width: int

    def __call__(self, rows: Sequence[int], texts: Sequence[str], names: Sequence[str]) -> Tensor:
        """[n, 2, d], image and text, of these rows of the run, whose captions are ``texts``.

        WrongRow: the first sample, called as in ``names``, whose embeddings are not there.
        """

    def describe(self) -> str:
        """One line for the log."""


class CaptionSource(Protocol):
    """Further captions of samples, by row. Picklable: loader processes get a copy."""

    def draw(self, row: int, text: str, name: str, seed: int) -> str:
        """``text``, the sample's own caption, or one of the others of its ``row``; by ``seed`` (64 bits).

        WrongRow: there are none of this row and caption; ``name`` says which sample that is.
        """

    def describe(self) -> str:
        """One line for the log."""


class Source(Protocol):
    """Training data as a stream of samples in a fixed order. Picklable: loader processes get a copy."""

    def stream(self, epoch: int, lane: Lane, place: Place = BEGIN, limit: int = sys.maxsize) -> Iterator[Item]:
        """The lane's samples of an epoch from ``place`` on, turn after turn without an end.

        Of a turn every fault comes with exactly one sample of one lane; another stream may go on at any place.
        NothingUsable: more than ``limit`` faults were read in a row.
        """

    def describe(self, lanes: int) -> str:
        """One line for the log: what there is and how it is dealt to ``lanes`` lanes."""

    def identity(self) -> list[str | int]:
        """What the order follows from besides seed, lanes, steps and batch size: a place is one of this order."""
