"""The worst-case weights of a sample: what distributionally robust optimization maximizes over.

For margins m of n samples, a robust risk is the largest mean of m under weights q, non-negative and of sum 1, that
stay near the uniform ones:

    KL-regularized  max sum_i q_i m_i - tau KL(q)           = tau log (1/n sum_i exp(m_i / tau))
    KL-constrained  max sum_i q_i m_i,  KL(q) <= rho        = min_tau tau log (1/n sum_i exp(m_i / tau)) + tau rho
    CVaR            max sum_i q_i m_i,  q_i <= 1/(alpha n)  = min_l l + 1/(alpha n) sum_i (m_i - l)_+

with KL(q) = sum_i q_i log(n q_i). The left sides are the primal problems, the right sides their duals. By
Danskin's theorem, a risk's gradient with respect to m is its q. All functions take [..., n], work along the last
dimension, do not wait for the device, and have no gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_POINTS, _ROUNDS = 16, 9  # 15^9 parts of the logarithm of the interval that tau is searched in
_SHARPEST = 1e12


@torch.no_grad()
def kl_regularized(margins: Tensor, tau: Tensor | float) -> Tensor:
    """The weights for the penalty ``tau`` > 0 (a number, or a tensor of one): softmax(m / tau), [..., n]."""
    return ((margins - margins.amax(-1, keepdim=True)) / tau).softmax(-1)


@torch.no_grad()
def kl_constrained(margins: Tensor, rho: float) -> Tensor:
    """The weights in the ball of radius ``rho`` >= 0: softmax(m / tau) for the tau at which KL(q) = rho, [..., n].

    tau is found in float64, to a relative 1e-8, and on the side where KL(q) <= rho. Where the ball has room for
    all weight on the largest margin, that is where it lies (evenly on several that are equal), and tau is 0.
    """
    n = margins.shape[-1]
    m = margins.double()
    peak = m.amax(-1, keepdim=True)
    spread = (peak - m.amin(-1, keepdim=True)).clamp_min(torch.finfo(torch.float64).tiny)
    m = (m - peak) / spread  # in [-1, 0], so that one interval of 1/tau holds the solution of every problem
    largest = (m == 0).double()
    uniform_on_largest = largest / largest.sum(-1, keepdim=True)
    # KL(q) grows with s = 1/tau, from 0 to log(n / number of largest). It is the integral of s Var_q(m), and the
    # variance of what lies in an interval of length 1 is at most 1/4: so s^2 >= 8 rho.
    low = torch.full_like(peak, math.log(max(math.sqrt(8 * rho), 1e-150)))
    high = torch.full_like(peak, math.log(_SHARPEST)).maximum(low)
    steps = torch.linspace(0, 1, _POINTS, dtype=torch.float64, device=m.device)
    for _ in range(_ROUNDS):
        points = low + (high - low) * steps  # [..., points]
        inside = _divergence(m.unsqueeze(-2), points.exp().unsqueeze(-1)) <= rho
        last = inside.sum(-1, keepdim=True).sub_(1).clamp_(0, _POINTS - 2)
        low, high = points.gather(-1, last), points.gather(-1, last + 1)
    found = (m * low.exp()).softmax(-1)
    room = torch.log(n / largest.sum(-1, keepdim=True)) <= rho
    return torch.where(room, uniform_on_largest, found).to(margins.dtype)


def _divergence(m: Tensor, s: Tensor) -> Tensor:
    """KL(q) of q = softmax(s m), for m <= 0 with a largest element of 0: [..., n] and [..., 1] -> [...]."""
    scaled = m * s
    rise = scaled.expm1()  # so that the logarithm is exact for small s, where KL(q) is of order s^2
    weight = rise + 1
    return (weight * scaled).sum(-1) / weight.sum(-1) - rise.mean(-1).log1p()


@torch.no_grad()
def cvar(margins: Tensor, alpha: float) -> Tensor:
    """The weights 1/(alpha n) on the largest alpha n margins, 0 < alpha <= 1: [..., n].

    What is left of the sum, where alpha n is no whole number, lies on the next one. Equal margins share evenly.
    """
    mass = alpha * margins.shape[-1]
    limit = threshold(margins, alpha)
    above, at = (margins > limit).to(margins.dtype), (margins == limit).to(margins.dtype)
    rest = (mass - above.sum(-1, keepdim=True)) / at.sum(-1, keepdim=True)
    return (above + rest * at) / mass


@torch.no_grad()
def threshold(margins: Tensor, alpha: float) -> Tensor:
    """The largest l that solves CVaR's dual, an upper alpha-quantile of the margins: [..., n] -> [..., 1]."""
    k = min(max(math.ceil(alpha * margins.shape[-1]), 1), margins.shape[-1])
    return margins.topk(k, dim=-1, sorted=True).values[..., -1:]
