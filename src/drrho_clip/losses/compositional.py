"""The finite-sum coupled compositional (FCCO) core: inner estimates, their moving average, the gradient.

Notation of ``docs/objective.md``. Both margins are differences of one matrix of pairs, q = s - r:

    q_ij = <image_i, text_j> - <ref_image_i, ref_text_j>        a_ij = q_ij - q_ii        c_ij = q_ji - q_ii

Two passes over the pairs are enough (``pair_kernels``, which never stores ``q`` as a whole). The first takes the
log-sum-exp of rows and columns, which gives log g and, by a moving average over a sample's visits, log u. The
second gives

    dF/dS_ij  ~  W1_ij + W2_ji,    W1_ij = exp(a_ij / tau_i) / u1_i,    W2_ji = exp(c_ji / tau_j) / u2_j.

This takes six products of tiles with embeddings (two for q in each pass, two for the gradients), or four without a
reference.

A single process computes each pair once and takes rows and columns from the same tile. One of several ranks owns
``b`` rows and ``b`` columns: it goes through its rows, then through its columns as the rows of the transposed
problem.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drrho_clip import collectives, schedules
from drrho_clip.collectives import Exchange
from drrho_clip.losses.gather import PairGather, Pairs
from drrho_clip.losses.interface import LossEnvironment, LossInputs
from drrho_clip.losses.pair_kernels import Block, Budget, Kernels
from drrho_clip.sample_state import SampleState
from drrho_clip.schedules import ErrorBounds

if TYPE_CHECKING:
    from typing_extensions import Unpack

_UNITS = 2.0**40


def duplicate_groups(index: Tensor) -> Tensor:
    """int64 [B] -> int64 [B] in 0..B-1, equal for equal indices. The host does not wait for the device."""
    ordered, order = index.sort(stable=True)
    starts = torch.zeros_like(ordered)
    starts[1:] = (ordered[1:] != ordered[:-1]).long()
    return torch.empty_like(order).scatter_(0, order, starts.cumsum(0))


def mean_of_copies(values: Tensor, groups: Tensor) -> Tensor:
    """Give all copies of a sample the mean of their values. [B, c], groups int64 [B] -> [B, c].

    The result does not depend on the order in which a GPU adds: the values are added as integers, in units of the
    largest one's 2^-40.
    """
    at = groups[:, None].expand_as(values)
    unit = torch.zeros_like(values).scatter_reduce(0, at, values.abs(), "amax").gather(0, at) / _UNITS
    units = torch.where(values == 0, 0, values / unit).round().long()
    total = torch.zeros_like(units).scatter_add(0, at, units).gather(0, at)
    count = torch.zeros_like(units).scatter_add(0, at, torch.ones_like(units)).gather(0, at)
    return total / count * unit


def merge_duplicates(log_u: Tensor, groups: Tensor) -> Tensor:
    """Give all copies of a sample the log of the mean of their u. [B, c], groups int64 [B] -> [B, c]."""
    at = groups[:, None].expand_as(log_u)
    peak = torch.full_like(log_u, -torch.inf).scatter_reduce(0, at, log_u, "amax").gather(0, at)
    return peak + mean_of_copies((log_u - peak).exp(), groups).log()


def moving_average(log_g: Tensor, log_u: Tensor | None, gamma: Tensor, eps: float) -> Tensor:
    """log of (1 - gamma) u + gamma (eps + g), elementwise; of eps + g where u is NaN (never seen) or None."""
    fresh = torch.logaddexp(log_g, torch.full_like(log_g, eps).log())
    if log_u is None:
        return fresh
    averaged = torch.logaddexp(torch.log1p(-gamma) + log_u, gamma.log() + fresh)
    return torch.where(log_u.isnan(), fresh, averaged)


class EstimatorSettings(TypedDict):
    """A run's settings of the estimator.

    ``gamma``, ``gamma_schedule``, ``gamma_decay_epochs``: ``schedules.gamma``'s. ``eps``, ``rho``: ``FastCLIP``'s.
    ``bounds``: of the embeddings that ranks exchange; None: they are exchanged as they are.
    """

    gamma: float
    gamma_schedule: str
    gamma_decay_epochs: int
    eps: float
    rho: float
    bounds: ErrorBounds | None


class Estimator(TypedDict):
    """The keywords that all losses of this kind have in common, beside ``state``."""

    gamma: Callable[[int], float]
    eps: float
    rho: float
    kernels: Kernels
    gather: PairGather


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
        gather=PairGather(settings["bounds"]),
    )


def exchange(
    index: Tensor,
    reference: tuple[Tensor, Tensor] | None,
    state: SampleState | None,
    gather: PairGather,
    device: torch.device,
) -> Exchange:
    """Start to gather what the losses of this kind need besides the target's embeddings.

    The results: ``index`` int64 [B], the samples of the global batch; their values [B] in each column of
    ``state``; if there is a ``reference``, ``ref_image`` and ``ref_text`` [B, d_r], and ``ref_positives`` [B] if
    ``gather`` gives them. ``index`` and ``reference`` are this rank's.
    """

    def gathered() -> dict[str, Tensor]:
        if state is None:
            found = {"index": collectives.all_gather(index.to(device, non_blocking=True))}
        else:
            everywhere, values = state.fetch(index)
            found = {name: value.to(device, non_blocking=True) for name, value in values.items()}
            found["index"] = everywhere.to(device, non_blocking=True)
        if reference is not None:
            pairs = gather.reference(*reference)._asdict()
            found |= {f"ref_{name}": value for name, value in pairs.items() if value is not None}
        return found

    return Exchange(gathered, device)


@dataclass(frozen=True)
class Solution:
    """The result of one step of the estimator. The columns are the two directions: image anchors, text anchors.

    ``log_u``       [B, 2], after the update and with copies merged; equal on all ranks.
    ``mean_margin`` [b, 2], sum_j W_ij m_ij / (tau_i (B - 1)) of this rank's anchors, m the margin; divided by
                    tau_i and averaged it is P of docs/objective.md. Zeros without ``moments``.
    ``grad_image``  [b, d], ``grad_text`` [b, d]: this rank's rows of the gradient of F with weight 1 or 1/tau.
                    They are multiplied by K, because each rank has one part of the gradient and DDP averages the
                    parts.
    """

    log_u: Tensor
    mean_margin: Tensor
    grad_image: Tensor
    grad_text: Tensor


def solve(
    inputs: LossInputs,
    exchanged: Mapping[str, Tensor],
    old_log_u: Tensor | None,
    inverse_tau: Tensor,
    *,
    weight_by_inverse_tau: bool,
    gamma: Tensor,
    eps: float,
    moments: bool,
    kernels: Kernels,
    gather: PairGather,
) -> Solution:
    """Update the inner estimates of the global batch and compute the gradient for this rank's embeddings.

    ``exchanged``    the results of ``exchange``.
    ``old_log_u``    [B, 2], NaN for samples never seen; None if no u is kept (gamma is 1 in every epoch).
    ``inverse_tau``  0-d for a shared temperature, [B, 2] for individual ones.
    ``weight_by_inverse_tau``  multiply each anchor's row by its 1/tau (for objectives not multiplied by tau).

    It takes two collectives: the target's embeddings, then the 2B values of log u. Call it under ``torch.no_grad``
    and in ``exact_float32``. ValueError: the global batch has fewer than two samples.
    """
    images, texts = [inputs.image.detach().float()], [inputs.text.detach().float()]
    everyone = [gather.target(*images, *texts)]
    if (reference := inputs.reference) is not None:
        images.append(reference[0].float())
        texts.append(reference[1].float())
        everyone.append(Pairs(exchanged["ref_image"], exchanged["ref_text"], exchanged.get("ref_positives")))
    all_images, all_texts = [pairs.image for pairs in everyone], [pairs.text for pairs in everyone]
    k, b = collectives.world_size(), len(images[0])
    batch = k * b
    if batch < 2:
        raise ValueError(f"a global batch of {batch} samples has no negatives: give two or more, or leave it out")
    own = slice(collectives.rank() * b, (collectives.rank() + 1) * b)
    diagonal, *of_reference = [
        torch.einsum("ij,ij->i", x, y) if positives is None else positives for x, y, positives in everyone
    ]
    for r in of_reference:
        diagonal = diagonal - r
    groups = duplicate_groups(exchanged["index"])
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
    diagonal_weight = (lse - shift[own]).exp().sum(1, keepdim=True)
    factor = k / (2 * batch * (batch - 1))
    return Solution(
        log_u=log_u,
        mean_margin=(log_g - log_u[own]).exp() * (mean - exponent[own]),
        grad_image=grad_image.addcmul_(diagonal_weight, texts[0], value=-1).mul_(factor),
        grad_text=grad_text.addcmul_(diagonal_weight, images[0], value=-1).mul_(factor),
    )


def checked_eps(eps: float) -> float:
    """``eps``. ValueError: it is not above 0, and so u could be 0, of which there is no logarithm."""
    if not eps > 0:
        raise ValueError(f"eps {eps} is added to the inner estimates: give one above 0")
    return eps


def checked_gamma(gamma: float, *, keeps_u: bool) -> float:
    """``gamma``. ValueError: it is outside of (0, 1], or below 1 where no u is kept that it could weigh."""
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma {gamma} is the weight of the new inner estimate: give one above 0, and at most 1")
    if gamma < 1 and not keeps_u:
        raise ValueError(f"gamma {gamma} needs the samples' estimates so far: give a state, or a gamma of 1")
    return gamma


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
