"""What one loader process does: it makes batches of its lanes' samples, each with the lanes' places after it.

Every one of the W processes of a rank prepares whole batches, every W-th of them, from the lanes that serve those
steps (see ``lanes`` and ``order``). It runs through the epochs without stopping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from drrho_clip.batch import Batch
from training.data.bad_samples import REPAIR, Allowance, NothingUsable, Skips, WrongRow
from training.data.batch_memory import BatchMemory, ReceivedMemory
from training.data.decode import check_size
from training.data.lanes import Lane, Layout
from training.data.progress import BEGIN, Place, Progress
from training.data.samples import Announcing, CaptionSource, FeatureSource, RawSample, Shown, Source, Unusable
from training.data.sources.reinforcement import Reinforcement
from training.data.tokenizer import Tokenizer, Tokens
from training.data.transforms import TrainView, Views
from training.rng import caption_number, sample_seed

T = TypeVar("T")

LONGEST_TEXT = 4096  # characters that are tokenized: CLIP's tokenizer takes minutes for a word of 100 kB
_SMALL = ("text", "index", "ref_text")  # tensors of a batch, int64
_EMPTY_TURNS = 20  # turns without a usable sample, in addition to one per lane, before a lane gives up


class Sample(NamedTuple):
    """One decoded training sample. ``text`` is the first of its own captions; ``shown`` has the one in use.

    ``features``: the reference's embeddings [2, d], where the shards hold them.
    """

    views: Views
    shown: Shown
    text: str
    row: int
    seed: int
    name: str
    features: Tensor | None = None


@dataclass(frozen=True)
class LoadedBatch:
    """One batch of a rank, with the samples left out on the way to it and the places of its lanes after it.

    ``failure`` is the reason why there is no batch; no further one follows.
    """

    batch: Batch | None
    skips: Skips
    places: dict[tuple[int, int], Place] = field(default_factory=dict)
    failure: ValueError | None = None

    def pin_memory(self) -> LoadedBatch:
        """A copy in page-locked memory; ``DataLoader`` calls this method by its name."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())

    def copy(self, memory: ReceivedMemory, ref_memory: ReceivedMemory) -> LoadedBatch:
        """A copy with its images in these memories, valid when the loader process uses its own memory again."""
        if self.batch is None:
            return self
        image, ref_image = memory.copy(self.batch.image), self.batch.ref_image
        ref_image = None if ref_image is None else ref_memory.copy(ref_image)
        return replace(self, batch=replace(self.batch, image=image, ref_image=ref_image))

    def __getstate__(self) -> dict[str, Any]:
        """Ids and rows go from process to process as arrays, inside the message.

        A tensor would go through shared memory: handing over its descriptor takes longer than copying so little.
        """
        if self.batch is None:
            return self.__dict__
        small = {name: t.numpy() for name in _SMALL if (t := getattr(self.batch, name)) is not None}
        return self.__dict__ | {"batch": replace(self.batch, **small)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        batch = state["batch"]
        if batch is not None:
            small = {name: torch.from_numpy(a) for name in _SMALL if (a := getattr(batch, name)) is not None}
            state["batch"] = replace(batch, **small)
        self.__dict__.update(state)


class TrainStream(IterableDataset[LoadedBatch]):
    """The endless sequence of batches that one loader process prepares: every W-th from ``start`` on.

    ``rank`` of ``ranks`` has ``batch_size`` samples of each of an epoch's ``steps``. ``own_shards``: every rank
    reads the whole source by itself, as if it were the only virtual rank.
    """

    def __init__(
        self,
        source: Source,
        view: TrainView,
        tokenizer: Tokenizer,
        ref_tokenizer: Tokenizer | None,
        features: FeatureSource | None = None,
        captions: CaptionSource | None = None,
        reinforcement: Reinforcement | None = None,
        *,
        seed: int,
        batch_size: int,
        steps: int,
        layout: Layout,
        allowed: Allowance | None = None,
        rank: int = 0,
        ranks: int = 1,
        own_shards: bool = False,
    ) -> None:
        self.source, self.view = source, view
        self.allowed = allowed or Allowance()
        self.tokens = Tokens(tokenizer)
        self.ref_tokens = None if ref_tokenizer is None else Tokens(ref_tokenizer)
        self.features, self.captions, self.reinforcement = features, captions, reinforcement
        if features is not None and isinstance(source, Announcing):
            source.announce = self._coming
        self.seed, self.batch_size, self.steps = seed, batch_size, steps
        self.rank, self.ranks, self.own_shards = rank, ranks, own_shards
        self.layout, self.start = layout, Progress()
        self._images, self._ref_images = BatchMemory(), BatchMemory()

    def _coming(self, row: int, epoch: int, turn: int) -> None:
        """Tell the features that a sample will be used."""
        assert self.features is not None, "nothing is announced without them"
        views = self.features.views
        self.features.coming(row, 0 if views is None else views.draw(self.seed, epoch, turn, row)[0])

    @property
    def lanes(self) -> int:
        """The number of lanes that the source is dealt to."""
        return self.layout.workers * (1 if self.own_shards else self.layout.ranks)

    def own(self, places: Mapping[tuple[int, int], Place]) -> dict[tuple[int, int], Place]:
        """The places of this rank's lanes; the rank does not learn how the lanes of others advance."""
        own = {name for worker in range(self.layout.workers) for name in self._lanes_of(worker)}
        return {name: place for name, place in places.items() if name in own}

    def __iter__(self) -> Iterator[LoadedBatch]:
        worker, workers = this_worker()
        skips = Skips(limit=self.allowed.samples)
        epoch = -1
        readers: dict[tuple[int, int], LaneReader] = {}
        for turn in count(self.start.epoch * self.steps + self.start.step + worker, workers):
            if turn // self.steps != epoch:
                epoch, readers = turn // self.steps, {}
            try:
                batch, places = self._batch(turn % self.steps, epoch, readers, skips)
            except (NothingUsable, WrongRow) as error:
                yield LoadedBatch(None, skips.take(), failure=error)
                return
            yield LoadedBatch(batch, skips.take(), places)

    def _batch(
        self, step: int, epoch: int, readers: dict[tuple[int, int], LaneReader], skips: Skips
    ) -> tuple[Batch, dict[tuple[int, int], Place]]:
        """The rank's part of the batch of ``step``, and the places of its lanes after it. Adds to ``readers``."""
        samples: list[Sample] = []
        places = {}
        for name, lane in self._lanes_of(step % self.layout.workers).items():
            if name not in readers:
                place = self.start.places.get(name, BEGIN) if epoch == self.start.epoch else BEGIN
                readers[name] = LaneReader(self, epoch, lane, place, skips)
            samples += readers[name].take(lane.share)
            places[name] = readers[name].place
            if step + self.layout.workers >= self.steps:
                readers[name].finish()
        return self._collate(samples), places

    def _lanes_of(self, worker: int) -> dict[tuple[int, int], Lane]:
        """This rank's lanes of a virtual worker, in the order of their samples in the batch."""
        if self.own_shards:
            return {(self.rank, worker): Lane(0, 1, worker, self.layout.workers, self.batch_size)}
        virtual = self.layout.ranks // self.ranks
        return {
            (p, worker): Lane(p, self.layout.ranks, worker, self.layout.workers, self.batch_size // virtual)
            for p in range(self.rank * virtual, (self.rank + 1) * virtual)
        }

    def _collate(self, samples: list[Sample]) -> Batch:
        shown, seeds = [sample.shown for sample in samples], [sample.seed for sample in samples]
        rows, names = [sample.row for sample in samples], [sample.name for sample in samples]
        texts, own = [sample.shown.text for sample in samples], [sample.text for sample in samples]
        references = [view for sample in samples if (view := sample.views.reference) is not None]
        return Batch(
            image=self._images.stack([sample.views.target for sample in samples]),
            text=self.tokens(texts, seeds),
            index=torch.tensor(rows),
            ref_image=self._ref_images.stack(references) if references else None,
            ref_text=None if self.ref_tokens is None else self.ref_tokens(texts, seeds),
            ref_features=self._features(samples, rows, own, names, shown),
        )

    def _features(
        self, samples: list[Sample], rows: list[int], own: list[str], names: list[str], shown: list[Shown]
    ) -> Tensor | None:
        if self.features is not None:
            return self.features(rows, own, names, shown)
        found = [sample.features for sample in samples if sample.features is not None]
        if not found:
            return None
        for name, features in zip(names, found, strict=True):
            if features.shape != found[0].shape:
                raise WrongRow(
                    f"--dataset_reinforcement: the embeddings of {names[0]} are {found[0].shape[1]} wide, and "
                    f"those of {name} {features.shape[1]}: give shards of the same teachers"
                )
        return torch.stack(found)


class LaneReader:
    """The decoded samples of one lane in one epoch; ``place`` is where it stands after the last one taken."""

    def __init__(self, stream: TrainStream, epoch: int, lane: Lane, place: Place, skips: Skips) -> None:
        self.place = place
        self._stream, self._epoch, self._lane, self._skips = stream, epoch, lane, skips
        self._items = stream.source.stream(epoch, lane, place, skips.limit)
        self._usable = self._barren = 0  # usable samples of this turn; turns in a row without any

    def take(self, n: int) -> list[Sample]:
        """The next ``n`` samples. NothingUsable, WrongRow: the data cannot be used."""
        samples: list[Sample] = []
        while len(samples) < n:
            if (sample := self._next()) is not None:
                samples.append(sample)
        return samples

    def finish(self) -> None:
        """At the end of the lane's epoch, count the bad samples that come before the next good one of the turn."""
        self._next()

    def _next(self) -> Sample | None:
        """The next good sample; None at the end of a turn."""
        for item in self._items:
            self.place = item.place
            self._skips.extend(item.faults)
            if item.sample is not None and (sample := self._decoded(item.sample)) is not None:
                return sample
            self._skips.check()
            if item.sample is None:
                self._end_turn()
                return None
        raise AssertionError("streams have no end")

    def _decoded(self, raw: RawSample) -> Sample | None:
        image = decode_or_skip(raw, self._skips, self._stream.view.decode)
        sample = None if image is None else self._sample(raw, image)
        if sample is not None:
            self._usable += 1
            self._skips.in_a_row = 0
        return sample

    def _sample(self, raw: RawSample, image: Tensor | Image.Image) -> Sample | None:
        stream = self._stream
        seed = sample_seed(stream.seed, self._epoch, raw.turn, raw.row)
        if stream.reinforcement is not None:
            return self._reinforced(stream.reinforcement, raw, image, seed)
        number, of_view = 0, seed
        if stream.features is not None and stream.features.views is not None:
            number, of_view = stream.features.views.draw(stream.seed, self._epoch, raw.turn, raw.row)
        caption, text = self._caption(raw, seed)
        shown = Shown(text, caption, number)
        return Sample(stream.view(image, of_view), shown, raw.text[:LONGEST_TEXT], raw.row, seed, raw.name)

    def _reinforced(
        self, reinforcement: Reinforcement, raw: RawSample, image: Tensor | Image.Image, seed: int
    ) -> Sample | None:
        """The sample with what its shard holds for it; None where that cannot be used, which is counted."""
        view = self._stream.view
        try:
            found = reinforcement(raw, self._stream.seed, self._epoch, seed)
            seen = view(image, seed).target if found.view is None else view.replay(image, found.view)
        except Unusable as fault:
            self._skips.add(str(fault), raw.name, fault.why)
            return None
        shown = Shown(found.text[:LONGEST_TEXT])
        return Sample(Views(seen, None), shown, raw.text, raw.row, seed, raw.name, found.features)

    def _caption(self, raw: RawSample, seed: int) -> tuple[int, str]:
        """The caption for this use of a sample, of those that it has: its number and itself."""
        stream = self._stream
        # Of a sample's own captions, stored features have the first.
        own = (raw.text, *raw.more) if stream.features is None else (raw.text,)
        texts = [text[:LONGEST_TEXT] for text in own]
        if stream.captions is not None:
            return stream.captions.draw(raw.row, texts, raw.name, seed)
        number = caption_number(seed, len(texts), 0)
        return number, texts[number]

    def _end_turn(self) -> None:
        self._usable, self._barren = 0, 0 if self._usable else self._barren + 1
        if self._barren > self._lane.lanes + _EMPTY_TURNS:
            raise NothingUsable(
                f"--train-data: it contains no usable sample; left out: {self._skips}. {REPAIR}, or correct the "
                "path"
            )


def decode_or_skip(raw: RawSample, skips: Skips, decoder: Callable[..., T]) -> T | None:
    """What ``decoder`` returns for the image of ``raw``; None where it fails, which is counted in ``skips``."""
    try:
        if not isinstance(raw.image, Image.Image):
            check_size(raw.image)
        return decoder(raw.image)
    except Unusable as fault:
        skips.add(str(fault), raw.name)
        return None
    except Exception as error:  # a decoder may raise any exception on a broken file
        skips.add("undecodable image", f"{raw.name}: {_why_undecodable(raw, error)}")
        return None


def _why_undecodable(raw: RawSample, error: Exception) -> str:
    if not isinstance(raw.image, bytes) or not isinstance(error, UnidentifiedImageError):
        return str(error)
    return f"its format is not known, it begins with {raw.image[:16]!r}" if raw.image else "it is empty"


def this_worker() -> tuple[int, int]:
    """(number of this loader process, number of loader processes); (0, 1) in the run's own process."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
