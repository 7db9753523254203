"""Synthetic captions in training: what a captioning model wrote about each image, once (``captioner``).

With ``--cached_syn_texts_dir`` training uses for each sample one of its own captions or of the synthetic ones, all
with the same probability unless ``--syn_texts_ratio`` says otherwise, by a seed that follows from (seed, epoch,
sample). The store (see ``row_store``) keeps them as utf-8: for each row [captions per sample] strings of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from training.cache.row_store import RowStore, caption_checksum, open_store
from training.config.params import Config
from training.rng import caption_number

KIND = "synthetic captions"
FLAG = "--cached_syn_texts_dir"


class Captions:
    """The captions of a store, ``count`` per sample; row 0 of the store is row ``offset`` of the run.

    ``ratio``: the chance of a synthetic caption; None: all captions have the same chance.
    """

    def __init__(self, store: RowStore, count: int, offset: int = 0, ratio: float | None = None) -> None:
        self.store, self.count, self.offset, self.ratio = store, count, offset, ratio

    def draw(self, row: int, texts: Sequence[str], name: str, seed: int) -> tuple[int, str]:
        """See ``CaptionSource``."""
        position = self._position(row, texts[0], name)
        number = caption_number(seed, len(texts), self.count, self.ratio)
        if number < len(texts):
            return number, texts[number]
        return number, _text(self.store.one("captions", position)[number - len(texts)])

    def written(self, row: int, text: str, name: str) -> list[str]:
        """See ``CaptionSource``."""
        return [
            _text(caption) for caption in self.store.one("captions", self._position(row, text, name))[: self.count]
        ]

    def _position(self, row: int, text: str, name: str) -> int:
        place = np.array([row - self.offset])
        checksum = np.array([caption_checksum(text)], np.uint32)
        (position,) = self.store.find(
            place, checksum, lambda _: f"{FLAG}: sample {name} (row {place[0]} of the captions)"
        )
        return int(position)

    @property
    def origin(self) -> str:
        """How many they are per sample, and what wrote them."""
        made = self.store.identity
        return f"{self.count} by {made['model']} with weights {made['weights']}, seed {made['seed']}"

    def describe(self) -> str:
        """See ``CaptionSource``."""
        made = self.store.identity
        return (
            f"{self.count} per sample of {len(self.store):,} samples in {self.store.folder}, "
            f"by {made['model']} with weights {made['weights']}"
        )


def _text(written: np.bytes_) -> str:
    return bytes(written).decode(errors="replace")


def open_captions(config: Config) -> Captions | None:
    """The captions in ``--cached_syn_texts_dir``; None if the run reads none. ValueError: they do not fit."""
    cache = config.cache
    if not cache.cached_syn_texts_dir or cache.writes == "captions" or not (config.trains or cache.writes):
        return None
    store = open_store(cache.cached_syn_texts_dir, KIND, FLAG)
    _, (held,) = store.shape("captions")
    count = cache.num_syn_texts or held
    if count > held:
        raise ValueError(
            f"--num_syn_texts {count}: {store.folder} has {held} captions per sample; give at most {held}"
        )
    return Captions(store, count, cache.syn_texts_offset, cache.syn_texts_ratio)
