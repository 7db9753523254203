"""Training samples from a csv file, and synthetic ones for benchmarks.

Both have all their samples at hand, so an epoch is one random order of the rows, fixed by (seed, epoch, turn), and
dealt to the lanes one by one (see ``order``). The row number is the sample's row of the sample state.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import pandas as pd
from PIL import Image

from training.order import Lane, permutation, seed_of
from training.params import DataConfig
from training.samples import RawSample, Skips

_WORDS = (
    *("red", "green", "blue", "small", "large", "round", "old", "new"),
    *("bright", "dark", "dog", "tree", "house", "river", "car", "bird"),
)


class CsvSource:
    """The rows of a csv file: ``images`` are paths, ``texts`` captions."""

    def __init__(self, images: list[str], texts: list[str], seed: int) -> None:
        assert len(images) == len(texts)
        self.images, self.texts, self.seed = images, texts, seed

    def stream(self, epoch: int, lane: Lane, skips: Skips) -> Iterator[RawSample | None]:
        """See ``samples.Source``."""
        position = 0
        for turn in count():
            skips.check()
            rows = permutation(len(self.images), self.seed, epoch, turn)
            for row in rows[(lane.number - position) % lane.count :: lane.count]:
                yield self._sample(int(row), turn)
            position += len(rows)  # goes on over turns: where one ends, the next continues the deal
            yield None

    def in_order(self, lane: Lane, skips: Skips) -> Iterator[RawSample]:
        """Every ``lane.count``-th row from row ``lane.number`` on, once, in the file's order."""
        for row in range(lane.number, len(self.images), lane.count):
            yield self._sample(row, 0)

    def count(self) -> int:
        """The number of rows."""
        return len(self.images)

    def describe(self, lanes: int) -> str:
        """See ``samples.Source``."""
        return f"{len(self.images)} rows, dealt to {lanes} lanes"

    def _sample(self, row: int, turn: int) -> RawSample:
        return RawSample(self.images[row], self.texts[row], row, turn, f"row {row}: {self.images[row]}")


class SyntheticSource:
    """``samples`` pictures of noise, ``size`` = (height, width), with captions of a few words; rows in order."""

    def __init__(self, samples: int, size: tuple[int, int], seed: int) -> None:
        self.samples, self.size, self.seed = samples, size, seed

    def stream(self, epoch: int, lane: Lane, skips: Skips) -> Iterator[RawSample | None]:
        """See ``samples.Source``."""
        position = 0
        for turn in count():
            for row in range((lane.number - position) % lane.count, self.samples, lane.count):
                yield self._sample(row, turn)
            position += self.samples
            yield None

    def describe(self, lanes: int) -> str:
        """See ``samples.Source``."""
        return f"{self.samples} synthetic samples for {lanes} lanes"

    def _sample(self, row: int, turn: int) -> RawSample:
        height, width = self.size
        seed = seed_of(self.seed, row)
        noise = np.random.Philox(key=seed).random_raw(-(-height * width * 3 // 8)).view(np.uint8)
        pixels = noise[: height * width * 3].reshape(height, width, 3)
        words = (_WORDS[seed >> shift & 15] for shift in range(0, 32, 4))
        return RawSample(Image.fromarray(pixels), " ".join(words), row, turn, f"synthetic {row}")


def open_csv(path: str, config: DataConfig, seed: int) -> CsvSource:
    """The csv file under the flags ``--csv-*``. ValueError: a column is not there, or there are no rows."""
    keys = [config.csv_img_key, config.csv_caption_key]
    try:
        table = pd.read_csv(path, sep=config.csv_separator, usecols=keys, dtype=str, keep_default_na=False)
    except ValueError:
        columns = pd.read_csv(path, sep=config.csv_separator, nrows=0).columns
        raise ValueError(
            f"{path} has no columns {keys[0]!r} and {keys[1]!r}, it has {list(columns)}: "
            "name them with --csv-img-key and --csv-caption-key, and their separator with --csv-separator"
        ) from None
    if not len(table):
        raise ValueError(f"{path} has no rows")
    return CsvSource(table[keys[0]].tolist(), table[keys[1]].tolist(), seed)
