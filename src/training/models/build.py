"""Builds the model to train from the configuration; ``frozen`` builds those that are not trained."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from open_clip.transform import PreprocessCfg
from torch import nn

from training.checkpoint.architecture import ModelDescription, description_at, model_differences
from training.config.model import ModelConfig
from training.config.objective import LossConfig
from training.config.params import Config
from training.distributed.collectives import node_main_first
from training.distributed.process_group import World
from training.models import described, pretrained
from training.models.create import (
    BuiltModel,
    config_as_built,
    create,
    finish,
    open_tokenizer,
    warn_without_quick_gelu,
)
from training.models.open_clip_model import OpenClipModel
from training.models.pretrained import Weights, one_line

_log = logging.getLogger(__name__)


def build_target(
    config: Config,
    world: World,
    resumed: Path | None = None,
    *,
    preprocess: Mapping[str, str] | None = None,
    context_length: int | None = None,
) -> BuiltModel:
    """The model to train, with its weights, temperature, locked towers and gradient checkpointing.

    ``resumed``: the checkpoint that will be loaded into it. Where that says how its model was built, the target is
    built so. ``preprocess`` (fields of open_clip's ``PreprocessCfg``) and ``context_length``: what is known of the
    model and has no flag. ValueError: a name, file or flag is wrong; the message names it.
    """
    c, loss = config.model, config.loss
    name = pretrained.open_clip_name(c.model, "--model")
    with node_main_first():
        architecture = pretrained.architecture(name, f"--model {c.model}")
        _check_tower(architecture["vision_cfg"], c)
        weights = pretrained.find(name, c.pretrained, "--pretrained", "--model")
        tokenizer = open_tokenizer(name, f"--model {c.model}", context_length)
    saved = description_at(resumed) if resumed is not None else None
    if saved is not None:
        weights, c = _as_saved(architecture, weights, c, saved, f"checkpoint {resumed}")
    elif not c.force_quick_gelu:
        warn_without_quick_gelu(architecture, weights, f"--model {c.model}")
    module, built = create(
        name,
        architecture,
        weights,
        flag=f"--model {c.model}",
        weights_flag="--pretrained",
        precision=config.run.precision,
        seed=config.run.seed,
        initial=loss.spec.initial,
        force_quick_gelu=c.force_quick_gelu,
        force_patch_dropout=c.force_patch_dropout,
        force_custom_text=c.force_custom_text,
        force_image_size=c.force_image_size,
        force_preprocess_cfg={**(preprocess or {}), "mean": c.image_mean, "std": c.image_std},
        force_context_length=context_length,
        pretrained_image=c.pretrained_image,
    )
    _lock(module, c, is_hugging_face="hf_model_name" in architecture["text_cfg"])
    start_temperature(module, loss)
    _choose_scalars(module, loss)
    if c.grad_checkpointing:
        module.set_grad_checkpointing()
    channels_last = config.model.channels_last
    return finish(module, built, tokenizer, c.model, weights, world, role="target", channels_last=channels_last)


def _as_saved(
    architecture: Mapping[str, Any], weights: Weights, c: ModelConfig, saved: ModelDescription, said: str
) -> tuple[Weights, ModelConfig]:
    """``weights`` and ``c`` with which the target becomes the model that the checkpoint ``said`` was saved of.

    What the flags leave open is as in the checkpoint, with a warning where that changes something. ValueError: the
    flags ask for another model.
    """
    path = said.removeprefix("checkpoint ")
    cure = f"--pretrained {path} takes weights of other kinds and image sizes, without their run"
    asked = config_as_built(
        architecture,
        quick_gelu=c.force_quick_gelu or None,
        custom_text=c.force_custom_text,
        image_size=c.force_image_size,
    )
    differing = model_differences(asked, saved.model_cfg)
    declared = weights.declared.get("quick_gelu")
    if "quick_gelu" in differing and not c.force_quick_gelu and declared == differing["quick_gelu"][1]:
        del differing["quick_gelu"]  # the tag or file of --pretrained says the same
    described.check_same_model(differing, f"--model {c.model}", saved, said, cure)
    forced = {
        "quick_gelu": "--force-quick-gelu" if c.force_quick_gelu else "",
        "custom_text": "--force-custom-text" if c.force_custom_text else "",
        "vision_cfg.image_size": "--force-image-size" if c.force_image_size is not None else "",
    }
    for field, (wanted, has) in differing.items():
        if flag := forced.get(
            field, f"--model {c.model}" if field in ("quick_gelu", "custom_text") and not has else ""
        ):
            raise ValueError(
                f"{flag}: {said} was saved with {field} {has}, not {wanted}: give what it was saved with, or "
                f"start anew, as {cure}"
            )
    pixels = {**asdict(PreprocessCfg()), **weights.declared}
    own = {key: value for key, value in saved.preprocess_cfg.items() if pixels.get(key, value) != value}
    given = {"mean": c.image_mean, "std": c.image_std}
    own = {key: value for key, value in own.items() if key != "size" and given.get(key) is None}
    told = [*described.shown(differing), *(f"{key} {value}, not {pixels[key]}" for key, value in own.items())]
    if told:
        _log.warning("--model %s: built as %s says: %s", c.model, said, ", ".join(told))
    for key, value in given.items():
        if value is not None and value != saved.preprocess_cfg.get(key, value):
            _log.warning(
                "--image-%s %s: %s was saved with %s: the run goes on with other pixels",
                *(key, " ".join(map(str, value)), said, saved.preprocess_cfg[key]),
            )
    quick, custom = (bool(saved.model_cfg.get(key)) for key in ("quick_gelu", "custom_text"))
    size = c.force_image_size
    if "vision_cfg.image_size" in differing:
        size = differing["vision_cfg.image_size"][1]
        size = tuple(size) if isinstance(size, list) else size
    changed = replace(c, force_quick_gelu=quick, force_custom_text=custom, force_image_size=size)
    return replace(weights, declared=saved.declared), changed


def start_temperature(module: nn.Module, loss: LossConfig) -> None:
    """Set the temperature to ``--temperature`` if that was given and acts; it replaces the one of the weights."""
    if loss.temperature is not None:
        with torch.no_grad():
            module.get_parameter("logit_scale").fill_(math.log(1 / loss.temperature))
        _log.info("the temperature starts at --temperature %g", loss.temperature)


def _choose_scalars(module: OpenClipModel, loss: LossConfig) -> None:
    """Decide whether the temperature and the bias are trained."""
    module.logit_scale.requires_grad_(loss.trains_temperature)
    bias = getattr(module, "logit_bias", None)
    if bias is not None and not loss.spec.trains_bias:
        bias.requires_grad_(False)  # the loss does not use it; DDP would wait for its gradient


def _lock(module: OpenClipModel, c: ModelConfig, *, is_hugging_face: bool) -> None:
    if c.lock_image:
        groups = c.lock_image_unlocked_groups
        try:
            module.visual.lock(unlocked_groups=groups, freeze_bn_stats=c.lock_image_freeze_bn_stats)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"--lock-image-unlocked-groups {groups}: this image tower cannot be locked so ({one_line(error)})"
            ) from error
    if not c.lock_text:
        return
    if is_hugging_face:
        module.text.lock(c.lock_text_unlocked_layers, c.lock_text_freeze_layer_norm)
        return
    tower: Any = module.text if hasattr(module, "text") else module
    getattr(tower, "lock" if tower is not module else "lock_text_tower")(c.lock_text_unlocked_layers)
    if not c.lock_text_freeze_layer_norm:
        # open_clip's own towers lock all weights. Here the flag does what it does in Hugging Face's towers.
        norms = [tower.ln_final, *(m for m in tower.transformer.modules() if isinstance(m, nn.LayerNorm))]
        for norm in norms:
            norm.requires_grad_(True)


def _check_tower(tower: Mapping[str, Any], c: ModelConfig) -> None:
    """ValueError: a flag that the image tower with the ``vision_cfg`` ``tower`` would ignore."""
    if c.force_patch_dropout and isinstance(tower.get("layers"), list):
        raise ValueError(
            f"--force-patch-dropout {c.force_patch_dropout}: the image tower of {c.model} is a ResNet, which has "
            "no patches to drop; leave the flag out"
        )
    if c.pretrained_image and "timm_model_name" not in tower:
        raise ValueError(
            f"--pretrained-image: the image tower of {c.model} is not one of timm's, and only those come with "
            "weights; use --pretrained"
        )
