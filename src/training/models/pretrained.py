"""Where models and weights come from: config files and names, pretrained tags and files.

A *tag* (``--pretrained openai``) is more than weights: open_clip's table also says how they were trained, with
which activation and which normalization. ``find`` returns both, and ``training.models`` builds what is declared.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import torch
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from torch import nn

from training.checkpoint.pt_file import load_weights
from training.config.model import brings_weights
from training.files import digest

OWN_WEIGHTS = "its own"


@dataclass(frozen=True)
class Weights:
    """What a model starts from.

    ``file``      weights to load, or None.
    ``declared``  what the tag says of them: mean, std, interpolation, resize_mode, quick_gelu; empty for files.
    ``source``    for logs.
    """

    file: str | None = None
    declared: Mapping[str, Any] = field(default_factory=dict)
    source: str = "random weights"


def is_config_file(model: str) -> bool:
    """Whether the value of ``--model`` is a path of a model config JSON rather than a name."""
    return model.endswith(".json")


def open_clip_name(model: str, flag: str) -> str:
    """open_clip's name of the model that ``flag`` was given.

    A JSON file is registered under its stem and a digest of its contents: two files of one stem, or one that is
    called like a built-in model, are two models, and open_clip's tags for built-in names do not apply to them.
    ValueError: no such model, no such file, not a model config.
    """
    if is_config_file(model):
        return _register(Path(model), f"{flag} {model}")
    # open_clip writes names with a slash (ViT-B/32) like this itself.
    name = model if brings_weights(model) else model.replace("/", "-")
    if brings_weights(name) or name in open_clip.list_models():
        return name
    close = difflib.get_close_matches(name, open_clip.list_models(), n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "open_clip.list_models() has the names"
    raise ValueError(f"{flag} {model}: neither a model of open_clip nor the path of a model config JSON; {hint}")


def architecture(name: str, where: str) -> dict[str, Any]:
    """The model config of open_clip's model ``name``, with its ``vision_cfg`` and ``text_cfg``.

    ``where``: flag and value, for the ValueError where it cannot be had (``hf-hub:`` and ``local-dir:`` names).
    """
    try:
        return open_clip.get_model_config(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: its open_clip_config.json cannot be had ({one_line(error)})") from error


def try_to_build(name: str, where: str) -> None:
    """Build open_clip's model ``name`` without memory for it. ValueError: its config has an error."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with torch.device("meta"):
            open_clip.create_model(name, load_weights=False, device="meta")
    except (TypeError, AssertionError, AttributeError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: open_clip cannot build a model of this config ({one_line(error)})") from error
    finally:
        logging.disable(disabled)


def one_line(error: Exception) -> str:
    """What a library said, fit for one sentence; of torch's list of weights that do not fit the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 2 and lines[0].startswith("Error(s) in loading state_dict"):
        return f"{lines[1].rstrip('. ')}; {len(lines) - 2} more like it"
    return " ".join(" ".join(lines).split())[:400] or type(error).__name__


def _register(path: Path, where: str) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        config = json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: the model config cannot be read ({error})") from None
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(config if isinstance(config, dict) else ())
    if missing:
        raise ValueError(f"{where}: not an open_clip model config, it has no {', '.join(sorted(missing))}")
    canonical = json.dumps(config, sort_keys=True)
    name = f"{path.stem}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"
    if name not in open_clip.list_models():
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, f"{name}.json")
            copy.write_text(canonical, encoding="utf-8")
            open_clip.add_model_config(copy)
    return name


def find(name: str, pretrained: str, flag: str, model_flag: str) -> Weights:
    """The weights that ``flag`` names, for open_clip's model ``name``: a tag, downloaded if need be, or a file.

    ValueError: neither, or a tag whose weights are not cached and cannot be downloaded.
    """
    if not pretrained:
        return Weights()
    if open_clip.is_pretrained_cfg(name, pretrained):
        declared = open_clip.get_pretrained_cfg(name, pretrained)
        file = _cached(declared) or _download(name, pretrained, declared, flag, model_flag)
        return Weights(file, declared, f"tag {pretrained}")
    if os.path.isfile(pretrained):
        return Weights(pretrained, source=pretrained)
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
    known = f"one of its tags ({tags})" if tags else "a tag (it has none)"
    raise ValueError(f"{flag} {pretrained}: for {model_flag} {name} this is neither a file nor {known}")


def identity(model: str, flag: str, *weights: str | None) -> dict[str, str]:
    """What was given to ``flag`` for a model and its weights, in words that name it: a file by its contents."""
    told = [f"file {_digest(given, os.stat(given).st_mtime)}" if os.path.isfile(given) else given
            for given in weights if given]  # fmt: skip
    return {"model": open_clip_name(model, flag), "weights": " as ".join(told) or OWN_WEIGHTS}


@lru_cache(maxsize=8)
def _digest(path: str, changed: float) -> str:
    """``changed``: when the file was last written to, so that a new content is read again."""
    return digest(Path(path), size=8)


def from_checkpoint(name: str, checkpoint: str, tag: str) -> Weights:
    """The weights in ``checkpoint`` for a model that is built as ``tag`` ('': none) declares.

    ValueError: ``tag`` is a file, that is, weights are given twice.
    """
    declared = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    if tag and not declared:
        raise ValueError(
            f"--ref_model_checkpoint {checkpoint} and --ref_model_pretrained {tag} are two files of weights: give "
            f"one; beside a checkpoint only a tag of {name} has a use, it says how the model is built"
        )
    return Weights(checkpoint, declared, checkpoint)


def _hub_files(declared: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Repository on the Hugging Face hub, and the names that its weights may have there, the safe format first."""
    repository, _, name = declared["hf_hub"].rpartition("/")
    if not name:
        return repository, [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
    return repository, list(dict.fromkeys([str(Path(name).with_suffix(".safetensors")), name]))


def _cached(declared: Mapping[str, Any]) -> str | None:
    # Looked up here first: the hub's client asks the network about files that it has, and retries for a minute.
    if not declared.get("hf_hub"):
        return None
    repository, names = _hub_files(declared)
    files = (huggingface_hub.try_to_load_from_cache(repository, name) for name in names)
    return next((file for file in files if isinstance(file, str)), None)


def _download(name: str, tag: str, declared: Mapping[str, Any], flag: str, model_flag: str) -> str:
    try:
        return open_clip.download_pretrained(dict(declared))
    except (OSError, RuntimeError) as error:
        cause = str(error).strip().splitlines()[-1]
    if declared.get("hf_hub"):
        repository, names = _hub_files(declared)
        cache = huggingface_hub.constants.HF_HUB_CACHE
        expected = f"{' or '.join(names)} of {repository} in the Hugging Face cache {cache}"
    else:
        folder = Path("~/.cache/clip").expanduser()
        expected = str(folder / os.path.basename(declared["url"]))
    sibling = f"{name}-quickgelu"
    needs_sibling = declared.get("quick_gelu") and sibling in open_clip.list_models()
    model = f"{model_flag} {sibling} " if needs_sibling else ""
    raise ValueError(
        f"{flag} {tag}: the weights of {name} are not on this machine and cannot be downloaded. Expected: "
        f"{expected}. Download them where there is a network and copy the cache, or give the file itself: "
        f"{model}{flag} FILE. (Cause: {cause})"
    )


def load(model: nn.Module, file: str, flag: str) -> None:
    """Load ``file`` into an open_clip ``model``: state dict or training checkpoint, safetensors, big_vision's npz.

    No code from the file runs. open_clip converts what other projects wrote and resizes position embeddings.
    ValueError: the file does not fit the model.
    """
    try:
        if Path(file).suffix in (".safetensors", ".npz", ".npy"):
            open_clip.load_checkpoint(model, file)
            return
        state = load_weights(file)
        own = model.state_dict()
        if own.keys() == state.keys() and all(own[key].shape == state[key].shape for key in own):
            model.load_state_dict(state)
            return
        # open_clip converts only what it reads itself.
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "weights.pt")
            torch.save(state, copy)
            open_clip.load_checkpoint(model, str(copy))
    except (RuntimeError, KeyError, AttributeError, AssertionError) as error:
        raise ValueError(f"{flag} {file}: these weights do not fit the model ({one_line(error)})") from error


def count_parameters(model: str, flag: str, **forced: Any) -> int | None:
    """Parameters of ``model``, a name or a config's path, built without memory for them.

    ``forced``: further arguments of ``open_clip.create_model``. None where its config has to be downloaded first.
    """
    name = open_clip_name(model, flag)
    try:
        with _quiet_meta_device():
            module = open_clip.create_model(name, load_weights=False, device="meta", **forced)
    except (OSError, RuntimeError):
        return None
    return sum(parameter.numel() for parameter in module.parameters())


@contextlib.contextmanager
def _quiet_meta_device() -> Iterator[None]:
    """Tensors without memory, and nothing of open_clip's warning that weights are missing."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with torch.device("meta"):
            yield
    finally:
        logging.disable(disabled)
