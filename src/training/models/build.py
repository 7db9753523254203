"""Builds the target and the frozen reference with open_clip from the configuration.

A model is built with the settings that its pretrained tag declares: activation (QuickGELU), mean, std,
interpolation. open_clip only warns if the tag declares QuickGELU and the model's config does not, and would
compute embeddings with the wrong activation.

The initial weights depend only on the seed. So every rank builds the same model, and building it does not change
the state of the random number generators.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import open_clip
import torch
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError
from torch import Tensor, nn

from training.config.model import ModelConfig, brings_weights
from training.config.objective import LossConfig
from training.config.params import Config
from training.distributed.collectives import node_main_first
from training.distributed.process_group import World
from training.models import pretrained
from training.models.open_clip_model import OpenClipModel
from training.models.pretrained import Weights, one_line
from training.models.weights import load
from training.rng import seeded_cpu

_log = logging.getLogger(__name__)
_OPENAI_LOGIT_SCALE = math.log(1 / 0.07)


class _ModelTokenizer(Protocol):
    """open_clip's tokenizers, for its own text towers and for Hugging Face's."""

    context_length: int

    def __call__(self, texts: list[str], /) -> Tensor: ...


@dataclass(frozen=True)
class BuiltModel:
    """A model and the requirements of its inputs.

    ``module``      open_clip model on the run's device; its forward returns a dict.
    ``preprocess``  size, mean, std, interpolation and resize mode of its images.
    ``tokenizer``   list of n captions -> int64 [n, context_length].
    ``name``        the name as given, or the stem of a config file.
    """

    module: OpenClipModel
    preprocess: PreprocessCfg
    tokenizer: Callable[[list[str]], Tensor]
    name: str
    context_length: int


def build_target(config: Config, world: World) -> BuiltModel:
    """The model to train, with its weights, temperature, locked towers and gradient checkpointing.

    ValueError: a name, file or flag is wrong; the message names it.
    """
    c, loss = config.model, config.loss
    name = pretrained.open_clip_name(c.model, "--model")
    with node_main_first():
        architecture = pretrained.architecture(name, f"--model {c.model}")
        _check_tower(architecture["vision_cfg"], c)
        weights = pretrained.find(name, c.pretrained, "--pretrained", "--model")
        tokenizer = _tokenizer(name, f"--model {c.model}")
    module = _create(
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
        force_preprocess_cfg={"mean": c.image_mean, "std": c.image_std},
        pretrained_image=c.pretrained_image,
    )
    _lock(module, c, is_hugging_face="hf_model_name" in architecture["text_cfg"])
    start_temperature(module, loss)
    _choose_scalars(module, loss)
    if c.grad_checkpointing:
        module.set_grad_checkpointing()
    return _finish(module, tokenizer, c.model, weights, world, role="target")


def build_reference(config: Config, world: World) -> BuiltModel | None:
    """The frozen reference, in eval mode and without parameters that require a gradient.

    None if the run has no reference or reads its features from disk. If ``--ref_model_checkpoint`` is given beside
    a tag, the tag only decides how the model is built. ValueError as for ``build_target``.
    """
    reference = _reference_of(config)
    return None if reference is None else _build_frozen(config, world, reference)


def build_captioner(config: Config, world: World) -> BuiltModel:
    """The captioning model of ``--cap_model``, frozen and in eval mode. ValueError as for ``build_target``."""
    return _build_frozen(config, world, _captioner_of(config))


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
    """A frozen model: the values of its flags, and the names of two of these. ``role``: for the log."""

    role: str
    model: str
    tag: str
    checkpoint: str = ""
    model_flag: str = "--ref_model"
    weights_flag: str = "--ref_model_pretrained"

    @property
    def name(self) -> str:
        return pretrained.open_clip_name(self.model, self.model_flag)

    def look(self) -> Weights:
        """The weights, which are not downloaded."""
        if self.checkpoint:
            return pretrained.from_checkpoint(self.name, self.checkpoint, self.tag)
        return pretrained.look(self.name, self.tag, self.weights_flag, self.model_flag)


def _reference_of(config: Config) -> _Frozen | None:
    c = config.reference
    if not c.ref_model or (config.cache.cached_ref_features_dir and not config.cache.writes):
        return None
    if config.flags.get("distill_model"):
        flags = {"model_flag": "--distill-model", "weights_flag": "--distill-pretrained"}
        return _Frozen("teacher", c.ref_model, c.ref_model_pretrained, **flags)
    return _Frozen("reference", c.ref_model, c.ref_model_pretrained, c.ref_model_checkpoint)


def _captioner_of(config: Config) -> _Frozen:
    c, flags = config.cache, {"model_flag": "--cap_model", "weights_flag": "--cap_model_pretrained"}
    return _Frozen("captioning model", c.cap_model, c.cap_model_pretrained, **flags)


def _build_frozen(config: Config, world: World, frozen: _Frozen) -> BuiltModel:
    said, weights_flag = f"{frozen.model_flag} {frozen.model}", frozen.weights_flag
    name = frozen.name
    with node_main_first():
        architecture = pretrained.architecture(name, said)
        if frozen.checkpoint:
            weights, weights_flag = frozen.look(), "--ref_model_checkpoint"
        else:
            weights = pretrained.find(name, frozen.tag, weights_flag, frozen.model_flag)
        tokenizer = _tokenizer(name, said)
    module = _create(
        name,
        architecture,
        weights,
        flag=said,
        weights_flag=weights_flag,
        precision=config.run.precision,
        seed=config.run.seed,
    )
    module.eval().requires_grad_(False)
    return _finish(module, tokenizer, frozen.model, weights, world, role=frozen.role)


def _create(
    name: str,
    architecture: Mapping[str, Any],
    weights: Weights,
    *,
    flag: str,
    weights_flag: str,
    precision: str,
    seed: int,
    initial: Mapping[str, float] | None = None,
    force_quick_gelu: bool = False,
    force_image_size: int | tuple[int, int] | None = None,
    force_preprocess_cfg: Mapping[str, Any] | None = None,
    pretrained_image: bool = False,
    **settings: Any,
) -> OpenClipModel:
    """An open_clip model on the CPU with ``weights``. Its temperature is float32 in every precision."""
    scalars = {
        "init_logit_scale": architecture.get("init_logit_scale", _OPENAI_LOGIT_SCALE),
        "init_logit_bias": architecture.get("init_logit_bias"),
        **(initial or {}),
    }
    own_weights = weights.file is None and brings_weights(name)
    is_timm = "timm_model_name" in architecture["vision_cfg"]
    # timm resizes the position embeddings that it has, so the weights are loaded before the size is set.
    resize_later = force_image_size is not None and is_timm and weights.file is not None
    preprocess = {**weights.declared, **{k: v for k, v in (force_preprocess_cfg or {}).items() if v is not None}}
    fetches = own_weights or pretrained_image or "hf_model_name" in architecture["text_cfg"]
    with _fetching(fetches), seeded_cpu(seed):
        try:
            with _quiet_open_clip():
                module: OpenClipModel = open_clip.create_model(
                    name,
                    load_weights=own_weights,
                    require_pretrained=own_weights,
                    precision=precision,
                    output_dict=True,
                    force_quick_gelu=force_quick_gelu or weights.declared.get("quick_gelu", False),
                    force_image_size=None if resize_later else force_image_size,
                    force_preprocess_cfg=preprocess,
                    pretrained_image=pretrained_image and weights.file is None,
                    pretrained_text=weights.file is None,
                    **scalars,
                    **settings,
                )
        except (OSError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
            raise ValueError(f"{flag}: open_clip cannot build this model ({one_line(error)})") from error
        if not own_weights:
            _initialize_caption_projection(module)
    _keep_float32(module, None if own_weights else scalars)
    if weights.file is not None:
        said = flag if name.endswith(f":{weights.file}") else f"{weights_flag} {weights.file}"
        with _quiet_open_clip():
            load(module, weights.file, said, flag)
    if resize_later:
        module.visual.set_input_size(force_image_size)
        resized = {**open_clip.get_model_preprocess_cfg(module), "size": module.visual.image_size}
        open_clip.set_model_preprocess_cfg(module, resized)
    return module


def _initialize_caption_projection(module: nn.Module) -> None:
    """Initialize CoCa's last layer at the scale of its other projections.

    open_clip leaves it as uninitialized memory, which does not depend on the seed and may contain NaN.
    """
    decoder = getattr(module, "text_decoder", None)
    if isinstance(decoder, nn.Module):
        projection = decoder.get_parameter("text_projection")  # [width, vocabulary]
        nn.init.normal_(projection, std=len(projection) ** -0.5)


def _keep_float32(module: nn.Module, initial: Mapping[str, float | None] | None) -> None:
    """Keep temperature and bias in float32, at exactly their initial values if these are known.

    bfloat16 resolves ln(1/tau) near 4 in steps of 1/64, which is about a hundred times an optimizer step: the
    temperature would never change. Values that are loaded afterwards stay exact too.
    """
    for name in ("logit_scale", "logit_bias"):
        parameter = getattr(module, name, None)
        if parameter is None or parameter.dtype == torch.float32:
            continue
        value = parameter.detach().float()
        if initial is not None:
            start = initial[f"init_{name}"]
            assert start is not None, f"open_clip makes a {name} only if it is given an initial value"
            value = torch.full_like(value, start)
        setattr(module, name, nn.Parameter(value))


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


def _tokenizer(name: str, flag: str) -> _ModelTokenizer:
    try:
        with _quiet_open_clip():
            return open_clip.get_tokenizer(name)
    except ImportError as error:
        raise ValueError(f"{flag}: its tokenizer needs a missing package: pip install {error.name}") from error
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{flag}: its tokenizer cannot be loaded ({one_line(error)}); without a network it must already be in "
            "the Hugging Face cache"
        ) from error


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


def _finish(
    module: OpenClipModel, tokenizer: _ModelTokenizer, model: str, weights: Weights, world: World, *, role: str
) -> BuiltModel:
    name = Path(model).stem if pretrained.is_config_file(model) else model
    source = "its own weights" if weights.file is None and brings_weights(model) else weights.source
    parameters = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    gelu = ", QuickGELU" if weights.declared.get("quick_gelu") else ""
    _log.info(
        "%s %s: %.1fM parameters, %.1fM trained, %s%s", role, name, parameters / 1e6, trained / 1e6, source, gelu
    )
    preprocess = PreprocessCfg(**open_clip.get_model_preprocess_cfg(module))
    return BuiltModel(module.to(world.device), preprocess, tokenizer, name, tokenizer.context_length)


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


def _fetching(needed: bool) -> AbstractContextManager[None]:
    """If building may download something, local rank 0 runs first, then the others; else all run at once."""
    return node_main_first() if needed else nullcontext()


@contextmanager
def _quiet_open_clip() -> Iterator[None]:
    """Suppress open_clip's log lines about each build. They would report that no weights were loaded."""

    def is_ours(record: logging.LogRecord) -> bool:
        return Path(record.pathname).parent != Path(open_clip.__file__).parent or record.levelno >= logging.ERROR

    root = logging.getLogger()
    root.addFilter(is_ours)
    try:
        yield
    finally:
        root.removeFilter(is_ours)
