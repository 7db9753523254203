"""The frozen reference: which model it is, where its weights come from, and what it is used for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from drrho_clip.losses.registry import LossSpec
from training.config.given import Given, Refusal
from training.config.inputs.weights import check_weights, check_weights_file
from training.config.model import brings_weights, check_model
from training.config.remarks import Idle


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


IDLE = (
    Idle(
        ("ref_filter_ratio", "ref_filter_n_chunks", "ref_filter_topk"),
        lambda s: "select" not in s.usage,
        "without --ref_features_usage select",
    ),
)


def resolve_reference(given: Given, loss: LossSpec, *, reads: bool, writes: str) -> ReferenceConfig:
    """The ``ReferenceConfig`` of the flags; empty without a reference.

    ``reads``: its features are read from disk, so the model need not be named. ``writes``: the kind of cache that
    the run writes, '' for none. Refusal: the flags do not describe one reference with weights and a use.
    """
    check_weights_file(given, "ref_model_checkpoint")
    for key in ("ref_model_pretrained", "distill_pretrained"):
        check_weights(given, key)
    return given.group(ReferenceConfig, **_choice(given, loss, reads=reads, writes=writes))


def _choice(given: Given, loss: LossSpec, *, reads: bool, writes: str) -> dict[str, Any]:
    usage = _usage(given)
    nothing = {"ref_model": "", "ref_model_pretrained": "", "ref_model_checkpoint": "", "usage": frozenset()}
    if writes and writes != "features":
        return nothing
    if given.distill_model:
        if given.ref_model:
            raise Refusal(
                f"{given.say('distill_model')} and {given.say('ref_model')} are two references: give one; "
                "with --ref_features_usage distill, --ref_model is the teacher"
            )
        check_model(given, "distill_model")
        return {
            "ref_model": given.distill_model,
            "ref_model_pretrained": given.distill_pretrained,
            "ref_model_checkpoint": "",
            "usage": frozenset({"distill"}),
        }
    if writes and not given.ref_model:
        raise Refusal("--cache_ref_model_features needs --ref_model: give the model whose features are written")
    if not given.ref_model:
        for key in ("ref_model_pretrained", "ref_model_checkpoint"):
            if given.values[key]:
                raise Refusal(f"{given.say(key)} has no effect without --ref_model: give the reference")
    if not given.ref_model and not reads:
        if given.chose("ref_features_usage"):
            raise Refusal(f"{given.say('ref_features_usage')} has no effect without --ref_model: give a reference")
        if loss.distills:
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
    if loss.distills:
        usage = usage - {"ref"} | {"distill"}
    elif loss.reference == "none" and "ref" in usage and not writes:
        flag = given.say("cached_ref_features_dir" if reads else "ref_model")
        raise Refusal(
            f"{flag}: the loss {loss.name!r} does not use a reference's margins; add --fastclip, or use the "
            "reference with --ref_features_usage distill or select"
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
        raise Refusal(
            f"{given.say('ref_features_usage')}: expected a comma-separated list of ref, distill and select"
        )
    return words
