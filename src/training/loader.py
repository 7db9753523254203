"""From a stream of samples to batches on the device, in loader processes.

Every loader process serves one lane of its rank (see ``order``) and contributes its share of every batch: what the
processes of a rank send for one step is put together on the device. A rank yields exactly ``steps_per_epoch`` full
batches per epoch, ceil(samples / global batch); the last one is filled with the next samples of the order.

The processes run through the epochs without stopping, so an epoch does not begin with empty queues.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import count, islice
from typing import NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from drrho_clip.batch import Batch
from training.image_size import check_size
from training.images import TrainView, Views, decode
from training.order import Lane, lane_of, seed_of, slots
from training.samples import Allowance, NothingUsable, RawSample, SkipLog, Skips, Source, Unusable
from training.tabular import CsvSource
from training.tokens import Tokenizer, Tokens
from training.webdata import ShardSource

T = TypeVar("T")

LONGEST_TEXT = 4096  # characters that are tokenized: CLIP's tokenizer takes minutes over a word of 100 kB
_PREFETCH = 4  # batches that the loader processes work ahead
_BARREN_TURNS = 20  # beyond one per lane, passes without a usable sample before a lane gives up


class Sample(NamedTuple):
    """One decoded training sample."""

    views: Views
    text: str
    index: int
    seed: int


@dataclass(frozen=True)
class Chunk:
    """What one loader process contributes to one step: ``batch``, or None where it has no share in it.

    ``failure`` says why nothing more will come.
    """

    batch: Batch | None
    skips: Skips
    failure: str | None = None

    def pin_memory(self) -> Chunk:
        """A copy in page-locked memory; ``DataLoader`` calls this by its name."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


class TrainStream(IterableDataset):
    """The endless row of chunks of one loader process, epoch after epoch from ``start_epoch`` on.

    ``rank`` of ``ranks``: among those that share the source's samples.
    """

    def __init__(
        self,
        source: Source,
        view: TrainView,
        tokenizer: Tokenizer,
        ref_tokenizer: Tokenizer | None,
        *,
        seed: int,
        batch_size: int,
        steps: int,
        allowed: Allowance | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.source, self.view = source, view
        self.allowed = allowed or Allowance()
        self.tokens = Tokens(tokenizer)
        self.ref_tokens = None if ref_tokenizer is None else Tokens(ref_tokenizer)
        self.seed, self.batch_size, self.steps = seed, batch_size, steps
        self.rank, self.ranks = rank, ranks
        self.start_epoch = 0

    def __iter__(self) -> Iterator[Chunk]:
        worker, workers = _worker()
        lane = lane_of(self.rank, self.ranks, worker, workers)
        for epoch in count(self.start_epoch):
            skips = Skips(limit=self.allowed.samples)
            samples = self._samples(epoch, lane, skips)
            for step in range(self.steps):
                share = slots(step, self.batch_size, worker, workers)
                try:
                    batch = self._collate(list(islice(samples, share)))
                except NothingUsable as error:
                    yield Chunk(None, skips.take(), str(error))
                    return
                yield Chunk(batch, skips.take())

    def _samples(self, epoch: int, lane: Lane, skips: Skips) -> Iterator[Sample]:
        barren, usable = 0, 0
        for raw in self.source.stream(epoch, lane, skips):
            if raw is None:
                barren, usable = (0 if usable else barren + 1), 0
                if barren > lane.count + _BARREN_TURNS:
                    raise NothingUsable(f"there is no usable sample in the training data; left out: {skips}")
                continue
            image = _decode(raw, skips, self.view.decode)
            if image is None:
                skips.check()
                continue
            usable += 1
            skips.in_a_row = 0
            seed = seed_of(self.seed, epoch, raw.turn, raw.index)
            yield Sample(self.view(image, seed), raw.text[:LONGEST_TEXT], raw.index, seed)

    def _collate(self, samples: list[Sample]) -> Batch | None:
        if not samples:
            return None
        texts, seeds = [sample.text for sample in samples], [sample.seed for sample in samples]
        references = [sample.views.reference for sample in samples]
        return Batch(
            image=torch.stack([sample.views.target for sample in samples]),
            text=self.tokens(texts, seeds),
            index=torch.tensor([sample.index for sample in samples]),
            ref_image=None if references[0] is None else torch.stack(references),
            ref_text=None if self.ref_tokens is None else self.ref_tokens(texts, seeds),
        )


class TrainData:
    """The training data of one rank.

    ``steps_per_epoch`` batches of this rank's ``batch_size`` make an epoch; ``samples_per_epoch`` counts the
    places in all ranks' batches (the samples of the set, and those that fill the last batch).
    """

    def __init__(self, stream: TrainStream, *, world_size: int, workers: int, device: torch.device) -> None:
        self.steps_per_epoch = stream.steps
        self.samples_per_epoch = stream.steps * stream.batch_size * world_size
        self.skips = SkipLog(stream.allowed)
        self._stream, self._device, self._chunks_per_step = stream, device, max(workers, 1)
        self._loader = _loader(stream, workers, device, stream.seed)
        self._chunks: Iterator[Chunk] | None = None
        self._next_epoch: int | None = None

    @property
    def skipped(self) -> dict[str, int]:
        """How many samples this rank has left out so far, by reason."""
        return dict(self.skips.total.counts)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The ``steps_per_epoch`` batches of ``epoch``, on the device (``index`` on the CPU).

        Epochs in a row flow on; any other epoch, or one after an epoch left early, starts the processes anew.
        NothingUsable: the data holds no usable sample, or far too many bad ones in a row; TooManyBad.
        """
        if self._chunks is None or self._next_epoch != epoch:
            self.close()
            self._stream.start_epoch = epoch
            self._chunks = iter(self._loader)
        self._next_epoch = None
        yield from prefetch((self._step() for _ in range(self.steps_per_epoch)), self._device)
        self._next_epoch = epoch + 1

    def close(self) -> None:
        """End the loader processes."""
        self._chunks = None

    def _step(self) -> list[Batch]:
        chunks = []
        for _ in range(self._chunks_per_step):
            chunk = next(self._chunks)
            if chunk.failure is not None:
                self.close()
                raise NothingUsable(chunk.failure)
            self.skips.update(chunk.skips, 0 if chunk.batch is None else len(chunk.batch))
            chunks.append(chunk)
        return [chunk.batch for chunk in chunks if chunk.batch is not None]


class ValData:
    """Pairs for evaluation: every sample of the set on exactly one rank, in batches (image, text).

    image: float [n, 3, H, W], normalized; text: int64 [n, L]; n ≤ batch size. Ranks may have different numbers of
    samples, and none. Iterate as often as you like.
    """

    def __init__(self, stream: ValStream, *, workers: int, device: torch.device) -> None:
        self.skips = SkipLog()
        self._stream, self._workers = stream, max(workers, 1)
        self._loader = _loader(stream, workers, device, 0)

    def __len__(self) -> int:
        """This rank's batches; skipped samples may make them fewer. Reads the headers of the shards."""
        return sum(self._stream.batches(worker, self._workers) for worker in range(self._workers))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for image, text, skips in self._loader:
            self.skips.update(skips)
            if len(image):
                yield image, text


class ValStream(IterableDataset):
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
        """How many batches that process makes of a sound set."""
        lane = lane_of(self.rank, self.ranks, worker, workers)
        samples = self.source.count() if self.limit is None else min(self.source.count(), self.limit)
        return -(-len(range(lane.number, samples, lane.count)) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Skips]]:
        lane = lane_of(self.rank, self.ranks, *_worker())
        skips = Skips()
        samples = self.source.in_order(lane, skips)
        if self.limit is not None:  # of positions 0, 1, ..., limit - 1 this lane has those = number mod count
            samples = islice(samples, len(range(lane.number, self.limit, lane.count)))
        more = True
        while more:
            raws = list(islice(samples, self.batch_size))
            more = len(raws) == self.batch_size
            pairs = [(image, raw.text) for raw in raws if (image := _decode(raw, skips, decode)) is not None]
            if not pairs:
                yield torch.empty(0), torch.empty(0), skips.take()
                continue
            images, texts = zip(*pairs)
            yield torch.stack([self.transform(i) for i in images]), self.tokenizer(list(texts)), skips.take()


def prefetch(batches: Iterable[Batch | list[Batch]], device: torch.device) -> Iterator[Batch]:
    """``batches`` on ``device``; the parts of one that comes in parts are put together there.

    On a GPU the next batch is copied from pinned memory beside the computation on the last one.
    """
    if device.type != "cuda":
        yield from (_move(batch, device) for batch in batches)
        return
    copies = torch.cuda.Stream(device)
    ahead: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            arriving = _move(batch, device)
        if ahead is not None:
            yield ahead
        ahead = _hand_over(arriving, copies, device)
    if ahead is not None:
        yield ahead


def _hand_over(batch: Batch, copies: torch.cuda.Stream, device: torch.device) -> Batch:
    """Let the current stream wait for the copies; their memory is not reused before it has read them."""
    current = torch.cuda.current_stream(device)
    current.wait_stream(copies)
    for f in fields(batch):
        tensor = getattr(batch, f.name)
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(current)
    return batch


def _move(batch: Batch | list[Batch], device: torch.device) -> Batch:
    parts = [part.to(device) for part in (batch if isinstance(batch, list) else [batch])]
    if len(parts) == 1:
        return parts[0]
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Batch)}
    return Batch(**{name: None if column[0] is None else torch.cat(column) for name, column in columns.items()})


def _decode(raw: RawSample, skips: Skips, decoder: Callable[..., T]) -> T | None:
    try:
        if not isinstance(raw.image, Image.Image):
            check_size(raw.image)
        return decoder(raw.image)
    except Unusable as fault:
        skips.add(str(fault), raw.name)
        return None
    except Exception as error:  # a decoder raises anything on a broken file
        skips.add("undecodable image", f"{raw.name}: {error}")
        return None


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _loader(stream: IterableDataset, workers: int, device: torch.device, seed: int) -> DataLoader:
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=_PREFETCH if workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(seed),  # else it would draw from the run's generator
    )


def _start_worker(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is parallel enough
