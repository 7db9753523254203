"""The finite-sum coupled compositional (FCCO) core: inner estimates, their moving average, the gradient.

Notation of ``docs/objective.md``. With target and reference embeddings joined as

    x_i = [image_i, -ref_image_i]        y_j = [text_j, ref_text_j]        q_ij = <x_i, y_j> = s_ij - r_ij

both margins are differences of one matrix: a_ij = q_ij - q_ii for image anchors and c_ij = q_ji - q_ii for text
anchors. DRRho-CLIP is therefore FastCLIP on joined embeddings; the reference's half gets no gradient.

``q`` is never stored as a whole. Two passes over row tiles suffice: the first takes the log-sum-exp of rows and
columns, which gives log g and, averaged over visits, log u; the second gives

    dF/dS_ij  ~  W1_ij + W2_ji,    W1_ij = exp(a_ij / tau_i) / u1_i,    W2_ji = exp(c_ji / tau_j) / u2_j.

Where all tiles fit ``keep_bytes`` the first pass keeps them and the second does not multiply again.

One process sees each pair once and takes rows and columns from the same tile. A rank of many owns ``b`` rows and
``b`` columns; it visits its rows, then its columns as the rows of the transposed problem. Everything is float32,
exponents are formed as differences before ``exp``, so that margins of +-400 tau stay finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from drrho_clip import collectives
from drrho_clip.losses.registry import LossInputs

# Stands for the log of zero. A finite number, since 0 * -inf would turn weighted sums into NaN.
_EXCLUDED = -1e30


@dataclass(frozen=True)
class Budget:
    """Bytes for one tile of pairs, and for keeping all tiles between the two passes."""

    tile_bytes: int
    keep_bytes: int

    @classmethod
    def default(cls, device: torch.device) -> Budget:
        """A tile that a CPU's caches hold; on a GPU one large enough to fill it."""
        if device.type == "cpu":
            return cls(tile_bytes=2 << 20, keep_bytes=64 << 20)
        return cls(tile_bytes=128 << 20, keep_bytes=512 << 20)


@dataclass(frozen=True)
class Anchors:
    """What the first pass knows of ``n`` anchors; all tensors are [n].

    ``lse``   log sum_j exp(e_j), with e_j the exponent of the pair with its j-th negative.
    ``mean``  sum_j e_j exp(e_j - lse), the mean exponent under the weights W; zeros where it was not asked for.
    """

    lse: Tensor
    mean: Tensor


def duplicate_groups(index: Tensor) -> Tensor:
    """Equal indices -> equal small integers: int64 [B] -> int64 [B] in 0..B-1, without a host sync."""
    ordered, order = index.sort(stable=True)
    starts = torch.zeros_like(ordered)
    starts[1:] = (ordered[1:] != ordered[:-1]).long()
    return torch.empty_like(order).scatter_(0, order, starts.cumsum(0))


def merge_duplicates(log_u: Tensor, groups: Tensor) -> Tensor:
    """Give the copies of a sample the log of the mean of their u: [B, c], groups int64 [B] -> [B, c]."""
    at = groups[:, None].expand_as(log_u)
    peak = torch.full_like(log_u, -torch.inf).scatter_reduce(0, at, log_u, "amax").gather(0, at)
    total = torch.zeros_like(log_u).scatter_add(0, at, (log_u - peak).exp()).gather(0, at)
    count = torch.zeros_like(log_u).scatter_add(0, at, torch.ones_like(log_u)).gather(0, at)
    return peak + (total / count).log()


def moving_average(log_g: Tensor, log_u: Tensor | None, gamma: Tensor, eps: float) -> Tensor:
    """log of (1 - gamma) u + gamma (eps + g), elementwise; eps + g where u is NaN (never seen) or None."""
    fresh = torch.logaddexp(log_g, torch.full_like(log_g, eps).log())
    if log_u is None:
        return fresh
    averaged = torch.logaddexp(torch.log1p(-gamma) + log_u, gamma.log() + fresh)
    return torch.where(log_u.isnan(), fresh, averaged)


def _tiles(rows: int, columns: int, budget: Budget) -> list[slice]:
    step = max(1, min(rows, budget.tile_bytes // (4 * columns)))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _fits(rows: int, columns: int, budget: Budget) -> bool:
    return 4 * rows * columns <= budget.keep_bytes


def _margins(x: Tensor, y: Tensor, groups_x: Tensor, groups_y: Tensor, out: Tensor) -> Tensor:
    """q of a tile, with a sample's pairs with itself and with its copies excluded."""
    torch.mm(x, y.T, out=out)
    return out.masked_fill_(groups_x[:, None] == groups_y, _EXCLUDED)


def _scaled(q: Tensor, scale: Tensor | None, out: Tensor) -> Tensor:
    return q if scale is None else torch.mul(q, scale, out=out)


def pair_statistics(
    x: Tensor,
    y: Tensor,
    groups_x: Tensor,
    groups_y: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    *,
    columns: bool,
    moments: bool,
    budget: Budget,
) -> tuple[Anchors, Anchors | None, Tensor | None]:
    """First pass. ``x`` [n, D], ``y`` [m, D], ``groups_*`` from ``duplicate_groups``, [n] and [m].

    Exponents are ``q_ij * row_scale_i`` for the rows and ``q_ij * column_scale_j`` for the columns; a scale of
    None stands for 1, where the caller has scaled ``x``. Returns the rows' statistics, the columns' where
    ``columns`` is set, and ``q`` [n, m] where it fits ``budget.keep_bytes``.
    """
    n, m = len(x), len(y)
    tiles = _tiles(n, m, budget)
    kept = x.new_empty(n, m) if _fits(n, m, budget) else None
    margins = None if kept is not None else x.new_empty(tiles[0].stop, m)
    work, scratch = x.new_empty(tiles[0].stop, m), None
    if row_scale is not None:
        scratch = torch.empty_like(work)
    row_lse, row_mean = [], []
    peak = x.new_full((m,), -torch.inf)
    total, weighted = x.new_zeros(m), x.new_zeros(m)
    for tile in tiles:
        height = tile.stop - tile.start
        out = kept[tile] if kept is not None else margins[:height]
        q = _margins(x[tile], y, groups_x[tile], groups_y, out)
        part, spare = work[:height], scratch if scratch is None else scratch[:height]

        e = _scaled(q, None if row_scale is None else row_scale[tile, None], spare)
        top = e.amax(1)
        p = torch.sub(e, top[:, None], out=part).exp_()
        s = p.sum(1)
        row_lse.append(top + s.log())
        row_mean.append(torch.einsum("ij,ij->i", p, e) / s if moments else torch.zeros_like(s))

        if columns:
            e = _scaled(q, column_scale, spare)
            top = torch.maximum(peak, e.amax(0))
            p = torch.sub(e, top, out=part).exp_()
            fade = (peak - top).exp()
            total = total * fade + p.sum(0)
            if moments:
                weighted = weighted * fade + torch.einsum("ij,ij->j", p, e)
            peak = top
    rows = Anchors(torch.cat(row_lse), torch.cat(row_mean))
    return rows, Anchors(peak + total.log(), weighted / total) if columns else None, kept


def pair_gradient(
    x: Tensor,
    y: Tensor,
    groups_x: Tensor,
    groups_y: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    row_shift: Tensor,
    column_shift: Tensor,
    *,
    width: int,
    columns: bool,
    kept: Tensor | None,
    budget: Budget,
) -> tuple[Tensor, Tensor | None]:
    """Second pass: ``G y[:, :width]`` [n, width] and, where ``columns`` is set, ``G^T x[:, :width]`` [m, width].

    ``G_ij = exp(q_ij row_scale_i - row_shift_i) + exp(q_ij column_scale_j - column_shift_j)``, zero for pairs of
    a sample with itself. ``kept`` is ``q`` of the first pass, or None: then it is multiplied again.
    """
    n, m = len(x), len(y)
    tiles = _tiles(n, m, budget)
    height = tiles[0].stop
    margins = None if kept is not None else x.new_empty(height, m)
    left, right = x.new_empty(height, m), x.new_empty(height, m)
    grad_x = x.new_empty(n, width)
    grad_y = x.new_zeros(m, width) if columns else None
    for tile in tiles:
        height = tile.stop - tile.start
        if kept is not None:
            q = kept[tile]
        else:
            q = _margins(x[tile], y, groups_x[tile], groups_y, margins[:height])
        g, h = left[:height], right[:height]
        e = _scaled(q, None if row_scale is None else row_scale[tile, None], g)
        torch.sub(e, row_shift[tile, None], out=g).exp_()
        e = _scaled(q, column_scale, h)
        torch.sub(e, column_shift, out=h).exp_()
        g.add_(h)
        torch.mm(g, y[:, :width], out=grad_x[tile])
        if grad_y is not None:
            grad_y.addmm_(g.T, x[tile, :width])
    return grad_x, grad_y


@dataclass(frozen=True)
class Kernels:
    """The two passes, eager or compiled, and the memory that they may use (None: the device's default)."""

    statistics: Callable = pair_statistics
    gradient: Callable = pair_gradient
    budget: Budget | None = None

    @classmethod
    def compiled(cls) -> Kernels:
        """Both passes through ``torch.compile``; they have no graph break."""
        return cls(torch.compile(pair_statistics, fullgraph=True), torch.compile(pair_gradient, fullgraph=True))


@dataclass(frozen=True)
class Solution:
    """One step of the estimator. Columns are the directions: image anchors, text anchors.

    ``log_u``       [B, 2], after the update, duplicates merged; equal on all ranks.
    ``pull``        [b, 2], sum_j W_ij m_ij / (tau_i (B - 1)) of this rank's anchors; zeros without ``moments``.
    ``grad_image``  [b, d], this rank's rows of dF/dImage for W weighted by ``weight``; ``grad_text`` the same.
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
    """Update the inner estimates of the global batch and take the gradient with respect to this rank's embeddings.

    ``index``         int64 [B], the global batch's samples.
    ``old_log_u``     [B, 2], NaN for never seen; None where no u is kept (gamma is 1 in every epoch).
    ``inverse_tau``   0-d for a shared temperature, [B, 2] for individual ones.
    ``weight_by_inverse_tau``  weigh each anchor's row by its 1/tau (objectives not multiplied by tau).

    Two collectives: the embeddings, then the 2B values of log u. Call it without gradients, in ``exact_float32``.
    """
    image, text = inputs.image.detach().float(), inputs.text.detach().float()
    width = image.shape[1]
    x, y = image, text
    if inputs.ref_image is not None:
        x = torch.cat([image, -inputs.ref_image.float()], 1)
        y = torch.cat([text, inputs.ref_text.float()], 1)
    k, b = collectives.world_size(), len(x)
    batch = k * b
    own = slice(collectives.rank() * b, (collectives.rank() + 1) * b)
    if k == 1:
        all_x, all_y = x, y
    else:
        all_x, all_y = collectives.all_gather(torch.cat([x, y], 1)).chunk(2, dim=1)
    diagonal = torch.einsum("ij,ij->i", all_x, all_y)
    groups = duplicate_groups(index)

    # A shared temperature scales x once instead of every pair; the text gradient is divided by it at the end.
    shared = inverse_tau.ndim == 0
    if shared:
        all_x = all_x * inverse_tau
        row_scales = column_scales = (None, None)
        exponent = (diagonal * inverse_tau)[:, None].expand(-1, 2)
    else:
        row_scales, column_scales = inverse_tau[own].unbind(1), inverse_tau.unbind(1)
        exponent = diagonal[:, None] * inverse_tau
    own_x = all_x[own]

    options = {"columns": k == 1, "budget": kernels.budget or Budget.default(x.device)}
    # Rows of the first block are image anchors; of the second, which one process does not need, text anchors.
    blocks = [(own_x, all_y, groups[own], groups, row_scales[0], column_scales[1])]
    if k > 1:
        blocks.append((y, all_x, groups[own], groups, row_scales[1], column_scales[0]))

    first = [kernels.statistics(*block, moments=moments, **options) for block in blocks]
    image_anchors, text_anchors = first[0][:2] if k == 1 else (first[0][0], first[1][0])
    lse = torch.stack([image_anchors.lse, text_anchors.lse], 1)
    mean = torch.stack([image_anchors.mean, text_anchors.mean], 1)
    log_g = lse - exponent[own] - math.log(batch - 1)
    log_u = moving_average(log_g, None if old_log_u is None else old_log_u[own], gamma, eps)
    log_u = merge_duplicates(collectives.all_gather(log_u), groups)
    log_weight = inverse_tau.log() if weight_by_inverse_tau else torch.zeros_like(inverse_tau)
    shift = exponent + log_u - log_weight

    second = [
        kernels.gradient(*block, shift[own, i], shift[:, 1 - i], width=width, kept=first[i][2], **options)
        for i, block in enumerate(blocks)
    ]
    grad_image, grad_text = second[0] if k == 1 else (second[0][0], second[1][0])
    if shared:
        grad_text = grad_text / inverse_tau

    # The diagonal: every margin contains -q_ii.
    centre = (lse - shift[own]).exp().sum(1, keepdim=True)
    factor = 1.0 / (2 * batch * (batch - 1))
    return Solution(
        log_u=log_u,
        pull=(log_g - log_u[own]).exp() * (mean - exponent[own]),
        grad_image=grad_image.sub_(centre * text).mul_(factor),
        grad_text=grad_text.sub_(centre * image).mul_(factor),
    )


class AttachGradient(torch.autograd.Function):
    """A value whose gradients are known: forward returns it, backward hands each input its own, times grad."""

    @staticmethod
    def forward(ctx, value: Tensor, *inputs_and_grads: Tensor) -> Tensor:
        n = len(inputs_and_grads) // 2
        ctx.save_for_backward(*inputs_and_grads[n:])
        ctx.dtypes = [t.dtype for t in inputs_and_grads[:n]]
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        grads = [(grad * g).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return (None, *grads, *([None] * len(grads)))
