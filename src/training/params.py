"""The run's configuration: frozen, grouped, validated once; nothing writes to it afterwards.

``flags.py`` declares the command line; ``parse`` here turns it into a ``Config`` or exits with one sentence.
Fields carry the names of their flags.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DataConfig:
    """Where training samples come from. ``dataset_type`` is resolved ('webdataset', 'csv' or 'synthetic')."""

    train_data: str | None
    train_data_upsampling_factors: tuple[float, ...] | None
    train_num_samples: int | None
    dataset_type: str
    dataset_resampled: bool
    csv_separator: str
    csv_img_key: str
    csv_caption_key: str
    workers: int
    data_size: int
    sample_index: str
    skip_webdataset_split_by_node: bool
    aug_cfg: Mapping[str, Any]
    rand_augment: bool


@dataclass(frozen=True)
class EvalConfig:
    """In-run evaluation."""

    val_data: str | None
    val_num_samples: int | None
    val_frequency: int
    imagenet_val: str | None
    imagenet_v2: str | None
    zeroshot_frequency: int


@dataclass(frozen=True)
class ModelConfig:
    """The target model. ``model`` is an open_clip name or the path of a model config JSON."""

    model: str
    pretrained: str
    pretrained_image: bool
    lock_image: bool
    lock_image_unlocked_groups: int
    lock_image_freeze_bn_stats: bool
    lock_text: bool
    lock_text_unlocked_layers: int
    lock_text_freeze_layer_norm: bool
    image_mean: tuple[float, ...] | None
    image_std: tuple[float, ...] | None
    force_image_size: int | tuple[int, int] | None
    force_quick_gelu: bool
    force_patch_dropout: float | None
    force_custom_text: bool
    grad_checkpointing: bool
    torchcompile: bool
    use_bn_sync: bool


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen reference. ``usage`` is a subset of {'ref', 'distill', 'select'}; empty without a reference.

    ``--distill-model`` is the reference of OpenCLIP's distillation baseline and fills ``ref_model`` with
    ``usage = {'distill'}``.
    """

    ref_model: str
    ref_model_pretrained: str
    ref_model_checkpoint: str
    usage: frozenset[str]
    ref_filter_ratio: float
    ref_filter_n_chunks: int
    ref_filter_topk: bool


@dataclass(frozen=True)
class LossConfig:
    """The objective. ``name`` is the registry's; ``temperature`` is None where the flag was not given."""

    name: str
    temperature_scheme: str
    multiply_tau: bool
    temperature: float | None
    tau_gradient: str
    rho: float
    fastclip_eps: float
    gamma: float
    gamma_schedule: str
    gamma_decay_epochs: int
    loss_weight: float
    logit_scale_bound: float
    sample_state_device: str
    local_loss: bool
    gather_with_grad: bool
    coca_caption_loss_weight: float
    coca_contrastive_loss_weight: float
    distill_weight: float
    distill_logit_scale: float
    distill_ref_logit_scale: float
    distill_teacher_dimension: tuple[int, ...]
    distill_average_after_softmax: bool


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer; defaults by model name are filled in and ``lr_tau`` is resolved (never negative)."""

    optimizer: str
    lr: float
    beta1: float
    beta2: float
    eps: float
    wd: float
    momentum: float
    lr_tau: float
    grad_clip_norm: float | None


@dataclass(frozen=True)
class ScheduleConfig:
    """How long, and how the learning rates move."""

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


@dataclass(frozen=True)
class RunConfig:
    """The step, the run's folder, checkpoints and reports.

    ``batch_size`` is what one rank contributes to one step; ``accum_freq`` splits it into micro-batches.
    ``report_to`` is a subset of {'tensorboard', 'wandb'}.
    """

    batch_size: int
    accum_freq: int
    precision: str
    seed: int
    logs: str
    name: str | None
    log_local: bool
    log_every_n_steps: int
    report_to: frozenset[str]
    wandb_notes: str
    wandb_project_name: str
    save_frequency: int
    save_most_recent: bool
    save_published_state: bool
    delete_previous_checkpoint: bool
    resume: str | None
    remote_sync: str | None
    remote_sync_frequency: int
    remote_sync_protocol: str
    copy_codebase: bool
    debug: bool
    profile: bool
    dry_run: bool


@dataclass(frozen=True)
class DistributedConfig:
    """How ranks find each other."""

    dist_url: str
    dist_backend: str
    dist_port: str
    world_size: int
    ddp_static_graph: bool
    no_set_device_rank: bool


@dataclass(frozen=True)
class Config:
    """Everything a run was told. ``flags`` holds every flag's value as given, for ``params.txt``."""

    data: DataConfig
    evaluation: EvalConfig
    model: ModelConfig
    reference: ReferenceConfig
    loss: LossConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    run: RunConfig
    distributed: DistributedConfig
    flags: Mapping[str, Any]
