"""Checkpoints on disk: what they consist of, which are complete, and which may be removed.

In the run's folder ``checkpoints/``,

    epoch_N.pt        weights, optimizer, counters, ... after N epochs, in the published format (``run_state``)
    step_S.pt         the same inside an epoch: saved at intervals, or where the run was stopped
    epoch_latest.pt   with --save-most-recent, the newest state
    epoch_N.state/    the sample state (``sample_state_io``); files that were saved together share it

The .pt is the marker: it is put in place last and in one piece, and names its folder with the size and checksum of
every file in it; torch protects the .pt itself by a checksum per tensor. So whenever the .pt is there, the whole
checkpoint is, and marker and content are never of different saves. A folder that no file names is left from a save
that was interrupted, or from a file that has been replaced, and is removed.

Reading a checkpoint runs no code from it.
"""

from __future__ import annotations

import logging
import re
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.checkpoint import pt_file, published, sample_state_io
from training.checkpoint.sample_state_io import SavedState
from training.distributed.collectives import gather_object, on_main, rank_in

_log = logging.getLogger(__name__)

FETCHED = "fetched"  # the folder, beside the run's own checkpoints, for one that was fetched from elsewhere


@dataclass(frozen=True)
class Found:
    """A checkpoint that exists: its file, when it was saved, how far the run was, and its sample state.

    ``saved_at`` is later than that of every earlier checkpoint in the folder, even if a clock was set back.
    """

    path: Path
    saved_at: float
    progress: tuple[int, int, int]
    state: SavedState | None = None

    @property
    def order(self) -> tuple[float, tuple[int, int, int]]:
        """Larger means newer. Published files, which have no time of saving, come first."""
        return self.saved_at, self.progress


def find_latest(folder: Path, since: float = 0.0) -> Path | None:
    """The newest complete checkpoint in ``folder``, of any name, saved after ``since``; None: there is none.

    Skipped ones are logged with the reason. Collective: the ranks share the work of computing checksums.
    """
    for path in on_main(lambda: _newest_first(folder, since)):
        fault = problem(path)
        if fault is None:
            return path
        if rank_in() == 0:
            _log.warning("skipped: %s", fault)
    return None


def problem(path: Path) -> str | None:
    """Why no run can resume from the file ``path``; None: every byte is as it was written. Collective."""
    found = on_main(lambda: _look(path))
    if isinstance(found, str):
        return found
    if found.state is None:
        return None
    ranks = gather_object(None)
    damaged = sample_state_io.damaged(found.state.folder, found.state.files, rank_in(), len(ranks))
    fault = next(filter(None, gather_object(damaged)), None)
    return fault and f"checkpoint {path}: {fault}"


def contents(folder: Path) -> tuple[list[Found], list[Path]]:
    """The checkpoints in ``folder``, sorted by name, and the files that cannot be read."""
    found, unreadable = [], []
    for path in sorted(folder.glob("*.pt")):
        try:
            held = pt_file.read(path)
            if "epoch" in held:
                found.append(_describe(path, held))
        except ValueError:
            unreadable.append(path)
    return found, unreadable


def tidy(folder: Path, keep_last: int) -> None:
    """Remove all but the ``keep_last`` newest step_S.pt, sample states that no checkpoint names, and leftovers.

    Called by rank 0, after a save that succeeded. For an unreadable epoch_N.pt or step_S.pt the file's own name
    tells which sample state it names; if another file is unreadable, all sample states are kept.
    """
    found, unreadable = contents(folder)
    inside = sorted((f for f in found if re.fullmatch(r"step_\d+\.pt", f.path.name)), key=lambda f: f.order)
    for old in inside[: max(len(inside) - keep_last, 0)]:
        old.path.unlink()
        found.remove(old)
    for rest in folder.glob(".*.tmp"):
        rest.unlink()
    shutil.rmtree(folder / FETCHED, ignore_errors=True)  # the run has a checkpoint of its own now
    spared = [path.stem for path in unreadable]
    if any(not re.fullmatch(r"(epoch|step)_\d+", stem) for stem in spared):
        _log.warning("old sample states are kept, because %s cannot be read", unreadable[0])
        return
    named = {f.state.folder for f in found if f.state}
    for state in folder.glob("*.state*"):
        if state not in named and state.name.split(".state")[0] not in spared:
            shutil.rmtree(state)


def delete_previous(path: Path, epoch: int) -> None:
    """Remove the epoch_N.pt with the largest N up to ``epoch``, but not ``path``, the complete new one."""
    epochs = {
        p: int(m[1]) for p in path.parent.glob("epoch_*.pt") if (m := re.fullmatch(r"epoch_(\d+)\.pt", p.name))
    }
    before = [p for p, number in epochs.items() if p != path and number <= epoch]
    if before:
        max(before, key=epochs.__getitem__).unlink()


def unused_folder(folder: Path, stem: str) -> Path:
    """The folder for the sample state of ``stem``: a name that does not exist yet."""
    names = (f"{stem}.state" + (f".{i}" if i else "") for i in range(10**6))
    return next(folder / name for name in names if not (folder / name).exists())


def newest_time(folder: Path) -> float:
    """When the newest checkpoint in ``folder`` was saved; 0: there is none."""
    return max((found.saved_at for found in contents(folder)[0]), default=0.0)


def _newest_first(folder: Path, since: float) -> list[Path]:
    found = []
    for path in sorted(folder.glob("*.pt")):
        try:
            found.append(_found(path))
        except ValueError as error:
            _log.warning("skipped: %s", error)
    later = [f for f in found if since == 0 or f.saved_at > since]
    return [f.path for f in sorted(later, key=lambda f: f.order, reverse=True)]


def _found(path: Path) -> Found:
    """ValueError: ``path`` is not a readable checkpoint of a run."""
    held = pt_file.read(path)
    if "epoch" not in held:
        raise ValueError(f"checkpoint {path} holds bare weights, not the state of a run")
    return _describe(path, held)


def _describe(path: Path, held: Mapping[str, Any]) -> Found:
    """ValueError: ``held`` is not what a trainer writes."""
    if "epoch" not in held:
        return Found(path, 0.0, (0, 0, 0))
    try:
        progress = int(held["epoch"]), int(held.get("epoch_step", 0)), int(held.get("step", 0))
        return Found(path, float(held.get("saved_at", 0)), progress, SavedState.named_in(held, path))
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"checkpoint {path} is not the state of a run ({error})") from error


def _look(path: Path) -> Found | str:
    """The checkpoint ``path``, after a check of its content and of the files it names; a str: what is wrong."""
    try:
        held = pt_file.read(path)
        found = _describe(path, held)
        damaged = zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        return str(error) if isinstance(error, ValueError) else f"checkpoint {path}: {error}"
    if damaged:
        return f"checkpoint {path} is damaged: the checksum of {damaged} in it is not the one that was written"
    missing = sample_state_io.missing(found.state.folder, found.state.files) if found.state else None
    if missing and not published.has_columns(held):
        return f"checkpoint {path}: its sample state is incomplete ({missing}); copy its folder beside the file"
    return Found(path, found.saved_at, found.progress) if missing else found
