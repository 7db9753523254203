"""The pairs of ``--val-data``, each of them once and on one rank only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

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
from training.data.sources.tables import CsvSource, open_csv
from training.data.sources.webdataset import ShardSource, open_val_shards
from training.data.tokenizer import Tokenizer
from training.data.transforms import eval_transform
from training.data.worker import LONGEST_TEXT, decode_or_skip, this_worker
from training.distributed.process_group import World


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


class ValData:
    """Pairs for evaluation: every sample of the set on exactly one rank, in batches (image, text).

    image: float [n, 3, H, W], normalized; text: int64 [n, L]; n ≤ batch size. Ranks may have different numbers of
    samples, or none. It can be iterated any number of times.
    """

    def __init__(self, stream: ValStream, *, workers: int, device: torch.device) -> None:
        self.skips = SkipLog()
        self._stream, self._workers = stream, max(workers, 1)
        self._loader = open_loader(stream, workers, device)

    def __len__(self) -> int:
        """The number of this rank's batches; skipped samples may reduce it. Reads the headers of the shards."""
        return sum(self._stream.batches(worker, self._workers) for worker in range(self._workers))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for image, text, skips in self._loader:
            self.skips.update(skips)
            if len(image):
                yield image, text


class ValStream(IterableDataset[tuple[Tensor, Tensor, Skips]]):
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

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Skips]]:
        part = self._part(*this_worker())
        skips = Skips()
        samples = usable(self.source.in_order(part), skips)
        if self.limit is not None:  # as many as this part has of the positions 0 ... limit - 1
            samples = islice(samples, len(range(part.number, self.limit, part.parts)))
        more = True
        while more:
            raws = list(islice(samples, self.batch_size))
            more = len(raws) == self.batch_size
            pairs = [
                (image, raw.text[:LONGEST_TEXT])
                for raw in raws
                if (image := decode_or_skip(raw, skips, decode)) is not None
            ]
            if not pairs:
                yield torch.empty(0), torch.empty(0), skips.take()
                continue
            images, texts = zip(*pairs)
            yield torch.stack([self.transform(i) for i in images]), self.tokenizer(list(texts)), skips.take()
