"""Weights into an open_clip model, from files and folders that this program, open_clip, OpenAI, Hugging Face,
big_vision or other trainers have written. No code from them is run.

What open_clip does to weights when it reads a file is done here in the same way: names of older versions, position
embeddings of another size.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from open_clip.transform import PreprocessCfg
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from training.checkpoint import pt_file, torchscript
from training.checkpoint.architecture import description_at
from training.config.inputs.weights import FOLDER, INDEX, NPZ, TORCH, TORCHSCRIPT, NotWeights, kind_of
from training.models import transformers_clip

_log = logging.getLogger(__name__)

_CONFIG = "open_clip_config.json"
# The names of weights in a folder, in the order in which open_clip looks for them; and lists of parts.
_NAMES = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
    *("open_clip_pytorch_model.pth", "open_clip_model.safetensors.index.json"),
    *("open_clip_pytorch_model.bin.index.json", "model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model.pth", "model.pth"),
)
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.\w+$")
_SHOWN = 3  # tensors that a message names


def files_of(source: str | os.PathLike[str]) -> list[Path]:
    """The files that hold the weights at ``source``: a file, a folder, or the list of a model's parts.

    ValueError, a sentence about ``source``: there are none, or one is missing.
    """
    path = Path(source)
    kind = kind_of(path)
    if kind == FOLDER:
        file = _in_folder(path)
        try:
            return files_of(file)
        except NotWeights as error:
            raise NotWeights(f"its {file.name}: {error}") from None
    if kind != INDEX:
        return [path]
    names = sorted(set(map(str, json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())))
    parts = [path.parent / Path(name).name for name in names]
    for part in parts:
        if not part.is_file():
            raise NotWeights(f"{part.name}, one of the {len(parts)} parts of {path.name}, is missing: get it too")
        try:
            kind_of(part)
        except NotWeights as error:
            raise NotWeights(f"{part.name}, one of the {len(parts)} parts of {path.name}: {error}") from None
    return parts


def declared_at(source: str | os.PathLike[str]) -> dict[str, Any]:
    """What is known of how the weights at ``source`` were trained: quick_gelu, mean, std, ...

    The configs of open_clip or transformers in a folder say it, and checkpoints of this program; of a TorchScript
    archive of OpenAI's it is known.
    """
    path = Path(source)
    kind = kind_of(path)
    if kind == TORCH:
        saved = description_at(path)
        return saved.declared if saved is not None else {}
    if kind == FOLDER:
        return _declared_in(path)[1]
    try:
        openai = kind == TORCHSCRIPT and torchscript.read(path).keys() >= torchscript.OPENAI_SIZES
    except Exception:  # the unpickler can fail in any way on foreign bytes, and ``load`` says how
        openai = False
    return {"quick_gelu": True} if openai else {}


def load(model: nn.Module, source: str, said: str, model_said: str) -> None:
    """Load the weights at ``source`` into an open_clip ``model``.

    ``said``, ``model_said``: the flags and values of both. ValueError: they cannot be read, or do not fit.
    """
    try:
        files = files_of(source)
    except NotWeights as error:
        raise ValueError(f"{said}: {error}") from None
    if kind_of(files[0]) == NPZ:
        _load_big_vision(model, files[0], said, model_said)
        return
    if Path(source).is_file():
        _warn_of_declared_beside(model, Path(source), said)
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= pt_file.load_weights(file)
        except ValueError as error:
            raise ValueError(f"{said}: {str(error).removeprefix(f'checkpoint {source}: ')}") from error
    own = model.state_dict()
    of_transformers = False
    if not _is_model(state, own):  # then a model of transformers in the file is a second one
        state, of_transformers = transformers_clip.as_open_clip(state)
    if of_transformers and not _has_quick_gelu(model) and not _declared_in(files[0].parent)[1]:
        _log.warning(
            "%s: transformers' models have QuickGELU unless their %s says another hidden_act, which is not there, "
            "and --model has another activation: give --force-quick-gelu, or the folder with that file",
            *(said, transformers_clip.CONFIG),
        )
    state = _fitted(model, _under_own_names(state, own, said), own, said)
    fault = _misfit(state, own, Path(files[0]).name)
    if fault:
        raise ValueError(f"{said}: these weights do not fit the model {model_said} ({fault})")
    model.load_state_dict(state)


# ------------------------------------------------------------------------------------------------------- folders


def _in_folder(folder: Path) -> Path:
    there = {file.name: file for file in sorted(folder.iterdir()) if not file.name.startswith(".")}
    known = next((there[name] for name in _NAMES if name in there), None)
    if known is not None:
        return known
    files = [file for name, file in there.items() if re.search(r"\.(safetensors|bin|pth|pt)$", name)]
    if len(files) == 1:
        return files[0]
    if files:
        raise NotWeights(
            f"this folder has several files of weights ({_some(f.name for f in files)}): give one of them"
        )
    own = sorted((folder / "checkpoints").glob("*.pt"))
    if own:
        raise NotWeights(f"this is the folder of a run: give a file in it, such as {own[-1]}")
    raise NotWeights(f"this folder has no weights, such as {_NAMES[0]}; it holds {_some(there) or 'nothing'}")


def _declared_in(folder: Path) -> tuple[str, dict[str, Any]]:
    """The config in ``folder``, and what it says of how its weights were trained; empty: there is none."""
    try:
        held = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        pixels, model = held.get("preprocess_cfg", {}), held["model_cfg"]
        declared = {key: pixels[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in pixels}
        return _CONFIG, {**declared, "quick_gelu": bool(model.get("quick_gelu"))}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return transformers_clip.CONFIG, transformers_clip.declared_in(folder)


def _warn_of_declared_beside(model: nn.Module, file: Path, said: str) -> None:
    """A file alone does not decide how the model is built; warn where the config beside it says otherwise."""
    config, declared = _declared_in(file.parent)
    pixels = {**asdict(PreprocessCfg()), **open_clip.get_model_preprocess_cfg(model)}
    # Not those of timm and transformers, which a config's quick_gelu does not decide.
    has = {**pixels, "quick_gelu": any(isinstance(module, QuickGELU) for module in model.modules())}
    unused = {key: value for key, value in declared.items() if _plain(value) != _plain(has[key])}
    if unused:
        _log.warning(
            "%s: %s beside the file says %s, which a file alone does not bring: give the folder to have that too",
            *(said, config, ", ".join(f"{key} {value}" for key, value in unused.items())),
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _has_quick_gelu(model: nn.Module) -> bool:
    return any("QuickGELU" in type(module).__name__ for module in model.modules())


# --------------------------------------------------------------------------------------------------------- names


def _under_own_names(state: dict[str, Tensor], own: Mapping[str, Tensor], said: str) -> dict[str, Tensor]:
    """``state`` without a prefix under which it holds a whole model, such as ``model.`` in Lightning's files.

    ValueError: it holds several, beside each other or one inside the other, as a teacher or an average.
    """
    heads = {name.split(".")[0] for name in state} - {name.split(".")[0] for name in own}
    found = {}
    for head in heads:
        inner = {name.partition(".")[2]: value for name, value in state.items() if name.startswith(f"{head}.")}
        if _is_model(inner, own):
            found[head] = inner
    at_top = _is_model(state, own)
    if len(found) + at_top > 1:
        places = " and ".join([*(["no prefix"] if at_top else []), *sorted(found)])
        raise ValueError(
            f"{said}: it holds several models, under {places}; save the weights of one of them with torch.save, "
            "and give that file"
        )
    return next(iter(found.values()), state)


def _is_model(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Whether ``state`` has most of the names ``own`` of a model, with its text tower under ``text`` or not."""
    # A deep text tower has more than half of a model's names by itself.
    if not any(name.startswith("visual.") for name in state):
        return False
    plain = {name.removeprefix("text.") for name in state}
    custom = convert_to_custom_text_state_dict(dict(state))
    return any(len(own.keys() & names) > len(own) / 2 for names in (state.keys(), plain, custom.keys()))


def _fitted(model: nn.Module, state: dict[str, Tensor], own: Mapping[str, Tensor], said: str) -> dict[str, Tensor]:
    """``state`` as this version of open_clip names and shapes it, as far as it can be."""
    visual: Any = model.visual
    state = dict(convert_state_dict(model, state))
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    elif hasattr(model, "positional_embedding") and "text.positional_embedding" in state:
        state = {name.removeprefix("text."): value for name, value in state.items()}
    if state.keys() >= torchscript.OPENAI_SIZES and not _has_quick_gelu(model):
        _log.warning(
            "%s: these weights are OpenAI's by their names, which were trained with QuickGELU, and the model has "
            "another activation: give --model NAME-quickgelu, or --force-quick-gelu",
            said,
        )
    # Buffers that are not saved, and what came with transformers before 4.31.
    unsaved = {name for name, _ in model.named_buffers()} - own.keys()
    for name in (*torchscript.OPENAI_SIZES, *unsaved, "text.transformer.embeddings.position_ids"):
        if name not in own:
            state.pop(name, None)
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in own and state[name].numel() == 1:
            state[name] = state[name].reshape(own[name].shape)
    if "logit_bias" in state and "logit_bias" not in own:
        _log.info("%s: its logit_bias is left out, which belongs to the sigmoid loss (--siglip)", said)
        del state["logit_bias"]
    elif "logit_bias" in own and "logit_bias" not in state and "logit_scale" in state:
        # As open_clip starts the sigmoid loss from other weights: mlfoundations/open_clip issue 712.
        state["logit_bias"] = own["logit_bias"].new_zeros(own["logit_bias"].shape)
    for name, what in (
        ("visual.positional_embedding", "images"),
        ("visual.attnpool.positional_embedding", "images"),
        ("visual.trunk.pos_embed", "images"),
        ("positional_embedding", "texts"),
        ("text.positional_embedding", "texts"),
    ):
        given, wanted = state.get(name), own.get(name)
        if given is None or wanted is None or given.shape == wanted.shape:
            continue
        resized = _resized(name, given.float(), wanted, visual, model)
        if resized is not None and resized.shape == wanted.shape:
            state[name] = resized
            _log.info(
                "%s: the position embeddings of its %s, %s, are interpolated to %s",
                *(said, what, list(given.shape), list(wanted.shape)),
            )
    return state


def _resized(name: str, given: Tensor, wanted: Tensor, visual: Any, model: nn.Module) -> Tensor | None:
    """Position embeddings ``given`` at the places of ``wanted``; None: they are of another model."""
    if given.ndim != wanted.ndim or given.shape[-1] != wanted.shape[-1]:
        return None
    if name.endswith("pos_embed"):
        from timm.layers import resample_abs_pos_embed

        trunk = visual.trunk
        before = 0 if getattr(trunk, "no_embed_class", False) else getattr(trunk, "num_prefix_tokens", 1)
        if not _is_square(given.shape[1] - before) or not hasattr(trunk, "patch_embed"):
            return None
        return resample_abs_pos_embed(given, new_size=list(trunk.patch_embed.grid_size), num_prefix_tokens=before)
    held = {name: given}
    if not name.startswith("visual."):
        resize_text_pos_embed(held, model)
        return held[name]
    if not _is_square(len(given) - 1):
        return None
    grid = visual.grid_size if hasattr(visual, "grid_size") else (math.isqrt(len(wanted) - 1),) * 2
    table = {"visual.positional_embedding": given}
    resize_pos_embed(table, SimpleNamespace(visual=SimpleNamespace(grid_size=grid)))
    return table["visual.positional_embedding"]


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


# -------------------------------------------------------------------------------------------------------- misfits


def _misfit(state: Mapping[str, Tensor], own: Mapping[str, Tensor], file: str) -> str | None:
    """Why ``state`` cannot be the weights of a model with ``own``, and what to do; None: it can."""
    if any(name.startswith(("text_model.", "vision_model.")) for name in state):
        return (
            "they are of Hugging Face transformers, of whose models only whole ones of CLIP are read here; take "
            "the same model from open_clip instead: as a tag of --model, or by --model hf-hub:ORG/REPO, a "
            f"repository with an {_CONFIG}"
        )
    shared = [name for name in own if name in state]
    if not shared:
        heads = sorted({name.split(".")[0] for name in state})
        tower = {"patch_embed", "blocks"} <= set(heads) or {"conv1", "layer1"} <= set(heads)
        what = "they are of an image tower alone" if tower else "none of their names is one of the model's"
        return f"{what}: they are called {_some(state)}; give weights of a whole CLIP model"
    differing = [name for name in shared if state[name].shape != own[name].shape]
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if not (differing or missing or surplus):
        return None
    if differing:
        shapes = [f"{n} is {list(state[n].shape)} there and {list(own[n].shape)} here" for n in differing]
        fault = f"size mismatch: {_some(shapes, 2)}"
    else:
        fault = " and ".join(
            f"they {verb} {_some(names)}"
            for verb, names in (("lack", missing), ("have in addition", surplus))
            if names
        )
    part = _PART.search(file)
    if part and missing:
        return (
            f"{file} is part {int(part[1])} of {int(part[2])}: give its folder, or the .index.json there; {fault}"
        )
    others = _models_with(state)
    cure = f"give --model {' or '.join(others)}" if others else "give the model that they were trained with"
    return f"{fault}; {cure}"


def _models_with(state: Mapping[str, Tensor]) -> list[str]:
    """Models of open_clip that have weights of these widths and depths."""

    def depth(prefix: str) -> int:
        numbers = (re.match(rf"{prefix}resblocks\.(\d+)\.", name) for name in state)
        return 1 + max((int(found[1]) for found in numbers if found), default=-1)

    def size(name: str, axis: int) -> int | None:
        value = state.get(name, state.get(f"text.{name}"))
        return value.shape[axis] if value is not None and value.ndim == 2 else None

    patches = state.get("visual.conv1.weight")
    if patches is None or patches.ndim != 4 or "visual.class_embedding" not in state:
        return []
    image = (patches.shape[0], patches.shape[-1], depth(r"visual\.transformer\."))
    text = (size("token_embedding.weight", 1), depth(r"(?:text\.)?transformer\."), size("text_projection", 1))
    fitting = []
    for name in open_clip.list_models():
        if re.search(r"-[0-9a-f]{8}$", name):  # a config file of this run, registered by its digest
            continue
        config = open_clip.get_model_config(name)
        if not {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys():
            continue
        vision, words = config["vision_cfg"], config["text_cfg"]
        theirs = (vision.get("width", 768), vision.get("patch_size", 16), vision.get("layers", 12))
        of_text = (words.get("width", 512), words.get("layers", 12), config["embed_dim"])
        if "timm_model_name" not in vision and (theirs, of_text) == (image, text):
            fitting.append(name)
    return sorted(fitting, key=len)[:_SHOWN]


def _load_big_vision(model: nn.Module, file: Path, said: str, model_said: str) -> None:
    try:
        open_clip.load_checkpoint(model, str(file))
    except Exception as error:  # open_clip reads one name after another, and numpy whatever it finds
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{said}: these weights do not fit the model {model_said} ({cause}); a .npz is read as big_vision's "
            "SigLIP, for a model such as --model ViT-B-16-SigLIP"
        ) from error


def _some(names: Iterable[str], shown: int = _SHOWN) -> str:
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
