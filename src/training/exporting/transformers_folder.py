"""The folder of a ``CLIPModel`` that Hugging Face transformers opens.

The files are written here, without transformers. Only models that ``CLIPModel`` computes exactly are: open_clip's
own towers with every setting that ``CLIPModel`` does not have at its default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from training.exporting.plain_towers import check_tower, check_vit, with_defaults
from training.exporting.subject import CannotExport, Subject
from training.exporting.tokenizer_files import is_clip_tokenizer, write_tokenizer
from training.models.transformers_clip import CONFIG, PREPROCESSING, as_transformers

_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers


def write_folder(subject: Subject, folder: Path) -> None:
    """Weights, ``config.json``, preprocessing and tokenizer. CannotExport: ``CLIPModel`` is another model."""
    config = subject.config
    _check(config, subject)
    state = {name: subject.stored(name, tensor) for name, tensor in as_transformers(_plain(subject)).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    _write(folder / CONFIG, _model_config(config, subject))
    _write(folder / PREPROCESSING, _preprocessing(subject.preprocess))
    write_tokenizer(subject.built.tokenizer, folder)


def _check(config: Mapping[str, Any], subject: Subject) -> None:
    if "multimodal_cfg" in config:
        raise CannotExport("CLIPModel writes no captions, and this model is a CoCa; --format hf is for it")
    if subject.built.module.logit_bias is not None:
        raise CannotExport(
            "CLIPModel has no logit_bias, which a model of the sigmoid loss has; --format hf is for it"
        )
    vision = config["vision_cfg"]
    check_vit(vision, "CLIPModel")
    check_tower(config["text_cfg"], "text_cfg", "CLIPModel")
    if isinstance(vision.get("image_size"), list) and len(set(vision["image_size"])) > 1:
        raise CannotExport("CLIPModel takes square images; --format hf is for it")
    if not is_clip_tokenizer(subject.built.tokenizer):
        raise CannotExport("its tokenizer is not that of OpenAI's models; --format hf is for it")
    if subject.preprocess["resize_mode"] == "longest" or subject.preprocess["interpolation"] not in _RESAMPLE:
        raise CannotExport(
            "transformers cannot resize images as its preprocess config asks; --format hf is for it"
        )


def _plain(subject: Subject) -> dict[str, Tensor]:
    """The weights with the names of ``CLIP``, also for a text tower that is a module of its own."""
    state: dict[str, Tensor] = subject.built.module.state_dict()
    return {name.removeprefix("text."): tensor for name, tensor in state.items()}


def _model_config(config: Mapping[str, Any], subject: Subject) -> dict[str, Any]:
    vision = with_defaults(config["vision_cfg"], "vision_cfg")
    text = with_defaults(config["text_cfg"], "text_cfg")
    size = vision["image_size"]
    shared = {
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": config["embed_dim"],
    }
    tokenizer: Any = subject.built.tokenizer
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config["embed_dim"],
        "logit_scale_init_value": float(subject.built.module.logit_scale),
        "torch_dtype": str(subject.dtype).removeprefix("torch."),
        "vision_config": {
            **shared,
            "model_type": "clip_vision_model",
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision["mlp_ratio"]),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": size[0] if isinstance(size, (list, tuple)) else size,
            "patch_size": vision["patch_size"],
            "num_channels": 3,
        },
        "text_config": {
            **shared,
            "model_type": "clip_text_model",
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text["mlp_ratio"]),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "bos_token_id": tokenizer.sot_token_id,
            "eos_token_id": tokenizer.eot_token_id,
            "pad_token_id": tokenizer.eot_token_id,  # the tokens after the first end are not looked at
        },
    }


def _preprocessing(pixels: Mapping[str, Any]) -> dict[str, Any]:
    size = pixels["size"]
    height, width = size if isinstance(size, list) else (size, size)
    squash = pixels["resize_mode"] == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width} if squash else {"shortest_edge": height},
        "resample": _RESAMPLE[pixels["interpolation"]],
        "do_center_crop": not squash,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": pixels["mean"],
        "image_std": pixels["std"],
    }


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
