"""The image tower as the folder that ``timm.create_model('local-dir:DIR', pretrained=True)`` opens.

The classifier of timm's model is the projection into the joint space: the model's output, divided by its norm, is
the image's embedding. That it is so is checked before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from training.exporting.plain_towers import check_vit, with_defaults
from training.exporting.subject import CannotExport, Subject

_TOLERANCE = 1e-4  # between two ways to compute the same unit vector in float32
# timm's models for open_clip's ViT; sizes are given as arguments.
_VIT = {False: "vit_base_patch16_clip_224", True: "vit_base_patch16_clip_quickgelu_224"}


def write_folder(subject: Subject, folder: Path) -> None:
    """Weights and ``config.json`` of the image tower. CannotExport: timm has no such model."""
    visual, config = subject.built.module.visual, subject.config
    size = subject.preprocess["size"]
    height, width = size if isinstance(size, list) else (size, size)
    vision, width_out = config["vision_cfg"], config["embed_dim"]
    if "timm_model_name" in vision:
        name, arguments = vision["timm_model_name"], _arguments(visual, vision, (height, width))
        outputs = _outputs(visual, vision, width_out)
    else:
        check_vit(vision, "timm's ViT")
        name, outputs = _VIT[bool(config.get("quick_gelu"))], width_out
        full = with_defaults(vision, "vision_cfg")
        arguments = {
            "img_size": [height, width],
            "patch_size": full["patch_size"],
            "embed_dim": full["width"],
            "depth": full["layers"],
            "num_heads": full["width"] // full["head_width"],
            "mlp_ratio": full["mlp_ratio"],
        }
    try:
        tower = timm.create_model(name, num_classes=outputs, **arguments).eval()
        tower.load_state_dict(_weights(subject, tower, vision))
    except (RuntimeError, TypeError, KeyError) as error:
        raise CannotExport(f"timm does not take its weights ({' '.join(str(error).split())[:200]})") from error
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = subject.built.module.encode_image(images, normalize=True), tower(images)
    if not torch.allclose(ours, nn.functional.normalize(theirs, dim=-1), rtol=0, atol=_TOLERANCE):
        raise CannotExport("timm computes something else from these weights")
    state = {key: subject.stored(key, tensor) for key, tensor in tower.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    held = _config(subject, tower, name, outputs, arguments, (height, width))
    (folder / "config.json").write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")


def _outputs(visual: Any, vision: Mapping[str, Any], embedding: int) -> int:
    full = with_defaults(vision, "vision_cfg")
    if full["timm_pool"] in ("abs_attn", "rot_attn"):
        raise CannotExport(f"its timm_pool {full['timm_pool']} is open_clip's own")
    if full["timm_proj"] == "mlp":
        raise CannotExport("its projection is an MLP, and a model of timm ends in one layer")
    return 0 if full["timm_proj"] == "none" else embedding


def _arguments(visual: Any, vision: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    pool = with_defaults(vision, "vision_cfg")["timm_pool"]
    arguments: dict[str, Any] = {"global_pool": pool} if pool else {}
    default: Any = timm.get_pretrained_cfg(vision["timm_model_name"])
    if default is not None and default.fixed_input_size and tuple(default.input_size[1:]) != size:
        arguments["img_size"] = list(size)
    return arguments


def _weights(subject: Subject, tower: Any, vision: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of the image tower under timm's names, in float32."""
    state: dict[str, Tensor] = subject.built.module.state_dict()
    if "timm_model_name" not in vision:
        return checkpoint_filter_fn({k: v for k, v in state.items() if k.startswith("visual.")}, tower)
    trunk = {k.removeprefix("visual.trunk."): v for k, v in state.items() if k.startswith("visual.trunk.")}
    if "visual.head.proj.weight" not in state:
        return trunk
    classifier = next(name for name, module in tower.named_modules() if module is tower.get_classifier())
    weight = state["visual.head.proj.weight"]
    bias = state.get("visual.head.proj.bias", weight.new_zeros(len(weight)))
    return trunk | {f"{classifier}.weight": weight, f"{classifier}.bias": bias}


def _config(
    subject: Subject, tower: Any, name: str, outputs: int, arguments: Mapping[str, Any], size: tuple[int, int]
) -> dict[str, Any]:
    pixels = subject.preprocess
    known = {key: tower.pretrained_cfg.get(key) for key in ("first_conv", "classifier", "fixed_input_size")}
    return {
        "architecture": name.partition(".")[0],
        "num_classes": outputs,
        "num_features": tower.num_features,
        "model_args": dict(arguments),
        "pretrained_cfg": {
            **known,
            "num_classes": outputs,
            "input_size": [3, *size],
            "mean": pixels["mean"],
            "std": pixels["std"],
            "interpolation": pixels["interpolation"],
            "crop_pct": 1.0,
            "crop_mode": {"shortest": "center", "longest": "border", "squash": "squash"}[pixels["resize_mode"]],
        },
    }
