"""From configuration to the objective: the loss with its sample state, and what the reference is used for."""

from __future__ import annotations

from functools import partial

import torch

from drrho_clip import losses, schedules
from drrho_clip.losses import Loss, fastclip, individual
from drrho_clip.losses.compositional import Kernels
from drrho_clip.losses.distillation import Distillation
from drrho_clip.sample_state import SampleState
from training.config.params import Config
from training.loop.task import Selection


def build_loss(config: Config, device: torch.device) -> Loss:
    """The loss that ``config.loss`` names; losses with sample state carry it as ``state``."""
    spec, c = losses.get(config.loss.name), config.loss
    gather = {"local_loss": c.local_loss, "gather_with_grad": c.gather_with_grad}
    if spec.name in ("fastclip", "fastclip_individual"):
        return spec.build(**_fastclip_settings(config, device))
    settings = {
        "clip": gather,
        "siglip": {},
        "coca": {
            "contrastive_weight": c.coca_contrastive_loss_weight,
            "caption_weight": c.coca_caption_loss_weight,
            **gather,
        },
        "distill": {"weight": c.distill_weight, "teacher_scale": c.distill_logit_scale, **gather},
    }
    return spec.build(**settings[spec.name])


def state_columns(config: Config) -> tuple[str, ...]:
    """The columns of the sample state that the configured loss keeps; none where it has no state."""
    spec = losses.get(config.loss.name)
    if not spec.sample_state:
        return ()
    u = () if config.loss.gamma == 1.0 else fastclip.COLUMNS
    return u + (individual.TEMPERATURE_COLUMNS if spec.temperature == "individual" else ())


def build_distillation(config: Config) -> Distillation | None:
    """The distillation term beside another loss; the ``distill`` baseline has its own."""
    c = config.loss
    if "distill" not in config.reference.usage or c.name == "distill":
        return None
    return Distillation(
        weight=c.distill_weight,
        teacher_scale=c.distill_logit_scale,
        multiply_tau=c.multiply_tau,
        teacher_dimensions=c.distill_teacher_dimension,
        average_after_softmax=c.distill_average_after_softmax,
    )


def constant_scale(config: Config) -> float:
    """1/tau of the margin loss where the reference is a teacher too and the flag fixes it; 0: the model's own."""
    both = {"ref", "distill"} <= config.reference.usage
    return config.loss.distill_ref_logit_scale if both else 0.0


def build_selection(config: Config) -> Selection | None:
    """Batch selection, where the reference is used for it."""
    r = config.reference
    if "select" not in r.usage:
        return None
    return Selection(keep_ratio=1 - r.ref_filter_ratio, n_chunks=r.ref_filter_n_chunks, topk=r.ref_filter_topk)


def _fastclip_settings(config: Config, device: torch.device) -> dict:
    c, columns = config.loss, state_columns(config)
    state_device = device if c.sample_state_device == "auto" else torch.device("cpu")
    settings = {
        "state": SampleState(config.data.data_size, columns, state_device) if columns else None,
        "gamma": partial(
            schedules.gamma, final=c.gamma, schedule=c.gamma_schedule, decay_epochs=c.gamma_decay_epochs
        ),
        "eps": c.fastclip_eps,
        "rho": c.rho,
        "kernels": Kernels.compiled() if config.model.torchcompile else Kernels(),
    }
    if c.name == "fastclip":
        return settings | {"multiply_tau": c.multiply_tau, "tau_gradient": c.tau_gradient}
    return settings | {
        "temperature": c.temperature if c.temperature is not None else 0.07,
        "betas": (config.optim.beta1, config.optim.beta2),
        "adam_eps": config.optim.eps,
        "lr_tau": config.optim.lr_tau,
    }
