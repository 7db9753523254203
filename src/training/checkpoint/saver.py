"""Saving while training continues.

``Saver.save`` copies the state into host memory, waits for the copy, and leaves the rest to a thread: writing,
checksums, fsync, the exchange between the ranks' threads (in a separate group), and the removal of superseded
checkpoints. At most one save is in progress; the next one waits for it.

A save that fails, because the disk is full for example, leaves complete checkpoints unchanged; the failure is
logged, and the run continues.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from training.checkpoint import catalog, pt_file, published, sample_state_io
from training.checkpoint.run_state import RunState
from training.checkpoint.staging import Staging
from training.config.run import RunConfig
from training.distributed.collectives import Group, PeerFailed, lost_peer, on_main, rank_in
from training.distributed.process_group import own_group
from training.files import link

_log = logging.getLogger(__name__)

_PATIENCE = 60  # seconds that a save in progress may take when the run ends with an error


class SaveFailed(ValueError):
    """The last checkpoint of a run could not be saved."""


@dataclass(frozen=True)
class _Job:
    """What the thread writes: ``held`` into each of ``paths``, and ``columns`` beside them."""

    paths: Sequence[Path]
    stem: str
    epoch: int
    held: dict[str, Any]
    columns: dict[str, Tensor] | None
    supersedes: bool


class Saver:
    """Saves the states of one run in ``folder``. Every rank has one, and all ranks call its methods together.

    ``initial_tau``: initial individual temperature, for ``--save_published_state``. A context manager, which waits
    at its end. SaveFailed: the last save failed.
    """

    def __init__(self, folder: Path, config: RunConfig, *, initial_tau: float = 0.07) -> None:
        self._folder, self._config, self._initial_tau = folder, config, initial_tau
        self._group = own_group(config.step_timeout)
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self.committed: Path | None = None  # the file of the last save that this process knows to be complete
        self._newest = catalog.newest_time(folder) if rank_in() == 0 else 0.0

    def save_epoch(self, state: RunState, *, final: bool) -> bool:
        """Save what the flags ask for after an epoch or at the run's end (``final``); whether there was a save."""
        due = state.epoch_step == 0 and self.due(state.epoch)
        names = [state.stem] if due or final else []
        if self._config.save_most_recent:
            names.append("epoch_latest")
        if names:
            self.save(state, names, supersedes=self._config.delete_previous_checkpoint and (due or final))
        return bool(names)

    def due(self, epoch: int) -> bool:
        """Whether ``--save-frequency`` asks for a checkpoint after ``epoch`` epochs."""
        return self._config.save_frequency > 0 and epoch % self._config.save_frequency == 0

    def save(self, state: RunState, names: Sequence[str], *, supersedes: bool = False) -> None:
        """Save ``state`` under each of ``names``; when this returns, ``state`` may change.

        ``supersedes``: the checkpoint of the epoch before is removed after the save.
        """
        self.wait()
        table = state.sample_state
        live = [state.held() if rank_in() == 0 else {}, table.local() if table else {}]
        held, local = self._staging.copy(live)
        self._newest = held["saved_at"] = max(time.time(), self._newest + 1e-3)
        if table and self._config.save_published_state:
            held |= published.to_published(sample_state_io.whole(table), self._initial_tau)
        columns = table.sharded(local) if table else None
        paths = [self._folder / f"{name}.pt" for name in names]
        # For the sample state's folder: named after the epoch, because later saves replace epoch_latest.pt.
        stem = state.stem if names[0] == "epoch_latest" else names[0]
        job = _Job(paths, stem, state.epoch, held, columns, supersedes)
        self._gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(target=self._run, args=(job,), name="saver", daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the save in progress, if there is one."""
        if self._thread is not None and self._thread.is_alive():  # not alive: an error may come before its start
            self._thread.join(timeout)
        self._thread = None

    def close(self) -> None:
        """Wait for the last save. SaveFailed on rank 0, PeerFailed on the others: it failed."""
        self.wait()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        elif isinstance(error, Exception):
            self.wait(_PATIENCE)

    def _run(self, job: _Job) -> None:
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)  # a thread starts with the first GPU, which belongs to another rank
        try:
            _write(job, self._folder, self._group, self._config.keep_last)
            self._failure, self.committed = None, job.paths[0]
        except PeerFailed as error:
            self._failure = error
        except Exception as error:  # disks and networks fail in many ways; none of them may end the run
            if lost_peer(error):
                self._failure = PeerFailed("another rank has ended, and its save with it")
                return
            self._failure = SaveFailed(
                f"--logs: checkpoint {job.paths[0]} could not be saved ({error}); complete ones there are "
                "unchanged"
            )
            _log.error("%s; the run continues", self._failure)


def _write(job: _Job, folder: Path, group: Group, keep_last: int) -> None:
    held, place = job.held, None
    if job.columns is not None:
        place = on_main(lambda: _make_folder(folder, job.stem), group)
        try:
            files = sample_state_io.write(place, job.columns, group)
        except Exception:
            if rank_in(group) == 0:
                shutil.rmtree(place, ignore_errors=True)
            raise
        held["sample_state"] = {"folder": place.name, "files": {n: list(f) for n, f in files.items()}}

    def commit() -> None:
        try:
            _write_files(job.paths, held)
        except Exception:
            if place is not None and not _named(place, job.paths):
                shutil.rmtree(place, ignore_errors=True)
            raise
        _log.info("saved %s", ", ".join(str(path) for path in job.paths))
        try:
            if job.supersedes:
                catalog.delete_previous(job.paths[0], job.epoch)
            catalog.tidy(folder, keep_last)
        except OSError as error:
            _log.warning("superseded checkpoints could not be removed (%s)", error)

    on_main(commit, group)


def _named(place: Path, paths: Sequence[Path]) -> bool:
    """Whether a file names ``place``: the checkpoint was saved, and the failure came later."""
    found, unreadable = catalog.contents(place.parent)
    return any(f.state is not None and f.state.folder == place for f in found) or bool(
        set(unreadable) & set(paths)
    )


def _make_folder(folder: Path, stem: str) -> Path:
    place = catalog.unused_folder(folder, stem)
    place.mkdir(parents=True)
    return place


def _write_files(paths: Sequence[Path], held: dict[str, Any]) -> None:
    """Write the first file, and make the others links to it where the file system has links."""
    pt_file.write(paths[0], held)
    for path in paths[1:]:
        link(paths[0], path)
