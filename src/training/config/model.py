"""What a model's name says without building it: whether open_clip knows it, its config, CLIP's defaults for it.

open_clip's configs are read from its package folder; importing open_clip takes seconds and a refusal should not.
"""

from __future__ import annotations

import importlib.util
import json
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from training.config.parser import Given, Refusal

_SCHEMES = ("hf-hub:", "local-dir:")  # models that open_clip fetches, or reads from a folder


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
    """``--model``, ``--ref_model`` or ``--distill-model`` names something that can be built."""
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


def optimizer_defaults(model: str) -> dict[str, float]:
    """Learning rate, betas and epsilon by model name, as in CLIP's paper; a JSON path counts by its stem."""
    vit = "vit" in _name(model).lower()
    return {"lr": 5e-4, "beta1": 0.9, "beta2": 0.98 if vit else 0.999, "eps": 1e-6 if vit else 1e-8}


def _is_file(model: str) -> bool:
    return model.endswith(".json")


def _name(model: str) -> str:
    return Path(model).stem if _is_file(model) else model


@cache
def _builtin_configs() -> dict[str, Path]:
    spec = importlib.util.find_spec("open_clip")  # finds the package without running it
    folders = [Path(place) / "model_configs" for place in spec.submodule_search_locations or ()] if spec else []
    return {file.stem: file for folder in folders for file in folder.glob("*.json")}
