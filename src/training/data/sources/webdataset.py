"""Training samples from webdataset shards: tar files of ``NAME.jpg|jpeg|png|webp``, ``NAME.txt``, ``NAME.json``.

``paths`` finds the shards that ``--train-data`` names, ``shards`` reads them, ``fields`` finds image, caption and
key in a sample.

The order of an epoch (see ``order`` for lanes and turns):

- Every turn visits the shards in a random order, fixed by (seed, epoch, turn).
- Up to ``SPLIT_BY_SAMPLE`` samples per epoch, every lane reads all shards and decodes only its own samples,
  which are dealt one by one. An epoch of N samples then has each of N samples once, whatever the sizes of the
  shards, and the global batches do not even depend on the lanes. Reading is cheap compared with decoding at this
  size.
- Above that, the shards are dealt: each lane reads its own. Where lanes have unequal shares, one lane continues
  with its next turn while another does not finish; ``--epoch_policy exact`` counts the samples first and deals
  to each lane as many as it delivers.
- Samples are shuffled, undecoded, in windows of ``WINDOW``, by (seed, epoch, turn, lane, window). While a window
  is handed out, the next one is read, and its rows are announced: what is stored of them on disk can be fetched.
- With ``--epoch_policy resample`` each lane draws shards with replacement instead.

``rows`` describes which row a sample has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

from training.config.data import DataConfig
from training.data.bad_samples import Skips, WrongRow
from training.data.lanes import Lane, Part
from training.data.order import Piece, deal, deal_exactly
from training.data.progress import BEGIN, Place
from training.data.samples import Fault, Item, RawSample, Unusable
from training.data.sources import reinforcement
from training.data.sources.fields import DEFAULT, INCOMPLETE, SampleFields, fields_of
from training.data.sources.paths import expand_shards
from training.data.sources.rows import RowsMet, at_positions, check_sizes, count_all, nameless_row, with_rows
from training.data.sources.shards import (
    APART,
    UNREADABLE,
    Damage,
    Group,
    Shard,
    count_samples,
    read_shard,
    shown,
    where_the_rest_is,
)
from training.data.sources.urls import is_local
from training.distributed.collectives import on_main
from training.distributed.process_group import World
from training.rng import draws, permutation, seed_of

SPLIT_BY_SAMPLE = 2**15
WINDOW = 4096
SEARCH = 1.0  # seconds in which a shard is searched for the files that a sample lacks


class Visit(NamedTuple):
    """The samples of ``piece``, in a lane's list for a turn; ``turn`` distinguishes the visits of an epoch."""

    piece: Piece
    turn: int


_Where = tuple[int, int, int]  # of a sample: visit, position in the shard, offset in the tar


class Read(NamedTuple):
    """A sample, the ``faults`` that count with it, and (visit, position, offset) of the next sample."""

    sample: RawSample | None
    faults: list[Fault]
    next: _Where


_DELIVERED = Read(None, [], (0, 0, 0))  # in a window, instead of a sample that need not be kept any longer


class _Ahead:
    """Reads the next window sample by sample, while those of the present one are handed out.

    Else all lanes of all ranks would read a whole window at the same step. An error in what is read ahead is
    raised when the window is taken, as if it had been read then.
    """

    def __init__(self, reads: Iterator[Read]) -> None:
        self._reads = reads
        self._held: list[Read] = []
        self._error: Exception | None = None

    def read_one(self) -> None:
        """Read one more sample of the next window, if there is one."""
        try:
            self._held.extend(islice(self._reads, 1))
        except Exception as error:
            self._error = error

    def take(self, window: int) -> list[Read]:
        """The next ``window`` samples, fewer where they end."""
        if self._error is not None:
            raise self._error
        block, self._held = self._held, []
        block.extend(islice(self._reads, window - len(block)))
        return block


class ShardSource:
    """The stream of samples of a list of shards.

    ``sample_index``: 'key' or 'position'; None where the run keeps no rows, so that no key is needed.
    ``fields``: where a sample has its parts.
    ``weights``: one per shard, to draw shards with replacement; None to visit each shard once per turn.
    ``by_sample``: deal samples, not shards, to the lanes.
    ``bounds``: the rows at which shards begin and end, where rows go by position.
    ``sizes``: samples per shard, to deal as many as the ``steps`` of an epoch take, and none twice.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        seed: int,
        *,
        sample_index: str | None = "key",
        fields: SampleFields = DEFAULT,
        weights: Sequence[float] | None = None,
        by_sample: bool = False,
        sizes: Sequence[int] | None = None,
        steps: int = 0,
        bounds: Sequence[int] = (),
        window: int = WINDOW,
    ) -> None:
        self.shards = tuple(shards)
        self.seed, self.sample_index, self.window = seed, sample_index, window
        self.fields, self.known = fields, fields.known
        self.weights = None if weights is None else tuple(weights)
        self.by_sample = by_sample and weights is None
        self.sizes, self.steps, self.bounds = sizes, steps, tuple(bounds)
        self.announce: Callable[[int, int, int], None] | None = None
        self._rows = RowsMet()
        self._incomplete = 0  # samples that lack a part, since the process has begun

    def stream(self, epoch: int, lane: Lane, place: Place = BEGIN, limit: int = sys.maxsize) -> Iterator[Item]:
        """See ``samples.Source``."""
        while True:
            end = yield from self._turn(epoch, lane, place, limit)
            yield end
            place = end.place

    def describe(self, lanes: int) -> str:
        """See ``samples.Source``."""
        if self.weights:
            return f"{len(self.shards)} shards, drawn with replacement by each of {lanes} lanes"
        if self.by_sample:
            return f"{len(self.shards)} shards, read by all {lanes} lanes and dealt by sample"
        return f"{len(self.shards)} shards, {len(self.shards) / lanes:.4g} for each of {lanes} lanes"

    def identity(self) -> list[str | int]:
        """See ``samples.Source``. The folder of the shards is not part of it, so they may be moved."""
        names = seed_of(
            *"\n".join(shard.url.rsplit("/", 1)[-1] for shard in self.shards).encode(errors="surrogateescape")
        )
        kind = "drawn" if self.weights else "dealt by sample" if self.by_sample else "dealt"
        fields = [] if self.fields == DEFAULT else [repr(self.fields)]  # which samples there are depends on them
        # Equal weights are left out, as in checkpoints of earlier versions, which named no weights at all.
        unequal = len(set(self.weights or ())) > 1
        weights = [f"weights {seed_of(*repr(self.weights).encode())}"] if unequal else []
        return [
            kind,
            len(self.shards),
            names,
            self.window,
            *([self.steps] if self.sizes else []),
            *fields,
            *weights,
        ]

    def in_order(self, part: Part) -> Iterator[Item]:
        """Sample ``part.number`` and every ``part.parts``-th sample after it, once, in the order of the list."""
        visits = [Visit(Piece(number), 0) for number in range(len(self.shards))]
        for position, (sample, faults, _) in enumerate(self._samples(visits)):
            if part.owns(position):
                yield Item(sample, faults=faults)

    def count(self) -> int:
        """The number of samples; a shard that cannot be read counts as none."""
        total = 0
        for shard in self.shards:
            with suppress(*UNREADABLE):
                total += count_samples(shard.url, self.known)
        return total

    def _turn(self, epoch: int, lane: Lane, place: Place, limit: int) -> Generator[Item, None, Item]:
        """The rest of a turn from ``place`` on. Returns the item that ends the turn."""
        key = (self.seed, epoch, place.turn) if self.by_sample else (self.seed, epoch, place.turn, lane.number)
        shared = lane if self.by_sample else None
        ahead = _Ahead(self._announced(self._samples(self._visits(epoch, place.turn, lane), place, limit), epoch))
        while True:
            block = ahead.take(self.window)
            if not block or block[0].sample is None:
                faults = block[0].faults if block and (shared is None or shared.owns(0)) else ()
                return Item(None, Place(turn=place.turn + 1, before=place.before), faults)
            after = Place(place.turn, place.window + 1, place.before + len(block), *block[-1].next)
            for taken, i in enumerate(permutation(len(block), *key, place.window).tolist()):
                read, block[i] = block[i], _DELIVERED
                if taken < place.taken:
                    continue
                ahead.read_one()
                if shared and not shared.owns(place.before + taken):
                    continue
                place_after = place._replace(taken=taken + 1) if taken + 1 < len(block) else after
                yield Item(read.sample, place_after, read.faults)
            place = after

    def _announced(self, reads: Iterator[Read], epoch: int) -> Iterator[Read]:
        """``reads``, whose rows are announced; not those of sets that are so small that all lanes read all."""
        if self.announce is None or self.by_sample:
            yield from reads
            return
        for read in reads:
            if read.sample is not None:
                self.announce(read.sample.row, epoch, read.sample.turn)
            yield read

    def _visits(self, epoch: int, turn: int, lane: Lane) -> list[Visit]:
        """What the lane reads in a turn, in this order."""
        key = (self.seed, epoch, turn)
        if self.weights:
            n = max(len(self.shards) // lane.lanes, 1)
            drawn = draws(n, self.weights, *key, lane.number)
            return [Visit(Piece(shard), turn * n + i) for i, shard in enumerate(drawn)]
        shards = permutation(len(self.shards), *key)
        if self.by_sample:
            return [Visit(Piece(shard), turn) for shard in shards]
        if self.sizes is None:
            return [Visit(piece, turn) for piece in deal(shards, lane)]
        return [Visit(piece, turn) for piece in deal_exactly(shards, self.sizes, lane, self.steps)]

    def _samples(self, visits: Sequence[Visit], place: Place = BEGIN, limit: int = sys.maxsize) -> Iterator[Read]:
        """The usable samples from ``place`` on, each with the faults up to the next one.

        The first sample also has the faults before it. If there is no sample, the only ``Read`` has None for it.
        NothingUsable: more than ``limit`` faults in a row.
        """
        sample: RawSample | None = None
        faults: list[Fault] = []
        for found in self._found(visits, place):
            if isinstance(found, Fault):
                faults.append(found)
                if len(faults) > limit:
                    skips = Skips(limit=limit)
                    skips.extend(faults)
                    skips.check()
                continue
            following, where = found
            if sample is not None:
                yield Read(sample, faults, where)
                faults = []
            sample = following
        yield Read(sample, faults, (len(visits), 0, 0))

    def _found(self, visits: Sequence[Visit], place: Place) -> Iterator[Fault | tuple[RawSample, _Where]]:
        """The samples from ``place`` on, each with its (visit, position, offset), and between them the faults."""
        for number in range(place.visit, len(visits)):
            piece, turn = visits[number]
            url = self.shards[piece.shard].url
            start = (place.position, place.offset) if number == place.visit else (0, 0)
            incomplete: set[str] = set()
            for found in read_shard(url, *start, known=self.known):
                if piece.ends_before(found.position):
                    break
                if not piece.holds(found.position):
                    continue
                if isinstance(found, Damage):
                    yield found.fault
                    continue
                try:
                    yield self._parse(found, piece.shard, turn), (number, found.position, found.offset)
                except Unusable as fault:
                    why = fault.why
                    if str(fault) in INCOMPLETE:
                        lacks = str(fault).removeprefix("missing ")
                        why = self._where_the_rest_is(url, found.name, lacks, incomplete) or why
                    yield Fault(str(fault), shown(f"{url}/{found.name}"), shown(why))

    def _parse(self, group: Group, number: int, turn: int) -> RawSample:
        shard, fields, files = self.shards[number], self.fields, group.files
        parsed: dict[str, Any] = {}
        image = fields.image_in(files)
        texts = fields.texts_in(files, parsed)
        name = f"{shard.url}/{group.name}"
        extras = {extension: files.members[extension] for extension in fields.extras if extension in files.members}
        if self.sample_index is None:
            return RawSample(image, texts[0], nameless_row(name), turn, shown(name), texts[1:], extras or None)
        by_key = self.sample_index == "key"
        row = shard.first_row + (fields.key_in(files, parsed) if by_key else group.position)
        if not shard.first_row <= row < shard.stop_row:
            raise Unusable("key out of range")
        if by_key:
            self._check_key(row, number)
        return RawSample(image, texts[0], row, turn, shown(name), texts[1:], extras or None)

    def _where_the_rest_is(self, url: str, name: str, lacks: str, incomplete: set[str]) -> str:
        """Where the shard has the files that the sample ``name`` lacks; '': nowhere, or it was not searched.

        ``incomplete``: samples of this shard that lacked a part before, to which it is added. The first incomplete
        sample and each at which their number has doubled is searched for in the headers of its shard, if that is a
        local file.
        """
        if name in incomplete:
            return APART
        incomplete.add(name)
        self._incomplete += 1
        if self._incomplete & (self._incomplete - 1) or not is_local(url):
            return ""
        return where_the_rest_is(url, name, lacks, self.known, SEARCH)

    def _check_key(self, row: int, number: int) -> None:
        met = self._rows.meet(row, number)
        if met == number:
            return
        shard, other = self.shards[number], self.shards[met]
        if other.url != shard.url:
            raise WrongRow(
                f"--train-data: key {row - shard.first_row} is in {other.url} and in {shard.url}, so two samples "
                "would share a row of the sample state; give --data_size one size per :: source if each has keys "
                "of its own, use --sample_index position, or write distinct keys"
            )


def open_shards(config: DataConfig, seed: int, world: World, steps: int) -> ShardSource:
    """The source that the flags describe, for epochs of ``steps``. ValueError: the message names the wrong flag.

    Collective: rank 0 lists the shards, and with ``--sample_index position`` or ``--epoch_policy exact`` the ranks
    count the samples together.
    """
    assert config.train_data is not None, "the parser asks for --train-data"
    train_data = config.train_data
    sources = on_main(lambda: expand_shards(train_data))
    sizes = config.data_sizes or (config.data_size,)
    keeps_rows = sizes[0] > 0
    shards = list(with_rows(sources, sizes))
    samples = config.train_num_samples
    assert samples is not None, "the parser asks for --train-num-samples"
    fields = fields_of(config)
    if config.dataset_reinforcement:
        fields = replace(fields, extras=reinforcement.EXTENSIONS)
    by_position, exact = keeps_rows and config.sample_index == "position", config.epoch_policy == "exact"
    counts: list[int] = []
    bounds: list[int] = []
    if by_position or exact:
        flag = "--sample_index position" if by_position else "--epoch_policy exact"
        counts = count_all([shard.url for shard in shards], fields.known, world, flag)
    if by_position:
        check_sizes(shards, counts, train_data, sizes)
        shards = at_positions(shards, counts)
        bounds = sorted(
            {row for shard, n in zip(shards, counts) for row in (shard.first_row, shard.first_row + n)}
        )
    if exact and sum(counts) < samples:
        raise ValueError(
            f"--train-num-samples {samples}: the shards hold {sum(counts)} samples, and "
            f"--epoch_policy exact takes none twice; give at most {sum(counts)}"
        )
    weights = None
    if config.epoch_policy == "resample":
        factors = config.train_data_upsampling_factors or (1.0,) * len(sources)
        weights = [factor for factor, source in zip(factors, sources, strict=True) for _ in source]
    if config.skip_webdataset_split_by_node:
        seed = seed_of(seed, world.rank) >> 1  # ranks that read the same shards should read them in other orders
    return ShardSource(
        shards,
        seed,
        sample_index=config.sample_index if keeps_rows else None,
        fields=fields,
        weights=weights,
        by_sample=samples <= SPLIT_BY_SAMPLE,
        sizes=counts if exact else None,
        steps=steps,
        bounds=bounds,
    )


def open_val_shards(val_data: str, config: DataConfig) -> ShardSource:
    """The shards of ``--val-data``, to be read in order; they need no key. ValueError: there are none.

    A text file in them has a caption on each line, and a json may hold a list of them, as in sets for retrieval.
    """
    urls = [url for source in expand_shards(val_data, "--val-data") for url in source]
    return ShardSource(
        [Shard(url, 0, 0) for url in urls], 0, sample_index=None, fields=replace(fields_of(config), several=True)
    )
