"""The frozen reference: which model it is, where its weights come from, and what it is used for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from drrho_clip.losses.registry import LossSpec
from training.config.given import Given, Refusal
from training.config.inputs.weights import check_weights, check_weights_file
from training.config.model import brings_weights, check_model
from training.config.remarks import Idle, Pitfall


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen reference. ``usage`` is a subset of {'ref', 'distill', 'select'}; empty without a reference.

    ``ref_model`` may be empty beside ``ref_model_checkpoint``, which then says what it is.

    ``--distill-model`` is the reference of OpenCLIP's distillation baseline and fills ``ref_model``; its usage is
    'distill', and 'select' where that is asked for. ``model_flag``: the flag that gave ``ref_model``.
    """

    ref_model: str
    ref_model_pretrained: str
    ref_model_checkpoint: str
    usage: frozenset[str]
    ref_filter_ratio: float
    ref_filter_n_chunks: int
    ref_filter_topk: bool
    model_flag: str

    @property
    def named(self) -> bool:
        """Whether the flags say which model it is, by its name or by a checkpoint that does."""
        return bool(self.ref_model or self.ref_model_checkpoint)


IDLE = (
    Idle(
        ("ref_filter_ratio", "ref_filter_n_chunks", "ref_filter_topk"),
        lambda s: "select" not in s.usage,
        "without --ref_features_usage select",
    ),
)
PITFALLS = (
    Pitfall(
        lambda s: (
            s.trains and s.loss.distills and s.given.chose("ref_features_usage") and "ref" in _usage(s.given)
        ),
        "--ref_features_usage ref: no effect with this loss, which has a teacher and no margins",
    ),
    Pitfall(
        lambda s: bool((s.trains or s.writes_cache) and s.usage and _weights_and_tag(s.given)),
        "--ref_model_pretrained beside --ref_model_checkpoint: the weights are the checkpoint's, and the tag only "
        "decides how the model is built (in the published code the tag's weights are used)",
    ),
)


def resolve_reference(given: Given, loss: LossSpec, *, reads: str, writes: str) -> ReferenceConfig:
    """The ``ReferenceConfig`` of the flags; empty without a reference.

    ``reads``: the flag by which its features are read, so that the model need not be named, '' for none.
    ``writes``: the kind of cache that the run writes, '' for none. Refusal: the flags do not describe one
    reference with weights and a use.
    """
    check_weights_file(given, "ref_model_checkpoint")
    for key in ("ref_model_pretrained", "distill_pretrained"):
        check_weights(given, key)
    flag = "--distill-model" if given.distill_model else "--ref_model"
    return given.group(ReferenceConfig, **_choice(given, loss, reads=reads, writes=writes), model_flag=flag)


def _choice(given: Given, loss: LossSpec, *, reads: str, writes: str) -> dict[str, Any]:
    usage = _usage(given)
    nothing = {"ref_model": "", "ref_model_pretrained": "", "ref_model_checkpoint": "", "usage": frozenset()}
    if writes and writes != "features":
        return nothing
    key = "ref_model" if given.ref_model else "ref_model_checkpoint"  # the flag that says which model it is
    named = bool(given.values[key])
    if given.ref_model_pretrained and not given.ref_model:
        say = given.say("ref_model_pretrained")
        cure = "the teacher's are --distill-pretrained" if given.distill_model else "give the reference"
        raise Refusal(f"{say} has no effect without --ref_model: {cure}")
    if given.distill_model:
        if named:
            raise Refusal(
                f"{given.say('distill_model')} and {given.say(key)} are two references: give one; "
                "with --ref_features_usage distill, --ref_model is the teacher"
            )
        check_model(given, "distill_model")
        return {
            "ref_model": given.distill_model,
            "ref_model_pretrained": given.distill_pretrained,
            "ref_model_checkpoint": "",
            "usage": usage - {"ref"} | {"distill"},
        }
    if writes and not named:
        raise Refusal("--cache_ref_model_features needs --ref_model: give the model whose features are written")
    if not named and not reads:
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
        flag = given.say(reads or key)
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


def _weights_and_tag(given: Given) -> bool:
    """Whether the reference has a checkpoint, and a tag beside it."""
    return bool(given.ref_model_checkpoint and given.ref_model_pretrained)


def _usage(given: Given) -> frozenset[str]:
    words = frozenset(word.strip() for word in given.ref_features_usage.split(","))
    if not words <= {"ref", "distill", "select"}:
        raise Refusal(
            f"{given.say('ref_features_usage')}: expected a comma-separated list of ref, distill and select"
        )
    return words
