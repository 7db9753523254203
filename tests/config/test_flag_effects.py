"""Every flag has an effect: two values of each, and what they change. Unsupported flags are refused.

The two commands of a row differ in that flag alone, ``also`` is what both need besides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.support import flag_parts as parts
from tests.support import flag_runs as runs
from tests.support.flag_parts import refusal_or
from tests.support.flag_runs import observe_opened, observe_run
from tests.support.lab import OTHER_NODE, Lab
from training.config.flags import ALL
from training.config.given import Refusal
from training.config.params import parse

REFUSED = {key for key, flag in ALL.items() if flag.refused}


@dataclass(frozen=True)
class Effect:
    """Two values of a flag (None: left out; True: a switch that is given), and what shows the difference."""

    values: tuple[Any, Any]
    observe: Callable[[Lab, list[str]], Any]
    also: str = ""


SWITCH = (None, True)
FASTCLIP = "--fastclip --gamma 0.5"
V3 = "--fastclip --multiply_tau"
RESAMPLED = "--train-data @shards::@other_shards --dataset-resampled --train-num-samples 16"
CSV = "--dataset-type csv --train-data @wide_csv"
REFERENCE = "--ref_model @reference --ref_model_pretrained @reference_weights"
SELECT = f"{REFERENCE} --ref_features_usage select --batch-size 8"
DISTILL = f"--fastclip {REFERENCE} --ref_features_usage distill"
CACHE = f"{REFERENCE} --cache_ref_model_features"
PUBLISHED = "--fastclip --cached_ref_features_dir @published_features --num_samples_per_shard 4"
CAPTIONER = "--cap_model @coca --cap_model_pretrained @coca_weights"
DRAWN = "--cached_syn_texts_dir @captions"
TEACHER = "--distill-model @reference --distill-pretrained @reference_weights"
COOLDOWN = "--lr-scheduler const-cooldown --epochs-cooldown 3 --epochs 4"
VALIDATE = "--epochs 0 --val-data @shards"
FSSPEC = "--remote-sync-protocol fsspec"
STEPS = "--train-num-samples 8 --epochs 1"
LOCKED_IMAGE, LOCKED_TEXT = "--lock-image", "--lock-text"


EFFECTS: dict[str, Effect] = {
    # training data
    "train_data": Effect(("@shards", "@other_shards"), parts.rows),
    "train_data_upsampling_factors": Effect(("1::1", "1::99"), parts.rows, RESAMPLED),
    "train_num_samples": Effect(("4", "6"), parts.rows),
    "dataset_type": Effect(("auto", "synthetic"), parts.stream),
    "dataset_resampled": Effect(SWITCH, parts.rows, "--train-num-samples 16"),
    "epoch_policy": Effect((None, "exact"), parts.rows, "--train-num-samples 5"),
    "lanes": Effect((None, "1,2"), parts.lanes),
    "csv_separator": Effect((",", "\\t"), refusal_or(parts.stream), "--train-data @comma_csv"),
    "csv_img_key": Effect((None, "other_path"), parts.stream, CSV),
    "csv_caption_key": Effect((None, "other_title"), parts.stream, CSV),
    "csv_quoting": Effect(("auto", "none"), parts.stream, "--train-data @quoted_csv"),
    "csv_encoding": Effect(("latin-1", "cp1251"), parts.stream, "--train-data @latin_csv"),
    "workers": Effect(("1", "2"), parts.lanes),
    "data_size": Effect(("64", "65"), parts.table, FASTCLIP),
    "sample_index": Effect((None, "position"), parts.rows, "--train-data @other_shards"),
    "image_key": Effect((None, "other.jpg"), parts.stream, "--train-data @full_shards"),
    "text_key": Effect((None, "json:caption"), parts.stream, "--train-data @full_shards"),
    "json_key": Effect((None, "json:id"), parts.rows, "--train-data @full_shards"),
    "max_bad_fraction": Effect(("0", "0.05"), refusal_or(parts.rows), "--train-data @spoiled"),
    "skip_webdataset_split_by_node": Effect(SWITCH, parts.stream_of_second_rank),
    "aug_cfg": Effect((None, "scale=(0.1,0.2)"), parts.stream),
    "rand_augment": Effect(SWITCH, parts.stream),
    # evaluation
    "val_data": Effect(("@shards", "@other_shards"), parts.validation),
    "val_num_samples": Effect((None, "3"), parts.validation, "--val-data @shards"),
    "val_frequency": Effect(("1", "2"), observe_run(runs.epochs_evaluated), "--val-data @other_shards"),
    "imagenet_val": Effect((None, "@pictures"), observe_run(runs.evaluations), VALIDATE),
    "imagenet_v2": Effect((None, "@pictures"), observe_run(runs.evaluations), VALIDATE),
    "eval_data_dir": Effect((None, "@benchmark"), observe_run(runs.evaluations), VALIDATE),
    "eval_tasks": Effect(
        ("all", "cifar10"), observe_run(runs.evaluations), "--epochs 0 --eval_data_dir @benchmark"
    ),
    "zeroshot_frequency": Effect(("1", "2"), observe_run(runs.epochs_evaluated), "--imagenet-val @pictures"),
    # model
    "model": Effect(("@vit", "@resnet"), parts.parameters),
    "pretrained": Effect((None, "@weights"), parts.parameters, "--seed 3"),
    "pretrained_image": Effect(SWITCH, parts.timm_weights, "--model @resnet"),
    "lock_image": Effect(SWITCH, parts.trained),
    "lock_image_unlocked_groups": Effect(("0", "1"), parts.trained, LOCKED_IMAGE),
    "lock_image_freeze_bn_stats": Effect(SWITCH, parts.statistics_moved, f"{LOCKED_IMAGE} --model @resnet"),
    "lock_text": Effect(SWITCH, parts.trained),
    "lock_text_unlocked_layers": Effect(("0", "1"), parts.trained, LOCKED_TEXT),
    "lock_text_freeze_layer_norm": Effect(SWITCH, parts.trained, LOCKED_TEXT),
    "image_mean": Effect((None, "0.1 0.2 0.3"), parts.preprocessing),
    "image_std": Effect((None, "0.1 0.2 0.3"), parts.preprocessing),
    "force_image_size": Effect((None, "64"), parts.preprocessing),
    "force_quick_gelu": Effect(SWITCH, parts.embedding),
    "force_patch_dropout": Effect((None, "0.5"), parts.embedding),
    "force_custom_text": Effect(SWITCH, parts.text_tower),
    "grad_checkpointing": Effect(SWITCH, parts.block_calls),
    "torchcompile": Effect(SWITCH, runs.compilations),
    "channels_last": Effect(SWITCH, parts.memory_order, "--model @resnet"),
    "use_bn_sync": Effect(SWITCH, parts.wrapped, "--model @resnet"),
    # reference
    "ref_model": Effect(("@reference", "@vit"), parts.reference_size, "--fastclip --ref_model_pretrained x"),
    "ref_model_pretrained": Effect(
        ("@reference_weights", "@other_reference_weights"),
        parts.reference_parameters,
        "--fastclip --ref_model @reference",
    ),
    "ref_model_checkpoint": Effect(
        ("@reference_weights", "@other_reference_weights"),
        parts.reference_parameters,
        "--fastclip --ref_model @reference",
    ),
    "ref_features_usage": Effect(
        (None, "ref,distill"), observe_run(runs.losses), f"--fastclip {REFERENCE} --gamma 1.0"
    ),
    "ref_filter_ratio": Effect(("0.5", "0.75"), parts.selected, SELECT),
    "ref_filter_n_chunks": Effect(("1", "2"), parts.selected, f"{SELECT} --ref_filter_ratio 0.5"),
    "ref_filter_topk": Effect(SWITCH, parts.selected, f"{SELECT} --ref_filter_ratio 0.5"),
    "cache_ref_model_features": Effect(SWITCH, observe_run(runs.files), f"{REFERENCE} --fastclip"),
    "cached_ref_features_dir": Effect((None, "@features"), observe_run(runs.losses), FASTCLIP),
    "ref_features_dtype": Effect((None, "int8"), runs.cached_bytes, CACHE),
    "ref_features_error_bound": Effect(("0.001", "0.01"), runs.cached_bytes, CACHE),
    "ref_features_views": Effect(("0", "2"), runs.cached_bytes, CACHE),
    "ref_features_cache_mb": Effect(
        ("0", "1"), observe_run(runs.kept_features), f"{FASTCLIP} --cached_ref_features_dir @features"
    ),
    "dataset_reinforcement": Effect(SWITCH, observe_run(runs.losses), "--fastclip --train-data @reinforced"),
    "ref_features_offset": Effect(("0", "-2"), refusal_or(parts.reference_features), PUBLISHED),
    "num_samples_per_shard": Effect(("4", "3"), refusal_or(parts.reference_features), PUBLISHED),
    "cache_group_size": Effect(("1", "2"), runs.cached_rows, CACHE),
    "cache_rank": Effect(("0", "1"), runs.cached_rows, f"{CACHE} --cache_group_size 2"),
    # synthetic captions
    "cache_syn_texts": Effect(SWITCH, runs.files_or_refusal, CAPTIONER),
    "cap_model": Effect(
        ("@coca", "coca_ViT-B-32"), parts.captioner_size, "--cache_syn_texts --cap_model_pretrained x"
    ),
    "cap_model_pretrained": Effect(
        ("@coca_weights", "@other_coca_weights"),
        parts.captioner_parameters,
        "--cache_syn_texts --cap_model @coca",
    ),
    "cached_syn_texts_dir": Effect((None, "@captions"), parts.stream),
    "syn_texts_offset": Effect(("0", "-13"), refusal_or(parts.stream), DRAWN),
    "num_syn_texts": Effect(("1", "3"), parts.stream, f"{DRAWN} --train-num-samples 16"),
    "syn_texts_ratio": Effect(("0", "1"), parts.stream, DRAWN),
    "distill_model": Effect(("@reference", "@vit"), parts.reference_size, "--distill-pretrained x"),
    "distill_pretrained": Effect(
        ("@reference_weights", "@other_reference_weights"),
        parts.reference_parameters,
        "--distill-model @reference",
    ),
    # loss
    "loss": Effect((None, "siglip"), parts.gradients),
    "siglip": Effect(SWITCH, parts.gradients),
    "fastclip": Effect(SWITCH, parts.gradients),
    "temperature_scheme": Effect(("global_learnable", "global_constant"), parts.trained, FASTCLIP),
    "multiply_tau": Effect(SWITCH, parts.gradients, FASTCLIP),
    "temperature": Effect((None, "0.5"), parts.parameters, FASTCLIP),
    "tau_gradient": Effect(("paper", "published"), parts.gradients, V3),
    "rho": Effect(("8", "9"), parts.gradients, V3),
    "fastclip_eps": Effect(("1e-14", "0.5"), parts.gradients, FASTCLIP),
    "gamma": Effect(("0.5", "0.75"), parts.second_visit, f"{FASTCLIP} --gamma_schedule constant"),
    "gamma_schedule": Effect(("cosine", "constant"), parts.second_visit, FASTCLIP),
    "gamma_decay_epochs": Effect(("4", "40"), parts.second_visit, FASTCLIP),
    "loss_weight": Effect(("1", "2"), observe_run(runs.losses)),
    "logit_scale_bound": Effect(("100", "5"), observe_run(lambda run: run.logged("Logit Scale"))),
    "sample_state_device": Effect(("auto", "cpu"), parts.table, FASTCLIP),
    "gather_error_bound": Effect((None, "1e-2"), parts.gradients_on_two_ranks, FASTCLIP),
    "sample_state_dtype": Effect(("float32", "bound"), parts.table, FASTCLIP),
    "local_loss": Effect(SWITCH, parts.gradients_on_two_ranks),
    "gather_with_grad": Effect(SWITCH, parts.gradients_on_two_ranks),
    "coca_caption_loss_weight": Effect(("2", "3"), parts.caption_terms, "--model @coca"),
    "coca_contrastive_loss_weight": Effect(("1", "3"), parts.caption_terms, "--model @coca"),
    "distill_weight": Effect(("0.5", "1"), parts.gradients, TEACHER),
    "distill_logit_scale": Effect(("100", "50"), parts.gradients, TEACHER),
    "distill_ref_logit_scale": Effect(
        ("0", "50"), observe_run(runs.losses), f"--fastclip {REFERENCE} --ref_features_usage ref,distill"
    ),
    "distill_teacher_dimension": Effect((None, "2 4"), parts.distillation, DISTILL),
    "distill_average_after_softmax": Effect(
        SWITCH, parts.distillation, f"{DISTILL} --distill_teacher_dimension 2 4"
    ),
    # optimizer
    "optimizer": Effect(("adamw", "lion"), parts.stepped),
    "lr": Effect(("1e-3", "2e-3"), parts.rates),
    "beta1": Effect(("0.9", "0.5"), parts.stepped),
    "beta2": Effect(("0.9", "0.5"), parts.stepped),
    "eps": Effect(("1e-8", "1e-3"), parts.stepped),
    "wd": Effect(("0.2", "0"), parts.stepped),
    "momentum": Effect(("0.9", "0.5"), parts.stepped, "--optimizer sgd"),
    "lr_tau": Effect(("-1", "1e-4"), parts.rates),
    "max_skipped_steps": Effect(("1", "2"), runs.exit_code, "--optimizer sgd --lr 1e30 --epochs 1"),
    "grad_clip_norm": Effect((None, "1e-3"), observe_run(runs.weights), "--optimizer sgd"),
    # schedule
    "epochs": Effect(("2", "3"), parts.rates),
    "epochs_cooldown": Effect(("2", "3"), parts.rates, COOLDOWN),
    "warmup": Effect(("0", "3"), parts.rates),
    "skip_scheduler": Effect(SWITCH, parts.rates),
    "lr_scheduler": Effect(("cosine", "const"), parts.rates),
    "lr_cooldown_end": Effect(("0", "1e-4"), parts.rates, COOLDOWN),
    "lr_cooldown_power": Effect(("1", "2"), parts.rates, COOLDOWN),
    "lr_min": Effect(("0", "1e-4"), parts.rates),
    "lr_tau_scheduler": Effect(("const", "step_thresh"), parts.rates),
    "iters": Effect((None, "3"), parts.rates),
    "stop_epochs": Effect((None, "1"), parts.rates),
    "stop_iters": Effect((None, "3"), parts.rates),
    # the run
    "config_file": Effect((None, "@settings"), parts.rates_without_lr),
    "dry_run": Effect(SWITCH, observe_run(runs.files)),
    "batch_size": Effect(("2", "4"), observe_run(lambda run: run.forwards)),
    "global_batch_size": Effect((None, "4"), observe_run(lambda run: run.forwards)),
    "accum_freq": Effect(("1", "2"), observe_run(lambda run: run.forwards)),
    "precision": Effect(("fp32", "amp_bf16"), observe_run(runs.losses)),
    "seed": Effect(("0", "1"), parts.parameters),
    "logs": Effect(("here", "there"), runs.place, "--name run"),
    "name": Effect(("this", "that"), runs.place),
    "log_local": Effect(SWITCH, observe_opened(lambda files, level, wandb: files, OTHER_NODE)),
    "log_every_n_steps": Effect(("1", "2"), observe_run(lambda run: len(run.logged("LR"))), "--batch-size 1"),
    "report_to": Effect((None, "tensorboard"), observe_opened(lambda files, level, wandb: files)),
    "wandb_notes": Effect((None, "why"), observe_opened(lambda files, level, wandb: wandb), "--report-to wandb"),
    "wandb_project_name": Effect(
        (None, "other"), observe_opened(lambda files, level, wandb: wandb), "--report-to wandb"
    ),
    "remote_sync": Effect((None, "@elsewhere"), runs.copied, FSSPEC),
    "remote_sync_frequency": Effect(
        ("1", "2"), runs.waits, "--remote-sync @elsewhere --remote-sync-protocol fsspec"
    ),
    "remote_sync_protocol": Effect(("s3", "fsspec"), runs.addresses, "--remote-sync place"),
    "save_frequency": Effect(("1", "2"), observe_run(runs.files)),
    "save_every_n_steps": Effect((None, "1"), observe_run(runs.files), STEPS),
    "save_every_minutes": Effect((None, "0.00001"), observe_run(runs.files), STEPS),
    "keep_last": Effect(("1", "2"), observe_run(runs.files), f"{STEPS} --save_every_n_steps 1"),
    "save_most_recent": Effect(SWITCH, observe_run(runs.files)),
    "save_published_state": Effect(SWITCH, observe_run(lambda run: sorted(run.saved)), FASTCLIP),
    "delete_previous_checkpoint": Effect(SWITCH, observe_run(runs.files)),
    "resume": Effect((None, "@checkpoint"), observe_run(lambda run: len(run.forwards))),
    "requeue_on_preempt": Effect(SWITCH, runs.requeues),
    "step_timeout": Effect(("0.1", "0"), runs.ends_for_a_hang),
    "u_format": Effect(("log", "linear"), runs.published_rows, "--resume @checkpoint"),
    "deterministic": Effect(SWITCH, runs.repeatable),
    "copy_codebase": Effect(SWITCH, observe_opened(lambda files, level, wandb: files)),
    "debug": Effect(SWITCH, observe_opened(lambda files, level, wandb: level)),
    "profile": Effect(SWITCH, observe_run(runs.files), "--train-num-samples 14 --batch-size 1 --epochs 1"),
    # ranks
    "dist_url": Effect((None, "tcp://localhost:29123"), runs.group_of_two),
    "dist_backend": Effect(("nccl", "gloo"), runs.group_on_gpus),
    "dist_port": Effect((None, "29123"), runs.group_of_two),
    "world_size": Effect(("2", "3"), runs.group),
    "grad_compression": Effect((None, "bf16"), parts.wrapped),
    "powersgd_rank": Effect((None, "2"), parts.wrapped, "--grad_compression powersgd"),
    "ddp_static_graph": Effect(SWITCH, parts.wrapped),
    "no_set_device_rank": Effect(SWITCH, runs.group_on_gpus),
}

REFUSED_VALUES = {"str": "x", "int": "3"}


def words_of(key: str, value: Any) -> str:
    if value is None:
        return ""
    return ALL[key].name if value is True else f"{ALL[key].name} {value}"


def test_every_flag_has_an_effect_or_is_refused():
    assert set(EFFECTS) | REFUSED == set(ALL)
    assert not set(EFFECTS) & REFUSED


@pytest.mark.parametrize("key", EFFECTS)
def test_effect(key, lab, monkeypatch):
    monkeypatch.chdir(lab.root)
    effect = EFFECTS[key]
    before, after, again = (
        effect.observe(lab, lab.words(f"{effect.also} {words_of(key, value)}"))
        for value in (*effect.values, effect.values[0])
    )
    assert before == again, "the observation itself varies"
    assert before != after


def test_flags_of_several_teachers_act_in_the_loss_that_distills_by_itself(lab):
    widths = f"{TEACHER} --distill_teacher_dimension 2 4"
    lines = (TEACHER, widths, f"{widths} --distill_average_after_softmax")
    one, logits, softmax = (parts.gradients(lab, lab.words(line)) for line in lines)
    assert one != logits != softmax != one


def test_a_run_repeats(lab):
    """Runs are cached and not repeated above, so the same command must give the same result."""
    words = lab.words("")
    first, second = lab.run(words), Lab.run(replace(lab, runs={}), words)
    assert first.folder != second.folder
    assert runs.losses(first) == runs.losses(second)
    assert runs.weights(first) == runs.weights(second)
    assert first.files == second.files


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_refused(key, lab):
    value = True if ALL[key].kind == "switch" else REFUSED_VALUES[ALL[key].kind]
    with pytest.raises(Refusal) as refused:
        parse(lab.words(words_of(key, value)))
    assert str(refused.value) == f"{words_of(key, value)}: {ALL[key].refused}"
