"""What the user should know though the run goes on: flags that have no effect in this company, and pitfalls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from training.config.flags import ALL
from training.config.parser import Given
from training.config.run import Objective, keeps_rows
from training.distributed import launcher


@dataclass(frozen=True)
class Setting:
    """What the notes look at. ``kinds``: the types of training and validation data."""

    given: Given
    objective: Objective
    usage: frozenset[str]
    kinds: frozenset[str]
    report_to: frozenset[str]
    trains: bool


class Idle(NamedTuple):
    """``flags`` have no effect where ``when`` holds; ``why`` completes "no effect ..."."""

    flags: tuple[str, ...]
    when: Callable[[Setting], bool]
    why: str


_DISTILL = tuple(
    key for key in ALL if key.startswith("distill_") and key not in ("distill_model", "distill_pretrained")
)

IDLE = (
    Idle(("requeue_on_preempt",), lambda _: launcher.slurm_job() is None, "outside of Slurm, which has the queue"),
    Idle(
        (
            *("gamma", "gamma_schedule", "gamma_decay_epochs", "fastclip_eps", "rho"),
            *("temperature", "temperature_scheme", "multiply_tau", "tau_gradient"),
        ),
        lambda s: not s.objective.spec.sample_state,
        "without --fastclip",
    ),
    Idle(
        ("sample_state_device", "save_published_state"),
        lambda s: not keeps_rows(s.given, s.objective),
        "with a loss that keeps nothing per sample",
    ),
    Idle(
        ("multiply_tau", "tau_gradient"),
        lambda s: s.objective.individual,
        "with individual temperatures, whose objective has its own form",
    ),
    Idle(
        ("rho",),
        lambda s: s.objective.name == "fastclip" and not s.given.multiply_tau,
        "without --multiply_tau or individual temperatures",
    ),
    Idle(
        ("tau_gradient",),
        lambda s: s.objective.temperature_scheme == "global_constant",
        "with a constant temperature",
    ),
    Idle(
        ("local_loss", "gather_with_grad"),
        lambda s: s.objective.name == "siglip" or s.objective.spec.sample_state,
        "with this loss, which crosses ranks in its own way",
    ),
    Idle(
        ("coca_caption_loss_weight", "coca_contrastive_loss_weight"),
        lambda s: s.objective.name != "coca",
        "without a coca model",
    ),
    Idle(_DISTILL, lambda s: "distill" not in s.usage, "without distillation"),
    Idle(
        ("distill_ref_logit_scale",),
        lambda s: "ref" not in s.usage or s.objective.individual,
        "unless the reference serves both ref and distill, with one temperature for all samples",
    ),
    Idle(
        ("ref_filter_ratio", "ref_filter_n_chunks", "ref_filter_topk"),
        lambda s: "select" not in s.usage,
        "without --ref_features_usage select",
    ),
    Idle(
        ("ref_features_offset", "num_samples_per_shard"),
        lambda s: not s.given.cached_ref_features_dir,
        "without --cached_ref_features_dir",
    ),
    Idle(
        ("syn_texts_offset", "num_syn_texts"),
        lambda s: not s.given.cached_syn_texts_dir,
        "without captions to draw",
    ),
    Idle(("cap_model_pretrained",), lambda s: True, "without --cache_syn_texts"),
    Idle(("cache_group_size", "cache_rank"), lambda s: True, "without a cache to write"),
    Idle(("csv_separator", "csv_img_key", "csv_caption_key"), lambda s: "csv" not in s.kinds, "without csv data"),
    Idle(
        ("sample_index",),
        lambda s: "webdataset" not in s.kinds or s.given.data_size == -1,
        "without shards and --data_size",
    ),
    Idle(("skip_webdataset_split_by_node",), lambda s: "webdataset" not in s.kinds, "without shards to split"),
    Idle(("beta1", "beta2"), lambda s: s.given.optimizer in ("sgd", "nesterov"), "with this optimizer"),
    Idle(("eps",), lambda s: s.given.optimizer not in ("adamw", "lamb"), "with this optimizer"),
    Idle(("momentum",), lambda s: s.given.optimizer not in ("sgd", "nesterov"), "with this optimizer"),
    Idle(
        ("epochs_cooldown", "lr_cooldown_end", "lr_cooldown_power"),
        lambda s: s.given.lr_scheduler != "const-cooldown",
        "without --lr-scheduler const-cooldown",
    ),
    Idle(
        ("lock_image_unlocked_groups", "lock_image_freeze_bn_stats"),
        lambda s: not s.given.lock_image,
        "without --lock-image",
    ),
    Idle(
        ("lock_text_unlocked_layers", "lock_text_freeze_layer_norm"),
        lambda s: not s.given.lock_text,
        "without --lock-text",
    ),
    Idle(("val_num_samples", "val_frequency"), lambda s: not s.given.val_data, "without --val-data"),
    Idle(
        ("zeroshot_frequency",),
        lambda s: not (s.given.imagenet_val or s.given.imagenet_v2),
        "without --imagenet-val or --imagenet-v2",
    ),
    Idle(("wandb_notes", "wandb_project_name"), lambda s: "wandb" not in s.report_to, "without --report-to wandb"),
    Idle(("u_format",), lambda s: not s.given.resume, "without --resume"),
    Idle(
        ("remote_sync_frequency", "remote_sync_protocol"),
        lambda s: not s.given.remote_sync,
        "without --remote-sync",
    ),
)


def collect(setting: Setting) -> tuple[str, ...]:
    """One sentence per thing worth knowing, for the log."""
    given, found, said = setting.given, [], set()
    if given.cache_ref_model_features or given.cache_syn_texts:
        found += [
            f"{ALL[key].name}: no effect on what is written, rows keep their numbers"
            for key in ("ref_features_offset", "syn_texts_offset")
            if given.values[key]
        ]
    elif not setting.trains and given.epochs > 0:
        found.append("no --train-data: this run only evaluates")
    if setting.trains:
        for idle in IDLE:
            flags = [key for key in idle.flags if given.chose(key) and key not in said]
            if flags and idle.when(setting):
                said.update(flags)
                found.append(f"{', '.join(ALL[key].name for key in flags)}: no effect {idle.why}")
        if (
            setting.objective.name in ("clip", "coca", "distill")
            and given.local_loss
            and not given.gather_with_grad
        ):
            found.append(
                "--local-loss without --gather-with-grad: the gradient through other ranks' pairs is dropped"
            )
    return tuple(found)
