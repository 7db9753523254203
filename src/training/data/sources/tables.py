"""Training samples from csv files, and synthetic ones for benchmarks.

Both can read any sample directly, so a turn is one random order of all rows, fixed by (seed, epoch, turn), or with
``--epoch_policy resample`` as many rows drawn with replacement. Turn after turn the rows are dealt to the lanes
one by one (``Lane.owns``), so that the global batches do not depend on the lanes. The row number is the sample's
row of the sample state.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import count

import numpy as np
from PIL import Image

from training.config.data import DataConfig
from training.config.inputs.csv_files import csv_files
from training.data.lanes import Lane, Part
from training.data.progress import BEGIN, Place
from training.data.samples import Item, RawSample
from training.data.sources.csv_file import CsvFormat, read_pairs
from training.data.sources.strings import Strings
from training.rng import draws, permutation, seed_of

PROBES = 100  # pictures that are looked for before a run

_WORDS = (
    *("red", "green", "blue", "small", "large", "round", "old", "new"),
    *("bright", "dark", "dog", "tree", "house", "river", "car", "bird"),
)


class Table:
    """Samples 0 … ``samples`` - 1 in a random order; ``resampled``: drawn with replacement."""

    kind = "rows"

    def __init__(self, samples: int, seed: int, *, resampled: bool = False) -> None:
        self.samples, self.seed, self.resampled = samples, seed, resampled
        self._last: tuple[tuple[int, int], np.ndarray] | None = None

    def stream(self, epoch: int, lane: Lane, place: Place = BEGIN, limit: int = sys.maxsize) -> Iterator[Item]:
        """See ``samples.Source``."""
        turn = lane.position(place.taken) // self.samples
        rows = self._order(epoch, turn)
        for taken in count(place.taken):
            position = lane.position(taken)
            now, within = divmod(position, self.samples)
            if now != turn:
                yield Item(None, Place(taken=taken))
                turn, rows = now, self._order(epoch, now)
            visit = position if self.resampled else turn
            yield Item(self.sample(int(rows[within]), visit), Place(taken=taken + 1))

    def count(self) -> int:
        """The number of rows."""
        return self.samples

    def describe(self, lanes: int) -> str:
        """See ``samples.Source``."""
        how = "drawn with replacement and dealt" if self.resampled else "dealt"
        return f"{self.samples} {self.kind}, {how} to {lanes} lanes by sample"

    def identity(self) -> list[str | int]:
        """See ``samples.Source``."""
        return ["drawn" if self.resampled else "dealt by sample", self.samples]

    def sample(self, row: int, turn: int) -> RawSample:
        """Sample ``row`` at its ``turn``-th visit."""
        raise NotImplementedError

    def _order(self, epoch: int, turn: int) -> np.ndarray:
        """The rows of a turn. The last turn is kept, since the lanes of a process need it at the same time."""
        if self._last is None or self._last[0] != (epoch, turn):
            key = (self.seed, epoch, turn)
            n = self.samples
            rows = draws(n, np.ones(n), *key) if self.resampled else permutation(n, *key)
            self._last = (epoch, turn), rows
        return self._last[1]


class CsvSource(Table):
    """The rows of csv files: ``images`` are paths, ``texts`` captions."""

    def __init__(self, images: Iterable[str], texts: Iterable[str], seed: int, *, resampled: bool = False) -> None:
        self.images, self.texts = (
            column if isinstance(column, Strings) else Strings(column) for column in (images, texts)
        )
        assert len(self.images) == len(self.texts)
        super().__init__(len(self.images), seed, resampled=resampled)

    def in_order(self, part: Part) -> Iterator[Item]:
        """Row ``part.number`` and every ``part.parts``-th row after it, once, in the file's order."""
        for row in range(part.number, self.samples, part.parts):
            yield Item(self.sample(row, 0))

    def sample(self, row: int, turn: int) -> RawSample:
        """See ``Table``."""
        image = self.images[row]
        return RawSample(image, self.texts[row], row, turn, f"row {row}: {image}")


class SyntheticSource(Table):
    """``samples`` images of noise, ``size`` = (height, width), with captions of a few words."""

    kind = "synthetic samples"

    def __init__(self, samples: int, size: tuple[int, int], seed: int, *, resampled: bool = False) -> None:
        super().__init__(samples, seed, resampled=resampled)
        self.size = size

    def sample(self, row: int, turn: int) -> RawSample:
        """See ``Table``."""
        height, width = self.size
        seed = seed_of(self.seed, row)
        noise = np.random.Philox(key=seed).random_raw(-(-height * width * 3 // 8)).view(np.uint8)
        pixels = noise[: height * width * 3].reshape(height, width, 3)
        words = (_WORDS[seed >> shift & 15] for shift in range(0, 32, 4))
        return RawSample(Image.fromarray(pixels), " ".join(words), row, turn, f"synthetic {row}")


def open_csv(data: str, config: DataConfig, seed: int, flag: str = "--train-data") -> CsvSource:
    """The rows of all csv files that ``data``, the value of ``flag``, names, read with the flags ``--csv*``.

    ValueError: a file does not exist, or one of the errors of ``csv_file.read_pairs``.
    """
    keys = config.csv_img_key, config.csv_caption_key
    written = CsvFormat(config.csv_separator, config.csv_quoting, config.csv_encoding)
    images, texts = Strings(), Strings()
    for file in csv_files(data, flag):
        more_images, more_texts = read_pairs(file, keys, written, f"{flag} {file}")
        images.extend(more_images)
        texts.extend(more_texts)
    return CsvSource(images, texts, seed, resampled=config.epoch_policy == "resample")


def look_for_pictures(table: CsvSource, data: str, flag: str, allowed: float = 0.0) -> list[str]:
    """A remark if more than half of some pictures, evenly chosen from ``table``, do not exist.

    ``data``: the value of ``flag`` that ``table`` was read from. ValueError: none of them exists, and the share of
    bad samples that is ``allowed`` is below 1.
    """
    rows = range(0, table.samples, max(1, table.samples // PROBES))[:PROBES]
    paths = [table.images[row] for row in rows]
    missing = [path for path in paths if not os.path.exists(path)]
    if len(missing) <= len(paths) / 2:
        return []
    first = missing[0]
    where = "" if os.path.isabs(first) else f" in the working directory {os.getcwd()}"
    problem = (
        f"{flag} {data}: of {len(paths)} pictures that were looked for, {len(missing)} do not exist; the first is "
        f"{first!r}{where}: {_cure(first, csv_files(data, flag))}"
    )
    if len(missing) == len(paths) and allowed < 1:
        raise ValueError(problem)
    return [problem]


def _cure(path: str, files: list[str]) -> str:
    """What to do about the path of a picture that does not exist, in one of ``files``."""
    if re.match(r"\w+://", path) and not path.startswith("file://"):
        return "pictures are not downloaded while a run reads them; download them first (img2dataset, for example)"
    others = {
        "without the spaces around it": path.strip(),
        "with / instead of \\": path.replace("\\", "/"),
        "with the home directory for ~": os.path.expanduser(path),
        "without the quote signs around it": path.strip("\"'"),
        "without file://": path.removeprefix("file://"),
    }
    for how, other in others.items():
        if other != path and os.path.exists(other):
            return f"it exists {how}; correct the paths in the file"
    for file in files:
        folder = os.path.dirname(os.path.abspath(file))
        while path and not os.path.isabs(path):
            if os.path.exists(os.path.join(folder, path)):
                return f"it exists in {folder}; start the run there (cd), or write absolute paths into the file"
            if folder == (folder := os.path.dirname(folder)):
                break
    return "correct the paths, or --csv-img-key if this is not a path"
