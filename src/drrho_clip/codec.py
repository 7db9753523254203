"""Compression of float32 rows with a promised error: every component satisfies |x̂ - x| <= E.

A component x becomes the integer k = rint((x - c) / s) and comes back as x̂ = k s + c. The offset c is one float32
per column, or 0. The step s is a little below 2 E, so that the rounding of float32 fits into the bound too. With
u = 2^-24, |k| < 2^reach and every operation rounded to float32 (fused or not), the error is at most

    s / 2 + u |x - c| (1 + 1 + 1)  x - c, its product with 1 / s, and 1 / s itself are rounded
          + u |k s|                k s is rounded
          + u (|k s| + |c|)        the sum is rounded
    <= s / 2 (1 + 11 u 2^reach) + u |c|,

as |x - c| <= 2^reach s. Offsets are used up to |c| <= 2^14 E, so that u |c| <= 2^-10 E. Hence the step

    s = 2 E (1 - 2^-10, with an offset) / (1 + 11 u 2^reach), rounded down,

keeps the bound in exact arithmetic, on any device. Values that need |k| >= 2^15 are never quantized; those whose
float32 neighbours are more than E away are among them.

Integers are folded to v = 0, 1, 2, 3, ... for k = 0, -1, 1, -2, ... and packed in one of two ways:

fixed   ``low`` = reach + 1 bits each. The largest v, k = -2^reach, is reserved: it comes back as NaN.
Rice    the ``low`` last bits of each v, then for each v its other bits as a number: so many 0 and a 1. Values of
        a bell shape take some 2.5 bits less than with a fixed width. A row whose ones are all missing comes back
        as NaN.

A row of unit norm has |x_1| + ... + |x_d| <= sqrt(d), which bounds the zeros of the second part, however the row
is distributed. So both ways have a size that follows from E, d and a promise alone, without looking at the data.

A rotation would buy nothing here: errors of at most E in rotated coordinates are errors of up to sqrt(d) E in the
original ones, so that the step would have to be smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SMALLEST, LARGEST = 1e-30, 1e30  # bounds for which no intermediate result is subnormal or overflows
_MOST_BITS = 16
_UNIT = 2.0**-24
_OFFSET_LOSS = 2.0**-10
_MOST_OFFSET = 2**14  # times the bound
_MARGIN = 1 + 2.0**-6  # of promises: rows that were normalized in bfloat16 keep them
_TINY = 2.0**-126
_BLOCK = 2**17  # components that are worked on at a time on the CPU


@dataclass(frozen=True)
class Format:
    """How rows of ``dim`` components are packed.

    ``bound``  E. ``reach``: |k| < 2^reach, 1 to 15. ``low``: bits of each v that are packed as they are.
    ``zeros``  with Rice's code, the most zeros of one row's second part; None: fixed width.
    ``moved``  whether columns have an offset.
    """

    bound: float
    dim: int
    reach: int
    low: int
    zeros: int | None = None
    moved: bool = False

    @property
    def step(self) -> float:
        """s, a float32."""
        room = (1 - _OFFSET_LOSS) if self.moved else 1.0
        exact = 2 * _float32(self.bound, math.floor) * room / (1 + 11 * _UNIT * 2**self.reach)
        return _float32(exact, math.floor)

    @property
    def inverse(self) -> float:
        """1 / s, rounded to float32."""
        return _float32(1 / self.step, round)

    @property
    def bits(self) -> float:
        """Bits per component: ``low``, and what the second part adds."""
        return self.low if self.zeros is None else self.low + (self.dim + self.zeros) / max(self.dim, 1)

    @property
    def low_bytes(self) -> int:
        """Bytes of a row's first part. Components are padded to a multiple of 8."""
        return _up(self.dim) * self.low // 8

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.low_bytes + (0 if self.zeros is None else _up(self.dim + self.zeros) // 8)

    @classmethod
    def of_limit(cls, bound: float, dim: int, limit: float) -> Format:
        """The fewest bits of fixed width for |x| <= ``limit``. ValueError: more than 16 would be needed."""
        bound = _checked(bound)
        for reach in range(1, _MOST_BITS):
            found = cls(bound, dim, reach, reach + 1)
            if found._covers(limit):
                return found
        raise ValueError(_too_fine(bound, f"values up to {limit:g}"))

    @classmethod
    def of_norm(cls, bound: float, dim: int, norm: float) -> Format:
        """The fewest bits of Rice's code for rows of Euclidean norm up to ``norm``.

        v has a second part of z or more only if |k| >= z 2^(low - 1), hence |x| / s >= z (2^(low - 1) - 1/2). So a
        row has at most |x|_1 / (s (2^(low - 1) - 1/2)) zeros, and |x|_1 <= sqrt(d) |x|_2.

        ValueError: |k| could reach 2^15.
        """
        bound = _checked(bound)
        reach = next((r for r in range(1, _MOST_BITS) if cls(bound, dim, r, 1)._covers(norm)), None)
        if reach is None:
            raise ValueError(_too_fine(bound, f"rows of norm {norm:g}"))
        step, found = cls(bound, dim, reach, 1).step, []
        for low in range(1, reach + 2):
            most = math.sqrt(dim) * norm * _MARGIN / (step * (2 ** (low - 1) - 0.5))
            zeros = min(int(most), dim * ((2 ** (reach + 1) - 1) >> low))
            found.append(cls(bound, dim, reach, low, zeros))
        return min(found, key=lambda f: f.row_bytes)

    def _covers(self, limit: float) -> bool:
        if not 0 <= limit < math.inf:
            raise ValueError(f"a promised limit or norm must be finite and not negative, and this one is {limit}")
        return limit * _MARGIN <= (2**self.reach - 0.5) * self.step


@dataclass(frozen=True)
class Encoded:
    """``n`` rows of ``d`` components.

    ``rows``    uint8 [n, bytes].
    ``offset``  float32 [d], c; None: 0.
    ``kept``    int64 [m], the rows that are stored as they are, and ``exact``, float32 [m, d], these rows; None
                where a promise gave the format.
    """

    rows: Tensor
    format: Format
    offset: Tensor | None = None
    kept: Tensor | None = None
    exact: Tensor | None = None

    @property
    def bits(self) -> float:
        """Bits per packed component."""
        return self.format.bits

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.rows, self.offset, self.kept, self.exact)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@torch.no_grad()
def encode(x: Tensor, bound: float, *, limit: float | None = None, norm: float | None = None) -> Encoded:
    """``x`` [n, d] of float32, float16 or bfloat16, so that ``decode`` gives x̂ with |x̂ - x| <= ``bound`` = E.

    With a promise, the size follows from E and d, nothing waits for the device, and rows may be exchanged by
    ranks as they are. NaN, infinities and what breaks the promise come back as NaN, so that they cannot go unseen
    (or within the bound, where they fit nevertheless).

    ``limit``  |x| <= limit for every component: the fewest bits of fixed width. Only components are lost that
               break the promise. The fastest.
    ``norm``   every row has a Euclidean norm of at most ``norm``: some 2.5 bits less per component. The whole
               row is lost that breaks the promise.

    Both have a margin of 1/64 for the rounding of what was promised.

    Without one, ``x`` is measured: of fixed widths of 2 to 16 bits and Rice's code, with the columns' means as
    offsets and without, the smallest is taken. Rows with NaN, infinities or values that need more than 16 bits are
    kept in float32, as are some long ones where that makes the whole smaller. So all that is finite keeps the
    bound, and all else comes back as it is.

    ValueError: ``x`` has another type or shape; ``bound`` is not in [1e-30, 1e30]; the promise needs more than 16
    bits; two promises.
    """
    if x.ndim != 2 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"rows [n, d] of float32, float16 or bfloat16 are encoded, not {x.dtype} {list(x.shape)}")
    if limit is not None and norm is not None:
        raise ValueError(f"limit {limit} and norm {norm}: promise one of them, the other follows or is not needed")
    x = x.detach().float()
    if limit is not None:
        known = Format.of_limit(bound, x.shape[1], limit)
    elif norm is not None:
        known = Format.of_norm(bound, x.shape[1], norm)
    else:
        chosen, offset = measure(x, bound)
        rows, held = pack(x, chosen, offset)
        kept = (~held).nonzero().flatten()
        return Encoded(rows, chosen, offset, kept, x[kept])
    return Encoded(pack(x, known)[0], known)


def decode(encoded: Encoded) -> Tensor:
    """float32 [n, d], on the device of ``encoded``."""
    x = unpack(encoded.rows, encoded.format, encoded.offset)
    if encoded.kept is not None and encoded.exact is not None:
        x[encoded.kept] = encoded.exact
    return x


# ------------------------------------------------------------------------------------------------- one format


def pack(x: Tensor, how: Format, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float32 [n, d] -> uint8 [n, row_bytes], and bool [n]: the whole row comes back within the bound.

    ``offset`` float32 [d] where ``how.moved``. Every shape follows from ``how``, and nothing waits for the device.
    """
    packed = [_pack(block, how, offset) for block in _blocks(x, how.dim)]
    if len(packed) == 1:
        return packed[0]
    return torch.cat([rows for rows, _ in packed]), torch.cat([held for _, held in packed])


def unpack(rows: Tensor, how: Format, offset: Tensor | None = None) -> Tensor:
    """uint8 [n, bytes] -> float32 [n, d]; NaN for what ``pack`` could not hold.

    With Rice's code ``rows`` may have any number of zero bytes at the end. ``offset`` is [d] or [n, d].
    """
    blocks = _blocks(rows, how.dim)
    if len(blocks) == 1:
        return _unpack(rows, how, offset)
    x = torch.empty(len(rows), how.dim, device=rows.device)
    each = offset is not None and offset.ndim == 2
    begin = 0
    for block in blocks:
        end = begin + len(block)
        x[begin:end] = _unpack(block, how, offset[begin:end] if offset is not None and each else offset)
        begin = end
    return x


def _blocks(rows: Tensor, dim: int) -> Sequence[Tensor]:
    """``rows`` in pieces whose intermediate results stay in a core's cache; on other devices all in one."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return (rows,)
    return rows.split(max(_BLOCK // max(dim, 1), 1)) if len(rows) else (rows,)


def _pack(x: Tensor, how: Format, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    k, good = _quantized(x, how, offset)
    held = good.all(1)
    if how.zeros is None:
        k = torch.where(good, k, -(2**how.reach))
        return _pack_low(_folded(k), how.low), held
    v = _folded(k)
    ends = torch.cumsum((v >> how.low) + 1, 1, dtype=_counter(how.dim)) - 1
    room = _up(how.dim + how.zeros)
    if how.dim:
        held = held & (ends[:, -1] < room)
    # Rows that do not fit have all their ones behind the end, which is then cut off.
    ends = torch.where(held[:, None], ends, room).long()
    bits = torch.zeros(len(x), room + 1, dtype=torch.uint8, device=x.device).scatter_(1, ends, 1)
    return torch.cat([_pack_low(v, how.low), _pack_bits(bits[:, :room])], 1), held


def _unpack(rows: Tensor, how: Format, offset: Tensor | None) -> Tensor:
    v = _unpack_low(rows[:, : how.low_bytes], how.low)[:, : how.dim]
    if how.zeros is None:
        lost = v == 2**how.low - 1
    else:
        ends, good = _ends(rows[:, how.low_bytes :], how.dim)
        high = torch.diff(ends, dim=1, prepend=ends.new_full((len(ends), 1), -1)) - 1
        v, lost = v | (high << how.low), ~good[:, None]
    k = (v >> 1) ^ -(v & 1)
    x = k.float() * how.step
    if offset is not None:
        x = x + offset
    return x.masked_fill_(lost, math.nan)


def _quantized(x: Tensor, how: Format, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """k, int32 [n, d], and where it is right; elsewhere it is anything."""
    moved = x if offset is None else x - offset
    nearest = torch.round(moved * how.inverse)
    good = nearest.abs() < 2**how.reach  # not for NaN
    return torch.where(good, nearest, 0.0).to(torch.int32), good


def _folded(k: Tensor) -> Tensor:
    return (k << 1) ^ (k >> 31)


def _pack_low(v: Tensor, bits: int) -> Tensor:
    """The last ``bits`` bits of ``v`` int32 [n, d] -> uint8 [n, bytes].

    They are cut into pieces of 8, 4, 2 and 1 bits. Bytes of smaller pieces are folded from the pieces of the first
    half of a row and of the second, and so on: whole stretches of a row, which vector units like.
    """
    v = torch.nn.functional.pad(v, (0, _up(v.shape[1]) - v.shape[1]))
    packed = []
    for shift, size in _pieces(bits):
        piece = ((v >> shift) & (2**size - 1)).to(torch.uint8)
        while size < 8:
            first, second = piece.chunk(2, 1) if piece.shape[1] else (piece, piece)
            piece, size = first | (second << size), 2 * size
        packed.append(piece)
    return torch.cat(packed, 1) if packed else v.new_zeros(len(v), 0, dtype=torch.uint8)


def _unpack_low(packed: Tensor, bits: int) -> Tensor:
    """uint8 [n, bytes] -> int32 [n, d], d a multiple of 8."""
    width = 8 * packed.shape[1] // max(bits, 1)
    v = torch.zeros(len(packed), width, dtype=torch.int32, device=packed.device)
    begin = 0
    for shift, size in _pieces(bits):
        end = begin + width * size // 8
        piece, held = packed[:, begin:end], 8
        while held > size:
            held //= 2
            piece = torch.cat([piece & (2**held - 1), piece >> held], 1)
        v, begin = v | (piece.to(torch.int32) << shift), end
    return v


def _pieces(bits: int) -> Sequence[tuple[int, int]]:
    """(shift, bits) of the pieces of a number of ``bits`` bits: 13 is 8, 4 and 1."""
    found, shift = [], 0
    for size in (8, 8, 4, 2, 1):
        if bits - shift >= size:
            found.append((shift, size))
            shift += size
    return found


def _pack_bits(bits: Tensor) -> Tensor:
    """uint8 0 and 1, [n, m] with m a multiple of 8 -> uint8 [n, m / 8]; the first bit is the lowest."""
    by_eight = bits.reshape(len(bits), bits.shape[1] // 8, 8)
    packed = by_eight[..., 0]
    for i in range(1, 8):
        packed = packed | (by_eight[..., i] << i)
    return packed


def _ends(packed: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The places of the ``dim`` ones in each row of bits, int32 [n, dim], and whether there are so many [n]."""
    if packed.device.type == "cpu" and not torch.compiler.is_compiling():
        return _ends_on_cpu(packed, dim)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = ((packed[..., None] >> shifts) & 1).flatten(1)
    rank = torch.cumsum(bits, 1, dtype=torch.int32)
    target = torch.where(bits == 1, rank - 1, dim).clamp(max=dim).long()
    places = torch.arange(bits.shape[1], dtype=torch.int32, device=packed.device).expand_as(target)
    found = torch.zeros(len(packed), dim + 1, dtype=torch.int32, device=packed.device).scatter_(1, target, places)
    return found[:, :dim], bits.sum(1) == dim


def _ends_on_cpu(packed: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The same with numpy, whose search for ones is some twenty times as fast as torch's."""
    import numpy as np

    bits = np.unpackbits(np.ascontiguousarray(packed.numpy()), axis=1, bitorder="little").view(np.bool_)
    good = np.count_nonzero(bits, axis=1) == dim
    found = np.zeros((len(bits), dim), np.int32)
    chosen = bits if good.all() else bits[good]
    places = np.flatnonzero(chosen).reshape(len(chosen), dim)
    found[good] = places - bits.shape[1] * np.arange(len(chosen))[:, None]
    return torch.from_numpy(found), torch.from_numpy(good)


# ---------------------------------------------------------------------------------------------------- measuring


def measure(x: Tensor, bound: float, *, float_rows: bool = True) -> tuple[Format, Tensor | None]:
    """The format that takes the fewest bytes for ``x``, float32 [n, d], and its offset, float32 [d] or None.

    ``float_rows``: rows may be kept in float32 where that makes the whole smaller. Without it the format holds all
    that can be held: rows of finite values whose |k| is below 2^15.
    """
    bound = _checked(bound)
    if not x.numel():
        return Format(bound, x.shape[1], 1, 2), None
    spreads = [_Spread(x, bound, None)]
    finite = torch.isfinite(spreads[0].extent)
    mean = torch.where(finite[:, None], x, 0.0).sum(0) / finite.sum()
    if bool(mean.abs().max() <= _MOST_OFFSET * bound):
        spreads.append(_Spread(x, bound, mean))
    if not float_rows:
        most = max(spread.fitting[-1] for spread in spreads)
        spreads = [spread for spread in spreads if spread.fitting[-1] == most]
    options = [option for spread in spreads for option in spread.fixed(float_rows)]
    plain, moved = spreads[0], spreads[-1]
    # An offset saves the logarithm of a ratio in bits per component, and costs 32 bits per column.
    saved = math.log2(max(plain.mean, _TINY)) - math.log2(max(moved.mean, _TINY))
    options += (moved if len(x) * saved > 32 else plain).rice(float_rows)
    _, chosen, offset = min(options, key=lambda option: option[0])
    return chosen, offset


class _Spread:
    """How far the values of ``x`` [n, d] are from an offset, and what each format would take for them.

    ``extent``  float32 [n]: the largest distance in each row.
    ``mean``    the mean distance in the rows that can be held.
    """

    def __init__(self, x: Tensor, bound: float, offset: Tensor | None) -> None:
        self.x, self.offset = x, offset
        self.float_row = 4 * x.shape[1] + 8
        self.formats = [
            Format(bound, x.shape[1], reach, reach + 1, None, offset is not None) for reach in range(1, _MOST_BITS)
        ]
        far = [self._distances(block) for block in _blocks(x, x.shape[1])]
        self.extent = torch.cat([extent for extent, _ in far])
        self.fitting = [int(self._fits(how).sum()) for how in self.formats]
        can = self._fits(self.formats[-1])
        self.mean = float(torch.cat([mean for _, mean in far])[can].mean()) if self.fitting[-1] else math.inf

    def _distances(self, block: Tensor) -> tuple[Tensor, Tensor]:
        distances = (block if self.offset is None else block - self.offset).abs()
        return distances.amax(1), distances.mean(1)

    def _fits(self, how: Format) -> Tensor:
        """The rows whose |k| are all below 2^reach. Rounding is monotonic, so the largest distance decides."""
        return torch.round(self.extent * how.inverse) < 2**how.reach

    def fixed(self, float_rows: bool) -> list[tuple[int, Format, Tensor | None]]:
        """Bytes, format, offset with fixed widths."""
        n = len(self.x)
        return [
            (n * how.row_bytes + (n - fits) * self.float_row + self.offset_bytes, how, self.offset)
            for how, fits in zip(self.formats, self.fitting)
            if float_rows or fits == self.fitting[-1]
        ]

    def rice(self, float_rows: bool) -> list[tuple[int, Format, Tensor | None]]:
        """The same with Rice's code, for numbers of low bits around the binary logarithm of the mean v."""
        if not self.fitting[-1]:
            return []
        how = self.formats[self.fitting.index(self.fitting[-1])]
        can = self._fits(how)
        guess = round(math.log2(2 * self.mean * how.inverse + 1))
        lows = sorted({min(max(low, 1), how.reach + 1) for low in (guess - 1, guess, guess + 1)})
        zeros = torch.cat([self._zeros(block, how, lows) for block in _blocks(self.x, how.dim)])[can]
        found = []
        for low, ordered in zip(lows, zeros.sort(0).values.T):
            # With room for the i-th shortest row's zeros, the longer rows are kept in float32.
            lost = len(self.x) - 1 - torch.arange(len(ordered), device=ordered.device)
            row = _up(how.dim) * low // 8 + (how.dim + ordered.long() + 7) // 8
            size = len(self.x) * row + lost * self.float_row + self.offset_bytes
            best = int(size.argmin()) if float_rows else -1
            found.append((int(size[best]), replace(how, low=low, zeros=int(ordered[best])), self.offset))
        return found

    def _zeros(self, block: Tensor, how: Format, lows: Sequence[int]) -> Tensor:
        """Integers [n, len(lows)]: the zeros of each row's second part."""
        v = _folded(_quantized(block, how, self.offset)[0])
        return torch.stack([(v >> low).sum(1, dtype=_counter(how.dim)) for low in lows], 1)

    @property
    def offset_bytes(self) -> int:
        return 0 if self.offset is None else 4 * self.x.shape[1]


def _checked(bound: float) -> float:
    if not SMALLEST <= bound <= LARGEST:
        raise ValueError(f"an error bound must be in [{SMALLEST:g}, {LARGEST:g}], and this one is {bound}")
    return float(bound)


def _too_fine(bound: float, what: str) -> str:
    return (
        f"an error bound of {bound:g} needs more than {_MOST_BITS} bits for {what}: raise it, send float32, or "
        "promise nothing, so that the values are measured"
    )


def _counter(dim: int) -> torch.dtype:
    """The integers that hold the sum of the second parts of a row, each up to 2^16; the smaller are faster."""
    return torch.int32 if dim < 2**15 else torch.int64


def _float32(value: float, rounding: Callable[[float], int]) -> float:
    """``value`` > 0 as a float32."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(rounding(mantissa * 2**24), exponent - 24)


def _up(bits: int) -> int:
    """The next multiple of 8."""
    return -(-bits // 8) * 8
