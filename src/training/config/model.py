"""The target model: its flags, and what is known of a model by its name, without building it.

open_clip's configs are read from its package folder: importing open_clip takes seconds, and a refusal should not.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from training.config.given import Given, Refusal
from training.config.inputs.weights import check_weights
from training.config.remarks import Idle

_SCHEMES = ("hf-hub:", "local-dir:")  # models that open_clip fetches, or reads from a folder


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
    channels_last: bool
    use_bn_sync: bool


IDLE = (
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
)


def resolve_model(given: Given) -> ModelConfig:
    """The ``ModelConfig`` of the flags.

    Refusal: there is no such model or no such file, or a size or a mean has the wrong number of values.
    """
    check_model(given, "model")
    check_weights(given, "pretrained")
    mean, std = (_per_channel(given, key) for key in ("image_mean", "image_std"))
    size = given.force_image_size
    if size is not None:
        if len(size) > 2:
            raise Refusal(f"{given.say('force_image_size')}: give one size, or height and width")
        size = size[0] if len(size) == 1 else tuple(size)
    return given.group(ModelConfig, image_mean=mean, image_std=std, force_image_size=size)


def brings_weights(name: str) -> bool:
    """Whether open_clip finds weights by this name alone (``hf-hub:org/repo``, ``local-dir:folder``)."""
    return name.startswith(_SCHEMES)


def model_config(model: str) -> dict[str, Any] | None:
    """The config behind an open_clip name or a JSON path; None where it is not on this disk (``hf-hub:``).

    OSError, ValueError: the file cannot be read.
    """
    if _is_file(model):
        config = json.loads(Path(model).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}")
        return config
    path = _builtin_configs().get(model.replace("/", "-"))
    return None if path is None else json.loads(path.read_text(encoding="utf-8"))


def check_model(given: Given, key: str) -> None:
    """Refusal: the flag ``key`` names no model that can be built."""
    model = given.values[key]
    try:
        config = model_config(model)
    except (OSError, ValueError) as error:
        raise Refusal(f"{given.say(key)}: the model config cannot be read ({error})") from None
    if config is None and not brings_weights(model):
        near = get_close_matches(model, _builtin_configs(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "open_clip.list_models() lists them"
        raise Refusal(f"{given.say(key)}: open_clip has no such model; {hint}")
    missing = [part for part in ("embed_dim", "vision_cfg", "text_cfg") if config and part not in config]
    if missing:
        raise Refusal(f"{given.say(key)}: the model config lacks {', '.join(missing)}")


def is_coca(model: str) -> bool:
    """Whether the model has a caption decoder, by its name or its config."""
    return "coca" in _name(model).lower() or "multimodal_cfg" in (model_config(model) or {})


def is_vit(model: str) -> bool:
    """Whether the model is a vision transformer by its name; for a JSON path, by its stem."""
    return "vit" in _name(model).lower()


def _per_channel(given: Given, key: str) -> tuple[float, ...] | None:
    values = given.values[key]
    if values is None:
        return None
    if len(values) not in (1, 3):
        raise Refusal(f"{given.say(key)}: give one number per channel (3), or one for all")
    return tuple(values) * (3 // len(values))


def _is_file(model: str) -> bool:
    return model.endswith(".json")


def _name(model: str) -> str:
    return Path(model).stem if _is_file(model) else model


@cache
def _builtin_configs() -> dict[str, Path]:
    spec = importlib.util.find_spec("open_clip")  # finds the package without running it
    folders = [Path(place) / "model_configs" for place in spec.submodule_search_locations or ()] if spec else []
    return {file.stem: file for folder in folders for file in folder.glob("*.json")}
