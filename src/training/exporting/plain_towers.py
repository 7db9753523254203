"""Which towers of open_clip are those of OpenAI's CLIP, which other libraries have too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from training.exporting.subject import CannotExport

_KINDS = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg}
_SIZES = {"layers", "width", "heads", "head_width", "mlp_ratio", "patch_size", "image_size"}
_SIZES |= {"context_length", "vocab_size"}
# What decides how towers are initialized, trained or called, and not what they compute.
_WITHOUT_MEANING = {
    "patch_dropout",
    "output_tokens",
    "tokenizer_kwargs",
    "hf_model_pretrained",
    "hf_tokenizer_name",
}
_WITHOUT_MEANING |= {"timm_model_pretrained", "attn_pooler_queries", "attn_pooler_heads"}


def with_defaults(tower: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The config of a tower, under ``key`` of a model's, with open_clip's defaults for what it leaves out."""
    return {field.name: field.default for field in fields(_KINDS[key])} | dict(tower)


def check_tower(tower: Mapping[str, Any], key: str, client: str) -> None:
    """CannotExport: the tower has a setting that ``client``, another library's model, does not have."""
    defaults = with_defaults({}, key)
    for name, value in tower.items():
        if name not in _SIZES | _WITHOUT_MEANING and (value or None) != (defaults.get(name) or None):
            raise CannotExport(f"{client} has no {key}.{name} {value}; --format hf is for it")


def check_vit(vision: Mapping[str, Any], client: str) -> None:
    """CannotExport: the image tower is not the ViT of OpenAI's CLIP, as ``client`` has it."""
    check_tower(vision, "vision_cfg", client)
    if isinstance(vision.get("layers"), list):
        raise CannotExport(f"its image tower is open_clip's ResNet, which {client} is not; --format hf is for it")
