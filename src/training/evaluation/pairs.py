"""The pairs of ``--val-data``, each of them once and on one rank only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from training.config.params import Config
from training.data.bad_samples import SkipLog, Skips, usable
from training.data.build import Model
from training.data.decode import decode
from training.data.lanes import Part
from training.data.loader import open_loader
from training.data.samples import RawSample
from training.data.sources.tables import CsvSource, open_csv
from training.data.sources.webdataset import ShardSource, open_val_shards
from training.data.tokenizer import Tokenizer
from training.data.transforms import eval_transform
from training.data.worker import LONGEST_TEXT, decode_or_skip, this_worker
from training.distributed.process_group import World
from training.evaluation.benchmark.sources import file_place, member_place
from training.predictions import Place, shortened


def build_val(config: Config, world: World, target: Model, table: CsvSource | None = None) -> ValData | None:
    """The pairs of ``--val-data`` for this rank; None without it. ValueError: the message names the wrong flag.

    ``table``: its csv files, where they have been read already (``open_val_table``).
    """
    val = config.evaluation
    if val.val_data is None:
        return None
    source: CsvSource | ShardSource
    if val.val_dataset_type == "csv":
        source = table or open_val_table(config)
    else:
        source = open_val_shards(val.val_data, config.data)
    stream = ValStream(
        source,
        eval_transform(target.preprocess),
        target.tokenizer,
        batch_size=config.run.batch_size // config.run.accum_freq,
        limit=val.val_num_samples,
        rank=world.rank,
        ranks=world.world_size,
    )
    return ValData(stream, workers=config.data.workers, device=world.device)


def open_val_table(config: Config) -> CsvSource:
    """The csv files of ``--val-data``. ValueError: they cannot be read."""
    assert config.evaluation.val_data is not None, "it has a kind only where it is given"
    return open_csv(config.evaluation.val_data, config.data, config.run.seed, "--val-data")


class ValBatch(NamedTuple):
    """``image`` float [n, 3, H, W], normalized, and ``text`` int64 [n, L], the first caption of each.

    ``more`` int64 [m, L]: further captions, where samples have several; ``owner`` int64 [m]: whose they are.
    ``places`` and ``captions`` [n]: where the pictures are, and all captions of each, for people.
    """

    image: Tensor
    text: Tensor
    more: Tensor
    owner: Tensor
    places: list[Place]
    captions: list[tuple[str, ...]]


class ValData:
    """Pairs for evaluation: every sample of the set on exactly one rank, in batches of at most the batch size.

    Ranks may have different numbers of samples, or none. It can be iterated any number of times.
    """

    def __init__(self, stream: ValStream, *, workers: int, device: torch.device) -> None:
        self.skips = SkipLog()
        self._stream, self._workers = stream, max(workers, 1)
        self._loader = open_loader(stream, workers, device)

    def __len__(self) -> int:
        """The number of this rank's batches; skipped samples may reduce it. Reads the headers of the shards."""
        return sum(self._stream.batches(worker, self._workers) for worker in range(self._workers))

    def __iter__(self) -> Iterator[ValBatch]:
        for batch, skips in self._loader:
            self.skips.update(skips)
            if len(batch.image):
                yield batch


class ValStream(IterableDataset[tuple[ValBatch, Skips]]):
    """One loader process's share of the validation samples."""

    def __init__(
        self,
        source: ShardSource | CsvSource,
        transform: Callable[[Image.Image], Tensor],
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        limit: int | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.source, self.transform, self.tokenizer = source, transform, tokenizer
        self.batch_size, self.limit = batch_size, limit
        self.rank, self.ranks = rank, ranks

    def batches(self, worker: int, workers: int) -> int:
        """How many batches that process makes if no sample is bad."""
        part = self._part(worker, workers)
        samples = self.source.count() if self.limit is None else min(self.source.count(), self.limit)
        return -(-len(range(part.number, samples, part.parts)) // self.batch_size)

    def _part(self, worker: int, workers: int) -> Part:
        return Part(worker * self.ranks + self.rank, workers * self.ranks)

    def __iter__(self) -> Iterator[tuple[ValBatch, Skips]]:
        part = self._part(*this_worker())
        skips = Skips()
        samples = usable(self.source.in_order(part), skips)
        if self.limit is not None:  # as many as this part has of the positions 0 ... limit - 1
            samples = islice(samples, len(range(part.number, self.limit, part.parts)))
        more = True
        while more:
            raws = list(islice(samples, self.batch_size))
            more = len(raws) == self.batch_size
            pairs = [(image, raw) for raw in raws if (image := decode_or_skip(raw, skips, decode)) is not None]
            yield self._batch([image for image, _ in pairs], [raw for _, raw in pairs]), skips.take()

    def _batch(self, images: list[Image.Image], raws: list[RawSample]) -> ValBatch:
        further = [(i, text) for i, raw in enumerate(raws) for text in raw.more]
        return ValBatch(
            torch.stack([self.transform(image) for image in images]) if images else torch.empty(0),
            self._tokens([raw.text for raw in raws]),
            self._tokens([text for _, text in further]),
            torch.tensor([i for i, _ in further], dtype=torch.int64),
            [_place(raw) for raw in raws],
            [tuple(shortened(text) for text in (raw.text, *raw.more)) for raw in raws],
        )

    def _tokens(self, texts: list[str]) -> Tensor:
        return self.tokenizer([text[:LONGEST_TEXT] for text in texts]) if texts else torch.empty(0)


def _place(raw: RawSample) -> Place:
    return file_place(raw.image, 0, -1) if isinstance(raw.image, str) else member_place(raw.name)
