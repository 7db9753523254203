"""A ``.pt`` file of tensors and plain values: read without running code from it, written in one piece.

torch refuses everything that is neither a tensor nor a plain value. Published files hold numpy scalars too,
which are read here without numpy's own means, as those trust what they are given. Weights that others have saved
as TorchScript or safetensors are read as bare weights.
"""

from __future__ import annotations

import logging
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from training.checkpoint import torchscript
from training.config.inputs.weights import FOLDER, INDEX, NPZ, SAFETENSORS, TORCHSCRIPT, NotWeights, kind_of
from training.files import replacing

_log = logging.getLogger(__name__)

# Entries under which trainers keep a model's weights. They are taken before others.
_WEIGHTS = ("state_dict", "model_state_dict", "model", "module", "net", "weights")


class _NumpyType:
    """A numpy dtype in a file: its letters, and its byte order as ``__setstate__`` gets it."""

    def __init__(self, letters: str, *_: Any) -> None:
        self._letters, self._order = letters, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._order = state[1]

    def number(self, data: Any) -> Any:
        """The bytes ``data`` as a number."""
        letters, order = self._letters, self._order
        if not re.fullmatch(r"[biuf][1248]|[?bBhHiIlLqQefd]", letters) or order not in ("<", ">", "|", "="):
            raise ValueError(f"it holds a numpy value of type {letters!r}, which is no number")
        if isinstance(data, str):  # torch's older format
            data = data.encode("latin-1")
        return np.frombuffer(data, np.dtype(order + letters), count=1)[0]


def _scalar(kind: _NumpyType, data: Any) -> Any:
    return kind.number(data)


_SAFE: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_NumpyType, "numpy.dtype"),
    (_scalar, "numpy.core.multiarray.scalar"),  # as numpy 1 wrote it
    (_scalar, "numpy._core.multiarray.scalar"),
]


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of ``path``, on the CPU; tensors are mapped from the file and read when they are used.

    ValueError: it does not exist, is not complete, or holds something other than tensors and plain values.
    """
    try:
        held = content(path)
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: cannot be read ({error})") from error
    if not isinstance(held, dict):
        raise ValueError(f"checkpoint {path}: holds a {type(held).__name__}, not a dict of weights")
    return held


def content(path: str | os.PathLike[str]) -> Any:
    """As ``read``, but of any type. The ValueErrors are what a sentence about the file ends with."""
    path = Path(path)
    kind = kind_of(path)
    if kind == FOLDER:
        raise NotWeights("it is a folder: give the file of a checkpoint in it")
    if kind in (INDEX, NPZ):
        raise NotWeights("it holds weights in a form which --pretrained takes, and no checkpoint of a run")
    try:
        return _READERS.get(kind, _read_torch)(path)
    except Exception as error:  # the unpickler can fail in any way on foreign bytes
        raise ValueError(reason(error)) from error


def _read_torch(path: Path) -> Any:
    with torch.serialization.safe_globals(_SAFE):
        if path.suffix == ".safetensors":  # a wrong name, which newer versions of torch.load believe
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


_READERS: dict[str, Callable[[Path], Any]] = {SAFETENSORS: _read_safetensors, TORCHSCRIPT: torchscript.read}


def weights_of(held: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The model's weights in what ``read`` returned, a checkpoint or bare weights, under their plain names.

    Where a trainer keeps an average of the weights beside them, the weights are taken, and the log says so.
    ValueError: there are none, or several under names of which nothing is known.
    """
    return plain_names(_tensors(held) or _of_an_entry(held, path))


def _of_an_entry(held: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    entries = {str(name): weights for name, value in held.items() if (weights := _nested(value))}
    averages = [name for name in entries if re.search(r"(^|_)(ema|averaged?|avg)(_|$)", name)]
    others = [name for name in entries if name not in averages]
    known = [name for name in _WEIGHTS if name in others] or others or averages
    if not known:
        names = ", ".join(map(repr, sorted(map(str, held))[:8])) or "none"
        raise ValueError(
            f"checkpoint {path}: holds neither a state_dict nor bare weights; its entries are {names}: save the "
            "weights alone as a dict of tensors with torch.save"
        )
    taken = known[0]
    if len(known) > 1 and taken not in _WEIGHTS:
        raise ValueError(
            f"checkpoint {path}: holds weights under {' and '.join(known)}; save those of one of them alone as a "
            "dict of tensors with torch.save"
        )
    if taken in averages:
        _log.info("%s: the weights are those of %r, an average over the steps; it has no others", path, taken)
    elif averages:
        _log.info(
            "%s: the weights are those of %r; it has an average over the steps too, %r, which is not used: to "
            "take that one, save it in a file of its own",
            *(path, taken, averages[0]),
        )
    elif taken not in _WEIGHTS:
        _log.info("%s: the weights are those of %r", path, taken)
    return entries[taken]


def _nested(value: Any) -> dict[str, Tensor]:
    """Weights under an entry of a checkpoint; they may be one level deeper."""
    if not isinstance(value, Mapping):
        return {}
    return _tensors(value) or next(filter(None, (_tensors(value.get(name)) for name in _WEIGHTS)), {})


def _tensors(value: Any) -> dict[str, Tensor]:
    """``value`` if it is a dict of tensors, which may have a few plain values beside them; else nothing."""
    if not isinstance(value, Mapping):
        return {}
    found = {str(name): held for name, held in value.items() if isinstance(held, Tensor)}
    others = [held for held in value.values() if not isinstance(held, (Tensor, int, float, str, type(None)))]
    has_layers = any(held.ndim > 1 for held in found.values())
    return found if found and not others and (has_layers or len(found) == len(value)) else {}


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The model's weights in the file ``path``, on the CPU, without the prefixes of DDP and torch.compile."""
    return weights_of(read(path), path)


def plain_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` without the prefixes that wrappers add: ``module.`` on all names, ``_orig_mod.`` anywhere."""
    plain = {name.replace("_orig_mod.", ""): value for name, value in weights.items()}
    plain.pop("n_averaged", None)  # the count of torch's AveragedModel
    while plain and all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): value for name, value in plain.items()}
    return plain


def write(path: Path, held: Mapping[str, Any]) -> None:
    """Save ``held`` as ``path`` in one piece: after a crash there is either the old file or the whole new one.

    Tensors are saved from the CPU, so that the file loads on machines without a GPU.
    """
    with replacing(path) as file:
        _save(held, file)


def _save(held: Mapping[str, Any], file: IO[bytes]) -> None:
    """torch.save, but a full disk raises its OSError, instead of torch's error about a position in the file."""
    failures: list[OSError] = []

    class Noting:
        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                failures.append(error)
                raise

        def flush(self) -> None:
            file.flush()

    try:
        torch.save(_portable(held), Noting())  # type: ignore[arg-type]  # needs write and flush alone
    except RuntimeError as error:
        raise (failures[0] if failures else error) from error


def reason(error: Exception) -> str:
    """What is wrong with a file, extracted from torch's long message."""
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    if refused:
        cure = "if you trust the file, load it with weights_only=False once, and save its state_dict alone"
        return f"it holds {refused[1]}, which is neither a tensor nor a plain value; no code in it was run: {cure}"
    if re.search(r"unexpected EOF|unexpected pos|failed (reading|finding)|not enough bytes", str(error)):
        return "it is cut short or damaged, as by a broken download: get the file again"
    if "Weights only load failed" in str(error) or isinstance(error, LookupError):
        return "it was not written by torch.save"
    return " ".join(str(error).split()).partition(". ")[0] or "it is cut short: get the file again"


def _portable(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        tensor = tree.detach().cpu()
        # A view would be saved with all of the storage that it looks into.
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    if isinstance(tree, Mapping):
        return {key: _portable(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_portable(value) for value in tree]
    return tree
