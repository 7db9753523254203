"""The length of a run, and the learning rates that are set before each step."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from drrho_clip import schedules
from drrho_clip.state.readback import Readback
from training.config.optim import OptimConfig, ScheduleConfig


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
    """Sets the learning rate of every parameter group before each step.

    ``lr`` and ``lr_tau`` are the rates that were set last, for reports and for losses that keep temperatures of
    their own. With ``--skip-scheduler`` both stay at their peak.

    ``step_thresh`` depends on the temperature, which is on the device. On the CPU it is read directly. On a GPU,
    reading it would make the host wait for all queued work, and not every optimizer accepts a tensor as its rate.
    So each call starts a copy into page-locked memory and uses the copy that the previous call started. The rate
    then follows the temperature one step later. Only the first call waits. So the first step after a resume can
    have another rate than in an uninterrupted run; with ``read_at_once`` every call waits, and it has the same.

    ValueError: a schedule is unknown, or const-cooldown has no cooldown steps.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        optim: OptimConfig,
        schedule: ScheduleConfig,
        total_steps: int,
        cooldown_steps: int = 0,
        *,
        read_at_once: bool = False,
    ) -> None:
        if schedule.lr_scheduler not in ("cosine", "const", "const-cooldown"):
            raise ValueError(
                f"--lr-scheduler {schedule.lr_scheduler}: unknown; choose cosine, const or const-cooldown"
            )
        if schedule.lr_tau_scheduler not in ("cosine", "const", "step_thresh"):
            raise ValueError(
                f"--lr_tau_scheduler {schedule.lr_tau_scheduler}: unknown; choose cosine, const or step_thresh"
            )
        if schedule.lr_scheduler == "const-cooldown" and cooldown_steps <= 0:
            raise ValueError(
                "--lr-scheduler const-cooldown: give --epochs-cooldown, the number of epochs it falls for"
            )
        self._optimizer, self._optim, self._schedule = optimizer, optim, schedule
        self._total, self._cooldown = total_steps, cooldown_steps
        self._tau = None if read_at_once else _LateScalar()
        self.lr, self.lr_tau = optim.lr, optim.lr_tau

    def set(self, step: int, tau: Tensor | float | None = None) -> None:
        """Set the rates for optimizer step ``step``. Only step_thresh reads ``tau``, the current temperature."""
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
            now = float(tau) if self._tau is None else self._tau.read(tau)
            return schedules.step_thresh(now, lr=lr)
        return lr


class _LateScalar:
    """Reads a scalar on a GPU without waiting for it: each call returns the value of the previous call."""

    def __init__(self) -> None:
        self._pending: Readback | None = None

    def read(self, value: Tensor | float) -> float:
        """``value`` as a number; on a GPU, from the second call on, the value of the previous call."""
        if not (isinstance(value, Tensor) and value.is_cuda):
            return float(value)
        earlier, self._pending = self._pending, Readback(value)
        return float(value if earlier is None else earlier.value())
