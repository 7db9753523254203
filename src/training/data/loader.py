"""From the batches that loader processes prepare to batches on the device.

The W processes of a rank (see ``worker``) prepare its batches in turn. A rank yields exactly ``steps_per_epoch``
full batches per epoch, as many as every other rank. Each batch comes with the places of its lanes after it, so
that the stream can be resumed after any batch (``TrainData.state_dict``, ``resume``).

The processes run through the epochs without stopping, so that an epoch does not begin with empty queues.
"""

from __future__ import annotations

import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset

from drrho_clip.batch import Batch
from training.data.bad_samples import SkipLog, Skips
from training.data.batch_memory import BLOCKS, PREFETCH, ReceivedMemory
from training.data.lanes import Layout
from training.data.progress import Identity, Progress, pack, unpack
from training.data.worker import LoadedBatch, TrainStream
from training.distributed.collectives import gather_object
from training.distributed.loader_processes import Batches, Loader, start_method, start_worker

T = TypeVar("T")
Announce = Callable[[torch.Tensor], None]

log = logging.getLogger(__name__)


class TrainData:
    """The training data of one rank.

    An epoch has ``steps_per_epoch`` batches of this rank's ``batch_size``; ``samples_per_epoch`` is the number of
    samples in the batches of all ranks. ``fixed``: the user asked for these lanes, so a checkpoint's are not used.
    ``bounds``: the rows at which shards begin and end, where rows go by position in the list of shards.
    ``announce`` is called with the ``index`` of each batch once it is known, on a GPU a step before it comes.
    """

    def __init__(
        self,
        stream: TrainStream,
        *,
        world_size: int,
        workers: int,
        device: torch.device,
        fixed: bool = False,
        bounds: Sequence[int] = (),
    ) -> None:
        self.steps_per_epoch = stream.steps
        self.samples_per_epoch = stream.steps * stream.batch_size * world_size
        self.skips = SkipLog(stream.allowed)
        self._stream, self._device, self._fixed, self._bounds = stream, device, fixed, list(bounds)
        self._world_size, self._workers = world_size, workers
        self._loader = open_loader(stream, workers, device, stream.seed)
        self._must_copy = workers > 0 and device.type != "cuda"  # on a GPU page-locked memory is a copy
        self._processes: Batches[LoadedBatch] | None = None
        self._chunks: Iterator[LoadedBatch] | None = None
        self._fetched = (0, 0)  # the epoch and step that the next chunk is for
        self.announce: Announce = lambda index: None
        self._progress = Progress()  # after the last batch handed out

    @property
    def parts(self) -> int:
        """The virtual ranks of this rank: a batch has the same number of samples of each, one after another."""
        return self._stream.layout.ranks // self._world_size

    def epoch(self, epoch: int, step: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch`` from ``step`` on, on the device (``index`` on the CPU).

        If the last batch or ``resume`` ended at this step, the order continues there. Otherwise the order of the
        epoch starts at its beginning, and ``step`` only determines how many batches are left.
        NothingUsable: the data has no usable sample, or far too many bad ones in a row; TooManyBad, WrongRow.
        """
        if (self._progress.epoch, self._progress.step) != (epoch, step):
            self._progress = Progress(epoch, step)
        if self._chunks is None or self._fetched != (epoch, step):
            self.close()
            self._stream.start = replace(self._progress, places=dict(self._progress.places))
            self._fetched = (epoch, step)
            self._chunks = self._start()
        arrived: deque[LoadedBatch] = deque()
        for batch in prefetch(self._fetch(arrived), self._device, self.announce):
            chunk = arrived.popleft()
            self.skips.update(chunk.skips, len(batch))
            places = self._progress.places | chunk.places
            done = self._progress.step + 1
            whole = done == self.steps_per_epoch
            self._progress = Progress(epoch + 1) if whole else Progress(epoch, done, places)
            yield batch

    def close(self) -> None:
        """End the loader processes."""
        if self._processes is not None:
            self._processes.end()
        self._processes = self._chunks = None

    def _start(self) -> Iterator[LoadedBatch]:
        self._processes = iter(self._loader)
        return _copies(self._processes, self._workers) if self._must_copy else self._processes

    def state_dict(self) -> dict[str, Any]:
        """Where the streams of all ranks stand, and what they have left out of this epoch, in plain values.

        Collective.
        """
        parts = gather_object((self._progress, self.skips.epoch))
        state = pack(self._identity(), [progress for progress, _ in parts])
        if self._progress.step:  # the counts of an epoch that has ended are reported by this launch
            left_out = Skips()
            for _, skips in parts:
                left_out.merge(skips)
            state["skips"] = left_out.held()
        return state | ({"bounds": self._bounds} if self._bounds else {})

    def check_rows(self, state: Mapping[str, Any] | None) -> None:
        """ValueError: rows of the run that saved ``state`` belong to other samples now. Shards may be appended.

        Earlier versions did not keep where shards begin, so that nothing is compared with their states.
        """
        then = (state or {}).get("bounds")
        if not then or set(then) <= set(self._bounds):
            return
        if not self._bounds:
            raise ValueError(
                "--sample_index: the checkpoint's rows of the sample state go by position in the list of shards, "
                "and this run's do not, so they belong to other samples; give --sample_index position"
            )
        row = min(set(then) - set(self._bounds))
        raise ValueError(
            f"--sample_index position: in the checkpoint's run a shard began or ended at row {row}, and now none "
            "does, so later rows of the sample state belong to other samples; use the shards with which the run "
            "began, in their order (others may be appended), or begin a new run, to which --pretrained gives the "
            "checkpoint's weights"
        )

    def resume(self, state: Mapping[str, Any] | None, epoch: int, step: int) -> int:
        """Resume ``step`` steps into ``epoch``, where ``state`` was saved. Returns the step to resume at.

        This is usually ``step``. The lanes of the checkpoint are taken over. If they do not fit, or if the order
        of samples is a different one, the run continues nevertheless, and the log says what differs.
        """
        held = state or {}
        self._take_over(held)
        difference = self._identity().difference(held)
        if not difference and self._bounds and held.get("bounds", self._bounds) != self._bounds:
            difference = "samples per shard"
        if step and difference:
            old, new = held.get("global_batch", self._identity().global_batch), self._identity().global_batch
            step = min(step * old // new, self.steps_per_epoch - 1)
            log.warning(
                "the checkpoint was saved inside epoch %d, and the order of samples is different now: %s. The "
                "last %d steps of the epoch follow the new order from its beginning, so some samples come twice "
                "in this epoch and others not at all; the following epochs are complete",
                *(epoch, difference, self.steps_per_epoch - step),
            )
        elif held and difference:
            log.warning(
                "from here on, the order of samples differs from that of the checkpoint's run: %s", difference
            )
        places = {} if difference or not step else self._stream.own(unpack(held).places)
        self._progress = Progress(epoch, step, places)
        if step and "skips" in held and self._stream.rank == 0:  # counts are of all ranks; older files have none
            self.skips.epoch = Skips.of(held["skips"])
        self.close()
        return step

    def _take_over(self, held: Mapping[str, Any]) -> None:
        """Use the lanes of a checkpoint if they fit this launch."""
        if "lanes" not in held or self._fixed:
            return
        layout, stream = Layout(*held["lanes"]), self._stream
        misfit = layout.misfit(self._world_size, self._workers, self._identity().global_batch)
        if stream.own_shards and layout.ranks != self._world_size:
            misfit = f"with --skip_webdataset_split_by_node {self._world_size} ranks cannot replace {layout.ranks}"
        if misfit:
            log.warning(
                "the lanes %s of the checkpoint do not fit: %s. The run continues with the lanes %s: from here on "
                "its batches are not those that it would have had without the change, and follow another order",
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
                # A new error: the original would refer to this frame, and this frame refers to ``chunk``.
                raise type(chunk.failure)(str(chunk.failure))
            assert chunk.batch is not None, "a chunk without a batch has a failure"
            self._fetched = (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)
            arrived.append(replace(chunk, batch=None))
            yield chunk.batch


def prefetch(
    batches: Iterable[Batch], device: torch.device, announce: Announce = lambda index: None
) -> Iterator[Batch]:
    """``batches`` on ``device``. ``announce``: as in ``TrainData``.

    On a GPU the next batch is copied from page-locked memory during the computation on the last one.
    """
    if device.type != "cuda":
        for batch in batches:
            announce(batch.index)
            yield batch.to(device)
        return
    copies = _copy_stream(device)
    ahead: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            arriving = batch.to(device)
        announce(batch.index)
        if ahead is not None:
            yield ahead
        ahead = _hand_over(arriving, copies, device)
    if ahead is not None:
        yield ahead


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all epochs: the allocator keeps the memory that a stream has used for that stream."""
    return torch.cuda.Stream(device)


def _hand_over(batch: Batch, copies: torch.cuda.Stream, device: torch.device) -> Batch:
    """Make the current stream wait for the copies. Their memory is not reused before that stream has read them."""
    current = torch.cuda.current_stream(device)
    current.wait_stream(copies)
    for f in fields(batch):
        tensor = getattr(batch, f.name)
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(current)
    return batch


def open_loader(stream: IterableDataset[T], workers: int, device: torch.device, seed: int = 0) -> Loader[T]:
    """What ``stream`` yields in ``workers`` processes, in page-locked memory on the way to a GPU.

    The processes end with this one, and leave it to this one to react to a launcher's signals.
    """
    # The log has the same remark, with the number of cores that the job may use.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    return Loader(
        DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            prefetch_factor=PREFETCH if workers else None,
            worker_init_fn=start_worker,
            multiprocessing_context=start_method(workers),
            generator=torch.Generator().manual_seed(seed),  # otherwise it would draw from the run's generator
        )
    )


def _copies(chunks: Iterator[LoadedBatch], workers: int) -> Iterator[LoadedBatch]:
    """Chunks in memory of this process. The last ones received are kept, so that their blocks stay mapped."""
    held: deque[LoadedBatch] = deque(maxlen=workers * BLOCKS)
    memory, ref_memory = ReceivedMemory(), ReceivedMemory()
    for chunk in chunks:
        held.append(chunk)
        yield chunk.copy(memory, ref_memory)
