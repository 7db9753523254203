"""FastCLIP v0, v1, v3 (arXiv:2407.01445) and, with reference embeddings, DRRho-CLIP (arXiv:2505.06699).

There is one temperature for all samples, the model's. Averaged over both directions, the objectives are

    v0, v1:  F = (mean log u1 + mean log u2) / 2
    v3:      F = tau (mean log u1 + mean log u2) / 2 + rho tau          (``multiply_tau``)

v0 and v3 learn tau, v1 keeps it constant. tau is learned if the model's ``logit_scale`` requires a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from drrho_clip import collectives
from drrho_clip.collectives import Exchange
from drrho_clip.float32 import exact_float32
from drrho_clip.losses import compositional, pair_kernels
from drrho_clip.losses.gather import PairGather
from drrho_clip.losses.interface import Loss, LossEnvironment, LossInputs, LossOutput
from drrho_clip.losses.registry import LOG_U
from drrho_clip.sample_state import SampleState, StateUpdate

if TYPE_CHECKING:
    from typing_extensions import Unpack

COLUMNS = LOG_U
_PAIR_FACTORS = {"paper": 1.0, "published": 2.0}


class FastCLIP(Loss):
    """The global objectives with one temperature.

    ``state``         table with ``COLUMNS``; None if gamma is 1 in every epoch, where u is never read.
    ``gamma``         epoch -> weight of the new inner estimate, in (0, 1].
    ``eps``           is added to g; > 0.
    ``rho``           weight of the temperature's regularizer; used by ``multiply_tau`` objectives only.
    ``tau_gradient``  'paper'; or 'published' for the published code's gradient, which counts the pair term twice.
    ``gather``        how ranks exchange embeddings; None: as they are.

    ValueError, also of ``set_epoch``: a value is outside of these intervals, or gamma is below 1 without a state.
    """

    def __init__(
        self,
        *,
        state: SampleState | None,
        gamma: Callable[[int], float],
        eps: float,
        rho: float,
        multiply_tau: bool,
        tau_gradient: str = "paper",
        kernels: pair_kernels.Kernels | None = None,
        gather: PairGather | None = None,
    ) -> None:
        super().__init__()
        self.state = state
        self._gamma_of = gamma
        self.eps, self.rho, self.multiply_tau = compositional.checked_eps(eps), rho, multiply_tau
        if tau_gradient not in _PAIR_FACTORS:
            raise ValueError(f"unknown tau_gradient {tau_gradient!r}: choose {' or '.join(_PAIR_FACTORS)}")
        self._pair_factor = _PAIR_FACTORS[tau_gradient]
        self._kernels = kernels or pair_kernels.Kernels()
        self._gather = gather or PairGather()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.gamma = compositional.checked_gamma(self._gamma_of(epoch), keeps_u=self.state is not None)

    def set_progress(self, share: float) -> None:
        self._gather.progress = share

    def prepare(self, index: Tensor, reference: tuple[Tensor, Tensor] | None, device: torch.device) -> Exchange:
        return compositional.exchange(index, reference, self.state, self._gather, device)

    def forward(self, inputs: LossInputs) -> LossOutput:
        device = inputs.image.device
        with torch.no_grad(), exact_float32(device.type):
            prepared = inputs.prepared or self.prepare(inputs.require_index(), inputs.reference, device)
            exchanged = prepared.wait()
            old_log_u = None
            if self.state is not None:
                old_log_u = torch.stack([exchanged[name] for name in COLUMNS], 1)
            scale = inputs.logit_scale.detach().float()
            solution = compositional.solve(
                inputs,
                exchanged,
                old_log_u,
                scale,
                weight_by_inverse_tau=not self.multiply_tau,
                gamma=torch.full((), self.gamma, device=device),
                eps=self.eps,
                moments=inputs.logit_scale.requires_grad,
                kernels=self._kernels,
                gather=self._gather,
            )
            value = solution.log_u.mean()
            if self.multiply_tau:
                value = (value + self.rho) / scale
            gradients = solution.grad_image, solution.grad_text, self._grad_scale(solution, scale)
        loss = compositional.AttachGradient.apply(value, inputs.image, inputs.text, inputs.logit_scale, *gradients)
        update = StateUpdate(exchanged["index"], dict(zip(COLUMNS, solution.log_u.unbind(1), strict=True)))
        return LossOutput({"contrastive_loss": loss}, update if self.state is not None else None)

    def _grad_scale(self, solution: compositional.Solution, scale: Tensor) -> Tensor:
        """This rank's part of dF/d(1/tau) = -tau^2 dF/dtau, multiplied by K as in ``Solution``."""
        batch, k = len(solution.log_u), collectives.world_size()
        tau = 1 / scale
        pair = self._pair_factor * solution.mean_margin.sum() / (2 * batch)
        if not self.multiply_tau:
            return k * tau * pair
        first = collectives.rank() * len(solution.mean_margin)
        log_u = solution.log_u[first : first + len(solution.mean_margin)].sum() / (2 * batch)
        return -(tau**2) * (k * (log_u - pair) + self.rho)


def build(
    environment: LossEnvironment,
    *,
    multiply_tau: bool,
    tau_gradient: str,
    **estimator: Unpack[compositional.EstimatorSettings],
) -> FastCLIP:
    """For the registry. ``estimator``: settings for ``compositional.estimator``; the others are ``FastCLIP``'s."""
    return FastCLIP(
        state=environment.state,
        **compositional.estimator(environment, **estimator),
        multiply_tau=multiply_tau,
        tau_gradient=tau_gradient,
    )
