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
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import open_clip
import torch
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError
from torch import Tensor, nn

from training.checkpoint.architecture import ModelDescription, description_at, model_differences
from training.config.model import ModelConfig, brings_weights
from training.config.objective import LossConfig
from training.config.params import Config
from training.distributed.collectives import node_main_first
from training.distributed.process_group import World
from training.models import described, pretrained
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
    ``description`` what a checkpoint of the model says of it.
    """

    module: OpenClipModel
    preprocess: PreprocessCfg
    tokenizer: Callable[[list[str]], Tensor]
    name: str
    context_length: int
    description: ModelDescription


def build_target(config: Config, world: World, resumed: Path | None = None) -> BuiltModel:
    """The model to train, with its weights, temperature, locked towers and gradient checkpointing.

    ``resumed``: the checkpoint that will be loaded into it. Where that says how its model was built, the target is
    built so. ValueError: a name, file or flag is wrong; the message names it.
    """
    c, loss = config.model, config.loss
    name = pretrained.open_clip_name(c.model, "--model")
    with node_main_first():
        architecture = pretrained.architecture(name, f"--model {c.model}")
        _check_tower(architecture["vision_cfg"], c)
        weights = pretrained.find(name, c.pretrained, "--pretrained", "--model")
        tokenizer = _tokenizer(name, f"--model {c.model}")
    saved = description_at(resumed) if resumed is not None else None
    if saved is not None:
        weights, c = _as_saved(architecture, weights, c, saved, f"checkpoint {resumed}")
    module, built = _create(
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
    return _finish(module, built, tokenizer, c.model, weights, world, role="target")


def _as_saved(
    architecture: Mapping[str, Any], weights: Weights, c: ModelConfig, saved: ModelDescription, said: str
) -> tuple[Weights, ModelConfig]:
    """``weights`` and ``c`` with which the target becomes the model that the checkpoint ``said`` was saved of.

    What the flags leave open is as in the checkpoint, with a warning where that changes something. ValueError: the
    flags ask for another model.
    """
    path = said.removeprefix("checkpoint ")
    cure = f"--pretrained {path} takes weights of other kinds and image sizes, without their run"
    asked = _as_built(
        architecture,
        quick_gelu=c.force_quick_gelu,
        custom_text=c.force_custom_text,
        image_size=c.force_image_size,
    )
    differing = model_differences(asked, saved.model_cfg)
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
    if differing.get("quick_gelu") and weights.declared.get("quick_gelu"):
        del differing["quick_gelu"]  # the tag of --pretrained says the same
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
        size = saved.preprocess_cfg["size"]
    changed = replace(c, force_quick_gelu=quick, force_custom_text=custom, force_image_size=size)
    return replace(weights, declared=saved.declared), changed


def build_reference(config: Config, world: World) -> BuiltModel | None:
    """The frozen reference, in eval mode and without parameters that require a gradient.

    None if the run has no reference or reads its features from disk. If ``--ref_model_checkpoint`` is given beside
    a tag, the tag only decides how the model is built. ValueError as for ``build_target``.
    """
    reference = _reference_of(config)
    if reference is None:
        return None
    return _build_frozen(reference, world, config.run.precision, config.run.seed)


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
    if not c.named or (config.cache.cached_ref_features_dir and not config.cache.writes):
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


def _build_frozen(frozen: _Frozen, world: World, precision: str, seed: int) -> BuiltModel:
    said, weights_flag, name = frozen.said, frozen.weights_flag, frozen.name
    frozen.warn()
    with node_main_first():
        architecture = pretrained.architecture(name, said)
        if frozen.checkpoint:
            weights, weights_flag = frozen.look(), frozen.checkpoint_flag
        else:
            weights = pretrained.find(name, frozen.tag, weights_flag, frozen.model_flag)
        tokenizer = _tokenizer(name, said)
    module, built = _create(
        name, architecture, weights, flag=said, weights_flag=weights_flag, precision=precision, seed=seed
    )
    module.eval().requires_grad_(False)
    model = frozen.saved.name if frozen.saved is not None else frozen.model
    return _finish(module, built, tokenizer, model, weights, world, role=frozen.role)


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
    force_patch_dropout: float | None = None,
    force_custom_text: bool = False,
    pretrained_image: bool = False,
) -> tuple[OpenClipModel, dict[str, Any]]:
    """An open_clip model on the CPU with ``weights``, and the config with which it was built.

    Its temperature is float32 in every precision.
    """
    scalars = {
        "init_logit_scale": architecture.get("init_logit_scale", _OPENAI_LOGIT_SCALE),
        "init_logit_bias": architecture.get("init_logit_bias"),
        **(initial or {}),
    }
    quick_gelu = force_quick_gelu or weights.declared.get("quick_gelu", False)
    built = _as_built(
        architecture,
        quick_gelu=quick_gelu,
        custom_text=force_custom_text,
        patch_dropout=force_patch_dropout,
        image_size=force_image_size,
        scalars=scalars,
    )
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
                    force_quick_gelu=quick_gelu,
                    force_patch_dropout=force_patch_dropout,
                    force_custom_text=force_custom_text,
                    force_image_size=None if resize_later else force_image_size,
                    force_preprocess_cfg=preprocess,
                    pretrained_image=pretrained_image and weights.file is None,
                    pretrained_text=weights.file is None,
                    **scalars,
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
    return module, built


def _as_built(
    architecture: Mapping[str, Any],
    *,
    quick_gelu: bool = False,
    custom_text: bool = False,
    patch_dropout: float | None = None,
    image_size: int | tuple[int, int] | None = None,
    scalars: Mapping[str, float | None] | None = None,
) -> dict[str, Any]:
    """open_clip's config ``architecture`` with what its ``create_model`` changes in it for these arguments."""
    config = deepcopy(dict(architecture))
    vision = config["vision_cfg"]
    if quick_gelu:
        config["quick_gelu"] = True
    if custom_text or "hf_model_name" in config["text_cfg"]:
        config["custom_text"] = True
    if patch_dropout is not None:
        vision["patch_dropout"] = patch_dropout
    if image_size is not None:
        vision["image_size"] = image_size
    return config | {name: value for name, value in (scalars or {}).items() if value is not None}


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
    module: OpenClipModel,
    built: Mapping[str, Any],
    tokenizer: _ModelTokenizer,
    model: str,
    weights: Weights,
    world: World,
    *,
    role: str,
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
    length = tokenizer.context_length
    repository = built["text_cfg"].get("hf_tokenizer_name", "")
    description = ModelDescription(
        name, built, asdict(preprocess), f"{type(tokenizer).__name__} {repository}".rstrip(), length
    )
    return BuiltModel(module.to(world.device), preprocess, tokenizer, name, length, description)


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
