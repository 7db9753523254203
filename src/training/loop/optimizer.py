"""Parameter groups, optimizers, and a step that a bool on the device can skip.

Weight decay does not apply to parameters with fewer than two dimensions, to those whose name contains ``bn``,
``ln`` or ``bias``, and to ``logit_scale``, which is a group of its own with its own learning rate. The optimizer's
momentum, SGD's too, applies to ``logit_scale`` like to all other parameters.

AdamW and SGD are torch's fused versions on every device, which can skip a step without the host. With LAMB and
Lion the host waits in every step for the bool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from training.config.optim import OptimConfig

_Groups = list[dict[str, Any]]  # as torch's optimizers take them


def _adamw(groups: _Groups, config: OptimConfig, device: torch.device) -> Optimizer:
    return AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def _lamb(groups: _Groups, config: OptimConfig, device: torch.device) -> Optimizer:
    from timm.optim.lamb import Lamb  # takes seconds to import and is rarely needed

    # Its own clipping to norm 1 is off, because --grad-clip-norm decides about clipping.
    betas = (config.beta1, config.beta2)
    return Lamb(groups, lr=config.lr, betas=betas, eps=config.eps, max_grad_norm=None)


def _lion(groups: _Groups, config: OptimConfig, device: torch.device) -> Optimizer:
    from timm.optim.lion import Lion  # takes seconds to import and is rarely needed

    return Lion(groups, lr=config.lr, betas=(config.beta1, config.beta2))


def _sgd(groups: _Groups, config: OptimConfig, device: torch.device) -> Optimizer:
    return SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)


def _nesterov(groups: _Groups, config: OptimConfig, device: torch.device) -> Optimizer:
    if config.momentum <= 0:
        raise ValueError(f"--momentum {config.momentum}: --optimizer nesterov needs a positive momentum")
    return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=True, fused=True)


OPTIMIZERS: dict[str, Callable[[_Groups, OptimConfig, torch.device], Optimizer]] = {
    "adamw": _adamw,
    "lamb": _lamb,
    "lion": _lion,
    "sgd": _sgd,
    "nesterov": _nesterov,
}


def create_optimizer(model: nn.Module, config: OptimConfig, device: torch.device) -> Optimizer:
    """The optimizer named by ``config`` over the trainable parameters of the bare ``model``, on ``device``.

    Each group has a ``name``: "no_decay", "decay" and "logit_scale", in this order, without empty groups. Each
    group also has the names of its parameters (``param_names``), by which a checkpoint is matched.
    ValueError: the optimizer is unknown, or there is nothing to train.
    """
    if config.optimizer.lower() not in OPTIMIZERS:
        raise ValueError(f"--optimizer {config.optimizer}: unknown; choose one of {', '.join(OPTIMIZERS)}")
    groups = _groups(model, config)
    if not groups:
        raise ValueError("every parameter of the model is locked, so there is nothing to train; unlock a tower")
    return OPTIMIZERS[config.optimizer.lower()](groups, config, device)


def _groups(model: nn.Module, config: OptimConfig) -> _Groups:
    members: dict[str, list[tuple[str, nn.Parameter]]] = {"no_decay": [], "decay": [], "logit_scale": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_group_of(name, parameter)].append((name, parameter))
    decay = {"no_decay": 0.0, "decay": config.wd, "logit_scale": 0.0}
    lr = {"no_decay": config.lr, "decay": config.lr, "logit_scale": config.lr_tau}
    return [
        {"name": name, "params": named, "lr": lr[name], "weight_decay": decay[name]}
        for name, named in members.items()
        if named
    ]


def _group_of(name: str, parameter: Tensor) -> str:
    if "logit_scale" in name:
        return "logit_scale"
    spared = parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias"))
    return "no_decay" if spared else "decay"


@torch.no_grad()
def step_where(optimizer: Optimizer, taken: Tensor) -> None:
    """``optimizer.step()`` if ``taken``, a 0-d bool on the parameters' device, is True; else nothing changes.

    A fused optimizer gets it as ``found_inf``, as from torch's GradScaler, so that the host does not wait for it.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        if isinstance(optimizer, SGD):
            _start_momentum(optimizer)
        # type: ignore: torch's GradScaler sets these attributes too, and no class declares them.
        optimizer.grad_scale, optimizer.found_inf = None, (~taken).float()  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif bool(taken):
        optimizer.step()


def _start_momentum(optimizer: SGD) -> None:
    """Set missing momentum to zeros, which is how the first step treats it.

    torch leaves it undefined if that step is skipped.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if parameter.grad is not None and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
