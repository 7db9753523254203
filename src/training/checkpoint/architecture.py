"""What a checkpoint says of its model: enough to build it again, whatever the command line names.

A model's name does not determine it: flags, pretrained tags and the version of open_clip change activation, image
size and normalization. So each checkpoint holds, under ``KEY``, the config and the preprocess config of the model
as it was built. Published checkpoints hold neither, and loaders of published files do not look at the entry.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from training.checkpoint import pt_file
from training.config.inputs.weights import TORCH, NotWeights, kind_of

KEY = "architecture"

# Parts of a model's config that change neither which function its weights compute nor what the weights are called.
# The scalars are in the weights; patches are dropped in training only; towers are initialized before the weights.
_WITHOUT_MEANING = {
    *("init_logit_scale", "init_logit_bias"),
    *("vision_cfg.patch_dropout", "vision_cfg.timm_drop", "vision_cfg.timm_drop_path"),
    *("vision_cfg.timm_model_pretrained", "text_cfg.hf_model_pretrained"),
}
_DEFAULTS: dict[str, Any] = {
    "quick_gelu": False,
    "custom_text": False,
    **{f"vision_cfg.{field.name}": field.default for field in fields(CLIPVisionCfg)},
    **{f"text_cfg.{field.name}": field.default for field in fields(CLIPTextCfg)},
}


@dataclass(frozen=True)
class ModelDescription:
    """A model as it was built, after all flags and tags.

    ``name``            the value of ``--model``: an open_clip name, or the stem of a config file.
    ``model_cfg``       open_clip's config: embed_dim, vision_cfg, text_cfg, quick_gelu, custom_text, ...
    ``preprocess_cfg``  fields of open_clip's ``PreprocessCfg``: size, mean, std, interpolation, resize_mode, ...
    ``tokenizer``       class of the tokenizer, and the repository of one of Hugging Face's.
    ``context_length``  tokens of a caption.
    """

    name: str
    model_cfg: Mapping[str, Any]
    preprocess_cfg: Mapping[str, Any]
    tokenizer: str
    context_length: int

    def held(self) -> dict[str, Any]:
        """What a checkpoint holds: plain values, with lists in place of tuples."""
        held: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return held

    @property
    def declared(self) -> dict[str, Any]:
        """How the weights were trained, as open_clip's pretrained tags say it: mean, std, quick_gelu, ..."""
        keys = ("mean", "std", "interpolation", "resize_mode", "fill_color")
        pixels = {key: self.preprocess_cfg[key] for key in keys if key in self.preprocess_cfg}
        return {**pixels, "quick_gelu": bool(self.model_cfg.get("quick_gelu"))}


def architecture_of(held: Mapping[str, Any], path: str | Path) -> ModelDescription | None:
    """What the checkpoint ``path``, whose content is ``held``, says of its model; None: it does not say it.

    Files that others have written, published ones and bare weights say nothing. ValueError: the entry is damaged.
    """
    entry = held.get(KEY)
    if not isinstance(entry, Mapping) or "model_cfg" not in entry:
        return None
    try:
        model, pixels = entry["model_cfg"], entry["preprocess_cfg"]
        towers = model["vision_cfg"], model["text_cfg"]
        if not all(isinstance(part, Mapping) for part in (model, pixels, *towers)) or "embed_dim" not in model:
            raise TypeError("it is no model config of open_clip")
        return ModelDescription(
            str(entry["name"]),
            dict(model),
            {key: tuple(value) if isinstance(value, list) else value for key, value in pixels.items()},
            str(entry["tokenizer"]),
            int(entry["context_length"]),
        )
    except (TypeError, ValueError, LookupError) as error:
        raise ValueError(
            f"checkpoint {path}: its entry {KEY!r} does not describe a model ({' '.join(repr(error).split())}); "
            "remove the entry, or get the file again"
        ) from error


def description_at(path: str | Path) -> ModelDescription | None:
    """What the checkpoint ``path`` says of its model; None: it does not say it, or is no checkpoint of torch's.

    ValueError: what it says is damaged.
    """
    file = Path(path)
    try:
        if kind_of(file) != TORCH:
            return None
        return _read(str(file), file.stat().st_mtime_ns)
    except (NotWeights, OSError):
        return None  # whoever reads the weights says what is wrong


@lru_cache(maxsize=8)
def _read(path: str, changed: int) -> ModelDescription | None:
    """``changed``: when the file was last written, so that a changed file is read again."""
    try:
        held = pt_file.read(path)
    except ValueError:
        return None
    return architecture_of(held, path)


def model_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Field -> its values in two model configs of open_clip, for fields that make two models of the same weights.

    Fields of the towers have their names before them: ``vision_cfg.image_size``. A field that a config does not
    have counts as open_clip's default.
    """
    a, b = dict(_fields(ours)), dict(_fields(theirs))
    pairs = {key: (a.get(key, _DEFAULTS.get(key)), b.get(key, _DEFAULTS.get(key))) for key in sorted({*a, *b})}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and key not in _WITHOUT_MEANING}


def _fields(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if "hf_model_name" in config["text_cfg"]:
        config = {**config, "custom_text": True}  # open_clip builds these so, whatever the config says
    for key, value in json.loads(json.dumps(dict(config))).items():
        if isinstance(value, dict) and key.endswith("_cfg"):
            for name, inner in value.items():
                square = name == "image_size" and isinstance(inner, list) and len(set(inner)) == 1
                yield f"{key}.{name}", inner[0] if square else inner
        else:
            yield key, value
