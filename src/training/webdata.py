"""Training samples from webdataset shards: tar files of ``NAME.jpg|jpeg|png|webp``, ``NAME.txt``, ``NAME.json``.

``--train-data`` names the shards: brace ranges, globs, URLs, ``pipe:`` commands, several sources joined with
``::``. webdataset opens them (``gopen``), walks the tar and groups its members into samples.

The order of an epoch (see ``order`` for lanes and turns):

- Every turn visits the shards in a random order, fixed by (seed, epoch, turn).
- Up to ``SPLIT_BY_SAMPLE`` samples per epoch, every lane reads all shards and decodes only its own samples, which
  are dealt one by one. An epoch of N samples is then each of N samples once, whatever the shards' sizes, and the
  global batches do not depend on the number of ranks and workers. Reading is cheap beside decoding at this size.
- Beyond it the shards are dealt: each lane reads its own. The epoch is exact where shards have equal sizes;
  elsewhere a lane with less than its share goes on with its next turn while another does not finish.
- Samples are shuffled, undecoded, in windows of ``WINDOW``.
- ``--dataset-resampled`` draws shards with replacement instead, each lane for itself.

A sample's row of the sample state is the ``key`` in its json, or with ``--sample_index position`` its place among
all samples of the unshuffled list. That needs every shard's size: the tar headers of all shards are read at
start-up, shared out among the ranks (about 0.1 ms per sample and rank; remote shards are downloaded once for it).
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count

import webdataset as wds
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from training.distributed import World, gather_object
from training.order import Lane, Piece, deal, draws, permutation, seed_of, shuffled
from training.params import DataConfig
from training.samples import RawSample, Skips, Unusable

SPLIT_BY_SAMPLE = 2**15
WINDOW = 4096
IMAGES = ("jpg", "jpeg", "png", "webp")

_KEY = re.compile(r"-?[0-9]{1,18}")
_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset takes for metadata
_REMOTE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")
_UNREADABLE = (OSError, ValueError, ImportError, tarfile.TarError)
_READERS = 8  # threads that wait for files while counting


@dataclass(frozen=True)
class Shard:
    """One tar file. Its samples have rows ``first_row + key`` (or position), all below ``stop_row``."""

    url: str
    first_row: int
    stop_row: int


class ShardSource:
    """The stream of samples of a list of shards.

    ``sample_index``: 'key' or 'position'; None where the run keeps no rows, so that no json is needed.
    ``weights``: one per shard to draw them with replacement; None to visit each once per turn.
    ``by_sample``: deal samples, not shards, to the lanes.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        seed: int,
        *,
        sample_index: str | None = "key",
        weights: Sequence[float] | None = None,
        by_sample: bool = False,
        window: int = WINDOW,
    ) -> None:
        self.shards = tuple(shards)
        self.seed, self.sample_index, self.window = seed, sample_index, window
        self.weights = None if weights is None else tuple(weights)
        self.by_sample = by_sample and weights is None

    def stream(self, epoch: int, lane: Lane, skips: Skips) -> Iterator[RawSample | None]:
        """See ``samples.Source``."""
        read = self._read_all if self.by_sample else self._read_drawn if self.weights else self._read_dealt
        position = 0
        for turn in count():
            for sample in read(epoch, turn, lane, skips):
                if not self.by_sample or position % lane.count == lane.number:
                    yield sample
                position += 1  # goes on over turns: where one ends, the next continues the deal
            yield None

    def describe(self, lanes: int) -> str:
        """See ``samples.Source``."""
        if self.weights:
            return f"{len(self.shards)} shards, drawn with replacement by each of {lanes} lanes"
        if self.by_sample:
            return f"{len(self.shards)} shards, read by all {lanes} lanes and dealt by sample"
        return f"{len(self.shards)} shards, {len(self.shards) / lanes:.4g} for each of {lanes} lanes"

    def in_order(self, lane: Lane, skips: Skips) -> Iterator[RawSample]:
        """Every ``lane.count``-th sample from sample ``lane.number`` on, once, in the order of the list."""
        position = 0
        for number in range(len(self.shards)):
            own = Piece(number, lane.number, lane.number + 1, lane.count)
            for sample in self._samples(Piece(number, 0, 1, 1), own, 0, skips):
                if position % lane.count == lane.number:
                    yield sample
                position += 1

    def count(self) -> int:
        """The number of samples; shards that cannot be read have none."""
        total = 0
        for shard in self.shards:
            with suppress(*_UNREADABLE):
                total += count_samples(shard.url)
        return total

    def _read_all(self, epoch: int, turn: int, lane: Lane, skips: Skips) -> Iterator[RawSample]:
        key = (self.seed, epoch, turn)
        samples = (
            sample
            for shard in permutation(len(self.shards), *key)
            for sample in self._samples(
                Piece(shard, 0, 1, 1), Piece(shard, lane.number, lane.number + 1, lane.count), turn, skips
            )
        )
        return shuffled(samples, self.window, *key)

    def _read_dealt(self, epoch: int, turn: int, lane: Lane, skips: Skips) -> Iterator[RawSample]:
        key = (self.seed, epoch, turn)
        pieces = deal(permutation(len(self.shards), *key), lane)
        samples = (sample for piece in pieces for sample in self._samples(piece, piece, turn, skips))
        return shuffled(samples, self.window, *key, lane.number)

    def _read_drawn(self, epoch: int, turn: int, lane: Lane, skips: Skips) -> Iterator[RawSample]:
        key = (self.seed, epoch, turn, lane.number)
        n = max(len(self.shards) // lane.count, 1)
        samples = (
            sample
            for visit, shard in enumerate(draws(n, self.weights, *key), start=turn * n)
            for sample in self._samples(Piece(shard, 0, 1, 1), Piece(shard, 0, 1, 1), visit, skips)
        )
        return shuffled(samples, self.window, *key)

    def _samples(self, piece: Piece, own: Piece, turn: int, skips: Skips) -> Iterator[RawSample]:
        """The usable samples of ``piece``. Several lanes may read it: each reports those of its ``own``."""
        shard = self.shards[piece.shard]
        skips.check()

        def report(reason: str, name: str) -> None:
            if own.first == 0:
                skips.add(reason, name)

        for position, members in enumerate(read_shard(shard.url, report)):
            if not piece.holds(position):
                continue
            try:
                sample = self._parse(members, shard, position, turn)
            except Unusable as fault:
                if own.holds(position):
                    skips.add(str(fault), f"{shard.url}/{members['__key__']}")
            else:
                yield sample

    def _parse(self, members: dict, shard: Shard, position: int, turn: int) -> RawSample:
        image = next((members[extension] for extension in IMAGES if extension in members), None)
        if image is None:
            raise Unusable("missing image")
        if "txt" not in members:
            raise Unusable("missing text")
        try:
            text = members["txt"].decode()
        except UnicodeDecodeError:
            raise Unusable("text is not utf-8") from None
        name = f"{shard.url}/{members['__key__']}"
        if self.sample_index is None:
            return RawSample(image, text, nameless_row(name), turn, name)
        row = shard.first_row + (position if self.sample_index == "position" else _key(members))
        if not shard.first_row <= row < shard.stop_row:
            raise Unusable("key out of range")
        return RawSample(image, text, row, turn, name)


def read_shard(url: str, report: Callable[[str, str], None]) -> Iterator[dict]:
    """The groups of members of one shard, {extension: bytes, '__key__': name}, in the tar's order.

    What stops the shard, or is wrong with a member, goes to ``report(reason, name)``; groups up to there come out.
    """
    failed = False

    def stop(error: Exception) -> bool:
        nonlocal failed
        if not failed:
            report("unreadable shard", f"{url}: {error}")
        failed = True
        return False

    def go_on(error: Exception) -> bool:
        report("duplicate member", f"{url}: {error.args[0]}")
        return True

    try:
        stream = wds.gopen(url)
    except _UNREADABLE as error:
        stop(error)
        return
    groups = 0
    try:
        files = tar_file_expander([{"url": url, "stream": stream}], handler=stop)
        for group in group_by_keys(files, handler=go_on):
            groups += 1
            yield group
        if not failed:
            while stream.read(2**20):  # what follows the archive: a command must not meet a closed pipe
                pass
            stream.close()  # raises where a command has failed
    except OSError as error:
        stop(error)
    finally:
        with suppress(OSError):  # of a command whose output is left unread
            stream.close()
    if not groups and not failed:
        report("empty shard", url)


def count_samples(url: str) -> int:
    """How many groups of members ``read_shard`` finds in a sound shard; reads headers only where it can seek."""
    with wds.gopen(url) as stream:
        mode = "r:*" if hasattr(stream, "seekable") and stream.seekable() else "r|*"
        with tarfile.open(fileobj=stream, mode=mode) as tar:
            names = (member.name for member in tar if member.isreg() and not _META.match(member.name))
            prefixes = (base_plus_ext(name)[0] for name in names)
            samples, last = 0, None
            for prefix in prefixes:
                if prefix is not None and prefix != last:
                    samples, last = samples + 1, prefix
    return samples


def expand_shards(shards: str, flag: str = "--train-data") -> list[list[str]]:
    """The urls of each ``::`` source of ``flag``'s value, in order: sources as given, globs sorted.

    ValueError: a source without any shard.
    """
    sources = []
    for source in shards.split("::"):
        urls = []
        for url in expand_urls(source):
            is_pattern = glob.has_magic(url) and not _REMOTE.match(url)
            urls.extend(sorted(glob.glob(url)) if is_pattern else [url] if url else [])
        if not urls:
            raise ValueError(f"{flag} {shards}: no shard matches {source!r}; check the path")
        sources.append(urls)
    return sources


def look_for_shards(shards: str, flag: str) -> list[str]:
    """A sentence on each source of which some shards are not there; training counts them as unreadable.

    ValueError: a source of which none is there. Of URLs and commands this is known when they are opened.
    """
    remarks = []
    for urls in expand_shards(shards, flag):
        missing = _missing(urls)
        if len(missing) == len(urls):
            raise ValueError(f"{flag} {shards}: there is no {missing[0]}, nor another shard of it; check the path")
        if missing:
            remarks.append(f"{flag}: {len(missing)} of {len(urls)} shards are not there, {missing[0]} first")
    return remarks


def _missing(urls: list[str]) -> list[str]:
    """The local ones that are not there. Folders are listed, since to ask for each of 30,000 files takes long."""
    listed: dict[str, set[str]] = {}
    missing = []
    for url in urls:
        if _REMOTE.match(url):
            continue
        folder, name = os.path.split(url)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
        if name not in listed[folder]:
            missing.append(url)
    return missing


def open_shards(config: DataConfig, seed: int, world: World) -> ShardSource:
    """The source that the flags describe. ValueError names the flag that is wrong.

    All ranks have to call this together where ``--sample_index position`` makes them count.
    """
    sources = expand_shards(config.train_data)
    sizes = config.data_sizes or (config.data_size,)
    keeps_rows = sizes[0] > 0
    shards = list(with_rows(sources, sizes))
    if keeps_rows and config.sample_index == "position":
        shards = _at_positions(shards, _count_all([shard.url for shard in shards], world))
    weights = None
    if config.dataset_resampled:
        factors = config.train_data_upsampling_factors or (1.0,) * len(sources)
        weights = [factor for factor, source in zip(factors, sources, strict=True) for _ in source]
    if config.skip_webdataset_split_by_node:
        seed = seed_of(seed, world.rank) >> 1  # ranks that read the same shards should not read them in step
    return ShardSource(
        shards,
        seed,
        sample_index=config.sample_index if keeps_rows else None,
        weights=weights,
        by_sample=config.train_num_samples <= SPLIT_BY_SAMPLE,
    )


def open_val_shards(val_data: str) -> ShardSource:
    """The shards of ``--val-data``, for reading in order; they need no json. ValueError: there are none."""
    urls = [url for source in expand_shards(val_data, "--val-data") for url in source]
    return ShardSource([Shard(url, 0, 0) for url in urls], 0, sample_index=None)


def nameless_row(name: str) -> int:
    """A negative number that tells samples apart in a run that keeps no rows."""
    return -1 - (seed_of(*name.encode()) >> 1)


def _key(members: dict) -> int:
    if "json" not in members:
        raise Unusable("missing json")
    try:
        key = json.loads(members["json"])["key"]
    except (ValueError, RecursionError):
        raise Unusable("json is not valid") from None
    except (KeyError, TypeError, IndexError):
        raise Unusable("json without key") from None
    if isinstance(key, str) and _KEY.fullmatch(key):
        return int(key)
    if isinstance(key, int) and not isinstance(key, bool):
        return key
    raise Unusable("key is not an integer")


def with_rows(sources: list[list[str]], sizes: Sequence[int]) -> Iterator[Shard]:
    """One size: rows are shared by all sources. A size per source: each source has a range of its own."""
    if len(sizes) == 1:
        sizes, starts = list(sizes) * len(sources), [0] * len(sources)
    else:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
    for source, size, start in zip(sources, sizes, starts, strict=True):
        yield from (Shard(url, start, start + size) for url in source)


def _at_positions(shards: list[Shard], counts: list[int]) -> list[Shard]:
    """Move each shard's first row behind the samples before it in the same range of rows."""
    placed, seen = [], {}
    for shard, samples in zip(shards, counts):
        before = seen.get(shard.first_row, 0)
        placed.append(replace(shard, first_row=shard.first_row + before))
        seen[shard.first_row] = before + samples
    return placed


def _count_all(urls: list[str], world: World) -> list[int]:
    """Samples per shard; every rank counts its part."""

    def attempt(url: str) -> int | str:
        try:
            return count_samples(url)
        except _UNREADABLE as error:
            return f"{url}: {error}"

    with ThreadPoolExecutor(_READERS) as pool:
        parts = gather_object(list(pool.map(attempt, urls[world.rank :: world.world_size])))
    counts: list[int | str] = [0] * len(urls)
    for rank, part in enumerate(parts):
        counts[rank :: world.world_size] = part
    failures = [result for result in counts if isinstance(result, str)]
    if failures:
        raise ValueError(
            f"--sample_index position: {len(failures)} of {len(urls)} shards cannot be counted, and rows follow "
            f"from the sizes of all shards before: mend or remove {failures[0]}"
        )
    return counts
