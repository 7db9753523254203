"""Which row of the sample state a sample of a shard has, and a check that no two samples share one.

It is the ``key`` in the sample's json or, with ``--sample_index position``, its position among all samples of
the list. The latter needs the size of every shard: the ranks read the tar headers of all shards at the start,
each rank a part of them (about 0.1 ms per sample and rank; remote shards are downloaded once for it, and again
where a transfer breaks).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from training.data.sources.fields import Known
from training.data.sources.shards import UNREADABLE, Shard, count_samples
from training.data.sources.urls import WAITS, NotOpened, local_path
from training.distributed.collectives import gather_object
from training.distributed.process_group import World
from training.rng import seed_of

_HASH = 0x9E3779B97F4A7C15  # Knuth's multiplicative hash for 64 bits
_READERS = 8  # threads that wait for files while counting
_WORD = 2**64 - 1


def nameless_row(name: str) -> int:
    """A negative number that identifies a sample in a run that keeps no rows."""
    return -1 - (seed_of(*name.encode(errors="surrogateescape")) >> 1)


def with_rows(sources: list[list[str]], sizes: Sequence[int]) -> Iterator[Shard]:
    """The shards of all sources. With one size they share its rows; with one per source each has its own."""
    if len(sizes) == 1:
        sizes, starts = list(sizes) * len(sources), [0] * len(sources)
    else:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
    for source, size, start in zip(sources, sizes, starts, strict=True):
        yield from (Shard(url, start, start + size) for url in source)


def at_positions(shards: list[Shard], counts: list[int]) -> list[Shard]:
    """Move each shard's first row past the samples that come before it in the same range of rows."""
    placed: list[Shard] = []
    seen: dict[int, int] = {}
    for shard, samples in zip(shards, counts):
        before = seen.get(shard.first_row, 0)
        placed.append(replace(shard, first_row=shard.first_row + before))
        seen[shard.first_row] = before + samples
    return placed


def check_sizes(shards: Sequence[Shard], counts: Sequence[int], train_data: str, sizes: Sequence[int]) -> None:
    """ValueError: a range of rows is smaller than the number of its samples, so that the last ones never come.

    ``shards``: as ``with_rows`` gives them, not yet moved. ``sizes``: ``--data_size``.
    """
    held: dict[int, int] = {}
    for shard, samples in zip(shards, counts, strict=True):
        held[shard.first_row] = held.get(shard.first_row, 0) + samples
    needed = list(held.values())  # of each range
    if all(samples <= size for samples, size in zip(needed, sizes, strict=True)):
        return
    enough = (max(samples, size) for samples, size in zip(needed, sizes, strict=True))
    raise ValueError(
        f"--data_size {_joined(sizes)}: {train_data} has {_joined(needed)} samples, and with --sample_index "
        f"position each needs a row of its own in the sample state; give at least {_joined(enough)}"
    )


def _joined(numbers: Iterable[int]) -> str:
    return "::".join(map(str, numbers))


def count_all(urls: list[str], known: Known, world: World, flag: str) -> list[int]:
    """Samples per shard; every rank counts a part of them, so all ranks call it together."""

    def attempt(url: str) -> int | str:
        for wait in (*(WAITS if local_path(url) is None else ()), None):
            try:
                return count_samples(url, known)
            except UNREADABLE as error:
                if wait is None or isinstance(error, NotOpened):
                    return f"{url}: {error}"
            time.sleep(wait)  # a transfer that breaks may succeed later
        raise AssertionError("the last attempt returns")

    with ThreadPoolExecutor(_READERS) as pool:
        parts = gather_object(list(pool.map(attempt, urls[world.rank :: world.world_size])))
    results: list[int | str] = [0] * len(urls)
    for rank, part in enumerate(parts):
        results[rank :: world.world_size] = part
    failures = [result for result in results if isinstance(result, str)]
    if failures:
        elsewhere = any(isinstance(n, str) and local_path(url) is None for url, n in zip(urls, results))
        cure = "try again; if it stays so, repair or remove them" if elsewhere else "repair or remove them"
        raise ValueError(
            f"{flag} needs the number of samples of every shard, and {len(failures)} of {len(urls)} shards cannot "
            f"be read: {cure}, the first is {failures[0]}"
        )
    return [result for result in results if isinstance(result, int)]


class RowsMet:
    """Which shard each row was met in, for up to ``limit`` rows; of more rows, for a share chosen by hash.

    Up to ``limit`` rows, every row is remembered. Beyond that, half of the rows, chosen by hash, are forgotten
    and no longer checked, then half of the rest, and so on: of n rows at least a share of limit / 2n is checked.
    If m rows occur twice, all of them are missed with a probability of at most (1 - limit / 2n)^m: with
    m = 10,000, a whole shard, and n = 12 million that is e^-27.
    """

    def __init__(self, limit: int = 2**16) -> None:
        self._limit, self._mask = limit, 0
        self._shards: dict[int, int] = {}

    def meet(self, row: int, shard: int) -> int:
        """The shard in which ``row`` was first met: ``shard``, unless another shard has the row too."""
        if self._mask and (row * _HASH & _WORD) >> 32 & self._mask:
            return shard
        first = self._shards.setdefault(row, shard)
        if len(self._shards) > self._limit:
            self._mask = 2 * self._mask + 1
            self._shards = {r: s for r, s in self._shards.items() if not (r * _HASH & _WORD) >> 32 & self._mask}
        return first
