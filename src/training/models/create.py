"""Creates an open_clip model with its weights, tokenizer and preprocessing.

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
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import open_clip
import torch
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError
from torch import Tensor, nn

from training.checkpoint.architecture import ModelDescription
from training.config.model import brings_weights
from training.distributed.collectives import node_main_first
from training.distributed.process_group import World
from training.models import pretrained
from training.models.open_clip_model import OpenClipModel
from training.models.pretrained import Weights, one_line
from training.models.weights import load
from training.rng import seeded_cpu

_log = logging.getLogger(__name__)
_OPENAI_LOGIT_SCALE = math.log(1 / 0.07)


class ModelTokenizer(Protocol):
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


def create(
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
    force_context_length: int | None = None,
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
    quick_gelu: bool | None = True if force_quick_gelu else weights.declared.get("quick_gelu")
    built = config_as_built(
        architecture,
        quick_gelu=quick_gelu,
        custom_text=force_custom_text,
        patch_dropout=force_patch_dropout,
        image_size=force_image_size,
        context_length=force_context_length,
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
                    force_quick_gelu=bool(quick_gelu),
                    force_patch_dropout=force_patch_dropout,
                    force_custom_text=force_custom_text,
                    force_image_size=None if resize_later else force_image_size,
                    force_preprocess_cfg=preprocess,
                    force_context_length=force_context_length,
                    pretrained_image=pretrained_image and weights.file is None,
                    pretrained_text=weights.file is None,
                    **scalars,
                    # force_quick_gelu can only turn it on.
                    **({"quick_gelu": False} if quick_gelu is False and architecture.get("quick_gelu") else {}),
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


def warn_without_quick_gelu(architecture: Mapping[str, Any], weights: Weights, said: str) -> None:
    """Log where ``weights`` turn off the QuickGELU of ``architecture``, which flag and value ``said`` name."""
    if architecture.get("quick_gelu") and weights.declared.get("quick_gelu") is False:
        _log.warning("%s: built as %s says: quick_gelu False, not True", said, weights.source)


def config_as_built(
    architecture: Mapping[str, Any],
    *,
    quick_gelu: bool | None = None,
    custom_text: bool = False,
    patch_dropout: float | None = None,
    image_size: int | tuple[int, int] | None = None,
    context_length: int | None = None,
    scalars: Mapping[str, float | None] | None = None,
) -> dict[str, Any]:
    """open_clip's config ``architecture`` with what its ``create_model`` changes in it for these arguments.

    None: as in ``architecture``.
    """
    config = deepcopy(dict(architecture))
    vision = config["vision_cfg"]
    if quick_gelu is not None and quick_gelu != bool(config.get("quick_gelu")):
        config["quick_gelu"] = quick_gelu
    if custom_text or "hf_model_name" in config["text_cfg"]:
        config["custom_text"] = True
    if patch_dropout is not None:
        vision["patch_dropout"] = patch_dropout
    if image_size is not None:
        vision["image_size"] = image_size
    if context_length is not None:
        config["text_cfg"]["context_length"] = context_length
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


def open_tokenizer(name: str, flag: str, context_length: int | None = None) -> ModelTokenizer:
    """The tokenizer of the model ``name``. ValueError: it cannot be loaded; ``flag``: what names the model.

    ``context_length``: of its captions; None: the model's.
    """
    try:
        with _quiet_open_clip():
            return open_clip.get_tokenizer(name, context_length=context_length)
    except ImportError as error:
        raise ValueError(f"{flag}: its tokenizer needs a missing package: pip install {error.name}") from error
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{flag}: its tokenizer cannot be loaded ({one_line(error)}); without a network it must already be in "
            "the Hugging Face cache"
        ) from error


def finish(
    module: OpenClipModel,
    built: Mapping[str, Any],
    tokenizer: ModelTokenizer,
    model: str,
    weights: Weights,
    world: World,
    *,
    role: str,
    channels_last: bool = False,
) -> BuiltModel:
    """``module``, which was created with the config ``built``, on its device, with what its inputs need.

    ``model``: the value of the flag that names it. ``role``: what it is for, for the log. ``channels_last``: keep
    the weights of the image tower in this memory order, which its activations follow.
    """
    name = Path(model).stem if pretrained.is_config_file(model) else model
    source = "its own weights" if weights.file is None and brings_weights(model) else weights.source
    parameters = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    gelu = ", QuickGELU" if weights.declared.get("quick_gelu") else ""
    _log.info(
        "%s %s: %.1fM parameters, %.1fM trained, %s%s", role, name, parameters / 1e6, trained / 1e6, source, gelu
    )
    if channels_last:
        module.visual.to(memory_format=torch.channels_last)
    preprocess = PreprocessCfg(**open_clip.get_model_preprocess_cfg(module))
    length = tokenizer.context_length
    repository = built["text_cfg"].get("hf_tokenizer_name", "")
    description = ModelDescription(
        name, built, asdict(preprocess), f"{type(tokenizer).__name__} {repository}".rstrip(), length
    )
    return BuiltModel(module.to(world.device), preprocess, tokenizer, name, length, description)


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
