"""Model configs small enough for a test: 32 or 48 pixels, one layer, text of 16 to 24 tokens.

``path(name, folder)`` writes the JSON that ``--model`` and ``--ref_model`` take and returns its path;
``build(name)`` returns an open_clip model of it with random weights. Every ``vocab_size`` is that of
open_clip's own tokenizer, whose end-of-text id is the highest one.

``tiny-vit``            32 pixels, embedding 32, context 16.
``tiny-vit-reference``  48 pixels, embedding 24, context 24, QuickGELU: differs from ``tiny-vit`` in all four.
``tiny-coca``           32 pixels, embedding 64, context 16, with a caption decoder.
``tiny-resnet``         timm's 0.5M-parameter ResNet with BatchNorm as the image tower.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

VOCABULARY = 49408


def _text(width: int = 64, context_length: int = 16) -> dict:
    return {
        "context_length": context_length,
        "vocab_size": VOCABULARY,
        "width": width,
        "heads": width // 16,
        "layers": 1,
    }


def _vision(image_size: int = 32, patch_size: int = 8) -> dict:
    return {"image_size": image_size, "patch_size": patch_size, "width": 64, "head_width": 32, "layers": 1}


CONFIGS: dict[str, dict] = {
    "tiny-vit": {"embed_dim": 32, "vision_cfg": _vision(), "text_cfg": _text()},
    "tiny-vit-reference": {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": _vision(image_size=48, patch_size=16),
        "text_cfg": _text(width=48, context_length=24),
    },
    "tiny-coca": {
        "embed_dim": 64,  # CoCa's decoder attends to image tokens of this width: it equals the text width
        "custom_text": True,
        "vision_cfg": {**_vision(), "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**_text(), "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**_text(), "attn_pooler_heads": 2},
    },
    "tiny-resnet": {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32,
            "timm_model_name": "test_resnet",
            "timm_pool": "avg",
            "timm_proj": "linear",
        },
        "text_cfg": _text(),
    },
}


def config(name: str, **changes: Any) -> dict:
    """A copy of the config; a change to ``vision_cfg`` or ``text_cfg`` is merged into it."""
    result = deepcopy(CONFIGS[name])
    for key, value in changes.items():
        result[key] = {**result[key], **value} if isinstance(value, dict) and key in result else value
    return result


def path(name: str, folder: str | Path, **changes: Any) -> str:
    """Write ``folder/name.json`` (with ``changes``) and return its path."""
    file = Path(folder) / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config(name, **changes)))
    return str(file)


def build(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """An open_clip model on the CPU, float32, initialised with ``seed``; the global generator is left alone."""
    settings = config(name, **changes)
    custom_text = settings.pop("custom_text", False)
    kind = open_clip.CoCa if "multimodal_cfg" in settings else open_clip.CLIP
    if custom_text and kind is open_clip.CLIP:
        kind = open_clip.CustomTextCLIP
    if kind is not open_clip.CoCa:
        settings["output_dict"] = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(**settings)
        if kind is open_clip.CoCa:  # which leaves its last layer as it found the memory
            nn.init.normal_(model.text_decoder.text_projection, std=0.125)
        return model
