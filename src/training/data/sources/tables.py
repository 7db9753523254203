"""Training samples from a csv file, and synthetic ones for benchmarks.

Both can read any sample directly, so a turn is one random order of all rows, fixed by (seed, epoch, turn), or with
``--epoch_policy resample`` as many rows drawn with replacement. Turn after turn the rows are dealt to the lanes
one by one (``Lane.owns``), so that the global batches do not depend on the lanes. The row number is the sample's
row of the sample state.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import count

import numpy as np
import pandas as pd
from PIL import Image

from training.config.data import DataConfig
from training.data.lanes import Lane, Part
from training.data.progress import BEGIN, Place
from training.data.samples import Item, RawSample
from training.rng import draws, permutation, seed_of

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
    """The rows of a csv file: ``images`` are paths, ``texts`` captions."""

    def __init__(self, images: list[str], texts: list[str], seed: int, *, resampled: bool = False) -> None:
        assert len(images) == len(texts)
        super().__init__(len(images), seed, resampled=resampled)
        self.images, self.texts = images, texts

    def in_order(self, part: Part) -> Iterator[Item]:
        """Row ``part.number`` and every ``part.parts``-th row after it, once, in the file's order."""
        for row in range(part.number, self.samples, part.parts):
            yield Item(self.sample(row, 0))

    def sample(self, row: int, turn: int) -> RawSample:
        """See ``Table``."""
        return RawSample(self.images[row], self.texts[row], row, turn, f"row {row}: {self.images[row]}")


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


def open_csv(path: str, config: DataConfig, seed: int) -> CsvSource:
    """The csv file, read with the flags ``--csv-*``. ValueError: a column is missing, or there are no rows."""
    keys = [config.csv_img_key, config.csv_caption_key]
    try:
        table = pd.read_csv(path, sep=config.csv_separator, usecols=keys, dtype=str, keep_default_na=False)
    except ValueError:
        columns = pd.read_csv(path, sep=config.csv_separator, nrows=0).columns
        raise ValueError(
            f"{path} does not have both columns {keys[0]!r} and {keys[1]!r}, it has {list(columns)}: "
            "name them with --csv-img-key and --csv-caption-key, and their separator with --csv-separator"
        ) from None
    if not len(table):
        raise ValueError(f"{path} has no rows")
    resampled = config.epoch_policy == "resample"
    return CsvSource(table[keys[0]].tolist(), table[keys[1]].tolist(), seed, resampled=resampled)
