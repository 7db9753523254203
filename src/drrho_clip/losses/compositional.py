"""The finite-sum coupled compositional (FCCO) core: inner estimates, their moving average, the gradient.

Notation of ``docs/objective.md``. Both margins are differences of one matrix of pairs, q = s - r:

    q_ij = <image_i, text_j> - <ref_image_i, ref_text_j>        a_ij = q_ij - q_ii        c_ij = q_ji - q_ii

``q`` is never stored as a whole. Two passes over tiles of its rows are enough. The first takes the log-sum-exp of
rows and columns, which gives log g and, averaged over a sample's visits, log u. The second gives

    dF/dS_ij  ~  W1_ij + W2_ji,    W1_ij = exp(a_ij / tau_i) / u1_i,    W2_ji = exp(c_ji / tau_j) / u2_j.

This takes six products of tiles with embeddings (two for q in each pass, two for the gradients), or four without a
reference. The first pass keeps as many tiles as fit into ``keep_bytes``; the second recomputes only the others.

A single process computes each pair once and takes rows and columns from the same tile. One of several ranks owns
``b`` rows and ``b`` columns: it goes through its rows, then through its columns as the rows of the transposed
problem. Everything is float32. Exponents are subtracted before ``exp``, so that margins of +-400 tau stay finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drrho_clip import collectives, schedules
from drrho_clip.losses.interface import LossEnvironment, LossInputs

if TYPE_CHECKING:
    from typing_extensions import Unpack

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


def duplicate_groups(index: Tensor) -> Tensor:
    """int64 [B] -> int64 [B] in 0..B-1, equal for equal indices. The host does not wait for the device."""
    ordered, order = index.sort(stable=True)
    starts = torch.zeros_like(ordered)
    starts[1:] = (ordered[1:] != ordered[:-1]).long()
    return torch.empty_like(order).scatter_(0, order, starts.cumsum(0))


def merge_duplicates(log_u: Tensor, groups: Tensor) -> Tensor:
    """Give all copies of a sample the log of the mean of their u. [B, c], groups int64 [B] -> [B, c]."""
    at = groups[:, None].expand_as(log_u)
    peak = torch.full_like(log_u, -torch.inf).scatter_reduce(0, at, log_u, "amax").gather(0, at)
    total = torch.zeros_like(log_u).scatter_add(0, at, (log_u - peak).exp()).gather(0, at)
    count = torch.zeros_like(log_u).scatter_add(0, at, torch.ones_like(log_u)).gather(0, at)
    return peak + (total / count).log()


def moving_average(log_g: Tensor, log_u: Tensor | None, gamma: Tensor, eps: float) -> Tensor:
    """log of (1 - gamma) u + gamma (eps + g), elementwise; of eps + g where u is NaN (never seen) or None."""
    fresh = torch.logaddexp(log_g, torch.full_like(log_g, eps).log())
    if log_u is None:
        return fresh
    averaged = torch.logaddexp(torch.log1p(-gamma) + log_u, gamma.log() + fresh)
    return torch.where(log_u.isnan(), fresh, averaged)


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


class EstimatorSettings(TypedDict):
    """A run's settings of the estimator.

    ``gamma``, ``gamma_schedule``, ``gamma_decay_epochs``: ``schedules.gamma``'s. ``eps``, ``rho``: ``FastCLIP``'s.
    """

    gamma: float
    gamma_schedule: str
    gamma_decay_epochs: int
    eps: float
    rho: float


class Estimator(TypedDict):
    """The keywords that all losses of this kind have in common, beside ``state``."""

    gamma: Callable[[int], float]
    eps: float
    rho: float
    kernels: Kernels


def estimator(environment: LossEnvironment, **settings: Unpack[EstimatorSettings]) -> Estimator:
    """The keywords that all losses of this kind have in common, beside ``state``, from a run's settings."""
    return Estimator(
        gamma=partial(
            schedules.gamma,
            final=settings["gamma"],
            schedule=settings["gamma_schedule"],
            decay_epochs=settings["gamma_decay_epochs"],
        ),
        eps=settings["eps"],
        rho=settings["rho"],
        kernels=Kernels.compiled() if environment.compiled else Kernels(),
    )


@dataclass(frozen=True)
class Solution:
    """The result of one step of the estimator. The columns are the two directions: image anchors, text anchors.

    ``log_u``       [B, 2], after the update and with copies merged; equal on all ranks.
    ``pull``        [b, 2], sum_j W_ij m_ij / (tau_i (B - 1)) of this rank's anchors; zeros without ``moments``.
    ``grad_image``  [b, d], ``grad_text`` [b, d]: this rank's rows of the gradient of F with weight 1 or 1/tau.
                    They are multiplied by K, because each rank has one part of the gradient and DDP averages the
                    parts.
    """

    log_u: Tensor
    pull: Tensor
    grad_image: Tensor
    grad_text: Tensor


def solve(
    inputs: LossInputs,
    index: Tensor,
    old_log_u: Tensor | None,
    inverse_tau: Tensor,
    *,
    weight_by_inverse_tau: bool,
    gamma: Tensor,
    eps: float,
    moments: bool,
    kernels: Kernels,
) -> Solution:
    """Update the inner estimates of the global batch and compute the gradient for this rank's embeddings.

    ``index``        int64 [B], the samples of the global batch.
    ``old_log_u``    [B, 2], NaN for samples never seen; None if no u is kept (gamma is 1 in every epoch).
    ``inverse_tau``  0-d for a shared temperature, [B, 2] for individual ones.
    ``weight_by_inverse_tau``  multiply each anchor's row by its 1/tau (for objectives not multiplied by tau).

    It takes two collectives: the embeddings, then the 2B values of log u. Call it under ``torch.no_grad`` and in
    ``exact_float32``.
    """
    images, texts = [inputs.image.detach().float()], [inputs.text.detach().float()]
    if (embeddings := inputs.reference) is not None:
        images.append(embeddings[0].float())
        texts.append(embeddings[1].float())
    k, b = collectives.world_size(), len(images[0])
    batch = k * b
    own = slice(collectives.rank() * b, (collectives.rank() + 1) * b)
    all_images, all_texts = _gather(images, texts)
    diagonal, *reference = [torch.einsum("ij,ij->i", x, y) for x, y in zip(all_images, all_texts, strict=True)]
    for r in reference:
        diagonal = diagonal - r
    groups = duplicate_groups(index)
    own_scales: tuple[Tensor, ...]
    all_scales: tuple[Tensor, ...]
    if inverse_tau.ndim == 0:
        own_scales = all_scales = (inverse_tau, inverse_tau)
        exponent = (diagonal * inverse_tau)[:, None].expand(-1, 2)
    else:
        own_scales, all_scales = inverse_tau[own].unbind(1), inverse_tau.unbind(1)
        exponent = diagonal[:, None] * inverse_tau

    # The rows of the first block are image anchors. Those of the second, which a single process does not need, are
    # text anchors.
    g = groups.int()
    blocks = [Block(tuple(images), tuple(all_texts), g[own], g, own_scales[0], all_scales[1])]
    if k > 1:
        blocks.append(Block(tuple(texts), tuple(all_images), g[own], g, own_scales[1], all_scales[0]))
    columns, budget = k == 1, kernels.budget or Budget.default(diagonal.device)

    first = [kernels.statistics(block, columns=columns, moments=moments, budget=budget) for block in blocks]
    image_anchors, text_anchors = first[0][0], first[0][1] if k == 1 else first[1][0]
    assert text_anchors is not None  # a single process asks for the columns' statistics
    lse = torch.stack([image_anchors.lse, text_anchors.lse], 1)
    mean = torch.stack([image_anchors.mean, text_anchors.mean], 1)
    log_g = lse - exponent[own] - math.log(batch - 1)
    log_u = moving_average(log_g, None if old_log_u is None else old_log_u[own], gamma, eps)
    log_u = merge_duplicates(collectives.all_gather(log_u), groups)
    log_weight = inverse_tau.log() if weight_by_inverse_tau else torch.zeros_like(inverse_tau)
    shift = exponent + log_u - log_weight

    second = [
        kernels.gradient(block, shift[own, i], shift[:, 1 - i], columns=columns, kept=first[i][2], budget=budget)
        for i, block in enumerate(blocks)
    ]
    grad_image, grad_text = second[0][0], second[0][1] if k == 1 else second[1][0]
    assert grad_text is not None  # as above
    # The gradient of the diagonal, since every margin contains -q_ii.
    centre = (lse - shift[own]).exp().sum(1, keepdim=True)
    factor = k / (2 * batch * (batch - 1))
    return Solution(
        log_u=log_u,
        pull=(log_g - log_u[own]).exp() * (mean - exponent[own]),
        grad_image=grad_image.addcmul_(centre, texts[0], value=-1).mul_(factor),
        grad_text=grad_text.addcmul_(centre, images[0], value=-1).mul_(factor),
    )


def _gather(images: list[Tensor], texts: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The embeddings of all ranks, in one collective."""
    if collectives.world_size() == 1:
        return images, texts
    parts = [*images, *texts]
    gathered = collectives.all_gather(torch.cat(parts, 1)).split([part.shape[1] for part in parts], 1)
    return list(gathered[: len(images)]), list(gathered[len(images) :])


class AttachGradient(torch.autograd.Function):
    """A value whose gradients are known: forward returns it, backward gives each input its gradient times grad.

    The gradients are scaled in place, so backward can run only once.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, *inputs_and_grads: Tensor) -> Tensor:
        n = len(inputs_and_grads) // 2
        ctx.grads = inputs_and_grads[n:]
        ctx.dtypes = [t.dtype for t in inputs_and_grads[:n]]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.grads is not None, "backward has already run through this loss"
        grads, ctx.grads = [g.mul_(grad).to(dtype) for g, dtype in zip(ctx.grads, ctx.dtypes, strict=True)], None
        return (None, *grads, *([None] * len(grads)))
