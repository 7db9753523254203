"""What a source of samples (shards, a csv file, synthetic noise) hands to a loader process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from PIL import Image
from torch import Tensor

from training.data.lanes import Lane
from training.data.progress import BEGIN, Place
from training.rng import view_number, view_seed


class RawSample(NamedTuple):
    """One sample before decoding.

    ``image`` is an encoded image, the path of one, or a Pillow image; ``row`` is its row of the sample state
    (where the run keeps no state, a negative number that only identifies the sample); ``turn`` distinguishes the
    visits of the sample in one epoch; ``name`` is for messages. ``text`` is its caption, the first one where it
    has several; ``more`` are the others, and training draws one of all. ``extras`` are further files by their
    extensions, where the run uses them (``sources.reinforcement``).
    """

    image: bytes | str | Image.Image
    text: str
    row: int
    turn: int
    name: str
    more: tuple[str, ...] = ()
    extras: Mapping[str, bytes] | None = None


class Fault(NamedTuple):
    """Something left out, a sample, a shard or a part of one: its name, and the ``reason`` it counts under.

    ``why`` says more about it, and what helps, where that is known.
    """

    reason: str
    name: str
    why: str = ""


class Item(NamedTuple):
    """One element of a stream: a ``sample``, the ``faults`` that count with it, and the ``place`` after it.

    ``sample`` is None at the end of a turn; ``faults`` are then those of a turn without any usable sample.
    """

    sample: RawSample | None
    place: Place = BEGIN
    faults: Sequence[Fault] = ()


class Unusable(Exception):
    """A sample that cannot be used. The message is the reason that it counts under; ``why`` is as in ``Fault``."""

    def __init__(self, reason: str, why: str = "") -> None:
        super().__init__(reason)
        self.why = why


@dataclass(frozen=True)
class StoredViews:
    """The ``count`` random views of each image whose embeddings are stored, drawn with the store's ``seed``.

    ``offset``: row 0 of the store is this row of the run.
    """

    count: int
    seed: int
    offset: int = 0

    def draw(self, seed: int, epoch: int, turn: int, row: int) -> tuple[int, int]:
        """For one use of a sample in a run with ``seed``: the number of its view, and the seed of this view."""
        number = view_number(seed, epoch, turn, row, self.count)
        return number, view_seed(self.seed, number, row - self.offset)


class Shown(NamedTuple):
    """What one use of a sample shows of it: stored view number ``view``, and ``text``, its caption ``caption``.

    Caption 0 is the sample's own, the others are synthetic ones.
    """

    text: str
    caption: int = 0
    view: int = 0


class FeatureSource(Protocol):
    """Embeddings of a frozen model, stored by row. Picklable: loader processes get a copy.

    ``views`` is None where they are of one fixed view of each image.
    """

    width: int

    @property
    def paths(self) -> Sequence[Path]:
        """The files that are read when embeddings are asked for, those that matter most first."""

    @property
    def views(self) -> StoredViews | None:
        """The views of each image."""

    def __call__(
        self, rows: Sequence[int], texts: Sequence[str], names: Sequence[str], shown: Sequence[Shown] = ()
    ) -> Tensor:
        """Embeddings [n, 2, d], image and text, of these rows of the run, whose own captions are ``texts``.

        ``shown``: which view and which caption of each; empty: the first view and the own captions.
        WrongRow: the embeddings of a sample are missing; the message calls it by its entry in ``names``.
        """

    def coming(self, row: int, view: int = 0) -> None:
        """The embeddings of ``row``, in this view, will be asked for soon; a disk may fetch them meanwhile."""

    def describe(self) -> str:
        """One line for the log."""


class CaptionSource(Protocol):
    """Additional captions of samples, stored by row. Picklable: loader processes get a copy."""

    def draw(self, row: int, texts: Sequence[str], name: str, seed: int) -> tuple[int, str]:
        """One of ``texts``, the sample's own captions, or of those of its ``row``, chosen by ``seed`` (64 bits).

        Its number, own captions first, and the caption itself. WrongRow: there are none for this row and the first
        of ``texts``; the message calls the sample ``name``.
        """

    def written(self, row: int, text: str, name: str) -> list[str]:
        """All additional captions of the sample at ``row``, whose own caption is ``text``. WrongRow as above."""

    def describe(self) -> str:
        """One line for the log."""


@runtime_checkable
class Announcing(Protocol):
    """A source that knows the samples of its streams some time before it gives them."""

    announce: (
        Callable[[int, int, int], None] | None
    )  # is called with row, epoch and turn of each, where it is not None


class Source(Protocol):
    """Training data as a stream of samples in a fixed order. Picklable: loader processes get a copy."""

    def stream(self, epoch: int, lane: Lane, place: Place = BEGIN, limit: int = sys.maxsize) -> Iterator[Item]:
        """The lane's samples of an epoch from ``place`` on, turn after turn without an end.

        Every fault of a turn comes with exactly one sample of one lane. A new stream can start at the place of any
        item. NothingUsable: more than ``limit`` faults were read in a row.
        """

    def describe(self, lanes: int) -> str:
        """One line for the log: what the source has, and how it is dealt to ``lanes`` lanes."""

    def identity(self) -> list[str | int]:
        """What the order depends on besides seed, lanes, steps and batch size; places belong to this order."""
