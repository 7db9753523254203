"""The run that goes through the training data once and stores what a frozen model computes for each sample.

The unit of work is a training shard (for a csv file, a block of rows). Job ``--cache_rank`` of
``--cache_group_size`` has one stretch of the list. Those units of it that are not in the store yet are dealt to
the job's ranks, and a rank's loader processes take units in turn. Ranks write parts of whole units as
they proceed (see ``row_store``). What an interrupted run has written is kept, and the next run, on any number of
ranks, writes the rest.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from training.cache import producers
from training.cache.captions import Captions
from training.cache.producers import Work
from training.cache.row_store import PartValues, StoreWriter, caption_checksum
from training.config.params import Config
from training.data.bad_samples import Skips, WrongRow, usable
from training.data.build import open_table
from training.data.lanes import Part
from training.data.loader import open_loader
from training.data.samples import CaptionSource, RawSample
from training.data.sources.fields import SampleFields
from training.data.sources.shards import Shard
from training.data.sources.tables import CsvSource
from training.data.sources.webdataset import ShardSource, open_shards
from training.data.tokenizer import Tokenizer
from training.data.transforms import KeptViews
from training.data.worker import LONGEST_TEXT, decode_or_skip, this_worker
from training.distributed import collectives
from training.distributed.process_group import World
from training.logger import ProgressBar, RunLog

log = logging.getLogger(__name__)

BLOCK = 512  # rows of a csv file that are one unit of work
PART_BYTES = 2**28
PART_SECONDS = 600.0  # captions have so few bytes that 256 MB of them are the work of an hour
MEET_SECONDS = 300.0  # between two exchanges of the ranks, in which one may wait for the others two hours at most
UNREADABLE = "unreadable shard"  # as ``shards.read_shard`` reports it
# The row of a table is wrong, or its picture is gone. Other errors are of the machine, and may pass.
_NO_PICTURE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


class ShardUnit(NamedTuple):
    """One piece of the data: a ``shard``."""

    number: int
    name: str
    shard: Shard
    sample_index: str
    fields: SampleFields

    def read(self, skips: Skips) -> Iterator[RawSample]:
        """Its samples, each once; its faults are counted in ``skips``."""
        source = ShardSource([self.shard], 0, sample_index=self.sample_index, fields=self.fields)
        return usable(source.in_order(Part(0, 1)), skips)


class TableUnit(NamedTuple):
    """One piece of the data: the rows ``first`` to ``stop`` of a ``table``.

    ``allowed``: the largest share of them whose pictures may be missing.
    """

    number: int
    name: str
    table: CsvSource
    first: int
    stop: int
    allowed: float

    def read(self, skips: Skips) -> Iterator[RawSample]:
        """Its samples, each once; pictures that cannot be read are counted in ``skips``.

        So is the unit itself, where they may be there again when the next run reads it: too many are missing, as
        when a file system is not mounted, or one is there and cannot be read.
        """
        missing, problem = 0, ""
        for row in range(self.first, self.stop):
            sample = self.table.sample(row, 0)
            try:
                with open(self.table.images[row], "rb") as file:
                    picture = file.read()
            except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
                skips.add("undecodable image", sample.name, str(error))
                if isinstance(error, OSError) and error.errno not in _NO_PICTURE:
                    problem = problem or f"a picture cannot be read ({error})"
                else:
                    missing += 1
                continue
            yield sample._replace(image=picture)
        rows = self.stop - self.first
        if not problem and self.allowed < 1 and missing > self.allowed * rows:
            problem = (
                f"{missing} of {rows} pictures are not there, more than --max_bad_fraction {self.allowed:g}: "
                "raise it if they are gone for good"
            )
        if problem:
            skips.add(UNREADABLE, self.name, problem)


Unit = ShardUnit | TableUnit


def write(
    config: Config,
    world: World,
    run_log: RunLog,
    table: CsvSource | None = None,
    synthetic: Captions | None = None,
) -> None:
    """Write what is missing. ValueError: the store has other values; at the end, shards that cannot be read.

    ``table``: the csv files of ``--train-data``, where they have been read already. ``synthetic``: captions that
    the reference reads beside the samples' own.
    """
    asked, cache = producers.job(config, world, synthetic), config.cache
    units = _stretch(_units(config, world, table), cache.cache_rank, cache.cache_group_size)
    writer = StoreWriter(Path(asked.folder), asked.kind, asked.identity)
    missing = collectives.on_main(lambda: _missing(units, writer))
    run_log.info(f"writing {writer.kind} of {len(missing)} of {len(units)} shards to {writer.folder}")
    failed: list[str] = []
    left_out = Skips()
    if missing:
        work = asked.begin()
        with run_log.progress(
            -(-len(missing) // world.world_size), f"writing {writer.kind}", unit="shards"
        ) as bar:
            mine = _stretch(missing, world.rank, world.world_size)
            written = _write_units(mine, work, writer, config, world, bar)
            for names, skips in collectives.gather_object(written):
                failed += names
                left_out.merge(skips)
    rows = collectives.on_main(lambda: _index(writer, {unit.number for unit in missing}, failed))
    run_log.info(f"{writer.folder} contains {writer.kind} of {rows:,} samples")
    if failed:
        raise ValueError(
            f"--train-data: {len(failed)} of {len(missing)} shards cannot be read, the first is {failed[0]}; all "
            f"others are written; left out: {left_out}. Repair the unreadable ones and run the same command again"
        )


def _index(writer: StoreWriter, wanted: set[int], failed: Sequence[str]) -> int:
    """Make the store readable. Returns its number of rows.

    ValueError: shards that other ranks have written are missing, or the store has no rows.
    """
    rows = writer.index()
    lost = len(wanted - writer.done().keys()) - len(failed)
    if lost > 0:
        raise ValueError(
            f"{writer.folder}: {lost} of {len(wanted)} shards are missing, though other ranks have written them: "
            "give a folder that all nodes share"
        )
    if not rows and not failed:
        raise ValueError(
            "--train-data: it contains no usable sample; run python -m training.check_data to see why"
        )
    return rows


def _units(config: Config, world: World, table: CsvSource | None) -> list[Unit]:
    """All of the training data, in units. All ranks call it together."""
    if config.data.dataset_type == "webdataset":
        settings = replace(config.data, epoch_policy="wrap", train_num_samples=1)
        source = open_shards(settings, config.run.seed, world, steps=1)
        names = [shard.url.rsplit("/", 1)[-1] for shard in source.shards]
        return [
            ShardUnit(i, name, shard, settings.sample_index, source.fields)
            for i, (name, shard) in enumerate(zip(names, source.shards, strict=True))
        ]
    table = table or open_table(config)
    cuts = [(first, min(first + BLOCK, table.samples)) for first in range(0, table.samples, BLOCK)]
    allowed = config.data.max_bad_fraction
    return [TableUnit(i, f"rows {a}-{b - 1}", table, a, b, allowed) for i, (a, b) in enumerate(cuts)]


def _missing(units: Sequence[Unit], writer: StoreWriter) -> list[Unit]:
    """The units that are not in the store. ValueError: it has other values, or shards of another list."""
    done = writer.done()
    for unit in units:
        if done.get(unit.number, unit.name) != unit.name:
            raise ValueError(
                f"{writer.folder}: shard number {unit.number} is {done[unit.number]} there, and {unit.name} in "
                "--train-data: give the list that the folder was begun with (new shards at its end), or another "
                "folder"
            )
    return [unit for unit in units if unit.number not in done]


def _stretch(units: Sequence[Unit], number: int, count: int) -> Sequence[Unit]:
    """Part ``number`` of ``count`` of a list."""
    return units[number * len(units) // count : (number + 1) * len(units) // count]


def _write_units(
    units: Sequence[Unit], work: Work, writer: StoreWriter, config: Config, world: World, bar: ProgressBar
) -> tuple[list[str], Skips]:
    """Process ``units`` and write parts. Returns the names of those that cannot be read, and all that is left out.

    It returns when all ranks are done. They exchange now and then who is: those that are done would otherwise wait
    for the slowest one longer than a collective may take.
    """
    workers = min(config.data.workers, len(units))
    stream = CacheStream(units, work.views, work.tokenizer, config.run.batch_size, work.captions)
    loader = open_loader(stream, workers, world.device)
    pending, skips = _Pending(writer, {unit.number: unit.name for unit in units}, work.pack), Skips()
    met = time.monotonic()
    for chunk in loader:
        if chunk.wrong is not None:
            raise WrongRow(str(chunk.wrong))
        values = {}
        if chunk.images is not None:
            texts = None if chunk.texts is None else chunk.texts.to(world.device, non_blocking=True)
            images = chunk.images.to(world.device, non_blocking=True)
            values = work(images, texts, chunk.rows)
        pending.add(chunk, values)
        skips.merge(chunk.skips)
        bar.update(len(chunk.ended) + len(chunk.failed))
        if time.monotonic() - met >= MEET_SECONDS:
            collectives.gather_object(False)
            met = time.monotonic()
    pending.write()
    if skips.counts:
        log.warning("samples left out: %s", skips)
    while not all(collectives.gather_object(True)):
        pass
    return [pending.names[number] for number in sorted(pending.failed)], skips


# ---------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class CacheBatch:
    """Samples from one loader process: ``units`` and ``rows`` [n], ``checksums`` of their captions [n, captions].

    ``images`` [n, views, 3, H, W] and ``texts`` [n, captions, L] are None where n is 0. The units in ``ended``
    have no more samples; those in ``failed`` could not be read to their end. ``wrong`` is the reason why the batch
    is empty and no further one follows.
    """

    images: Tensor | None
    texts: Tensor | None
    units: np.ndarray
    rows: np.ndarray
    checksums: np.ndarray
    ended: list[int]
    failed: list[int]
    skips: Skips
    wrong: WrongRow | None = None

    def pin_memory(self) -> CacheBatch:
        """A copy in page-locked memory; ``DataLoader`` calls this method by its name."""
        pinned = {name: getattr(self, name) for name in ("images", "texts")}
        return replace(self, **{name: t.pin_memory() for name, t in pinned.items() if t is not None})


class CacheStream(IterableDataset[CacheBatch]):
    """The samples of ``units``, each once, in batches of ``batch_size`` views that may span several units.

    ``captions``: synthetic ones, which stand behind the samples' own.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        views: KeptViews,
        tokenizer: Tokenizer | None,
        batch_size: int,
        captions: CaptionSource | None = None,
    ) -> None:
        self.units, self.views, self.tokenizer, self.captions = units, views, tokenizer, captions
        self.batch_size = max(batch_size // max(views.count, 1), 1)

    def __iter__(self) -> Iterator[CacheBatch]:
        try:
            yield from self._batches()
        except WrongRow as error:
            yield replace(self._chunk([], [], [], Skips()), wrong=error)

    def _batches(self) -> Iterator[CacheBatch]:
        worker, workers = this_worker()
        samples: list[tuple[int, RawSample, Tensor]] = []
        ended: list[int] = []
        for unit in self.units[worker::workers]:
            skips = Skips()
            for raw in unit.read(skips):
                image = decode_or_skip(raw, skips, self.views.decode)
                if image is not None:
                    samples.append((unit.number, raw, self.views(image, raw.row)))
                if len(samples) == self.batch_size:
                    yield self._chunk(samples, ended, [], Skips())
                    samples, ended = [], []
            failed = [unit.number] if skips.counts[UNREADABLE] else []
            ended += [] if failed else [unit.number]
            if failed or skips.counts:
                yield self._chunk(samples, ended, failed, skips)
                samples, ended = [], []
        yield self._chunk(samples, ended, [], Skips())

    def _chunk(
        self, samples: list[tuple[int, RawSample, Tensor]], ended: list[int], failed: list[int], skips: Skips
    ) -> CacheBatch:
        texts = [self._texts(raw) for _, raw, _ in samples]
        tokens = None
        if samples and self.tokenizer:
            tokens = self.tokenizer([text for of_sample in texts for text in of_sample])
            tokens = tokens.view(len(samples), -1, tokens.shape[-1])
        checksums = [[caption_checksum(text) for text in of_sample] for of_sample in texts]
        return CacheBatch(
            torch.stack([image for *_, image in samples]) if samples else None,
            tokens,
            np.array([unit for unit, *_ in samples], np.int64),
            np.array([raw.row for _, raw, _ in samples], np.int64),
            np.array(checksums, np.uint32),
            ended,
            failed,
            skips,
        )

    def _texts(self, raw: RawSample) -> list[str]:
        """The captions of a sample that are embedded."""
        own = raw.text[:LONGEST_TEXT]
        return [own] if self.captions is None else [own, *self.captions.written(raw.row, own, raw.name)]


class _Pending:
    """Values of a rank that are not written yet, unit by unit; ``names`` of the units by number.

    ``pack`` turns a part's values, with the checksums of its captions, into what is stored.
    """

    def __init__(
        self,
        writer: StoreWriter,
        names: dict[int, str],
        pack: Callable[[dict[str, np.ndarray], np.ndarray], PartValues],
    ) -> None:
        self.writer, self.names, self.pack = writer, names, pack
        self.failed: set[int] = set()
        self._ended: set[int] = set()
        self._held: dict[int, list[dict[str, np.ndarray]]] = defaultdict(list)
        self._bytes = 0
        self._written = time.monotonic()

    def add(self, chunk: CacheBatch, values: dict[str, np.ndarray]) -> None:
        """Add a chunk's values, and write a part if there are enough for one, or it is time for one."""
        columns = {"rows": chunk.rows, "checksums": chunk.checksums, **values}
        for unit in np.unique(chunk.units).tolist():
            mine = chunk.units == unit
            self._held[unit].append({name: column[mine] for name, column in columns.items()})
        self._ended.update(chunk.ended)
        self.failed.update(chunk.failed)
        for unit in chunk.failed:
            self._held.pop(unit, None)
        self._bytes += sum(value.nbytes for value in values.values())
        if self._bytes >= PART_BYTES or time.monotonic() - self._written >= PART_SECONDS:
            self.write()

    def write(self) -> None:
        """Write a part with the units that have ended; the values of the others are kept."""
        if not self._ended:
            return
        nothing: dict[str, np.ndarray] = {"rows": np.empty(0, np.int64), "checksums": np.empty((0, 1), np.uint32)}
        pieces = [piece for unit in sorted(self._ended) for piece in self._held.pop(unit, ())] or [nothing]
        columns = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        _, first = np.unique(columns["rows"], return_index=True)
        if repeated := len(columns["rows"]) - len(first):
            log.warning("%d samples have the row of another one; only the first of each row is kept", repeated)
        columns = {name: column[first] for name, column in columns.items()}
        rows, checksums = columns.pop("rows"), columns.pop("checksums")
        part = self.pack(columns, checksums) if columns else PartValues({})
        self.writer.write(
            [(unit, self.names[unit]) for unit in self._ended],
            rows,
            checksums[:, 0],
            constants=part.constants,
            facts=part.facts,
            **part.values,
        )
        self._ended.clear()
        self._written = time.monotonic()
        held = (value.nbytes for pieces in self._held.values() for piece in pieces for value in piece.values())
        self._bytes = sum(held)
