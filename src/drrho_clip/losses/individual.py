"""FastCLIP v2: one temperature per sample and direction (iSogCLR with a gamma schedule, arXiv:2407.01445).

The gradient of the embeddings is that of mean log u, with each anchor's row divided by its tau_i. The gradient of
the temperature is that of tau_i (log u_i + rho). An Adam step applies it, with moments that are kept per sample:

    grad_i = log u_i + rho - sum_j W_ij m_ij / (tau_i (B - 1)),  clamped to [-5, 5]
    m_i <- beta1 m_i + (1 - beta1) grad_i        v_i <- beta2 v_i + (1 - beta2) grad_i^2
    tau_i <- tau_i - lr m^_i / (sqrt(v^_i) + eps),  clamped to [0.01, 1]

The bias correction counts epoch + 1 steps, and beta1 = beta2 = 0 in epoch 0. W, u and the gradient of the
embeddings use tau_i from before the step. The copies of a sample in a batch take one step with the mean of their
gradients.
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
from drrho_clip.losses.registry import INDIVIDUAL_TAU, LOG_U, TAU, TAU_M, TAU_V
from drrho_clip.sample_state import SampleState, StateUpdate

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The columns for gamma = 1 in every epoch, where u is never read.
TEMPERATURE_COLUMNS = TAU + TAU_M + TAU_V
COLUMNS = LOG_U + TEMPERATURE_COLUMNS

GRAD_BOUND = 5.0


class IndividualFastCLIP(Loss):
    """The robust objective with individual temperatures.

    ``state``        table with ``COLUMNS``, or with ``TEMPERATURE_COLUMNS`` if gamma is 1 in every epoch.
    ``temperature``  the initial value of each tau_i. ``rho``, ``eps``, ``gamma`` as in ``FastCLIP``.
    ``lr_tau``       the temperatures' learning rate, until ``set_temperature_rate`` changes it.
    ``gather``       as in ``FastCLIP``.
    ``betas``, ``adam_eps``  of the temperatures' Adam step; ``betas`` from epoch 1 on.
    """

    state: SampleState

    def __init__(
        self,
        *,
        state: SampleState,
        gamma: Callable[[int], float],
        eps: float,
        rho: float,
        temperature: float,
        betas: tuple[float, float],
        adam_eps: float,
        lr_tau: float,
        kernels: pair_kernels.Kernels | None = None,
        gather: PairGather | None = None,
    ) -> None:
        super().__init__()
        self.state = state
        self._gamma_of = gamma
        self.eps, self.rho, self.temperature = compositional.checked_eps(eps), rho, temperature
        self.betas, self.adam_eps, self.lr_tau = betas, adam_eps, lr_tau
        self._keeps_u = set(LOG_U) <= set(state.columns)
        self._kernels = kernels or pair_kernels.Kernels()
        self._gather = gather or PairGather()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.gamma = compositional.checked_gamma(self._gamma_of(epoch), keeps_u=self._keeps_u)

    def set_temperature_rate(self, lr_tau: float) -> None:
        self.lr_tau = lr_tau

    def set_progress(self, share: float) -> None:
        self._gather.progress = share

    def prepare(self, index: Tensor, reference: tuple[Tensor, Tensor] | None, device: torch.device) -> Exchange:
        return compositional.exchange(index, reference, self.state, self._gather, device)

    def forward(self, inputs: LossInputs) -> LossOutput:
        device = inputs.image.device
        with torch.no_grad(), exact_float32(device.type):
            prepared = inputs.prepared or self.prepare(inputs.require_index(), inputs.reference, device)
            exchanged = prepared.wait()
            index = exchanged["index"]

            def pair(names: tuple[str, str]) -> Tensor:
                return torch.stack([exchanged[name] for name in names], 1)

            tau = pair(TAU)
            tau = torch.where(tau.isnan(), self.temperature, tau)
            solution = compositional.solve(
                inputs,
                exchanged,
                pair(LOG_U) if self._keeps_u else None,
                1 / tau,
                weight_by_inverse_tau=True,
                gamma=torch.full((), self.gamma, device=device),
                eps=self.eps,
                moments=True,
                kernels=self._kernels,
                gather=self._gather,
            )
            value = (tau * (solution.log_u + self.rho)).mean()
            gradients = solution.grad_image, solution.grad_text
            stepped = self._step_temperatures(index, tau, pair(TAU_M), pair(TAU_V), solution)
        loss = compositional.AttachGradient.apply(value, inputs.image, inputs.text, *gradients)
        if self._keeps_u:
            stepped[LOG_U] = solution.log_u
        update = {name: pairs[:, i] for names, pairs in stepped.items() for i, name in enumerate(names)}
        return LossOutput({"contrastive_loss": loss}, StateUpdate(index, update), {"mean_tau": tau.mean()})

    def _step_temperatures(
        self, index: Tensor, tau: Tensor, m: Tensor, v: Tensor, solution: compositional.Solution
    ) -> dict[tuple[str, str], Tensor]:
        """One Adam step for the temperatures of the samples ``index``, int64 [B]; the other tensors are [B, 2].

        It takes one more collective, which gathers the b gradients of each rank.
        """
        b = len(solution.mean_margin)
        first = collectives.rank() * b
        own = solution.log_u[first : first + b] + self.rho - solution.mean_margin
        grad = collectives.all_gather(own.clamp(-GRAD_BOUND, GRAD_BOUND))
        grad = compositional.mean_of_copies(grad, compositional.duplicate_groups(index))
        beta1, beta2 = self.betas if self.epoch > 0 else (0.0, 0.0)
        m = beta1 * m.nan_to_num(0.0) + (1 - beta1) * grad
        v = beta2 * v.nan_to_num(0.0) + (1 - beta2) * grad.square()
        m_hat = m / (1 - beta1 ** (self.epoch + 1))
        v_hat = v / (1 - beta2 ** (self.epoch + 1))
        tau = (tau - self.lr_tau * m_hat / (v_hat.sqrt() + self.adam_eps)).clamp(*INDIVIDUAL_TAU)
        return {TAU: tau, TAU_M: m, TAU_V: v}


def build(
    environment: LossEnvironment,
    *,
    temperature: float,
    beta1: float,
    beta2: float,
    adam_eps: float,
    lr_tau: float,
    **estimator: Unpack[compositional.EstimatorSettings],
) -> IndividualFastCLIP:
    """For the registry. ``estimator``: settings for ``compositional.estimator``; the others are the class's.

    ValueError: the environment has no sample state.
    """
    if environment.state is None:
        raise ValueError("individual temperatures are kept in the sample state, and the environment has none")
    return IndividualFastCLIP(
        state=environment.state,
        **compositional.estimator(environment, **estimator),
        temperature=temperature,
        betas=(beta1, beta2),
        adam_eps=adam_eps,
        lr_tau=lr_tau,
    )
