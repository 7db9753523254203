"""A ``.pt`` file of tensors and plain values: read without running code from it, written in one piece.

torch refuses everything that is neither a tensor nor a plain value. Published files hold numpy scalars too; only
these are allowed here in addition.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from training.files import replacing

_scalar = np.float64(0).__reduce__()[0]
_SAFE: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
    (_scalar, "numpy.core.multiarray.scalar"),  # as numpy 1 wrote it
    (_scalar, "numpy._core.multiarray.scalar"),
]


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of ``path``, on the CPU; tensors are mapped from the file and read when they are used.

    ValueError: it does not exist, is not complete, or holds something other than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        with torch.serialization.safe_globals(_SAFE):
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # the unpickler can fail in any way on foreign bytes
        raise ValueError(f"checkpoint {path}: cannot be read ({_reason(error)})") from error
    if not isinstance(held, dict):
        raise ValueError(f"checkpoint {path}: holds a {type(held).__name__}, not a dict of weights")
    return held


def weights_of(held: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The model's weights in what ``read`` returned, a checkpoint or bare weights, under their plain names."""
    weights = held.get("state_dict", held)
    if not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(f"checkpoint {path}: holds neither a state_dict nor bare weights")
    return plain_names(weights)


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The model's weights in the file ``path``, on the CPU, without the prefixes of DDP and torch.compile."""
    return weights_of(read(path), path)


def plain_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` without the prefixes that wrappers add: ``module.`` on all names, ``_orig_mod.`` anywhere."""
    plain = {name.replace("_orig_mod.", ""): value for name, value in weights.items()}
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


def _reason(error: Exception) -> str:
    """What is wrong with the file, extracted from torch's long message."""
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    if refused:
        return f"it holds a {refused[1]}, which is neither a tensor nor a plain value; no code in it was run"
    if "Weights only load failed" in str(error) or isinstance(error, LookupError):
        return "it was not written by torch.save"
    return str(error).strip().partition(". ")[0] or "it is cut short"


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
