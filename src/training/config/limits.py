"""Each flag by itself: which published flags are refused, and the values that the others may take."""

from __future__ import annotations

from training.config.flags import ALL
from training.config.parser import Given, Refusal

# Published flags without an effect here: what to say when one is set to anything but its default.
REFUSED: dict[str, str] = {
    "horovod": "Horovod is not supported; start one process per GPU with torchrun or srun instead",
    "torchscript": "a scripted model cannot be trained with DDP and autocast; use --torchcompile instead",
    "trace": "a traced model freezes its batch size and control flow; use --torchcompile instead",
    "use_bnb_linear": "bitsandbytes layers are not supported; use --precision amp_bf16 to save time and memory",
}

_POSITIVE, _AT_LEAST_0, _AT_LEAST_1, _SHARE = "(0, inf)", "[0, inf)", "[1, inf)", "[0, 1)"
INTERVALS: dict[str, str] = {
    **dict.fromkeys(
        ["image_std", "eps", "grad_clip_norm", "lr_cooldown_power", "remote_sync_frequency"], _POSITIVE
    ),
    **dict.fromkeys(["fastclip_eps", "temperature", "loss_weight", "distill_logit_scale"], _POSITIVE),
    **dict.fromkeys(["lr", "wd", "warmup", "lr_min", "lr_cooldown_end", "epochs", "workers", "seed"], _AT_LEAST_0),
    **dict.fromkeys(["save_frequency", "val_frequency", "zeroshot_frequency", "step_timeout"], _AT_LEAST_0),
    **dict.fromkeys(["lock_image_unlocked_groups", "lock_text_unlocked_layers"], _AT_LEAST_0),
    **dict.fromkeys(["coca_caption_loss_weight", "coca_contrastive_loss_weight"], _AT_LEAST_0),
    **dict.fromkeys(["gamma_decay_epochs", "rho", "distill_weight", "distill_ref_logit_scale"], _AT_LEAST_0),
    **dict.fromkeys(
        ["batch_size", "accum_freq", "log_every_n_steps", "world_size", "epochs_cooldown"], _AT_LEAST_1
    ),
    **dict.fromkeys(["global_batch_size", "save_every_n_steps", "keep_last"], _AT_LEAST_1),
    "save_every_minutes": _POSITIVE,
    **dict.fromkeys(["train_num_samples", "val_num_samples", "force_image_size"], _AT_LEAST_1),
    **dict.fromkeys(["ref_filter_n_chunks", "logit_scale_bound"], _AT_LEAST_1),
    **dict.fromkeys(["num_samples_per_shard", "cache_group_size", "num_syn_texts"], _AT_LEAST_1),
    **dict.fromkeys(["beta1", "beta2", "momentum", "force_patch_dropout", "ref_filter_ratio"], _SHARE),
    "max_skipped_steps": _AT_LEAST_1,
    "cache_rank": _AT_LEAST_0,
    "gamma": "(0, 1]",
    "max_bad_fraction": "[0, 1]",
    "image_mean": "(-inf, inf)",  # which leaves out nan
    "lr_tau": "(-inf, inf)",
}

WORDS: dict[str, tuple[str, ...]] = {
    "optimizer": ("adamw", "lamb", "lion", "sgd", "nesterov"),
    "lr_scheduler": ("cosine", "const", "const-cooldown"),
    "lr_tau_scheduler": ("cosine", "const", "step_thresh"),
    "gamma_schedule": ("cosine", "constant"),
    "temperature_scheme": ("global_learnable", "global_constant", "individual_learnable"),
    "dist_backend": ("nccl", "gloo"),
}


def check_values(given: Given) -> None:
    """Each flag by itself: refused flags, intervals, known words."""
    for key, reason in REFUSED.items():
        if given.values[key] != ALL[key].default:
            raise Refusal(f"{given.say(key)}: {reason}")
    for key, interval in INTERVALS.items():
        value = given.values[key]
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not _inside(number, interval):
                raise Refusal(f"{given.say(key)}: the value must lie in {interval}")
    for key, words in WORDS.items():
        if given.values[key] not in words:
            raise Refusal(f"{given.say(key)}: unknown, choose one of {', '.join(words)}")
    for key in ("iters", "stop_epochs", "stop_iters"):
        if given.values[key] == 0:
            raise Refusal(f"{given.say(key)}: zero has no meaning here, give at least 1, or -1 to switch it off")
    if given.name == "":
        raise Refusal("--name '': the name is empty, give one or leave the flag out")
    for key in ("image_mean", "image_std"):
        if given.values[key] is not None and len(given.values[key]) not in (1, 3):
            raise Refusal(f"{given.say(key)}: give one number per channel (3), or one for all")
    if given.force_image_size and len(given.force_image_size) > 2:
        raise Refusal(f"{given.say('force_image_size')}: give one size, or height and width")


def _inside(number: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(", "))
    above = number >= low if interval[0] == "[" else number > low
    return above and (number <= high if interval[-1] == "]" else number < high)
