"""Builds the loss with its sample state, the task and the trainer from the configuration."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from drrho_clip.losses.distillation import Distillation
from drrho_clip.losses.interface import Loss, LossEnvironment
from drrho_clip.reference import CachedReference, Reference
from drrho_clip.sample_state import SampleState
from drrho_clip.state.host_state import HostSampleState
from training.checkpoint.run_folder import RunFolder
from training.config.params import Config
from training.data.loader import TrainData
from training.distributed import ddp
from training.distributed.powersgd import PowerSGD
from training.distributed.process_group import World
from training.logger import RunLog
from training.loop.flops import Utilization, peak_flops
from training.loop.learning_rates import LearningRates, horizon
from training.loop.optimizer import create_optimizer
from training.loop.profiler import open_profiler
from training.loop.speed_monitor import DataWait
from training.loop.step import Stepper
from training.loop.task import Selection, Task
from training.loop.trainer import Trainer
from training.models import precision
from training.models.create import BuiltModel

# torch.compile splits the graph where DDP sends a bucket of gradients, so that they travel during the backward
# pass. Splitting a checkpointed block fails in torch 2.8 and works in 2.14. Without, they travel after it.
_SPLITS_CHECKPOINTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)


def build_task(config: Config, world: World, target: BuiltModel, reference: BuiltModel | None) -> Task:
    """The objective: the models, the loss and the uses of the reference."""
    run_precision = precision.resolve(config.run.precision, world.device)
    compression = build_compression(config, target.module, world)
    model = ddp.wrap(
        target.module,
        world,
        static_graph=config.distributed.ddp_static_graph,
        sync_bn=config.model.use_bn_sync,
        compression=compression,
    )
    frozen: Reference | CachedReference | None = None
    if config.reads_features:
        frozen = CachedReference()
    if reference is not None:
        pixels = reference.preprocess
        frozen = Reference(reference.module, pixels.mean, pixels.std, run_precision.autocast_dtype)
    if config.model.torchcompile:
        if world.distributed and config.model.grad_checkpointing and not _SPLITS_CHECKPOINTS:
            torch._dynamo.config.optimize_ddp = False
        # Selection embeds batches of two sizes. Taken for sizes that vary, they would get slower kernels.
        model = cast(nn.Module, torch.compile(model, dynamic=False))  # declared as a function
        frozen = frozen and frozen.compile()
    return Task(
        model=model,
        bare=target.module,
        mean=target.preprocess.mean,
        std=target.preprocess.std,
        precision=run_precision,
        loss=build_loss(config, world.device),
        loss_weight=config.loss.loss_weight,
        reference=frozen,
        margins="ref" in config.reference.usage or config.loss.spec.distills,
        constant_scale=constant_scale(config),
        distillation=build_distillation(config),
        selection=build_selection(config),
        compression=compression if isinstance(compression, PowerSGD) else None,
        seed=config.run.seed,
    )


def build_trainer(
    config: Config, world: World, folder: RunFolder, log: RunLog, task: Task, train_data: TrainData
) -> Trainer:
    """The loop over ``train_data``, with its optimizer and schedules."""
    length = horizon(config.schedule, train_data.steps_per_epoch)
    schedule = config.schedule
    if not schedule.skip_scheduler and schedule.warmup >= length.total_steps and world.is_main:
        log.warning(
            f"--warmup {schedule.warmup}: the run has {length.total_steps} steps, so the full learning rate is "
            "never reached; give fewer warm-up steps"
        )
    optimizer = create_optimizer(task.bare, config.optim, world.device)
    stepper = Stepper(
        task,
        optimizer,
        accum=config.run.accum_freq,
        scaler=task.precision.scaler(),
        grad_clip_norm=config.optim.grad_clip_norm,
        logit_scale_bound=config.loss.logit_scale_bound,
        max_skipped_steps=config.optim.max_skipped_steps,
    )
    return Trainer(
        stepper,
        LearningRates(
            optimizer,
            config.optim,
            config.schedule,
            length.total_steps,
            length.cooldown_steps,
            read_at_once=config.run.deterministic,
        ),
        train_data,
        length,
        world,
        log,
        open_profiler(config.run.profile, folder.path, world),
        DataWait(config.data.workers, world.local_world_size),
        Utilization(peak_flops(world.device, config.run.precision) if world.is_main else None),
        log_every=config.run.log_every_n_steps,
    )


def describe(config: Config, world: World) -> str:
    """One line for the log: the loss, the ranks, the precision, the batch size and the optimizer."""
    margins = " with reference margins" if "ref" in config.reference.usage else ""
    # The report reads it here: a loss that a program of its own registers is in no registry there.
    scale = ", without a temperature" if config.loss.spec.temperature == "none" else ""
    micro = f" in {config.run.accum_freq} micro-batches" if config.run.accum_freq > 1 else ""
    return (
        f"loss {config.loss.name} ({config.loss.decided_by}){margins}{scale}; "
        f"{world.world_size} x {world.device.type}, "
        f"{config.run.precision}, {config.run.batch_size} samples per rank and step{micro}; "
        f"{config.optim.optimizer}"
    )


def build_loss(config: Config, device: torch.device) -> Loss:
    """The loss that ``config.loss`` names. If it keeps a sample state, that is its attribute ``state``.

    The loss's settings are fields of ``config.loss`` or of ``config.optim``.
    """
    spec, columns = config.loss.spec, config.loss.state_columns
    kind = HostSampleState if config.loss.sample_state_device == "cpu" else SampleState
    environment = LossEnvironment(
        device,
        kind(config.data.data_size, columns, device, config.loss.state_codes) if columns else None,
        compiled=config.model.torchcompile,
    )
    settings = {
        keyword: getattr(config.loss if hasattr(config.loss, name) else config.optim, name)
        for keyword, name in spec.settings.items()
    }
    return spec.builder()(environment, **settings)


def build_compression(config: Config, model: nn.Module, world: World) -> str | PowerSGD:
    """How ranks compress the gradients of ``model``, for ``ddp.wrap``."""
    kind = config.distributed.grad_compression
    if kind != "powersgd" or not world.distributed:
        return kind
    return PowerSGD(model, rank=config.distributed.powersgd_rank, start=config.schedule.warmup)


def build_distillation(config: Config) -> Distillation | None:
    """The distillation term beside another loss; None without one. A loss that distills has its own term."""
    c = config.loss
    if "distill" not in config.reference.usage or c.spec.distills:
        return None
    return Distillation(
        weight=c.distill_weight,
        teacher_scale=c.distill_logit_scale,
        multiply_tau=c.multiply_tau,
        teacher_dimensions=c.distill_teacher_dimension,
        average_after_softmax=c.distill_average_after_softmax,
    )


def constant_scale(config: Config) -> float:
    """1/tau of the margin loss if the reference is a teacher too and the flag sets it; 0: the model's own."""
    both = {"ref", "distill"} <= config.reference.usage
    return config.loss.distill_ref_logit_scale if both else 0.0


def build_selection(config: Config) -> Selection | None:
    """Batch selection; None if the reference is not used for it."""
    r = config.reference
    if "select" not in r.usage:
        return None
    return Selection(keep_ratio=1 - r.ref_filter_ratio, n_chunks=r.ref_filter_n_chunks, topk=r.ref_filter_topk)
