"""DRRho risk minimization (arXiv:2505.06699) for any model and any loss that has a value per sample.

The DRRho risk is the distributionally robust risk of the RHO loss m(w, z) = l(w, z) - l(w_ref, z), a sample's loss
under the model that is trained minus its loss under a frozen reference:

    F(w) = max_q  sum_i q_i m(w, z_i)        over weights q of the n training samples near the uniform ones.

Without a reference it is the robust risk of the loss itself (DRO). "Near" is one of three divergences
(``worst_case`` has the formulas), and there are three kinds of estimators:

* ``KLRegularized``, ``KLConstrained``, ``CVaR``: F of the samples of the global batch in place of all n. They keep
  nothing. As F maximizes over q, or minimizes over a dual variable, their mean over batches is at most F: the
  batch seems less bad than the worst case of all samples, by O(1/B) for the regularized one with a fixed tau.
* ``MovingAverageKLRegularized``, ``MovingAverageKLConstrained``, ``ThresholdCVaR``: F of all n samples from
  batches of any size, with one scalar kept between steps.
* ``PerSampleKLRegularized``, ``PerSampleKLConstrained``, ``PerSampleCVaR``: the mean of n risks, one for each
  sample, as contrastive learning has them (an anchor's risk over its negatives), with one scalar kept per sample.

All are modules that give a 0-d tensor to call ``backward`` on:

    risk = KLRegularized(tau=1.0)
    value = risk(losses, reference_losses)  # [b] each, on this rank

Computation is in float32 at least, whatever autocast says. With several ranks, which all have the same b, the
value is that of the global batch and equal on all of them. The gradient for a rank's losses is multiplied by K,
because DDP averages over the ranks; the gradient for a risk's own parameters (tau, lambda) is complete on every
rank, so that they need no DDP.
``reference_losses`` get no gradient. A loss that is not finite makes the value not finite, and no state is changed
then.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from drrho_clip import collectives, worst_case
from drrho_clip.float32 import exact_float32
from drrho_clip.losses import compositional
from drrho_clip.sample_state import SampleState, StateUpdate


class _OfBatch(nn.Module):
    """The risk of the global batch, without any state."""

    def forward(self, losses: Tensor, reference_losses: Tensor | None = None) -> Tensor:
        """``losses``, ``reference_losses``: [b]. ValueError: they have other shapes."""
        with exact_float32(losses.device.type):
            return self._risk(_of_all_ranks(_margins(losses, reference_losses, 1)))

    def weights(self, losses: Tensor, reference_losses: Tensor | None = None) -> Tensor:
        """The worst-case weights q of this rank's samples, [b]; over all ranks their sum is 1."""
        with exact_float32(losses.device.type):
            margins = collectives.all_gather(_margins(losses, reference_losses, 1))
            return _own(self._weights(margins), losses)

    def _weights(self, margins: Tensor) -> Tensor:
        """[B] -> [B], without a graph."""
        raise NotImplementedError

    def _risk(self, margins: Tensor) -> Tensor:
        """[B] -> 0-d: the mean under the weights, where they are all that the gradient needs."""
        peak = margins.detach().amax()  # so that rounding in the sum of the weights does not count with m's size
        return peak + (self._weights(margins) * (margins - peak)).sum()


class KLRegularized(_OfBatch):
    """tau log (1/B sum_i exp(m_i / tau)), the risk with the penalty tau KL(q), of the global batch.

    Estimates F of all samples from below: E[value] <= F. The difference is tau / (2B) times the variance of
    exp(m / tau) over its squared mean, and smaller terms. The gradient is sum_i q_i grad m_i, q the batch's
    softmax(m / tau). For tau -> infinity it is the mean, for tau -> 0 the largest.

    ``tau``   > 0, in units of the loss.
    """

    def __init__(self, tau: float) -> None:
        super().__init__()
        self.tau = _positive("tau", tau)

    def _weights(self, margins: Tensor) -> Tensor:
        return worst_case.kl_regularized(margins, self.tau)

    def _risk(self, margins: Tensor) -> Tensor:
        peak = margins.detach().amax()
        return peak + self.tau * _log_mean_exp((margins - peak) / self.tau)


class KLConstrained(_OfBatch):
    """min_tau tau log (1/B sum_i exp(m_i / tau)) + tau rho, the risk over KL(q) <= rho, of the global batch.

    tau is solved for in each call. Estimates F of all samples from below: E[value] <= F, because the minimum is
    taken for each batch. The gradient is sum_i q_i grad m_i, q the batch's worst-case weights (taken as constants:
    there is no second derivative). With rho = 0 it is the mean, with rho >= log B the largest.

    ``rho``   >= 0, the radius. (The paper writes it rho / n.)
    """

    def __init__(self, rho: float) -> None:
        super().__init__()
        self.rho = _radius(rho)

    def _weights(self, margins: Tensor) -> Tensor:
        return worst_case.kl_constrained(margins, self.rho)


class CVaR(_OfBatch):
    """min_l l + 1/(alpha B) sum_i (m_i - l)_+, the mean of the largest share alpha of the global batch.

    With a reference this is the selection of the top share by RHO loss. Estimates F of all samples from below:
    E[value] <= F. The gradient is sum_i q_i grad m_i with q_i = 1/(alpha B) on the largest alpha B margins.

    ``alpha``   in (0, 1]. 1 is the mean; 1/B and less is the largest.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = _share("alpha", alpha)

    def _weights(self, margins: Tensor) -> Tensor:
        return worst_case.cvar(margins, self.alpha)


class _MovingAverageKL(nn.Module):
    """tau (log u + rho), u a moving average of g = 1/B sum_i exp(m_i / tau) over steps."""

    log_u: Tensor

    def __init__(self, gamma: float, rho: float) -> None:
        super().__init__()
        self.gamma, self.rho = _share("gamma", gamma), rho
        self.register_buffer("log_u", torch.tensor(math.nan))

    def _value(self, losses: Tensor, reference_losses: Tensor | None, tau: Tensor | float) -> Tensor:
        with exact_float32(losses.device.type):
            margins = _of_all_ranks(_margins(losses, reference_losses, 1))
            log_g = _log_g(margins, tau)
            log_u = _moving_average(log_g, self.log_u, self.gamma, eps=0.0)
            # u is a constant, so that the gradient through g is that of tau g / u.
            constant_tau = tau.detach() if isinstance(tau, Tensor) else tau
            value = tau * (log_u + self.rho) + constant_tau * _gradient_alone((log_g - log_u).exp())
            if self.training:
                with torch.no_grad():
                    self.log_u.copy_(torch.where(value.isfinite(), log_u, self.log_u))
            return value


class MovingAverageKLRegularized(_MovingAverageKL):
    """tau log u, the KL-regularized risk of all n samples, with u <- (1 - gamma) u + gamma g kept between steps.

    g = 1/B sum_i exp(m_i / tau) is an unbiased estimate of what F has under its logarithm, and u averages it over
    some 1/gamma steps (u = g at first). For a fixed model the value is still below F on average, by gamma /
    (2 - gamma) of ``KLRegularized``'s difference; while the model changes, u is late. The gradient is
    1/B sum_i exp(m_i / tau) / u grad m_i, with u after its update and taken as a constant (stochastic
    compositional optimization, as in SogCLR). The weights' sum is at most 1/gamma.

    ``tau``     > 0, in units of the loss.
    ``gamma``   in (0, 1]; 1 is ``KLRegularized``. The attribute may be changed at any time (``schedules.gamma``).

    The state is the buffer ``log_u``, NaN before the first call. It changes in training mode only.
    """

    def __init__(self, tau: float, gamma: float) -> None:
        super().__init__(gamma, 0.0)
        self.tau = _positive("tau", tau)

    def forward(self, losses: Tensor, reference_losses: Tensor | None = None) -> Tensor:
        """``losses``, ``reference_losses``: [b]. ValueError: they have other shapes."""
        return self._value(losses, reference_losses, self.tau)


class MovingAverageKLConstrained(_MovingAverageKL):
    """tau log u + tau rho, the KL-constrained risk of all n samples, minimized over the model and tau together.

    For any tau it estimates an upper bound on F, which is F at the best tau. u, its bias and the gradient for the
    model are those of ``MovingAverageKLRegularized``; the gradient for tau, with u as a constant, is
    log u + rho - 1/B sum_i exp(m_i / tau) / u m_i / tau.

    ``rho``     >= 0, the radius. (The paper writes it rho / n.)
    ``gamma``   in (0, 1], as for ``MovingAverageKLRegularized``.
    ``tau``     > 0, the first value. The parameter is its logarithm, ``log_tau``: give ``risk.parameters()`` to an
                optimizer, with no weight decay.
    """

    def __init__(self, rho: float, gamma: float, tau: float = 1.0) -> None:
        super().__init__(gamma, _radius(rho))
        self.log_tau = nn.Parameter(torch.tensor(_positive("tau", tau)).log())

    @property
    def tau(self) -> Tensor:
        """The temperature, a 0-d tensor with a graph to ``log_tau``."""
        return self.log_tau.exp()

    def forward(self, losses: Tensor, reference_losses: Tensor | None = None) -> Tensor:
        """``losses``, ``reference_losses``: [b]. ValueError: they have other shapes."""
        return self._value(losses, reference_losses, self.tau)


class ThresholdCVaR(nn.Module):
    """lambda + 1/(alpha B) sum_i (m_i - lambda)_+, minimized over the model and lambda together.

    Rockafellar and Uryasev's dual. For any lambda it is an unbiased estimate of an upper bound on the CVaR of all
    n samples, which is equal to it where lambda is their upper alpha-quantile; so are its gradients: 1/(alpha B)
    times grad m_i of the samples above lambda, and for lambda one minus 1/alpha times their share.

    ``alpha``   in (0, 1].

    The parameter is ``threshold``, lambda, in units of the loss: give ``risk.parameters()`` to an optimizer, with
    no weight decay. It is NaN before the first call in training mode, which takes the batch's quantile.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = _share("alpha", alpha)
        self.threshold = nn.Parameter(torch.tensor(math.nan))

    def forward(self, losses: Tensor, reference_losses: Tensor | None = None) -> Tensor:
        """``losses``, ``reference_losses``: [b]. ValueError: they have other shapes."""
        with exact_float32(losses.device.type):
            margins = _of_all_ranks(_margins(losses, reference_losses, 1))
            first = worst_case.threshold(margins, self.alpha).squeeze(-1)
            if self.training:
                with torch.no_grad():
                    missing = self.threshold.isnan() & first.isfinite()
                    self.threshold.copy_(torch.where(missing, first, self.threshold))
            return self.threshold + (margins - self.threshold).relu().mean() / self.alpha


class _PerSample(nn.Module):
    """A risk for each sample over c others, with one value kept per sample, which is in ``state_dict``."""

    def __init__(self, num_samples: int, column: str, device: torch.device | str) -> None:
        super().__init__()
        self.state = SampleState(num_samples, (column,), device)

    def forward(self, losses: Tensor, reference_losses: Tensor | None = None, *, index: Tensor) -> Tensor:
        """``losses``, ``reference_losses``: [b, c], the c losses of each of this rank's samples.

        A margin of -inf counts as nothing but stays one of the c: for copies of an anchor among its negatives.
        ``index``: int64 [b], the samples' rows in the state. ValueError: other shapes. IndexError: ``index`` is on
        the CPU and outside 0..n-1.
        """
        with exact_float32(losses.device.type):
            margins = _margins(losses, reference_losses, 2)
            if index.shape != losses.shape[:1]:
                raise ValueError(
                    f"index has shape {tuple(index.shape)}, losses {tuple(losses.shape)}: give one for each row"
                )
            everywhere, stored = self.state.fetch(index)
            everywhere = everywhere.to(margins.device)
            ((column, old),) = stored.items()
            value, new = self._risk(
                margins, _own(old.to(margins.device), margins), compositional.duplicate_groups(everywhere)
            )
            if self.training:
                self.state.commit(StateUpdate(everywhere, {column: new}), new.isfinite().all())
            return value

    def _risk(self, margins: Tensor, old: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The value, 0-d, and the new values, [B]. From [b, c], the old values [b], ``duplicate_groups`` [B]."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: column for name, column in self.state.state_dict().items()})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *lists: Any
    ) -> None:
        columns = {name: state_dict.pop(prefix + name, None) for name in self.state.columns}
        if absent := [prefix + name for name, column in columns.items() if column is None]:
            missing += absent
        else:
            self.state.load_state_dict(columns)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *lists)


class _PerSampleKL(_PerSample):
    """The mean over samples of tau (log u_i + rho), u_i a moving average over the visits of sample i."""

    def __init__(self, num_samples: int, gamma: float, eps: float, rho: float, device: torch.device | str) -> None:
        super().__init__(num_samples, "log_u", device)
        if not eps >= 0:
            raise ValueError(f"eps {eps} is negative: give 0 or more")
        self.gamma, self.eps, self.rho = _share("gamma", gamma), eps, rho

    def _kl_risk(self, margins: Tensor, old: Tensor, groups: Tensor, tau: Tensor | float) -> tuple[Tensor, Tensor]:
        constant_tau = tau.detach() if isinstance(tau, Tensor) else tau
        log_g = _log_g(margins, constant_tau)
        log_u = collectives.all_gather(_moving_average(log_g, old, self.gamma, self.eps))
        log_u = compositional.merge_duplicates(log_u[:, None], groups).squeeze(1)
        ratio = (log_g - _own(log_u, margins)).exp()
        value = tau * (log_u.mean() + self.rho) + constant_tau * _gradient_alone(ratio.mean())
        if isinstance(tau, Tensor):
            # The rows of other ranks are not here, so that autograd would find this rank's part alone.
            weights = worst_case.kl_regularized(margins, constant_tau)
            mean = torch.where(weights > 0, weights * margins.detach(), 0).sum(-1)
            of_all = collectives.all_reduce_sum((ratio.detach() * mean).sum()) / len(log_u)
            value = value - _gradient_alone(tau) / constant_tau * of_all
        return value, log_u


class PerSampleKLRegularized(_PerSampleKL):
    """1/n sum_i tau log u_i, the mean of n KL-regularized risks: each sample's, over what it is compared with.

    For a contrastive loss, i is an anchor and m_ij the RHO loss of its pair with negative j, the margin of
    docs/objective.md: this is SogCLR's objective (with a reference DRRho-CLIP's) for one direction. A batch gives
    g_i = 1/c sum_j exp(m_ij / tau) for its B anchors, and u_i <- (1 - gamma) u_i + gamma (eps + g_i) at each visit
    of i (eps + g_i at its first). The gradient is 1/B sum_i 1/c sum_j exp(m_ij / tau) / u_i grad m_ij, with u as a
    constant. For a fixed model, u_i is unbiased for eps + the mean over all j, and the bias of the logarithm goes
    away with gamma. Copies of a sample in one global batch leave the mean of their u.

    ``num_samples``  n, the number of rows; ``state`` (a ``SampleState``) holds n / K of them on each rank, on
                     ``device``. The process group comes first. They are in ``state_dict``, with several ranks as
                     DTensors, and change in training mode only.
    ``tau``          > 0.
    ``gamma``        in (0, 1]; 1 uses the batch alone.
    ``eps``          >= 0, keeps u away from zero.
    """

    def __init__(
        self,
        num_samples: int,
        tau: float,
        gamma: float,
        eps: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(num_samples, gamma, eps, 0.0, device)
        self.tau = _positive("tau", tau)

    def _risk(self, margins: Tensor, old: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        return self._kl_risk(margins, old, groups, self.tau)


class PerSampleKLConstrained(_PerSampleKL):
    """1/n sum_i tau log u_i + tau rho: n KL-constrained risks under one tau, minimized over the model and tau.

    For a contrastive loss it is RGCL-g, FastCLIP-v3's objective (with a reference DRRho-CLIP's), for one
    direction. One tau for all samples makes it an upper bound on the mean of the n risks over KL(q) <= rho. u and
    the gradient for the model are those of ``PerSampleKLRegularized``; for tau, with u as a constant, it is mean_i
    (log u_i + rho - 1/c sum_j exp(m_ij / tau) / u_i m_ij / tau).

    ``rho``   >= 0, the radius. The other arguments are ``PerSampleKLRegularized``'s; ``tau`` is the first value of
              the parameter ``log_tau``: give ``risk.parameters()`` to an optimizer, with no weight decay.
    """

    def __init__(
        self,
        num_samples: int,
        rho: float,
        gamma: float,
        tau: float = 1.0,
        eps: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(num_samples, gamma, eps, _radius(rho), device)
        self.log_tau = nn.Parameter(torch.tensor(_positive("tau", tau), device=device).log())

    @property
    def tau(self) -> Tensor:
        """The temperature, a 0-d tensor with a graph to ``log_tau``."""
        return self.log_tau.exp()

    def _risk(self, margins: Tensor, old: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        return self._kl_risk(margins, old, groups, self.tau)


class PerSampleCVaR(_PerSample):
    """1/n sum_i l_i + 1/(alpha c) sum_j (m_ij - l_i)_+, n CVaRs: each sample's, over what it is compared with.

    The dual of ``ThresholdCVaR``, with a lambda per sample, l_i, that takes a step of its own at each visit: l_i
    <- l_i - lr (1 - s_i / alpha), s_i the share of its margins above l_i (the first visit starts at their
    quantile). For the l_i that it has before the step, value and gradient, 1/(alpha c B) times grad m_ij of the
    margins above, are unbiased estimates of those of an upper bound on the mean CVaR, which is equal to it at the
    best l_i. Copies of a sample in one global batch leave the mean of theirs.

    ``alpha``   in (0, 1].
    ``lr``      > 0, in units of the loss; as small as l_i is to be exact.

    The state is the column ``threshold``; ``num_samples`` and ``device`` are ``PerSampleKLRegularized``'s.
    """

    def __init__(self, num_samples: int, alpha: float, lr: float, device: torch.device | str = "cpu") -> None:
        super().__init__(num_samples, "threshold", device)
        self.alpha, self.lr = _share("alpha", alpha), _positive("lr", lr)

    def _risk(self, margins: Tensor, old: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        threshold = torch.where(old.isnan(), worst_case.threshold(margins, self.alpha).squeeze(-1), old)
        own = threshold + (margins - threshold[:, None]).relu().mean(-1) / self.alpha
        of_all = collectives.all_reduce_sum(own.detach().sum()) / len(groups)
        share = (margins > threshold[:, None]).to(threshold.dtype).mean(-1)
        new = collectives.all_gather(threshold - self.lr * (1 - share / self.alpha))
        return of_all + _gradient_alone(own.mean()), compositional.mean_of_copies(new[:, None], groups).squeeze(1)


def _margins(losses: Tensor, reference_losses: Tensor | None, dimensions: int) -> Tensor:
    """RHO losses, in float32 or a wider type. ValueError: other dimensions, or the two differ in shape."""
    if losses.ndim != dimensions or not losses.numel():
        raise ValueError(
            f"losses has shape {tuple(losses.shape)}: give {'[b], one' if dimensions == 1 else '[b, c], c'} for "
            "each sample (reduction='none')"
        )
    wide = torch.promote_types(losses.dtype, torch.float32)
    if reference_losses is None:
        return losses.to(wide)
    if reference_losses.shape != losses.shape:
        raise ValueError(
            f"reference_losses has shape {tuple(reference_losses.shape)}, losses {tuple(losses.shape)}: give the "
            "two models' losses of the same samples"
        )
    return losses.to(wide) - reference_losses.detach().to(wide)


def _of_all_ranks(margins: Tensor) -> Tensor:
    """[b] -> [B] in rank order, with a graph to this rank's, whose gradient is multiplied by K."""
    k = collectives.world_size()
    if k == 1:
        return margins
    parts = list(collectives.all_gather(margins).chunk(k))
    parts[collectives.rank()] = margins.detach() + k * _gradient_alone(margins)
    return torch.cat(parts)


def _own(everywhere: Tensor, own: Tensor) -> Tensor:
    """This rank's part [b] of [B]; ``own``: [b, ...]."""
    return everywhere[collectives.rank() * len(own) :][: len(own)]


def _gradient_alone(x: Tensor) -> Tensor:
    """Zero, with the gradient of ``x``."""
    return x - x.detach()


def _log_g(margins: Tensor, tau: Tensor | float) -> Tensor:
    """log (1/n sum_i exp(m_i / tau)) over the last dimension, [..., n] -> [...]."""
    peak = margins.detach().amax(-1)
    return peak / tau + _log_mean_exp((margins - peak[..., None]) / tau)


def _log_mean_exp(x: Tensor) -> Tensor:
    """For x <= 0 with a largest element of 0; where all are small the error is relative to the result's size."""
    rise = x.expm1().mean(-1)
    return torch.where(rise > -0.5, rise.clamp_min(-0.5).log1p(), x.logsumexp(-1) - math.log(x.shape[-1]))


def _moving_average(log_g: Tensor, log_u: Tensor, gamma: float, eps: float) -> Tensor:
    """The logarithm of u after its update, without a graph, in the type of ``log_u``."""
    weight = torch.full((), gamma, dtype=log_u.dtype, device=log_g.device)
    return compositional.moving_average(log_g.detach().to(log_u.dtype), log_u, weight, eps)


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} {value} is not above 0 and finite: give one in units of the loss")
    return value


def _radius(rho: float) -> float:
    if not 0 <= rho < math.inf:
        raise ValueError(f"rho {rho} is no radius of KL(q): give 0 or more, in nats")
    return rho


def _share(name: str, value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError(f"{name} {value} is not a share: give one above 0 and at most 1")
    return value
