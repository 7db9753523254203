"""From the batches that loader processes prepare to batches on the device.

The W processes of a rank (``stream``) prepare its batches in turn. A rank yields exactly ``steps_per_epoch``
full batches per epoch, as many as every other rank. With each batch comes where its lanes then stand, so that the
stream can be taken up behind any batch (``TrainData.state_dict``, ``resume``).

The processes run through the epochs without stopping, so an epoch does not begin with empty queues.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, IterableDataset

from drrho_clip.batch import Batch
from training.data.bad_samples import SkipLog
from training.data.batch_memory import PREFETCH, ReceivedMemory
from training.data.lanes import Layout
from training.data.progress import Identity, Progress, pack, unpack
from training.data.worker import LoadedBatch, TrainStream
from training.distributed.collectives import gather_object
from training.distributed.signals import end_with_trainer, leave_to_trainer

T = TypeVar("T")

log = logging.getLogger(__name__)


class TrainData:
    """The training data of one rank.

    ``steps_per_epoch`` batches of this rank's ``batch_size`` make an epoch; ``samples_per_epoch`` counts the
    places in all ranks' batches. ``fixed``: the user asked for these lanes, whatever a checkpoint says.
    """

    def __init__(
        self, stream: TrainStream, *, world_size: int, workers: int, device: torch.device, fixed: bool = False
    ) -> None:
        self.steps_per_epoch = stream.steps
        self.samples_per_epoch = stream.steps * stream.batch_size * world_size
        self.skips = SkipLog(stream.allowed)
        self._stream, self._device, self._fixed = stream, device, fixed
        self._world_size, self._workers = world_size, workers
        self._loader = open_loader(stream, workers, device, stream.seed)
        self._must_copy = workers > 0 and device.type != "cuda"  # there page-locked memory is a copy
        self._chunks: Iterator[LoadedBatch] | None = None
        self._fetched = (0, 0)  # the epoch and step that the next chunk is for
        self._progress = Progress()  # behind the last batch handed out

    def epoch(self, epoch: int, step: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from ``step`` on, on the device (``index`` on the CPU).

        From where the last batch or ``resume`` left off they go on. Anywhere else they begin the epoch's order
        anew, and ``step`` only says how many are left.
        NothingUsable: the data holds no usable sample, or far too many bad ones in a row; TooManyBad, WrongRow.
        """
        if (self._progress.epoch, self._progress.step) != (epoch, step):
            self._progress = Progress(epoch, step)
        if self._chunks is None or self._fetched != (epoch, step):
            self.close()
            self._stream.start = replace(self._progress, places=dict(self._progress.places))
            self._fetched = (epoch, step)
            self._chunks = self._start()
        arrived: deque[LoadedBatch] = deque()
        for batch in prefetch(self._fetch(arrived), self._device):
            chunk = arrived.popleft()
            self.skips.update(chunk.skips, len(batch))
            places = self._progress.places | chunk.places
            done = self._progress.step + 1
            whole = done == self.steps_per_epoch
            self._progress = Progress(epoch + 1) if whole else Progress(epoch, done, places)
            yield batch

    def close(self) -> None:
        """End the loader processes."""
        self._chunks = None  # nobody else holds it

    def _start(self) -> Iterator[LoadedBatch]:
        _loading.add(self)
        chunks = iter(self._loader)
        return _copies(chunks, self._workers) if self._must_copy else chunks

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, of all ranks, in plain values. Collective."""
        return pack(self._identity(), gather_object(self._progress))

    def resume(self, state: Mapping[str, Any] | None, epoch: int, step: int) -> int:
        """Go on ``step`` steps into ``epoch``, where ``state`` was kept; the step to go on with, usually the same.

        Takes over the run's lanes. Where they do not fit, or the order is another one, the run goes on all the
        same, and the log says what is different.
        """
        held = state or {}
        self._take_over(held)
        difference = self._identity().difference(held)
        if step and difference:
            old, new = held.get("global_batch", self._identity().global_batch), self._identity().global_batch
            step = min(step * old // new, self.steps_per_epoch - 1)
            log.warning(
                "the checkpoint was saved inside epoch %d, whose order was another one: %s. The epoch's last %d "
                "steps take the present order from its beginning, so some samples come twice in this epoch and "
                "others not at all; the next epochs are whole",
                *(epoch, difference, self.steps_per_epoch - step),
            )
        elif held and difference:
            log.warning("from here on samples come in another order than the checkpoint's run had: %s", difference)
        places = {} if difference or not step else self._stream.own(unpack(held).places)
        self._progress = Progress(epoch, step, places)
        self.close()
        return step

    def _take_over(self, held: Mapping[str, Any]) -> None:
        """Use the lanes of a checkpoint, if this launch can."""
        if "lanes" not in held or self._fixed:
            return
        layout, stream = Layout(*held["lanes"]), self._stream
        misfit = layout.misfit(self._world_size, self._workers, self._identity().global_batch)
        if stream.own_shards and layout.ranks != self._world_size:
            misfit = f"{self._world_size} ranks cannot read the shards of {layout.ranks}"
        if misfit:
            log.warning(
                "the run's lanes %s do not fit: %s. From here on it has the lanes %s: its batches are not those "
                "that it would have had without the change, and batches before and after are of two orders",
                *(layout, misfit, stream.layout),
            )
        elif layout != stream.layout:
            stream.layout = layout
            log.info("lanes of the run: %s; %s", layout, stream.source.describe(stream.lanes))

    def _identity(self) -> Identity:
        s = self._stream
        return Identity(s.layout, s.seed, s.steps, s.batch_size * self._world_size, s.source.identity())

    def _fetch(self, arrived: deque[LoadedBatch]) -> Iterator[Batch]:
        epoch, start = self._fetched
        for step in range(start, self.steps_per_epoch):
            assert self._chunks is not None, "``epoch`` starts the processes"
            chunk = next(self._chunks)
            if chunk.failure is not None:
                self.close()
                raise type(chunk.failure)(str(chunk.failure))  # one that ``chunk``, here, does not hold
            assert chunk.batch is not None, "a chunk without a batch says why"
            self._fetched = (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)
            arrived.append(replace(chunk, batch=None))
            yield chunk.batch


def prefetch(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """``batches`` on ``device``.

    On a GPU the next batch is copied from pinned memory beside the computation on the last one.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    copies = torch.cuda.Stream(device)
    ahead: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            arriving = batch.to(device)
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


def open_loader(stream: IterableDataset[T], workers: int, device: torch.device, seed: int = 0) -> DataLoader[T]:
    """What ``stream`` yields in ``workers`` processes, in page-locked memory on the way to a GPU.

    The processes end with this one, and leave to it what a launcher's signals ask for.
    """
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(seed),  # else it would draw from the run's generator
    )


def _copies(chunks: Iterator[LoadedBatch], workers: int) -> Iterator[LoadedBatch]:
    """Chunks in memory of this process. The received ones are held on to, so that their blocks stay mapped."""
    held: deque[LoadedBatch] = deque(maxlen=workers * (PREFETCH + 1))
    memory, ref_memory = ReceivedMemory(), ReceivedMemory()
    for chunk in chunks:
        held.append(chunk)
        yield chunk.copy(memory, ref_memory)


_loading: WeakSet[TrainData] = WeakSet()


@atexit.register
def _end_processes() -> None:
    """At the program's end, before multiprocessing waits for processes that leave its signal to the trainer."""
    for data in list(_loading):
        data.close()


def _start_worker(_: int) -> None:
    leave_to_trainer()
    end_with_trainer()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is parallel enough
