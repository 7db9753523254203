"""The same key in two shards: two samples that would share a row of the sample state."""

from __future__ import annotations

_HASH = 0x9E3779B97F4A7C15  # Knuth's multiplicative hash for 64 bits
_WORD = 2**64 - 1


class Rows:
    """Which shard each row was met in, for as many rows as ``limit``; of more, a sample of them by hash.

    Up to ``limit`` rows every one is remembered. Beyond, every second one by hash is forgotten and no longer
    looked at, then every second one of the rest, and so on: of n rows at least a share of limit / 2n is under
    watch. Whoever meets m rows twice notices it but for a chance of (1 - limit / 2n)^m: with m = 10,000, a whole
    shard, and n = 12 million that is e^-27.
    """

    def __init__(self, limit: int = 2**16) -> None:
        self._limit, self._mask = limit, 0
        self._shards: dict[int, int] = {}

    def meet(self, row: int, shard: int) -> int:
        """The shard that ``row`` was first met in: ``shard``, unless another one has it too."""
        if (row * _HASH & _WORD) >> 32 & self._mask:
            return shard
        first = self._shards.setdefault(row, shard)
        if len(self._shards) > self._limit:
            self._mask = 2 * self._mask + 1
            self._shards = {r: s for r, s in self._shards.items() if not (r * _HASH & _WORD) >> 32 & self._mask}
        return first
