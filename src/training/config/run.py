"""What the flags mean together: refusals, and the values that follow from several flags.

Every rule takes what was ``Given`` and either answers or raises ``Refusal``: one sentence with the flag, its
value, what is wrong and what to do. Only ``resolve_objective`` imports the losses, and torch with them, so that
whatever can be refused without them is refused at once.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.config.flags import ALL
from training.config.model import brings_weights, check_model, is_coca
from training.config.parser import Given, Refusal

if TYPE_CHECKING:
    from drrho_clip.losses.registry import LossSpec

# ---------------------------------------------------------------------------------------------------- data


def kind_of_data(given: Given, key: str) -> str:
    """'webdataset', 'csv' or 'synthetic' for ``--train-data`` or ``--val-data``; 'none' where it is not given."""
    if key == "train_data" and given.dataset_type == "synthetic":
        return "synthetic"
    data = given.values[key]
    if not data:
        return "none"
    if given.dataset_type in ("webdataset", "csv"):
        return given.dataset_type
    kinds = {_kind_of_source(source) for source in data.split("::")}
    if len(kinds) > 1 or None in kinds:
        what = "mixes shards and csv files" if None not in kinds else "is neither .tar nor .csv or .tsv"
        raise Refusal(f"{given.say(key)}: it {what}, so say what it is with --dataset-type webdataset or csv")
    return kinds.pop()


def _kind_of_source(source: str) -> str | None:
    if re.search(r"\.(csv|tsv)$", source):
        return "csv"
    return "webdataset" if re.search(r"\.tar\b|\.tgz\b", source) else None


def data_sizes(given: Given, dataset_type: str) -> tuple[int, ...]:
    """``--data_size`` per source; empty where it was not given."""
    sizes = given.data_size if isinstance(given.data_size, list) else [given.data_size]
    if sizes == [-1]:
        return ()
    if min(sizes) < 1:
        raise Refusal(f"{given.say('data_size')}: a number of samples is at least 1")
    sources = given.train_data.count("::") + 1 if given.train_data else 1
    if len(sizes) > 1 and (dataset_type != "webdataset" or len(sizes) != sources):
        raise Refusal(
            f"{given.say('data_size')}: {len(sizes)} sizes for {sources} --train-data sources, give one size "
            "per :: source, or a single one where keys are already distinct"
        )
    return tuple(sizes)


def upsampling_factors(given: Given, dataset_type: str) -> tuple[float, ...] | None:
    """One positive weight per ``::`` source."""
    text = given.train_data_upsampling_factors
    if text is None:
        return None
    say = given.say("train_data_upsampling_factors")
    try:
        factors = tuple(float(part) for part in text.split("::"))
    except ValueError:
        raise Refusal(f"{say}: expected numbers joined with ::, e.g. 1::2.5") from None
    if not all(0 < factor < math.inf for factor in factors):
        raise Refusal(f"{say}: every weight must be above 0, drop the source from --train-data instead")
    if dataset_type != "webdataset" or epoch_policy(given) != "resample":
        raise Refusal(f"{say}: sources are only weighted in webdataset training with --dataset-resampled, add it")
    sources = given.train_data.count("::") + 1
    if len(factors) != sources:
        raise Refusal(f"{say}: {len(factors)} weights for {sources} --train-data sources, give one per source")
    return factors


def epoch_policy(given: Given) -> str:
    """'wrap', 'exact' or 'resample', which the published ``--dataset-resampled`` asks for too."""
    policy = given.epoch_policy or ("resample" if given.dataset_resampled else "wrap")
    if given.dataset_resampled and policy != "resample":
        raise Refusal(
            f"{given.say('epoch_policy')} contradicts --dataset-resampled, which is --epoch_policy resample: "
            "leave one of them out"
        )
    if policy == "exact" and given.skip_webdataset_split_by_node:
        raise Refusal(
            "--epoch_policy exact deals the samples of one shard list to all ranks, which contradicts "
            "--skip_webdataset_split_by_node: leave one of them out"
        )
    return policy


def lanes(given: Given) -> tuple[int, int] | None:
    """``--lanes P,Q`` as numbers; None: the launch decides."""
    if given.lanes is None:
        return None
    if not re.fullmatch(r"[1-9]\d{0,5},[1-9]\d{0,5}", given.lanes):
        raise Refusal(f"{given.say('lanes')}: expected virtual ranks and virtual workers, two numbers like 8,4")
    ranks, workers = given.lanes.split(",")
    return int(ranks), int(workers)


def check_training_data(given: Given, dataset_type: str) -> None:
    """What training needs besides the data itself."""
    if given.train_num_samples is None and dataset_type in ("webdataset", "synthetic"):
        raise Refusal(
            f"--train-num-samples is missing: {dataset_type} data does not say how many samples an epoch has, "
            "so give their number"
        )


def check_files(given: Given) -> None:
    """Local files that are to be read exist; patterns, URLs and tags are left to whoever opens them."""
    for key in ("train_data", "val_data", "imagenet_val", "imagenet_v2", "resume", "ref_model_checkpoint"):
        _check_file(given, key, is_file=True)
    for key in ("pretrained", "ref_model_pretrained", "distill_pretrained"):
        _check_file(
            given, key, is_file=bool(re.search(r"\.(pt|pth|bin|ckpt|safetensors)$", given.values[key] or ""))
        )


def _check_file(given: Given, key: str, is_file: bool) -> None:
    value = given.values[key]
    if not value or not is_file or (key == "resume" and value == "latest"):
        return
    if re.search(r"[:{*?\[]", value) or (key == "train_data" and given.dataset_type == "synthetic"):
        return
    if not Path(value).exists():
        raise Refusal(f"{given.say(key)}: there is no such file on this machine, check the path")


# ---------------------------------------------------------------------------------------------------- loss


@dataclass(frozen=True)
class Objective:
    """Which loss a run minimizes, by the registry's entry, and which flags decided it."""

    spec: LossSpec
    decided_by: str
    temperature_scheme: str

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def individual(self) -> bool:
        """One temperature per sample."""
        return self.spec.temperature == "individual"


def resolve_objective(given: Given) -> Objective:
    """The loss that the published flags, the model and ``--loss`` agree on."""
    from drrho_clip import losses  # fills the registry; imports torch

    if given.loss is not None and given.loss not in losses.names():
        raise Refusal(f"{given.say('loss')}: unknown, choose one of {', '.join(losses.names())}")
    scheme = given.temperature_scheme
    if given.loss is not None and losses.get(given.loss).temperature == "individual":
        if given.chose("temperature_scheme") and scheme != "individual_learnable":
            raise Refusal(
                f"{given.say('loss')} has one temperature per sample, which contradicts "
                f"{given.say('temperature_scheme')}: leave one of them out"
            )
        scheme = "individual_learnable"
    implied = _implied_losses(given, scheme)
    if len(implied) > 1:
        flags, names = zip(*((flag, name) for name, flag in implied.items()))
        raise Refusal(
            f"{flags[0]} asks for the loss {names[0]!r} and {flags[1]} for {names[1]!r}: keep one of them"
        )
    if given.loss is None:
        name, decided_by = next(iter(implied.items()), ("clip", "no flag asks for another one"))
    else:
        name, decided_by = given.loss, given.say("loss")
        for other, flag in implied.items():
            if other != name:
                raise Refusal(f"{decided_by} contradicts {flag}, which asks for {other!r}: leave one of them out")
        if name == "coca" and not implied:
            raise Refusal(f"{decided_by}: {given.say('model')} has no caption decoder, choose a coca model")
    spec = losses.get(name)
    if spec.sample_state and spec.temperature != "individual" and scheme == "individual_learnable":
        raise Refusal(
            f"{given.say('temperature_scheme')} contradicts {decided_by}, which has one temperature for all "
            "samples: use --loss fastclip_individual"
        )
    return Objective(spec, decided_by, scheme)


def _implied_losses(given: Given, scheme: str) -> dict[str, str]:
    """Loss names that published flags ask for, and the flag that does."""
    implied = {}
    if given.distill_model or given.distill_pretrained:
        for key, other in (("distill_model", "distill_pretrained"), ("distill_pretrained", "distill_model")):
            if not given.values[key]:
                raise Refusal(f"{given.say(other)} needs {ALL[key].name}: give the teacher's name and its weights")
        implied["distill"] = given.say("distill_model")
    if is_coca(given.model):
        implied["coca"] = given.say("model")
    if given.siglip:
        implied["siglip"] = "--siglip"
    if given.fastclip:
        individual = scheme == "individual_learnable"
        implied["fastclip_individual" if individual else "fastclip"] = "--fastclip"
    return implied


def keeps_rows(given: Given, objective: Objective) -> bool:
    """Whether the loss keeps anything per sample: single temperatures, or estimates, which gamma = 1 never reads.

    A single epoch has gamma = 1 too, but its run may be continued.
    """
    return objective.individual or (objective.spec.sample_state and given.gamma < 1)


def check_objective(given: Given, objective: Objective) -> None:
    """What the loss needs of the other flags, for a run that trains."""
    if keeps_rows(given, objective) and given.data_size == -1:
        raise Refusal(
            f"--data_size is missing: the loss {objective.name!r} keeps values per sample, so give the number "
            "of samples in the data set (all keys lie below it)"
        )
    if uses_temperature(given, objective):
        lowest, highest = (0.01, 1.0) if objective.individual else (1 / given.logit_scale_bound, 1.0)
        if not lowest * (1 - 1e-6) <= given.temperature <= highest:
            why = "single temperatures are kept" if objective.individual else "--logit_scale_bound keeps it"
            raise Refusal(f"{given.say('temperature')}: {why} in [{lowest:g}, {highest:g}], start within")
    if objective.name == "distill" and given.distill_weight > 1:
        raise Refusal(f"{given.say('distill_weight')}: the contrastive loss gets 1 minus it, give at most 1")


def uses_temperature(given: Given, objective: Objective) -> bool:
    """``--temperature`` acts with FastCLIP's losses only, where the user gave it."""
    return objective.spec.sample_state and given.chose("temperature")


# ---------------------------------------------------------------------------------------------------- reference


def resolve_reference(given: Given, objective: Objective, *, reads: bool, writes: str) -> dict[str, Any]:
    """``ref_model``, its weights and what it is used for; empty without a reference.

    ``reads``: its features are on disk, so that it may go unnamed. ``writes``: what the run writes, if it does.
    """
    usage = _usage(given)
    nothing = {"ref_model": "", "ref_model_pretrained": "", "ref_model_checkpoint": "", "usage": frozenset()}
    if writes and writes != "features":
        return nothing
    if given.distill_model:
        if given.ref_model:
            raise Refusal(
                f"{given.say('distill_model')} and {given.say('ref_model')} are two references: use one, "
                "--ref_features_usage distill makes --ref_model a teacher"
            )
        check_model(given, "distill_model")
        return {
            "ref_model": given.distill_model,
            "ref_model_pretrained": given.distill_pretrained,
            "ref_model_checkpoint": "",
            "usage": frozenset({"distill"}),
        }
    if writes and not given.ref_model:
        raise Refusal("--cache_ref_model_features needs --ref_model: the model to write features of")
    if not given.ref_model:
        for key in ("ref_model_pretrained", "ref_model_checkpoint"):
            if given.values[key]:
                raise Refusal(f"{given.say(key)} has no effect without --ref_model: name the reference")
    if not given.ref_model and not reads:
        if given.chose("ref_features_usage"):
            raise Refusal(f"{given.say('ref_features_usage')} has no effect without --ref_model: name a reference")
        if objective.spec.reference == "required":
            raise Refusal(f"{given.say('loss')} needs a teacher: give --distill-model and --distill-pretrained")
        return nothing
    if given.ref_model:
        check_model(given, "ref_model")
        weights = given.ref_model_pretrained or given.ref_model_checkpoint or brings_weights(given.ref_model)
        if not weights and not reads:
            raise Refusal(
                f"{given.say('ref_model')} has no weights: give --ref_model_pretrained TAG or FILE, or "
                "--ref_model_checkpoint FILE"
            )
    if objective.spec.reference == "required":
        usage = usage - {"ref"} | {"distill"}
    elif objective.spec.reference == "none" and "ref" in usage and not writes:
        flag = given.say("cached_ref_features_dir" if reads else "ref_model")
        raise Refusal(
            f"{flag}: the loss {objective.name!r} has no use for a reference's margins, add --fastclip, or use "
            "the reference with --ref_features_usage distill or select"
        )
    return {
        "ref_model": given.ref_model,
        "ref_model_pretrained": given.ref_model_pretrained,
        "ref_model_checkpoint": given.ref_model_checkpoint,
        "usage": usage,
    }


def _usage(given: Given) -> frozenset[str]:
    words = frozenset(word.strip() for word in given.ref_features_usage.split(","))
    if not words <= {"ref", "distill", "select"}:
        raise Refusal(f"{given.say('ref_features_usage')}: expected a comma list of ref, distill and select")
    return words


def check_distillation(given: Given) -> None:
    """The teachers' widths: the default, or at least two positive ones."""
    widths = given.distill_teacher_dimension
    if widths != [-1] and min(widths) < 1:
        raise Refusal(
            f"{given.say('distill_teacher_dimension')}: widths are at least 1, leave it out for a single one"
        )


# ---------------------------------------------------------------------------------------------------- run


def check_batch(given: Given, usage: frozenset[str]) -> None:
    """Accumulation divides the batch, and what selection keeps of it."""
    if given.global_batch_size is not None and given.chose("accum_freq"):
        raise Refusal(
            f"{given.say('accum_freq')} contradicts {given.say('global_batch_size')}, which splits a rank's share "
            "into micro-batches of --batch-size at most: leave one of them out"
        )
    if given.global_batch_size is not None and "select" in usage:
        raise Refusal(
            f"{given.say('global_batch_size')}: what batch selection keeps of a batch depends on its size, so "
            "give --batch-size instead"
        )
    batch, ratio, draws = given.batch_size, given.ref_filter_ratio, given.ref_filter_n_chunks
    sizes = {given.say("batch_size"): batch}
    if "select" in usage:
        kept = round(batch * (1 - ratio))
        if kept < 1 or not math.isclose(kept, batch * (1 - ratio), abs_tol=1e-6):
            raise Refusal(
                f"{given.say('ref_filter_ratio')} of {given.say('batch_size')} is no whole number of samples: "
                "choose a batch size such that batch size times ratio is one"
            )
        what = f"the {kept} samples that selection keeps of {given.say('batch_size')}"
        if kept % draws:
            raise Refusal(f"{given.say('ref_filter_n_chunks')} does not divide {what}: choose a divisor of {kept}")
        sizes[what] = kept
    for what, size in sizes.items():
        if size % given.accum_freq:
            raise Refusal(f"{given.say('accum_freq')} does not divide {what}: choose a divisor of {size}")
    if given.ddp_static_graph and given.accum_freq > 1:
        raise Refusal(
            f"--ddp-static-graph does not work with {given.say('accum_freq')}: DDP's static graph cannot skip its "
            "reduction for micro-batches, leave one of the two out"
        )


def check_schedule(given: Given, lr: float) -> None:
    """Schedules that need each other's flags."""
    if given.lr_scheduler == "const-cooldown":
        if given.epochs_cooldown is None:
            raise Refusal(
                "--lr-scheduler const-cooldown needs --epochs-cooldown: give the epochs that it falls for"
            )
        if given.epochs_cooldown > given.epochs:
            raise Refusal(f"{given.say('epochs_cooldown')} is longer than {given.say('epochs')}: give fewer")
    if given.lr_scheduler == "cosine" and given.lr_min > lr:
        raise Refusal(
            f"{given.say('lr_min')} lies above the learning rate {lr:g}: the cosine would rise, lower it"
        )
    if given.lr_tau_scheduler == "cosine" and 0 < given.lr_tau < given.lr_min:
        raise Refusal(
            f"{given.say('lr_tau')} lies below --lr_min {given.lr_min:g}, which its cosine shares: it would rise; "
            "lower --lr_min, or use --lr_tau_scheduler const"
        )
    if given.optimizer == "nesterov" and given.momentum == 0:
        raise Refusal("--momentum 0 with --optimizer nesterov: it needs a momentum above 0, or use sgd")


def report_to(given: Given) -> frozenset[str]:
    """'all', or a comma list of tensorboard and wandb."""
    words = {word.strip() for word in given.report_to.split(",")} - {""}
    if words == {"all"}:
        return frozenset({"tensorboard", "wandb"})
    if not words <= {"tensorboard", "wandb"}:
        raise Refusal(f"{given.say('report_to')}: expected tensorboard, wandb, both with a comma, or all")
    return frozenset(words)


def check_something_to_do(given: Given, trains: bool) -> None:
    """A run trains, or evaluates."""
    if trains or given.val_data or given.imagenet_val or given.imagenet_v2:
        return
    if given.epochs == 0:
        raise Refusal("--epochs 0 evaluates only: give --val-data, --imagenet-val or --imagenet-v2")
    raise Refusal(
        "--train-data is missing: give data to train on, or data to evaluate on (--imagenet-val, --val-data)"
    )
