"""The two passes over tiles of the pairs of a batch, which the compositional losses need; eager or compiled.

``q`` = s - r, the similarities of the target less those of the reference, is never stored as a whole. The first
pass takes the log-sum-exp of its rows and columns, the second the gradient for the embeddings, each tile by tile.
The first keeps as many tiles as fit into ``keep_bytes``; the second recomputes only the others.

Everything is float32. Exponents are subtracted before ``exp``, so that margins of +-400 tau stay finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Stands for log 0. It is a finite number, because 0 * -inf would turn weighted sums into NaN.
_EXCLUDED = -1e30


@dataclass(frozen=True)
class Budget:
    """The memory for one tile of pairs, and for all tiles that are kept between the two passes, in bytes."""

    tile_bytes: int
    keep_bytes: int

    @classmethod
    def default(cls, device: torch.device) -> Budget:
        """Tiles that fit into a CPU's caches, or that are large enough to keep a GPU busy (docs/benchmarks.md)."""
        if device.type == "cpu":
            return cls(tile_bytes=8 << 20, keep_bytes=8 << 20)
        return cls(tile_bytes=128 << 20, keep_bytes=512 << 20)


@dataclass(frozen=True)
class Block:
    """The pairs of ``n`` anchors, the rows, with ``m`` samples of the other modality, the columns.

    ``rows``, ``columns``              the target's embeddings [n, d] and [m, d], then the reference's if there is
                                       one.
    ``row_groups``, ``column_groups``  ``duplicate_groups`` of the samples, [n] and [m].
    ``row_scale``, ``column_scale``    1/tau: [n] and [m], or 0-d and equal if all samples share one temperature.
    """

    rows: tuple[Tensor, ...]
    columns: tuple[Tensor, ...]
    row_groups: Tensor
    column_groups: Tensor
    row_scale: Tensor
    column_scale: Tensor

    @property
    def shared(self) -> bool:
        """Whether a pair has the same exponent for its row and for its column."""
        return self.row_scale.ndim == 0

    def pairs(self, tile: slice, out: Tensor) -> Tensor:
        """Write ``q`` of the rows ``tile`` into ``out`` [t, m] and return it; scaled if the temperature is shared.

        A sample's pairs with itself and with its copies are excluded.
        """
        target, *reference = [r[tile] * self.row_scale if self.shared else r[tile] for r in self.rows]
        torch.mm(target, self.columns[0].T, out=out)
        for rows, columns in zip(reference, self.columns[1:], strict=True):
            out.addmm_(rows, columns.T, alpha=-1)
        return out.masked_fill_(self.row_groups[tile, None] == self.column_groups, _EXCLUDED)

    def row_exponents(self, tile: slice, q: Tensor, out: Tensor) -> Tensor:
        """``q / tau`` with the rows' temperatures; ``q`` itself if it is scaled already."""
        return q if self.shared else torch.mul(q, self.row_scale[tile, None], out=out)

    def column_exponents(self, q: Tensor, out: Tensor) -> Tensor:
        """``q / tau`` with the columns' temperatures; ``q`` itself if it is scaled already."""
        return q if self.shared else torch.mul(q, self.column_scale, out=out)


@dataclass(frozen=True)
class Anchors:
    """The first pass's results for ``n`` anchors; all tensors are [n].

    ``lse``   log sum_j exp(e_j), where e_j is the exponent of the anchor's pair with its j-th negative.
    ``mean``  sum_j e_j exp(e_j - lse), the mean exponent under the weights W; zeros if it was not asked for.
    """

    lse: Tensor
    mean: Tensor


def _tiles(rows: int, columns: int, budget: Budget) -> list[slice]:
    step = max(1, min(rows, budget.tile_bytes // (4 * columns)))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _kept_rows(tiles: list[slice], columns: int, budget: Budget) -> int:
    """The number of rows, from the first on, whose tiles fit into ``budget.keep_bytes``."""
    height = tiles[0].stop
    return min(budget.keep_bytes // (4 * columns * height) * height, tiles[-1].stop)


def pair_statistics(
    block: Block, *, columns: bool, moments: bool, budget: Budget
) -> tuple[Anchors, Anchors | None, Tensor | None]:
    """First pass: the statistics of the rows, those of the columns if ``columns`` is True, and the kept pairs.

    The kept pairs are [kept, m], of as many rows as fit into ``budget.keep_bytes``; None if no row does. Without
    ``moments`` the means are zero.
    """
    x, n, m = block.rows[0], len(block.rows[0]), len(block.columns[0])
    tiles = _tiles(n, m, budget)
    keeps = _kept_rows(tiles, m, budget)
    kept = x.new_empty(keeps, m)
    buffer = x.new_empty(tiles[0].stop if keeps < n else 0, m)
    work = x.new_empty(tiles[0].stop, m)
    scaled = work if block.shared else torch.empty_like(work)
    row_lse, row_mean = [], []
    peak = x.new_full((m,), -torch.inf)
    total, weighted = x.new_zeros(m), x.new_zeros(m)
    for tile in tiles:
        height = tile.stop - tile.start
        q = block.pairs(tile, kept[tile] if tile.stop <= keeps else buffer[:height])

        e = block.row_exponents(tile, q, scaled[:height])
        top = e.amax(1)
        p = torch.sub(e, top[:, None], out=work[:height]).exp_()
        s = p.sum(1)
        row_lse.append(top + s.log())
        row_mean.append(p.mul_(e).sum(1) / s if moments else torch.zeros_like(s))

        if columns:
            e = block.column_exponents(q, scaled[:height])
            top = torch.maximum(peak, e.amax(0))
            p = torch.sub(e, top, out=work[:height]).exp_()
            fade = (peak - top).exp()
            total = total * fade + p.sum(0)
            if moments:
                weighted = weighted * fade + p.mul_(e).sum(0)
            peak = top
    rows = Anchors(torch.cat(row_lse), torch.cat(row_mean))
    return rows, Anchors(peak + total.log(), weighted / total) if columns else None, kept if keeps else None


def pair_gradient(
    block: Block, row_shift: Tensor, column_shift: Tensor, *, columns: bool, kept: Tensor | None, budget: Budget
) -> tuple[Tensor, Tensor | None]:
    """Second pass: ``G columns`` [n, d] of the target's embeddings and ``G^T rows`` [m, d] if ``columns`` is True.

    ``G_ij = exp(q_ij / tau_i - row_shift_i) + exp(q_ij / tau_j - column_shift_j)``, and 0 for a sample with
    itself.

    ``kept``: the pairs that the first pass kept, which are overwritten; the other pairs are computed again.
    """
    x, y = block.rows[0], block.columns[0]
    tiles = _tiles(len(x), len(y), budget)
    height = tiles[0].stop
    keeps = 0 if kept is None else len(kept)
    buffer = x.new_empty(height if keeps < len(x) else 0, len(y))
    work = x.new_empty(height, len(y))
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_y = torch.zeros_like(y, memory_format=torch.contiguous_format) if columns else None
    for tile in tiles:
        height = tile.stop - tile.start
        q = block.pairs(tile, buffer[:height]) if kept is None or tile.stop > keeps else kept[tile]
        g = work[:height]
        torch.sub(block.row_exponents(tile, q, g), row_shift[tile, None], out=g).exp_()
        g.add_(block.column_exponents(q, q).sub_(column_shift).exp_())
        torch.mm(g, y, out=grad_x[tile])
        if grad_y is not None:
            grad_y.addmm_(g.T, x[tile])
    return grad_x, grad_y


class StatisticsPass(Protocol):
    """``pair_statistics``, eager or compiled."""

    def __call__(
        self, block: Block, *, columns: bool, moments: bool, budget: Budget
    ) -> tuple[Anchors, Anchors | None, Tensor | None]: ...


class GradientPass(Protocol):
    """``pair_gradient``, eager or compiled."""

    def __call__(
        self,
        block: Block,
        row_shift: Tensor,
        column_shift: Tensor,
        *,
        columns: bool,
        kept: Tensor | None,
        budget: Budget,
    ) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True)
class Kernels:
    """The two passes, eager or compiled, and the memory that they may use; None: ``Budget.default``."""

    statistics: StatisticsPass = pair_statistics
    gradient: GradientPass = pair_gradient
    budget: Budget | None = None

    @classmethod
    def compiled(cls, budget: Budget | None = None, backend: str = "inductor") -> Kernels:
        """Both passes through ``torch.compile``, without graph breaks.

        The code between the passes, a moving average and the mean over copies, is not compiled: it is a few
        operations on B x 2 numbers around a collective.
        """
        return cls(
            torch.compile(pair_statistics, fullgraph=True, backend=backend),
            torch.compile(pair_gradient, fullgraph=True, backend=backend),
            budget,
        )
