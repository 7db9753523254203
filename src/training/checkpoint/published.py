"""The published checkpoint file: read without running code from it, written so that others can read it.

A file is a dict ``epoch, name, state_dict, optimizer[, scaler]``. Files of runs with a sample state may carry it
in full, float32 [N, 1] per column:

    u_im, u_tt                      log u ("u_format": "log", zero for samples never seen), or u itself
    tau_im, tau_tt                  individual temperatures
    m_grad_tau_*, v_grad_tau_*      their Adam moments
    bound_*                         what log u is short of: u = stored * exp(bound)

Published files hold numpy scalars, which torch refuses together with everything else that is not a tensor or a
plain value. Those, and nothing else, are let through here.
"""

from __future__ import annotations

import errno
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

# published column -> column of the sample state
_COLUMNS = {
    f"{published}_{short}": f"{ours}_{long}"
    for published, ours in (("u", "log_u"), ("tau", "tau"), ("m_grad_tau", "tau_m"), ("v_grad_tau", "tau_v"))
    for short, long in (("im", "image"), ("tt", "text"))
}

_scalar = np.float64(0).__reduce__()[0]
_SAFE = [
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
    (_scalar, "numpy.core.multiarray.scalar"),  # as numpy 1 wrote it
    (_scalar, "numpy._core.multiarray.scalar"),
]


def read(path: str | os.PathLike) -> dict[str, Any]:
    """What ``path`` holds, on the CPU; tensors are mapped from the file and read when they are used.

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
    except Exception as error:  # foreign bytes make the unpickler fail in any way
        raise ValueError(f"checkpoint {path}: cannot be read ({_reason(error)})") from error
    if not isinstance(held, dict):
        raise ValueError(f"checkpoint {path}: holds a {type(held).__name__}, not a dict of weights")
    return held


def weights_of(held: Mapping[str, Any], path: str | os.PathLike) -> dict[str, Tensor]:
    """The model's weights in what ``read`` returned, a checkpoint or bare weights, under their plain names."""
    weights = held.get("state_dict", held)
    if not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(f"checkpoint {path}: holds neither a state_dict nor bare weights")
    return plain_names(weights)


def load_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """The model's weights in the file ``path``, on the CPU, without the prefixes of DDP and torch.compile."""
    return weights_of(read(path), path)


def plain_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` without the prefixes that wrappers add: ``module.`` on all names, ``_orig_mod.`` anywhere."""
    plain = {name.replace("_orig_mod.", ""): value for name, value in weights.items()}
    while plain and all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): value for name, value in plain.items()}
    return plain


def to_published(columns: Mapping[str, Tensor], initial_tau: float) -> dict[str, Any]:
    """The sample state's ``columns``, [N] with NaN for never seen, as entries of a published file.

    Never seen becomes u = 0 and a temperature that is still ``initial_tau``, moments 0.
    """
    entries: dict[str, Any] = {"u_format": "log"}
    for name, ours in _COLUMNS.items():
        if ours in columns:
            unseen = initial_tau if name.startswith("tau_") else 0.0
            column = columns[ours].float()
            entries[name] = column.masked_fill(column.isnan(), unseen)[:, None]
    if "tau_im" in entries:
        entries |= {f"bound_{d}": torch.zeros_like(entries[f"tau_{d}"]) for d in ("im", "tt")}
    return entries


def has_columns(held: Mapping[str, Any]) -> bool:
    """Whether a file carries the sample state itself."""
    return any(f"{name}_im" in held for name in ("u", "tau"))


def from_published(held: Mapping[str, Any], u_format: str | None = None) -> dict[str, Tensor]:
    """The sample state's columns in a published file, float32 [N], NaN for never seen; empty where it has none.

    ``u_format``  'log' or 'linear' for a file that does not say; one with a negative u can only be 'log'.
    ValueError: the file does not tell and nobody else did.
    """
    found = {ours: held[name].reshape(-1).float() for name, ours in _COLUMNS.items() if name in held}
    stored = {d: held[f"u_{d}"].reshape(-1).float() for d in ("im", "tt") if f"u_{d}" in held}
    if not stored:
        return found
    kind = held.get("u_format") or ("log" if any((u < 0).any() for u in stored.values()) else u_format)
    if kind not in ("log", "linear"):
        raise ValueError(
            "the checkpoint's u columns may hold u or log u, nothing in it tells: say --u_format log (DRRho-CLIP "
            "code) or --u_format linear (FastCLIP code)"
        )
    for short, long in (("im", "image"), ("tt", "text")):
        u = stored[short]
        never = u == 0
        log_u = u if kind == "log" else u.log()
        if f"bound_{short}" in held:
            log_u = log_u + held[f"bound_{short}"].reshape(-1).float()
        found[f"log_u_{long}"] = log_u.masked_fill(never, torch.nan)
        for name in (f"tau_{long}", f"tau_m_{long}", f"tau_v_{long}"):
            if name in found:
                found[name] = found[name].masked_fill(never, torch.nan)
    return found


def write(path: Path, held: Mapping[str, Any]) -> None:
    """Save ``held`` as ``path`` in one piece: there is the old file or the whole new one, also after a crash.

    Tensors are saved from the CPU, so that the file loads on machines without a GPU.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            _save(held, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # half a file would only fill the disk
        raise
    sync_folder(path.parent)


def _save(held: Mapping[str, Any], file: IO[bytes]) -> None:
    """torch.save, but a full disk is the OSError that it is, and not torch's word on a position in the file."""
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
        torch.save(_portable(held), Noting())
    except RuntimeError as error:
        raise (failures[0] if failures else error) from error


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` survive a crash of the machine, on file systems that offer it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    """What is wrong with the file, out of torch's page of advice."""
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    if refused:
        return f"it holds a {refused[1]}, which is neither a tensor nor a plain value; nothing of it was run"
    if "Weights only load failed" in str(error) or isinstance(error, LookupError):
        return "it was not written by torch.save"
    return str(error).strip().partition(". ")[0] or "it ends too early"


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
