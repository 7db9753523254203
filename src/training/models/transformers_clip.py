"""Weights of Hugging Face transformers' ``CLIPModel`` under open_clip's names, and the other way round.

Both libraries compute the same: transformers keeps queries, keys and values apart, open_clip in one matrix, and
the projections are transposed. Its other models, such as ``SiglipModel``, are not converted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG, PREPROCESSING = "config.json", "preprocessor_config.json"

_PROJECTIONS = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
_NAMES = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    **{
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in (
            ("text_model.final_layer_norm", "ln_final"),
            ("vision_model.pre_layrnorm", "visual.ln_pre"),  # sic
            ("vision_model.post_layernorm", "visual.ln_post"),
        )
        for kind in ("weight", "bias")
    },
}
_LAYER = re.compile(r"(text|vision)_model\.encoder\.layers\.(\d+)\.([\w.]+)\.(weight|bias)")
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.([\w.]+)[._](weight|bias)")
_IN_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_MARK = "vision_model.pre_layrnorm.weight"
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def as_open_clip(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """The weights of a ``CLIPModel``, which may all have a prefix, as open_clip's ``CLIP`` names them.

    Also whether they are such weights; others are returned as they are.
    """
    prefixes = [name.removesuffix(_MARK) for name in state if name.endswith(_MARK)]
    prefixes = [prefix for prefix in prefixes if {f"{prefix}{name}" for name in _PROJECTIONS} <= state.keys()]
    if not prefixes:
        return state, False
    prefix = min(prefixes, key=len)  # of a student with its teacher the outer one, beside which the other is told
    state = {name.removeprefix(prefix): value for name, value in state.items()}
    found = {}
    for name, value in state.items():
        layer = _LAYER.fullmatch(name)
        if name in _PROJECTIONS:
            found[_PROJECTIONS[name]] = value.T
        elif layer is None:
            if not name.endswith("embeddings.position_ids"):  # counts from 0, of transformers before 4.31
                found[_NAMES.get(name, name)] = value
        else:
            tower, number, part, kind = layer.groups()
            block = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{number}"
            three = [name.replace(part, f"self_attn.{which}_proj") for which in "qkv"]
            if name not in three:
                found[f"{block}.{_IN_LAYER.get(part, part)}.{kind}"] = value
            elif name == three[0] and state.keys() >= set(three):
                found[f"{block}.attn.in_proj_{kind}"] = torch.cat([state[each] for each in three])
    return found, True


def as_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of open_clip's ``CLIP``, a ViT and a text tower, as a ``CLIPModel`` names them."""
    names = {ours: theirs for theirs, ours in _NAMES.items()}
    projections = {ours: theirs for theirs, ours in _PROJECTIONS.items()}
    in_layer = {ours: theirs for theirs, ours in _IN_LAYER.items()}
    found = {}
    for name, value in state.items():
        layer = _BLOCK.fullmatch(name)
        if layer is None:
            found[projections.get(name) or names[name]] = value.T if name in projections else value
            continue
        of_image, number, part, kind = layer.groups()
        block = f"{'vision' if of_image else 'text'}_model.encoder.layers.{number}"
        if part == "attn.in_proj":
            for which, each in zip("qkv", value.chunk(3), strict=True):
                found[f"{block}.self_attn.{which}_proj.{kind}"] = each
        else:
            found[f"{block}.{in_layer[part]}.{kind}"] = value
    return found


def declared_in(folder: Path) -> dict[str, Any]:
    """How the ``CLIPModel`` in ``folder`` was trained, by its configs: quick_gelu, mean, std, interpolation."""
    model, pixels = _read(folder / CONFIG), _read(folder / PREPROCESSING)
    if model.get("model_type") != "clip":
        return {}
    towers = [model.get(key) or {} for key in ("text_config", "vision_config")]
    declared: dict[str, Any] = {}
    activations = {tower.get("hidden_act", "quick_gelu") for tower in towers}
    if activations in ({"quick_gelu"}, {"gelu"}):
        declared["quick_gelu"] = activations == {"quick_gelu"}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if len(pixels.get(theirs) or ()) == 3:
            declared[ours] = tuple(map(float, pixels[theirs]))
    if pixels.get("resample") in _INTERPOLATIONS:
        declared["interpolation"] = _INTERPOLATIONS[pixels["resample"]]
    return declared


def _read(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}
