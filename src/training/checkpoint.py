"""Checkpoints: all that a run is, saved and found again.

``RunState`` names what a run consists of. A checkpoint of it is, in the run's folder ``checkpoints/``,

    epoch_N.pt        weights, optimizer, scaler and counters after N epochs, in the published format
    epoch_N.state/    the sample state, written by torch.distributed.checkpoint, each rank its own rows; any number
                      of ranks can read it again. Several files share it where they were saved together.
    epoch_latest.pt   with --save-most-recent, the newest again
    step_S.pt         where a run ends inside an epoch

The .pt is put in place last and in one piece, and names its folder: whenever it is there, the whole checkpoint is.
A folder that no file names is the rest of a save that was cut off, or of a file since replaced, and is removed.
A .pt is read without running code from it; of torch's own format in the .state folder nobody can promise that.

All functions that take a ``RunState`` are collective: every rank calls them.
"""

from __future__ import annotations

import logging
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from drrho_clip.sample_state import SampleState
from training import published
from training.distributed import PeerFailed, on_main
from training.params import RunConfig
from training.published import load_weights as load_weights

_log = logging.getLogger(__name__)

FORMAT = 1


@dataclass
class RunState:
    """All that a run is.

    ``model``         the bare model, without DDP around it.
    ``optimizer``     None where nothing is trained (``--epochs 0``).
    ``scaler``        of fp16, else None. ``sample_state``: None where the loss keeps none.
    ``epoch``         completed epochs.
    ``epoch_step``    steps taken of the epoch after those; 0 at an epoch's boundary.
    ``step``          optimizer steps in all. ``samples_seen``: samples of all ranks in these steps.
    ``stream``        where the training data stands, plain values of all ranks (``loader.TrainData.state_dict``).
    """

    name: str
    model: nn.Module
    optimizer: Optimizer | None = None
    scaler: GradScaler | None = None
    sample_state: SampleState | None = None
    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    samples_seen: int = 0
    stream: Mapping[str, Any] | None = None

    @property
    def stem(self) -> str:
        """What a checkpoint of this state is called: by its epoch, or by its step inside one."""
        return f"epoch_{self.epoch}" if self.epoch_step == 0 else f"step_{self.step}"


def save_by_flags(
    folder: Path, state: RunState, config: RunConfig, *, final: bool, initial_tau: float = 0.07
) -> list[Path]:
    """Save what the flags ask for after an epoch, or at the run's end (``final``); the files written.

    ``initial_tau``  where individual temperatures start, for ``--save_published_state``.
    """
    due = config.save_frequency > 0 and state.epoch_step == 0 and state.epoch % config.save_frequency == 0
    names = [state.stem] if due or final else []
    if config.save_most_recent:
        names.append("epoch_latest")
    if not names:
        return []
    paths = [folder / f"{name}.pt" for name in names]
    save(paths, state, published_tau=initial_tau if config.save_published_state else None)
    if config.delete_previous_checkpoint and (due or final):
        on_main(lambda: _delete_previous(paths[0], state))
    on_main(lambda: _delete_unnamed(folder))
    return paths


def save(paths: Sequence[Path], state: RunState, *, published_tau: float | None = None) -> None:
    """Save ``state`` under each of ``paths``, which lie in one folder.

    ``published_tau``  also put the full columns of the sample state into the files, as the published code does,
                       with this temperature for samples never seen; None leaves them out.
    """
    folder = paths[0].parent
    rows = _save_rows(folder, state) if state.sample_state is not None else None
    columns = None
    if state.sample_state is not None and published_tau is not None:
        columns = _gather_columns(state.sample_state)

    def write() -> None:
        held = _held(state, rows)
        if columns is not None:
            held |= published.to_published(columns, published_tau)
        for path in paths:
            published.write(path, held)

    on_main(write)
    _log.info("saved %s", ", ".join(str(path) for path in paths))


def resume(
    path: Path, state: RunState, *, steps_per_epoch: int, global_batch: int, u_format: str | None = None
) -> None:
    """Fill ``state`` from ``path``, a checkpoint of ours or a published one; bare weights fill the model alone.

    What a published file does not say follows from its completed epochs: ``steps_per_epoch`` steps of
    ``global_batch`` samples each. ``u_format``: see ``published.from_published``.
    ValueError: the file cannot be read, or does not fit the model, the optimizer or the sample state.
    """
    held = published.read(path)
    _load_model(state.model, published.weights_of(held, path), path)
    if "epoch" not in held:
        _log.info("%s holds weights alone: the run starts at its beginning", path)
        return
    if state.optimizer is not None and "optimizer" in held:
        _load_optimizer(state.optimizer, held, path)
    if state.scaler is not None and held.get("scaler"):
        state.scaler.load_state_dict(held["scaler"])
    if state.sample_state is not None:
        _load_rows(path, held, state.sample_state, u_format)
    state.epoch = int(held["epoch"])
    state.epoch_step = int(held.get("epoch_step", 0))
    state.step = int(held.get("step", state.epoch * steps_per_epoch))
    state.samples_seen = int(held.get("samples_seen", state.step * global_batch))
    state.stream = held.get("stream")
    _log.info("resumed %s: %d epochs, %d steps", path, state.epoch, state.step)


def find_latest(folder: Path) -> Path | None:
    """The complete checkpoint in ``folder`` that is furthest in training, whatever its name; None without any.

    Those that cannot be read or lack their sample state are skipped, and the log says so. Collective.
    """
    return on_main(lambda: _find_latest(folder))


def contents(folder: Path) -> tuple[dict[Path, Path | None], list[Path]]:
    """Each checkpoint in ``folder`` -> the folder of its sample state or None; and the files nobody can read."""
    found, unreadable = {}, []
    for path in sorted(folder.glob("*.pt")):
        try:
            found[path] = _rows_folder(path, published.read(path))
        except ValueError:
            unreadable.append(path)
    return found, unreadable


def _held(state: RunState, rows: str | None) -> dict[str, Any]:
    held = {
        "format": FORMAT,
        "name": state.name,
        "epoch": state.epoch,
        "epoch_step": state.epoch_step,
        "step": state.step,
        "samples_seen": state.samples_seen,
        "state_dict": published.plain_names(state.model.state_dict()),
    }
    if state.optimizer is not None:
        held["optimizer"] = state.optimizer.state_dict()
        held["optimizer_class"] = type(state.optimizer).__name__
    if state.scaler is not None:
        held["scaler"] = state.scaler.state_dict()
    if rows is not None:
        held["sample_state"] = rows
    if state.stream is not None:
        held["stream"] = state.stream
    return held


def _save_rows(folder: Path, state: RunState) -> str:
    """Write the sample state beside the files; the name of its folder, one that no earlier save has used."""

    def unused() -> str:
        names = (f"{state.stem}.state" + (f".{i}" if i else "") for i in range(10**6))
        return next(name for name in names if not (folder / name).exists())

    name = on_main(unused)
    with _rows_exchanged(folder / name):
        dcp.save(state.sample_state.state_dict(), checkpoint_id=folder / name)

    def check() -> None:
        missing = _missing_rows(folder / name)
        if missing:
            raise ValueError(
                f"--logs: rank 0 does not see {missing} that another rank wrote; all nodes need one shared folder"
            )
        published.sync_folder(folder / name)

    on_main(check)
    return name


@contextmanager
def _rows_exchanged(rows: Path) -> Iterator[None]:
    """Around torch.distributed.checkpoint: one message for what it reports from all ranks at once.

    OSError on rank 0, PeerFailed on the others.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is fine
        try:
            yield
        except dcp.CheckpointException as error:
            rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
            if dist.is_initialized() and dist.get_rank() > 0:
                raise PeerFailed(f"rank {rank} failed; rank 0 says why") from None
            raise OSError(f"sample state {rows}, rank {rank}: {cause}") from cause


def _rows_folder(path: Path, held: Mapping[str, Any]) -> Path | None:
    """The folder of the sample state that the checkpoint ``path`` names, always one beside it."""
    name = held.get("sample_state")
    return path.parent / Path(name).name if name else None


def _missing_rows(rows: Path) -> str | None:
    """The first file of the sample state in ``rows`` that is not there, or not whole; None: it is complete."""
    if not (rows / ".metadata").is_file():
        return str(rows / ".metadata")
    needed: dict[Path, int] = {}
    for info in dcp.FileSystemReader(rows).read_metadata().storage_data.values():
        file = rows / info.relative_path
        needed[file] = max(needed.get(file, 0), info.offset + info.length)
    return next((str(f) for f, size in needed.items() if not f.is_file() or f.stat().st_size < size), None)


def _gather_columns(sample_state: SampleState) -> dict[str, Tensor]:
    """Column -> [N] on the CPU of rank 0; empty on the others."""
    columns = {}
    for name, column in sample_state.state_dict().items():
        if not isinstance(column, DTensor):
            columns[name] = column
            continue
        k, n = dist.get_world_size(), column.shape[0]
        local = column.to_local().cpu()
        padded = torch.full((-(-n // k),), torch.nan)
        padded[: len(local)] = local
        pieces = [torch.empty_like(padded) for _ in range(k)] if dist.get_rank() == 0 else None
        dist.gather(padded, pieces)
        if pieces is not None:
            columns[name] = torch.cat(pieces)[:n]
    return columns


def _load_model(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    missing, surplus = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    differing = [n for n in own if n in weights and own[n].shape != weights[n].shape]
    for what, names in (("lacks", missing), ("has unknown", surplus), ("has another shape of", differing)):
        if names:
            raise ValueError(
                f"checkpoint {path} {what} {names[0]!r} ({len(names)} in all): it is of another --model"
            )
    model.load_state_dict(weights)


def _load_optimizer(optimizer: Optimizer, held: Mapping[str, Any], path: Path) -> None:
    """Take over moments and step counts; rates, betas and decay stay those of this run's flags."""
    saved, current = held["optimizer"], optimizer.state_dict()
    kind = type(optimizer).__name__
    if held.get("optimizer_class", kind) != kind:
        raise ValueError(f"checkpoint {path} is of the optimizer {held['optimizer_class']}, --optimizer is {kind}")
    # The published code keeps a group for the temperature also where it is constant, without a parameter.
    saved_groups = [group for group in saved["param_groups"] if group["params"]]
    _check_groups(saved_groups, current["param_groups"], path)
    groups = []
    for theirs, ours in zip(saved_groups, current["param_groups"], strict=True):
        progress = {"step": theirs["step"]} if "step" in theirs else {}
        groups.append(ours | progress | {"params": theirs["params"]})
    shapes = {
        index: parameter.shape
        for group, live in zip(groups, optimizer.param_groups, strict=True)
        for index, parameter in zip(group["params"], live["params"], strict=True)
    }
    for index, values in saved["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != shapes[index]:
                raise ValueError(
                    f"checkpoint {path}: the optimizer's {key} of parameter {index} is {list(value.shape)}, "
                    f"the parameter {list(shapes[index])}: the parameters come in another order than here"
                )
    # A deep copy, since torch keeps tensors that need no conversion, and these are mapped from the file.
    optimizer.load_state_dict({"state": deepcopy(saved["state"]), "param_groups": groups})


def _check_groups(saved: list[dict], current: list[dict], path: Path) -> None:
    hint = "the locked parts or the temperature scheme are not those that it was saved with"
    sizes = [len(g["params"]) for g in saved], [len(g["params"]) for g in current]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"checkpoint {path}: its optimizer has groups of {sizes[0]} parameters, this run {sizes[1]}: {hint}"
        )
    for theirs, ours in zip(saved, current, strict=True):
        names = zip(theirs.get("param_names", ()), ours.get("param_names", ()))
        differing = next(((a, b) for a, b in names if a != b), None)
        if differing:
            raise ValueError(
                f"checkpoint {path}: its optimizer has {differing[0]!r} in place of {differing[1]!r}: {hint}"
            )


def _load_rows(path: Path, held: Mapping[str, Any], sample_state: SampleState, u_format: str | None) -> None:
    rows = _rows_folder(path, held)
    missing = _missing_rows(rows) if rows else None
    if rows and not missing:
        columns = sample_state.state_dict()
        _check_columns(rows, columns)
        with _rows_exchanged(rows):
            dcp.load(columns, checkpoint_id=rows)
        sample_state.load_state_dict(columns)
        return
    columns = published.from_published(held, u_format)
    if columns:
        sample_state.load_state_dict(columns)
    elif missing:
        raise ValueError(f"checkpoint {path}: its sample state lacks {missing}; copy the folder beside the file")
    else:
        _log.warning("%s holds no sample state: every sample counts as never seen", path)


def _check_columns(rows: Path, wanted: Mapping[str, Tensor]) -> None:
    saved = dcp.FileSystemReader(rows).read_metadata().state_dict_metadata
    for name, column in wanted.items():
        if name not in saved:
            raise ValueError(f"sample state {rows} lacks the column {name!r}; it has {sorted(saved)}")
        if saved[name].size != column.shape:
            raise ValueError(
                f"sample state {rows} has {saved[name].size[0]} rows where --data_size says {column.shape[0]}"
            )


def _find_latest(folder: Path) -> Path | None:
    best, best_key = None, None
    for path in sorted(folder.glob("*.pt")):
        try:
            key = _progress_of(path)
        except ValueError as error:
            _log.warning("skipped: %s", error)
            continue
        if best_key is None or key > best_key:
            best, best_key = path, key
    return best


def _progress_of(path: Path) -> tuple[int, int, int]:
    """How far a checkpoint is, for comparison. ValueError where it is not complete."""
    held = published.read(path)
    if "epoch" not in held:
        raise ValueError(f"checkpoint {path}: bare weights, not a checkpoint of a run")
    rows = _rows_folder(path, held)
    missing = _missing_rows(rows) if rows else None
    if missing:
        raise ValueError(f"checkpoint {path}: its sample state lacks {missing}")
    return int(held["epoch"]), int(held.get("epoch_step", 0)), int(held.get("step", 0))


def _delete_previous(path: Path, state: RunState) -> None:
    """Remove the newest checkpoint by epoch that came before ``path``, which is complete by now."""
    epochs = {
        p: int(m[1]) for p in path.parent.glob("epoch_*.pt") if (m := re.fullmatch(r"epoch_(\d+)\.pt", p.name))
    }
    before = [p for p, epoch in epochs.items() if p != path and epoch <= state.epoch]
    if before:
        max(before, key=epochs.__getitem__).unlink()


def _delete_unnamed(folder: Path) -> None:
    """Remove the sample states that no checkpoint names. Where one cannot be read, nobody knows: all stay."""
    named, unreadable = contents(folder)
    if unreadable:
        _log.warning("old sample states are kept, since %s cannot be read", unreadable[0])
        return
    for rows in folder.glob("*.state*"):
        if rows not in named.values():
            shutil.rmtree(rows)
