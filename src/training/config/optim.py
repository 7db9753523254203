"""The optimizer, the length of a run, and the schedules of the learning rates."""

from __future__ import annotations

from dataclasses import dataclass

from training.config.given import Given, Refusal
from training.config.model import is_vit
from training.config.remarks import Idle


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer. Defaults for the model are filled in, and ``lr_tau`` is resolved (never negative)."""

    optimizer: str
    lr: float
    beta1: float
    beta2: float
    eps: float
    wd: float
    momentum: float
    lr_tau: float
    grad_clip_norm: float | None
    max_skipped_steps: int = 20


@dataclass(frozen=True)
class ScheduleConfig:
    """How long a run is, and how the learning rates change. ``epochs`` is 0 where the run only evaluates."""

    epochs: int
    epochs_cooldown: int | None
    warmup: int
    skip_scheduler: bool
    lr_scheduler: str
    lr_cooldown_end: float
    lr_cooldown_power: float
    lr_min: float
    lr_tau_scheduler: str
    iters: int
    stop_epochs: int
    stop_iters: int


IDLE = (
    Idle(
        ("beta1", "beta2"),
        lambda s: s.given.optimizer in ("sgd", "nesterov") and not s.loss.takes("beta1"),
        "with this optimizer",
    ),
    Idle(
        ("eps",),
        lambda s: s.given.optimizer not in ("adamw", "lamb") and not s.loss.takes("eps"),
        "with this optimizer",
    ),
    Idle(("momentum",), lambda s: s.given.optimizer not in ("sgd", "nesterov"), "with this optimizer"),
    Idle(
        ("epochs_cooldown", "lr_cooldown_end", "lr_cooldown_power"),
        lambda s: s.given.lr_scheduler != "const-cooldown",
        "without --lr-scheduler const-cooldown",
    ),
)


def optimizer_defaults(model: str) -> dict[str, float]:
    """CLIP's defaults for ``model``: ``lr``, ``beta1``, ``beta2`` and ``eps``."""
    vit = is_vit(model)
    return {"lr": 5e-4, "beta1": 0.9, "beta2": 0.98 if vit else 0.999, "eps": 1e-6 if vit else 1e-8}


def resolve_optimizer(given: Given) -> OptimConfig:
    """The ``OptimConfig`` of the flags, with CLIP's defaults for the model.

    A negative ``--lr_tau`` becomes the model's rate. Refusal: Nesterov without momentum.
    """
    chosen = {
        key: default if given.values[key] is None else given.values[key]
        for key, default in optimizer_defaults(given.model).items()
    }
    if given.optimizer == "nesterov" and given.momentum == 0:
        raise Refusal(
            "--momentum 0: --optimizer nesterov needs a momentum above 0; give one, or use --optimizer sgd"
        )
    return given.group(OptimConfig, **chosen, lr_tau=chosen["lr"] if given.lr_tau < 0 else given.lr_tau)


def resolve_schedule(given: Given, lr: float, trains: bool) -> ScheduleConfig:
    """The ``ScheduleConfig`` of the flags. ``lr``: the model's peak rate.

    Refusal: a flag is missing, or two contradict each other.
    """
    for key in ("iters", "stop_epochs", "stop_iters"):
        if given.values[key] == 0:
            raise Refusal(f"{given.say(key)}: give at least 1, or -1 to switch it off")
    if trains and not given.skip_scheduler:
        _check_schedules(given, lr)
    return given.group(ScheduleConfig, epochs=given.epochs if trains else 0)


def _check_schedules(given: Given, lr: float) -> None:
    """Refusal: a schedule needs another flag, or would rise."""
    if given.lr_scheduler == "const-cooldown":
        if given.epochs_cooldown is None:
            raise Refusal("--lr-scheduler const-cooldown needs --epochs-cooldown: give its length in epochs")
        if given.epochs_cooldown > given.epochs:
            raise Refusal(
                f"{given.say('epochs_cooldown')} is longer than {given.say('epochs')}: give a shorter cooldown"
            )
    if given.lr_scheduler == "cosine" and given.lr_min > lr:
        raise Refusal(
            f"{given.say('lr_min')} is above the learning rate {lr:g}, so the cosine would rise: give a lower one"
        )
    if given.lr_tau_scheduler == "cosine" and 0 < given.lr_tau < given.lr_min:
        raise Refusal(
            f"{given.say('lr_tau')} is below --lr_min {given.lr_min:g}, where its cosine ends too, so it would "
            "rise: give a lower one, or use --lr_tau_scheduler const"
        )
