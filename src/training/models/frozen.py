"""Builds models that are not trained: the reference, a captioning model, the model of a saved checkpoint."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace

import open_clip

from training.checkpoint.architecture import ModelDescription, description_at, model_differences
from training.config.params import Config
from training.distributed.collectives import node_main_first
from training.distributed.process_group import World
from training.models import described, pretrained
from training.models.create import BuiltModel, create, finish, open_tokenizer, warn_without_quick_gelu
from training.models.pretrained import Weights

_log = logging.getLogger(__name__)


def build_reference(config: Config, world: World) -> BuiltModel | None:
    """The frozen reference, in eval mode and without parameters that require a gradient.

    None if the run has no reference or reads its features from disk. If ``--ref_model_checkpoint`` is given beside
    a tag, the tag only decides how the model is built. ValueError as for ``build_target``.
    """
    reference = _reference_of(config)
    if reference is None:
        return None
    return _build_frozen(
        reference, world, config.run.precision, config.run.seed, channels_last=config.model.channels_last
    )


def build_captioner(config: Config, world: World) -> BuiltModel:
    """The captioning model of ``--cap_model``, frozen and in eval mode. ValueError as for ``build_target``."""
    return _build_frozen(_captioner_of(config), world, config.run.precision, config.run.seed)


def look_for_weights(config: Config) -> None:
    """ValueError: a flag names weights that do not exist. Nothing is built, and nothing downloaded."""
    if not config.cache.writes:
        name = pretrained.open_clip_name(config.model.model, "--model")
        pretrained.look(name, config.model.pretrained, "--pretrained", "--model")
    reference = _reference_of(config)
    if reference is not None:
        reference.look()
    if config.cache.writes == "captions":
        _captioner_of(config).look()


@dataclass(frozen=True)
class _Frozen:
    """A frozen model: the values of its flags, and the names of these. ``role``: for the log.

    ``model`` may be empty if ``checkpoint`` says which one it is.
    """

    role: str
    model: str
    tag: str
    checkpoint: str = ""
    model_flag: str = "--ref_model"
    weights_flag: str = "--ref_model_pretrained"
    checkpoint_flag: str = "--ref_model_checkpoint"

    @property
    def said(self) -> str:
        """The flag that decides which model it is, with its value."""
        return f"{self.model_flag} {self.model}" if self.model else f"{self.checkpoint_flag} {self.checkpoint}"

    @property
    def saved(self) -> ModelDescription | None:
        """What the checkpoint says of its model."""
        return description_at(self.checkpoint) if self.checkpoint else None

    @property
    def name(self) -> str:
        """open_clip's name for it. ValueError: the flags and the checkpoint name none, or two."""
        return described.name_of(self.model, self.model_flag, self.checkpoint, self.checkpoint_flag)

    def warn(self) -> None:
        """Log where the model that the flags name is not the one of the checkpoint, which is taken."""
        if not self.model or self.saved is None:
            return
        name = pretrained.open_clip_name(self.model, self.model_flag)
        found = model_differences(pretrained.architecture(name, self.said), self.saved.model_cfg)
        tag = open_clip.get_pretrained_cfg(name, self.tag) if self.tag else {}
        if "quick_gelu" in found and tag.get("quick_gelu") == self.saved.model_cfg.get("quick_gelu"):
            del found["quick_gelu"]
        if found:
            told = ", ".join(described.shown(found))
            _log.warning("%s: built as checkpoint %s says: %s", self.said, self.checkpoint, told)

    def look(self) -> Weights:
        """The weights, which are not downloaded."""
        if not self.checkpoint:
            return pretrained.look(self.name, self.tag, self.weights_flag, self.model_flag)
        weights = pretrained.from_checkpoint(self.name, self.checkpoint, self.tag, self.checkpoint_flag)
        return weights if self.saved is None else replace(weights, declared=self.saved.declared)


def _reference_of(config: Config) -> _Frozen | None:
    c = config.reference
    if not c.named or config.reads_features:
        return None
    if config.flags.get("distill_model"):
        flags = {"model_flag": "--distill-model", "weights_flag": "--distill-pretrained"}
        return _Frozen("teacher", c.ref_model, c.ref_model_pretrained, **flags)
    return _Frozen("reference", c.ref_model, c.ref_model_pretrained, c.ref_model_checkpoint)


def _captioner_of(config: Config) -> _Frozen:
    c, flags = config.cache, {"model_flag": "--cap_model", "weights_flag": "--cap_model_pretrained"}
    return _Frozen("captioning model", c.cap_model, c.cap_model_pretrained, **flags)


def build_saved(checkpoint: str, model: str, world: World, precision: str = "fp32") -> BuiltModel:
    """The model of ``checkpoint``, frozen and in eval mode, as it was when the file was saved.

    ``checkpoint``: a file, or open_clip's ``NAME:TAG``. ``model``: the value of ``--model``, which may be empty if
    the checkpoint says what it is; then another ``model`` is told in the log, or refused where the weights are not
    for it. ValueError as for ``build_target``.
    """
    name, _, tag = checkpoint.partition(":")
    if tag and not os.path.exists(checkpoint):
        if model:
            raise ValueError(f"--model {model} and --checkpoint {checkpoint} both name a model: leave --model out")
        known = pretrained.open_clip_name(name, "--checkpoint")
        if not open_clip.is_pretrained_cfg(known, tag):
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(known)) or "none"
            raise ValueError(f"--checkpoint {checkpoint}: there is no such file, and {known} has the tags {tags}")
        named = _Frozen("model", name, tag, model_flag="--checkpoint", weights_flag="--checkpoint")
        return _build_frozen(named, world, precision, seed=0)
    flags = {"model_flag": "--model", "weights_flag": "--checkpoint", "checkpoint_flag": "--checkpoint"}
    return _build_frozen(_Frozen("model", model, "", checkpoint, **flags), world, precision, seed=0)


def _build_frozen(
    frozen: _Frozen, world: World, precision: str, seed: int, *, channels_last: bool = False
) -> BuiltModel:
    said, weights_flag, name = frozen.said, frozen.weights_flag, frozen.name
    frozen.warn()
    with node_main_first():
        architecture = pretrained.architecture(name, said)
        if frozen.checkpoint:
            weights, weights_flag = frozen.look(), frozen.checkpoint_flag
        else:
            weights = pretrained.find(name, frozen.tag, weights_flag, frozen.model_flag)
        tokenizer = open_tokenizer(name, said)
    warn_without_quick_gelu(architecture, weights, said)
    module, built = create(
        name, architecture, weights, flag=said, weights_flag=weights_flag, precision=precision, seed=seed
    )
    module.eval().requires_grad_(False)
    model = frozen.saved.name if frozen.saved is not None else frozen.model
    return finish(module, built, tokenizer, model, weights, world, role=frozen.role, channels_last=channels_last)
