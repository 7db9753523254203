"""Models as checkpoints describe them, and what is said where the flags describe another one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import open_clip

from training.checkpoint.architecture import ModelDescription, description_at, model_differences
from training.config.reference import ReferenceConfig
from training.models import pretrained

# Fields in which a model may differ from the one that --model names, as flags, tags and config files change them.
_CHANGED_BY_FLAGS = frozenset({"quick_gelu", "custom_text", "vision_cfg.image_size", "text_cfg.tokenizer_kwargs"})


def open_clip_name(description: ModelDescription, said: str) -> str:
    """A name under which open_clip builds the model of ``description``: a built-in one where that is the same.

    ValueError: this version of open_clip cannot build it. ``said``: where the description is from.
    """
    name = description.name.replace("/", "-")
    config = dict(description.model_cfg)
    if name in open_clip.list_models():
        builtin = open_clip.get_model_config(name)
        same_scalars = builtin.get("init_logit_bias") == config.get("init_logit_bias")
        if same_scalars and not model_differences(builtin, config):
            return name
    stem = re.sub(r"[^\w.-]+", "-", description.name.removeprefix("local-dir:")).strip("-.") or "model"
    # The weights bring the temperature; without it the name is that of the config file if flags changed nothing.
    config.pop("init_logit_scale", None)
    name = pretrained.register(stem, config)
    _try_to_build(name, said)
    return name


@lru_cache(maxsize=32)
def _try_to_build(name: str, said: str) -> None:
    pretrained.try_to_build(name, said)


def name_of(model: str, model_flag: str, checkpoint: str, checkpoint_flag: str) -> str:
    """open_clip's name for the model that ``model`` names, or that the file ``checkpoint`` says it is of.

    Either may be empty. If both say it, and differ in what flags change (QuickGELU, image size), it is the file's.
    ValueError: there is no such model, the file alone does not say what it is, or it is of another model.
    """
    saved = description_at(checkpoint) if checkpoint else None
    if not model:
        if saved is None:
            raise ValueError(
                f"{checkpoint_flag} {checkpoint}: the file does not say of which model it is, as checkpoints of "
                f"this program do: give {model_flag} NAME too"
            )
        return open_clip_name(saved, f"{checkpoint_flag} {checkpoint}")
    name, said = pretrained.open_clip_name(model, model_flag), f"{model_flag} {model}"
    differing = {} if saved is None else model_differences(pretrained.architecture(name, said), saved.model_cfg)
    if saved is None or not differing:
        return name
    cure = f"give the file's own, or leave {model_flag} out"
    check_same_model(differing, said, saved, f"checkpoint {checkpoint}", cure)
    return open_clip_name(saved, f"{checkpoint_flag} {checkpoint}")


def reference_name(reference: ReferenceConfig) -> tuple[str, str]:
    """open_clip's name for the reference, and the flag and value that name it. ValueError as for ``name_of``."""
    model, checkpoint = reference.ref_model, reference.ref_model_checkpoint
    flag = reference.model_flag
    said = f"{flag} {model}" if model else f"--ref_model_checkpoint {checkpoint}"
    return name_of(model, flag, checkpoint, "--ref_model_checkpoint"), said


def check_same_model(
    differing: Mapping[str, tuple[Any, Any]], said: str, saved: ModelDescription, file_said: str, cure: str
) -> None:
    """ValueError: a model differs from the ``saved`` one in more than what flags change, so that it is another.

    ``differing``: fields with the value of the flag ``said``, and that of the file. ``cure``: what to do then.
    """
    if differing.keys() - _CHANGED_BY_FLAGS:
        what = ", ".join(shown(differing))
        raise ValueError(f"{said}: {file_said} was saved with another --model, {saved.name} ({what}): {cure}")


def shown(differing: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """The first differences as text, with the value of the file before the other."""
    return [f"{field} {theirs}, not {ours}" for field, (ours, theirs) in list(differing.items())[:4]]
