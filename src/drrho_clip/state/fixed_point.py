"""Numbers in 16 bits each, with a promised error: |x̂ - x| <= E.

A number x becomes the integer n = rint(x / s) and comes back as x̂ = n s. Of the integers, ``first`` to ``last`` =
first + 65534 are kept; numbers beyond them become the nearest end, also infinite ones. One more code is NaN's.

The step s is a little below 2 E, so that the rounding of float32 fits into the bound. With u = 2^-24, |n| <= 2^17
and every operation rounded to float32, the error is at most

    s / 2 + 2 u |x| (1 + u)  the product of x and 1 / s, and 1 / s itself, are rounded
          + u |n s|          n s is rounded
    <= s / 2 (1 + 7 u 2^17),

as |x| <= (|n| + 1/2 + 2^-6) s. Hence s = 2 E / (1 + 7 u 2^17), rounded down, keeps the bound in exact arithmetic.
Each way is a single product, which nothing can be fused with, so all devices get the same bits. What has come back
once is encoded without a further error.

Nothing here imports torch, so that a program can see which bounds are possible while it parses flags.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_CODES = 2**16 - 1  # without NaN's
_MOST = 2**17
_ROUNDING = 1 + 7 * 2.0**-24 * _MOST
_NAN = -(2**15)


@dataclass(frozen=True)
class FixedPoint:
    """The numbers ``first`` * ``step``, ..., (``first`` + 65534) * ``step``; ``step`` is a float32."""

    step: float
    first: int

    @classmethod
    def of_bound(cls, bound: float, least: float, most: float) -> FixedPoint:
        """E = ``bound`` for numbers from ``least`` to ``most``, and above ``most`` as far as the codes go.

        ValueError: 16 bits are too few.
        """
        found = cls._beginning(bound, least)
        if not (0 < bound < math.inf and found.most >= most and found._within()):
            raise ValueError(
                f"an error bound of {bound:g} needs more than 16 bits for values from {least:.3g} to {most:.3g}: "
                f"give at least {cls.least_bound(least, most):g}"
            )
        return found

    @staticmethod
    def least_bound(least: float, most: float) -> float:
        """The smallest bound, in three digits, that ``of_bound`` takes for these numbers."""
        # ``last`` may be up to 2^17, so ``first`` half of that; below zero only ``first`` counts.
        step = max((most - least) / (_CODES - 2), least / (_CODES - 2), -least / (_MOST - 2))
        digits = 10.0 ** (math.floor(math.log10(step * _ROUNDING / 2)) - 2)
        return round(math.ceil(step * _ROUNDING / 2 / digits) * digits, 12)

    @classmethod
    def _beginning(cls, bound: float, least: float) -> FixedPoint:
        step = _float32_below(2 * bound / _ROUNDING) if 0 < bound < math.inf else 1.0
        return cls(step, math.floor(least / step))

    def _within(self) -> bool:
        return max(abs(self.first), abs(self.last)) <= _MOST

    @property
    def last(self) -> int:
        """The largest integer."""
        return self.first + _CODES - 1

    @property
    def least(self) -> float:
        """The least number, which all below it become."""
        return self.first * self.step

    @property
    def most(self) -> float:
        """The largest number, which all above it become."""
        return self.last * self.step

    @property
    def bound(self) -> float:
        """E, as the step promises it."""
        return self.step * _ROUNDING / 2

    @property
    def _shift(self) -> int:
        """n minus its code: the codes are -32767 to 32767."""
        return self.first + (_CODES - 1) // 2

    def encode(self, x: Tensor) -> Tensor:
        """float32 -> int16 of the same shape, on the same device."""
        nearest = (x.float() * (1 / self.step)).round().clamp(self.first, self.last)
        return (nearest - self._shift).nan_to_num(_NAN).short()

    def decode(self, kept: Tensor) -> Tensor:
        """int16 -> float32 of the same shape, on the same device."""
        x = (kept.int() + self._shift).float() * self.step
        return x.masked_fill(kept == _NAN, math.nan)

    def rounded(self, x: Tensor) -> Tensor:
        """float32 of the same shape: what comes back of ``x``."""
        return self.decode(self.encode(x))

    def outside(self, x: Tensor) -> Tensor:
        """bool of the same shape: beyond the ends, where the bound does not hold."""
        return (x < self.least - self.step / 2) | (x > self.most + self.step / 2)


def _float32_below(value: float) -> float:
    """The largest float32 that is not above ``value`` > 0."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(math.floor(mantissa * 2**24), exponent - 24)
