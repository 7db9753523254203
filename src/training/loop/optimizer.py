"""Parameter groups, optimizers, and the learning rates set before each step.

Weight decay spares parameters with fewer than two dimensions, those whose name contains ``bn``, ``ln`` or
``bias``, and ``logit_scale``, which is a group of its own with a rate of its own. The optimizer's momentum
applies to ``logit_scale`` as to everything else, SGD's too.

AdamW and SGD are torch's fused ones on every device: they can leave out a step on the device's word. For LAMB and
Lion the host waits for that word in every step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from drrho_clip import schedules
from training.config.params import OptimConfig, ScheduleConfig


def _adamw(groups: list[dict], config: OptimConfig, device: torch.device) -> Optimizer:
    return AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def _lamb(groups: list[dict], config: OptimConfig, device: torch.device) -> Optimizer:
    from timm.optim import Lamb  # seconds to import, and mostly not needed

    # Its own clipping to norm 1 stays off: --grad-clip-norm says whether and where to clip.
    betas = (config.beta1, config.beta2)
    return Lamb(groups, lr=config.lr, betas=betas, eps=config.eps, max_grad_norm=None)


def _lion(groups: list[dict], config: OptimConfig, device: torch.device) -> Optimizer:
    from timm.optim import Lion  # seconds to import, and mostly not needed

    return Lion(groups, lr=config.lr, betas=(config.beta1, config.beta2))


def _sgd(groups: list[dict], config: OptimConfig, device: torch.device) -> Optimizer:
    return SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)


def _nesterov(groups: list[dict], config: OptimConfig, device: torch.device) -> Optimizer:
    if config.momentum <= 0:
        raise ValueError(f"--momentum {config.momentum} with --optimizer nesterov: it needs a positive momentum")
    return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=True, fused=True)


OPTIMIZERS: dict[str, Callable[[list[dict], OptimConfig, torch.device], Optimizer]] = {
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


def _groups(model: nn.Module, config: OptimConfig) -> list[dict]:
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
        optimizer.grad_scale, optimizer.found_inf = None, (~taken).float()
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf
    elif taken:
        optimizer.step()


def _start_momentum(optimizer: SGD) -> None:
    """With zeros, as which the first step counts them. torch leaves them undefined where it skips that step."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if parameter.grad is not None and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def horizon(schedule: ScheduleConfig, steps_per_epoch: int) -> schedules.Horizon:
    """The length of the run that ``schedule`` describes."""
    return schedules.horizon(
        steps_per_epoch,
        epochs=schedule.epochs,
        iters=schedule.iters,
        stop_epochs=schedule.stop_epochs,
        stop_iters=schedule.stop_iters,
        epochs_cooldown=schedule.epochs_cooldown,
    )


class LearningRates:
    """Sets the rate of every group before each step.

    ``lr`` and ``lr_tau`` are the rates last set, for reports and for losses that keep temperatures of their own.
    ``--skip-scheduler`` leaves both at their peak.

    ``step_thresh`` depends on the temperature, which lives on the device. On the CPU it is read as it is. On a GPU
    reading it would make the host wait for all work in flight, and a rate that is itself a tensor is not
    understood by every optimizer; so each call starts a copy into page-locked memory and uses the one that the
    call before started. The rate then reacts one step later; the first call alone waits.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        optim: OptimConfig,
        schedule: ScheduleConfig,
        total_steps: int,
        cooldown_steps: int = 0,
    ) -> None:
        if schedule.lr_scheduler not in ("cosine", "const", "const-cooldown"):
            raise ValueError(
                f"--lr-scheduler {schedule.lr_scheduler}: unknown; known: cosine, const, const-cooldown"
            )
        if schedule.lr_tau_scheduler not in ("cosine", "const", "step_thresh"):
            raise ValueError(
                f"--lr_tau_scheduler {schedule.lr_tau_scheduler}: unknown; known: cosine, const, step_thresh"
            )
        if schedule.lr_scheduler == "const-cooldown" and cooldown_steps <= 0:
            raise ValueError("--lr-scheduler const-cooldown needs --epochs-cooldown, the epochs it falls for")
        self._optimizer, self._optim, self._schedule = optimizer, optim, schedule
        self._total, self._cooldown = total_steps, cooldown_steps
        self._tau = _LateScalar()
        self.lr, self.lr_tau = optim.lr, optim.lr_tau

    def set(self, step: int, tau: Tensor | float | None = None) -> None:
        """Set the rates for optimizer step ``step``; only step_thresh reads ``tau``, the temperature now."""
        self.lr, self.lr_tau = self._model_rate(step), self._temperature_rate(step, tau)
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr_tau if group["name"] == "logit_scale" else self.lr

    def _model_rate(self, step: int) -> float:
        s, lr = self._schedule, self._optim.lr
        if s.skip_scheduler:
            return lr
        if s.lr_scheduler == "cosine":
            return schedules.cosine(step, lr=lr, lr_min=s.lr_min, warmup=s.warmup, total=self._total)
        if s.lr_scheduler == "const":
            return schedules.warmup(step, lr=lr, warmup=s.warmup)
        return schedules.const_cooldown(
            step,
            lr=lr,
            warmup=s.warmup,
            total=self._total,
            cooldown=self._cooldown,
            power=s.lr_cooldown_power,
            lr_end=s.lr_cooldown_end,
        )

    def _temperature_rate(self, step: int, tau: Tensor | float | None) -> float:
        s, lr = self._schedule, self._optim.lr_tau
        if s.skip_scheduler:
            return lr
        if s.lr_tau_scheduler == "cosine":
            return schedules.cosine(step, lr=lr, lr_min=s.lr_min, warmup=s.warmup, total=self._total)
        if s.lr_tau_scheduler == "step_thresh" and tau is not None:
            return schedules.step_thresh(self._tau.read(tau), lr=lr)
        return lr


class _LateScalar:
    """Reads a scalar without stopping the GPU: the value handed in by the call before."""

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def read(self, value: Tensor | float) -> float:
        """``value`` itself for a number or a CPU tensor and at the first call, else the one handed in before."""
        if not (isinstance(value, Tensor) and value.is_cuda):
            return float(value)
        earlier, self._pending = self._pending, self._copy(value.detach())
        if earlier is None:
            return float(value)
        copy, done = earlier
        done.synchronize()
        return float(copy)

    @staticmethod
    def _copy(value: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        host.copy_(value, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return host, done
