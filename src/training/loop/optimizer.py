"""Parameter groups, optimizers, and a step that is taken or left out on the device's word.

Weight decay spares parameters with fewer than two dimensions, those whose name contains ``bn``, ``ln`` or
``bias``, and ``logit_scale``, which is a group of its own with a rate of its own. The optimizer's momentum
applies to ``logit_scale`` as to everything else, SGD's too.

AdamW and SGD are torch's fused ones on every device: they can leave out a step on the device's word. For LAMB and
Lion the host waits for that word in every step.
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
    from timm.optim.lamb import Lamb  # seconds to import, and mostly not needed

    # Its own clipping to norm 1 stays off: --grad-clip-norm says whether and where to clip.
    betas = (config.beta1, config.beta2)
    return Lamb(groups, lr=config.lr, betas=betas, eps=config.eps, max_grad_norm=None)


def _lion(groups: _Groups, config: OptimConfig, device: torch.device) -> Optimizer:
    from timm.optim.lion import Lion  # seconds to import, and mostly not needed

    return Lion(groups, lr=config.lr, betas=(config.beta1, config.beta2))


def _sgd(groups: _Groups, config: OptimConfig, device: torch.device) -> Optimizer:
    return SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)


def _nesterov(groups: _Groups, config: OptimConfig, device: torch.device) -> Optimizer:
    if config.momentum <= 0:
        raise ValueError(f"--momentum {config.momentum} with --optimizer nesterov: it needs a positive momentum")
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

    Its groups carry a ``name``: "no_decay", "decay", "logit_scale", in this order, empty ones left out; their
    parameters carry their names (``param_names``), by which a checkpoint is matched.
    ValueError: an unknown optimizer, or nothing to train.
    """
    if config.optimizer.lower() not in OPTIMIZERS:
        raise ValueError(f"--optimizer {config.optimizer}: unknown; known: {', '.join(OPTIMIZERS)}")
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
    """``optimizer.step()`` where ``taken``, a 0-d bool on the parameters' device; else nothing changes.

    A fused optimizer gets it as ``found_inf``, like from torch's GradScaler, and the host does not wait.
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
    elif taken:
        optimizer.step()


def _start_momentum(optimizer: SGD) -> None:
    """With zeros, as which the first step counts them. torch leaves them undefined where it skips that step."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if parameter.grad is not None and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
