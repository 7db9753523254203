"""The objectives as the papers write them: dense, in float64, u kept linearly, gradients by autograd.

Slow and direct on purpose. The estimator treats u as a constant, so that the gradient of (mean of g / u) with u
detached is that of mean log u.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Step:
    """What one step gives: u [B, 2] after the update, sum_j W_ij m_ij / tau / (B - 1) [B, 2], gradients."""

    u: Tensor
    mean_margin: Tensor
    grad_image: Tensor
    grad_text: Tensor


def step(
    image: Tensor,
    text: Tensor,
    index: Tensor,
    tau: Tensor,
    old_u: Tensor,
    *,
    gamma: float,
    eps: float,
    weight: Tensor,
    ref_image: Tensor | None = None,
    ref_text: Tensor | None = None,
) -> Step:
    """``tau`` [B, 2] per direction, ``old_u`` [B, 2] with NaN for never seen, ``weight`` [B, 2] of each anchor.

    The gradients are of sum_i weight_i tau_i log u_i / (2B), the multiply_tau form for weight 1.
    """
    image = image.detach().double().requires_grad_()
    text = text.detach().double().requires_grad_()
    tau, old_u, weight = tau.double(), old_u.double(), weight.double()
    batch = len(index)
    s = image @ text.T
    r = torch.zeros_like(s) if ref_image is None else ref_image.double() @ ref_text.double().T
    own = s.diagonal() - r.diagonal()
    margins = [(s - r) - own[:, None], (s - r).T - own[:, None]]
    negatives = index[:, None] != index[None, :]
    gs, pairs = [], []
    for direction, margin in enumerate(margins):
        e = torch.where(negatives, (margin / tau[:, direction, None]).exp(), 0.0)
        gs.append(e.sum(1) / (batch - 1))
        pairs.append((e * torch.where(negatives, margin, 0.0)).sum(1))
    g = torch.stack(gs, 1)
    fresh = eps + g.detach()
    u = torch.where(old_u.isnan(), fresh, (1 - gamma) * old_u + gamma * fresh)
    for value in index.unique():
        u[index == value] = u[index == value].mean(0)
    (weight * tau * g / u).sum().div(2 * batch).backward()
    mean_margin = torch.stack(pairs, 1).detach() / u / tau / (batch - 1)
    return Step(u, mean_margin, image.grad, text.grad)
