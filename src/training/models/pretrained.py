"""Finds models by name or config file, and weights by pretrained tag or file.

A *tag* (``--pretrained openai``) stands for more than weights: open_clip's table also declares how they were
trained, that is, their activation and their normalization. ``find`` returns both, and ``build.py`` builds the
declared model.
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
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import torch
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.factory import LOCAL_DIR_PREFIX

from training.config.inputs.weights import NotWeights
from training.config.model import brings_weights
from training.files import digest
from training.models.weights import declared_at, files_of

OWN_WEIGHTS = "its own"


@dataclass(frozen=True)
class Weights:
    """The initial weights of a model.

    ``file``      the file of the weights, or their folder; None: there is none.
    ``declared``  how they were trained, where a tag, a folder or OpenAI's file says it: mean, std, interpolation,
                  resize_mode, quick_gelu.
    ``source``    a description for the log.
    """

    file: str | None = None
    declared: Mapping[str, Any] = field(default_factory=dict)
    source: str = "random weights"


def is_config_file(model: str) -> bool:
    """Whether ``model``, the value of ``--model``, is the path of a model config JSON and not a name."""
    return model.endswith(".json")


def open_clip_name(model: str, flag: str) -> str:
    """open_clip's name for ``model``, the value of ``flag``.

    A JSON file is registered under its stem and a digest of its contents. So two files with the same stem are two
    models, a file with the stem of a built-in model is another model than that one, and open_clip's tags for
    built-in names do not apply to files. ValueError: there is no such model or file, or the file is not a model
    config.
    """
    if is_config_file(model):
        return _register(Path(model), f"{flag} {model}")
    # open_clip replaces slashes in names (ViT-B/32) in the same way.
    name = model if brings_weights(model) else model.replace("/", "-")
    if brings_weights(name) or name in open_clip.list_models():
        return name
    close = difflib.get_close_matches(name, open_clip.list_models(), n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "open_clip.list_models() lists the names"
    raise ValueError(
        f"{flag} {model}: this is neither a model of open_clip nor the path of a model config JSON; {hint}"
    )


def architecture(name: str, where: str) -> dict[str, Any]:
    """The model config of open_clip's model ``name``, with its ``vision_cfg`` and ``text_cfg``.

    ValueError: the config of a ``hf-hub:`` or ``local-dir:`` name cannot be loaded. ``where``: flag and value, for
    the message.
    """
    try:
        return open_clip.get_model_config(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: its open_clip_config.json cannot be loaded ({one_line(error)})") from error


def try_to_build(name: str, where: str) -> None:
    """Build open_clip's model ``name`` without allocating weights. ValueError: its config has an error."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with torch.device("meta"):
            open_clip.create_model(name, load_weights=False, pretrained_text=False, device="meta")
    except (TypeError, AssertionError, AttributeError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{where}: open_clip cannot build a model from this config ({one_line(error)})"
        ) from error
    finally:
        logging.disable(disabled)


def one_line(error: Exception) -> str:
    """A library's error message in one line. Of torch's list of weights that do not fit only the first stays."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 2 and lines[0].startswith("Error(s) in loading state_dict"):
        return f"{lines[1].rstrip('. ')}; and {len(lines) - 2} more errors"
    return " ".join(" ".join(lines).split())[:400] or type(error).__name__


def _register(path: Path, where: str) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        config = json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: the model config cannot be read ({error})") from None
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(config if isinstance(config, dict) else ())
    if missing:
        raise ValueError(f"{where}: this is not an open_clip model config, it has no {', '.join(sorted(missing))}")
    return register(path.stem, config)


def register(stem: str, config: Mapping[str, Any]) -> str:
    """open_clip's name for the model config ``config``: ``stem`` and a digest of the config."""
    canonical = json.dumps(dict(config), sort_keys=True)
    name = f"{stem}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"
    if name not in open_clip.list_models():
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, f"{name}.json")
            copy.write_text(canonical, encoding="utf-8")
            open_clip.add_model_config(copy)
    return name


def find(name: str, pretrained: str, flag: str, model_flag: str) -> Weights:
    """The weights that ``pretrained``, a tag, file or folder, names for open_clip's model ``name``.

    ``flag``: its flag. A tag's weights are downloaded if they are not cached. ValueError: as ``look``, or they are
    not cached and cannot be downloaded.
    """
    found = look(name, pretrained, flag, model_flag)
    if not pretrained or found.file is not None:
        return found
    file = _cached(found.declared) or _download(name, pretrained, found.declared, flag, model_flag)
    return replace(found, file=file)


def look(name: str, pretrained: str, flag: str, model_flag: str) -> Weights:
    """As ``find``, but nothing is downloaded, and a tag's weights have no file yet.

    ValueError: ``pretrained`` is neither a tag of the model nor a file or folder of weights.
    """
    if not pretrained:
        return _in_own_folder(name, model_flag)
    if open_clip.is_pretrained_cfg(name, pretrained):
        return Weights(None, open_clip.get_pretrained_cfg(name, pretrained), f"tag {pretrained}")
    said = f"{flag} {pretrained}"
    if os.path.exists(pretrained):
        return Weights(pretrained, _declared(pretrained, said), pretrained)
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
    known = f"one of its tags ({tags})" if tags else "a tag (it has none)"
    raise ValueError(f"{said}: for {model_flag} {name} this is neither a file nor {known}")


def _in_own_folder(name: str, model_flag: str) -> Weights:
    """The weights of a model ``local-dir:FOLDER``; none for other names."""
    folder = name.removeprefix(LOCAL_DIR_PREFIX)
    if folder == name:
        return Weights()
    try:
        files_of(folder)
    except NotWeights as error:
        raise ValueError(f"{model_flag} {name}: its weights could not be loaded ({error})") from None
    return Weights(folder, source="its own weights")


def _declared(source: str, said: str) -> Mapping[str, Any]:
    try:
        files_of(source)
        return declared_at(source)
    except NotWeights as error:
        raise ValueError(f"{said}: {error}") from None


def identity(name: str, *weights: str | None) -> dict[str, str]:
    """A text for open_clip's model ``name`` and one for its weights, by which both are recognized.

    ``weights``: flag values, which may be files; these are recognized by their contents.
    """
    texts = []
    for given in filter(None, weights):
        files = files_of(given) if os.path.exists(given) else ()
        digests = "+".join(_digest(str(file), file.stat().st_mtime) for file in files)
        texts.append(f"file {digests}" if digests else given)
    return {"model": name, "weights": " as ".join(texts) or OWN_WEIGHTS}


@lru_cache(maxsize=8)
def _digest(path: str, changed: float) -> str:
    """``changed``: when the file was last written, so that a changed file is read again."""
    return digest(Path(path), size=8)


def from_checkpoint(name: str, checkpoint: str, tag: str, flag: str = "--ref_model_checkpoint") -> Weights:
    """The weights in ``checkpoint``, the value of ``flag``, for a model that is built as ``tag`` declares.

    '' is no tag. ValueError: ``tag`` is a file, so that weights are given twice, or no tag of the model.
    """
    declared = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    if tag and not declared and not os.path.exists(tag):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(
            f"--ref_model_pretrained {tag}: {name} has no such tag; its tags are {tags}. Beside a checkpoint the "
            "tag only decides how the model is built, so it may be left out"
        )
    if tag and not declared:
        raise ValueError(
            f"{flag} {checkpoint} and --ref_model_pretrained {tag} both give weights: give one; "
            f"beside a checkpoint only a tag of {name} is useful, which decides how the model is built"
        )
    own = _declared(checkpoint, f"{flag} {checkpoint}")
    return Weights(checkpoint, declared or own, checkpoint)


def _hub_files(declared: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The repository on the Hugging Face hub, and the names that its weights may have there, safetensors first."""
    repository, _, name = declared["hf_hub"].rpartition("/")
    if not name:
        return repository, [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
    return repository, list(dict.fromkeys([str(Path(name).with_suffix(".safetensors")), name]))


def _cached(declared: Mapping[str, Any]) -> str | None:
    # The cache is searched here first: the hub's client asks the network even about cached files, and retries for
    # a minute.
    if not declared.get("hf_hub"):
        return None
    repository, names = _hub_files(declared)
    files = (huggingface_hub.try_to_load_from_cache(repository, name) for name in names)
    return next((file for file in files if isinstance(file, str)), None)


def _download(name: str, tag: str, declared: Mapping[str, Any], flag: str, model_flag: str) -> str:
    try:
        return open_clip.download_pretrained(dict(declared))
    except (OSError, RuntimeError) as error:
        cause = one_line(error) or type(error).__name__
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
        f"{expected}. Download them on a machine with a network and copy the cache, or give the file itself: "
        f"{model}{flag} FILE. (Cause: {cause})"
    )


def count_parameters(model: str, flag: str, **forced: Any) -> int | None:
    """The number of parameters of ``model``, a name or the path of a config. No memory is allocated for them.

    ``forced``: further arguments of ``open_clip.create_model``. None if the model's config must be downloaded
    first.
    """
    name = open_clip_name(model, flag)
    try:
        with _quiet_meta_device():
            module = open_clip.create_model(
                name, load_weights=False, pretrained_text=False, device="meta", **forced
            )
    except (OSError, RuntimeError):
        return None
    return sum(parameter.numel() for parameter in module.parameters())


@contextlib.contextmanager
def _quiet_meta_device() -> Iterator[None]:
    """Tensors without memory, and without open_clip's warning that weights are missing."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with torch.device("meta"):
            yield
    finally:
        logging.disable(disabled)
