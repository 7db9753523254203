"""The run's configuration: frozen, grouped, validated once; nothing writes to it afterwards.

``flags.py`` declares the command line and ``command_line.py`` reads it; ``limits.py`` and ``rules.py`` say what is
allowed; ``parse`` here makes a ``Config`` of it or exits with one sentence. Fields carry their flags' names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from training.config import cache as cache_rules
from training.config import limits, model, remarks, run
from training.config.cache import CacheConfig
from training.config.parser import Given, Refusal, read
from training.distributed import launcher

T = TypeVar("T")


class FrozenMapping(Mapping[str, Any]):
    """A mapping that nothing can write to, equal to a dict of the same items.

    Unlike ``MappingProxyType`` it can be pickled and copied, so that a ``Config`` travels to other processes.
    """

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_items", dict(items))

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"cannot assign to {name!r}: the mapping is frozen")

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return FrozenMapping, (dict(self._items),)

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True)
class DataConfig:
    """Where training samples come from.

    ``dataset_type`` is resolved: 'webdataset', 'csv', 'synthetic', or 'none' where there is nothing to train on.
    ``data_size`` is the number of rows of the sample state, -1 where none was given; ``data_sizes`` its parts,
    several where each ``::`` source has its own. ``train_num_samples`` None: all rows of the csv file.
    ``epoch_policy`` is resolved: 'resample' with ``--dataset-resampled`` too. ``lanes``: (virtual ranks, virtual
    workers), None where the launch decides.
    """

    train_data: str | None
    train_data_upsampling_factors: tuple[float, ...] | None
    train_num_samples: int | None
    dataset_type: str
    epoch_policy: str
    lanes: tuple[int, int] | None
    csv_separator: str
    csv_img_key: str
    csv_caption_key: str
    workers: int
    data_size: int
    sample_index: str
    max_bad_fraction: float
    skip_webdataset_split_by_node: bool
    aug_cfg: Mapping[str, Any]
    rand_augment: bool
    data_sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class EvalConfig:
    """In-run evaluation. ``val_dataset_type``: as ``DataConfig.dataset_type``, of ``val_data``."""

    val_data: str | None
    val_num_samples: int | None
    val_frequency: int
    imagenet_val: str | None
    imagenet_v2: str | None
    zeroshot_frequency: int
    val_dataset_type: str = "none"


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
    """The objective. ``name`` is the registry's, ``decided_by`` says in words which flag chose it.

    ``temperature`` is None where the flag was not given or does not act. ``multiply_tau`` is False for individual
    temperatures, whose objective is multiplied by them anyway.
    """

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
    decided_by: str = ""


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
    max_skipped_steps: int = 20


@dataclass(frozen=True)
class ScheduleConfig:
    """How long, and how the learning rates move. ``epochs`` is 0 where the run only evaluates."""

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

    ``batch_size`` is what one rank contributes to one step; ``accum_freq`` splits it into micro-batches. Where
    there is a ``global_batch_size`` both follow from it and the number of ranks (``Config.on_ranks``).
    ``precision`` has one spelling (``amp_bf16``). ``report_to`` is a subset of {'tensorboard', 'wandb'}.
    """

    batch_size: int
    global_batch_size: int | None
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
    save_every_n_steps: int | None
    save_every_minutes: float | None
    keep_last: int
    save_most_recent: bool
    save_published_state: bool
    delete_previous_checkpoint: bool
    resume: str | None
    requeue_on_preempt: bool
    step_timeout: float
    remote_sync: str | None
    remote_sync_frequency: int
    remote_sync_protocol: str
    copy_codebase: bool
    debug: bool
    profile: bool
    dry_run: bool
    u_format: str | None = None


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
    """Everything a run was told.

    ``flags`` holds every flag's value as given, for ``params.txt``. ``notes`` are sentences for the log, on flags
    that have no effect in this company. What depends on the device is the trainer's to say, not the parser's.
    """

    data: DataConfig
    evaluation: EvalConfig
    model: ModelConfig
    reference: ReferenceConfig
    cache: CacheConfig
    loss: LossConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    run: RunConfig
    distributed: DistributedConfig
    flags: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def on_ranks(self, ranks: int) -> Config:
        """The configuration on so many ranks: what ``--global_batch_size`` makes of batch and micro-batches.

        ValueError: the global batch cannot be shared out evenly.
        """
        run, total = self.run, self.run.global_batch_size
        if total is None:
            return self
        share, rest = divmod(total, ranks)
        if rest:
            raise ValueError(f"--global_batch_size {total}: not a multiple of the {ranks} ranks; give one")
        micro = -(-share // run.batch_size)
        if share % micro:
            raise ValueError(
                f"--global_batch_size {total}: the {share} samples of each of {ranks} ranks do not make {micro} "
                f"equal micro-batches of at most --batch-size {run.batch_size}; choose a --batch-size that "
                "divides them"
            )
        if micro > 1 and self.distributed.ddp_static_graph:
            raise ValueError(
                f"--ddp-static-graph does not work with the {micro} micro-batches that {ranks} ranks need for "
                f"--global_batch_size {total}: leave it out, or give a --batch-size of {share}"
            )
        return replace(self, run=replace(run, batch_size=share, accum_freq=micro))

    @property
    def trains(self) -> bool:
        """Whether there is anything to train, rather than only to evaluate."""
        return self.schedule.epochs > 0


def parse(argv: Sequence[str] | None = None) -> Config:
    """The configuration in ``argv`` (default: the command line).

    Bad input is one sentence on stderr and exit code 2, before anything is built.
    """
    try:
        return configure(read(sys.argv[1:] if argv is None else argv))
    except Refusal as refusal:
        if launcher.local_rank() == 0:  # its neighbours are refused for the same
            print(f"error: {refusal}", file=sys.stderr)
        raise SystemExit(2) from None


def configure(given: Given) -> Config:
    """``given`` checked and grouped. Refusal: the first thing that is wrong with it."""
    limits.check_values(given)
    dataset_type = run.kind_of_data(given, "train_data")
    writes = cache_rules.writes(given)
    trains = given.epochs > 0 and dataset_type != "none" and not writes
    run.check_something_to_do(given, trains or writes)
    model.check_model(given, "model")
    optim = _optimizer(given)
    run.check_schedule(given, optim.lr)
    data, evaluation = _data(given, dataset_type, trains)
    reports = run.report_to(given)
    run.check_files(given)
    run.check_distillation(given)

    cache = _group(CacheConfig, given, **cache_rules.resolve(given, dataset_type, trains))
    reads = bool(cache.cached_ref_features_dir) and not writes
    objective = run.resolve_objective(given)
    reference = ReferenceConfig(
        **run.resolve_reference(given, objective, reads=reads, writes=writes),
        **given.pick("ref_filter_ratio", "ref_filter_n_chunks", "ref_filter_topk"),
    )
    if trains:
        run.check_objective(given, objective)
        run.check_batch(given, reference.usage)
    kinds = frozenset({dataset_type, evaluation.val_dataset_type})
    setting = remarks.Setting(given, objective, reference.usage, kinds, reports, trains)
    return Config(
        data=data,
        evaluation=evaluation,
        model=_model(given),
        reference=reference,
        cache=cache,
        loss=_group(
            LossConfig,
            given,
            name=objective.name,
            decided_by=objective.decided_by,
            temperature_scheme=objective.temperature_scheme,
            temperature=given.temperature if run.uses_temperature(given, objective) else None,
            multiply_tau=given.multiply_tau and not objective.individual,
        ),
        optim=optim,
        schedule=_group(ScheduleConfig, given, epochs=given.epochs if trains else 0),
        run=_group(
            RunConfig,
            given,
            report_to=reports,
            precision={"amp_bfloat16": "amp_bf16"}.get(given.precision, given.precision),
        ),
        distributed=_group(DistributedConfig, given),
        flags=FrozenMapping({key: _frozen(value) for key, value in given.values.items()}),
        notes=remarks.collect(setting),
    )


def _data(given: Given, dataset_type: str, trains: bool) -> tuple[DataConfig, EvalConfig]:
    sizes = run.data_sizes(given, dataset_type)
    if trains:
        run.check_training_data(given, dataset_type)
    data = _group(
        DataConfig,
        given,
        dataset_type=dataset_type,
        epoch_policy=run.epoch_policy(given),
        lanes=run.lanes(given),
        train_data_upsampling_factors=run.upsampling_factors(given, dataset_type) if trains else None,
        data_size=sum(sizes) if sizes else -1,
        data_sizes=sizes,
        # A shell hands over "\\t" as it was typed.
        csv_separator="\t" if given.csv_separator == "\\t" else given.csv_separator,
    )
    return data, _group(EvalConfig, given, val_dataset_type=run.kind_of_data(given, "val_data"))


def _model(given: Given) -> ModelConfig:
    mean, std = (value and tuple(value * (3 // len(value))) for value in (given.image_mean, given.image_std))
    size = given.force_image_size
    if size is not None:
        size = size[0] if len(size) == 1 else tuple(size)
    return _group(ModelConfig, given, image_mean=mean, image_std=std, force_image_size=size)


def _optimizer(given: Given) -> OptimConfig:
    """With CLIP's defaults for the model; a negative ``--lr_tau`` is the model's rate."""
    defaults = model.optimizer_defaults(given.model)
    chosen = {
        key: default if given.values[key] is None else given.values[key] for key, default in defaults.items()
    }
    return _group(OptimConfig, given, **chosen, lr_tau=chosen["lr"] if given.lr_tau < 0 else given.lr_tau)


def _group(kind: type[T], given: Given, **resolved: Any) -> T:
    """A dataclass of ``kind`` from the flags of its fields' names, and what had to be ``resolved``."""
    names = [field.name for field in fields(kind) if field.name not in resolved]
    return kind(
        **{name: _frozen(given.values[name]) for name in names}, **{k: _frozen(v) for k, v in resolved.items()}
    )


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return FrozenMapping(value) if isinstance(value, Mapping) else value
