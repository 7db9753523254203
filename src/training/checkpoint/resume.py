"""What a run resumes from, and how its state is restored: our checkpoints, published ones, bare weights.

Weights, optimizer and counters come from the ``.pt`` (``run_state``); the sample state from the folder beside it,
for any number of ranks, or from the complete columns in a published file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from drrho_clip.sample_state import SampleState
from training.checkpoint import pt_file, published, remote_sync, sample_state_io
from training.checkpoint.catalog import find_latest, problem
from training.checkpoint.run_folder import RunFolder
from training.checkpoint.run_state import RunState, of_a_run
from training.checkpoint.sample_state_io import SavedState
from training.config.params import Config
from training.distributed.collectives import on_main, rank_in

_log = logging.getLogger(__name__)


def checkpoint_to_resume(config: Config, folder: RunFolder) -> Path | None:
    """The checkpoint to resume from, fetched if it is remote; None: the run starts at the beginning. Collective.

    ValueError: the user asks for a checkpoint that does not exist or is damaged, or all that the run has are.
    """
    found = locate_checkpoint(config, folder)
    if not isinstance(found, str):
        return found
    if config.run.resume != "latest":
        return remote_sync.fetch(found, folder.fetched)
    newest = remote_sync.fetch_newest(config.run, folder.name, folder.path, folder.fetched)
    if newest is None:
        _check_beginning(config, folder)
    return newest


def locate_checkpoint(config: Config, folder: RunFolder) -> Path | str | None:
    """Where the checkpoint to resume from is: a file or a URL; None: the run starts at the beginning. Collective.

    After a restart it is the newest checkpoint that this job itself has saved, regardless of ``--resume``. Else it
    is ``--resume FILE`` or ``--resume URL``; with ``latest``, the newest one in the run's folder or, if it has
    none, the target of ``--remote-sync``, from which the newest will be fetched. Nothing is fetched here.
    ValueError: as ``checkpoint_to_resume``, for checkpoints on this machine.
    """
    wanted, remote = config.run.resume, config.run.remote_sync
    if wanted is None and not folder.restarted:
        return None
    if wanted in (None, "latest"):
        found = find_latest(folder.checkpoints)
        if found is None and (wanted is None or remote is None):
            _check_beginning(config, folder)
        return found or (remote if wanted else None)
    if folder.restarted:
        own = find_latest(folder.checkpoints, folder.found_newest)
        if own is not None:
            return own
    if "://" in wanted:
        return wanted
    if not Path(wanted).is_file():
        raise ValueError(f"--resume {wanted}: there is no such file; check the path")
    fault = problem(Path(wanted))
    if fault:
        raise ValueError(f"--resume {wanted}: {fault}; give another one, or --resume latest with --name")
    return Path(wanted)


def _check_beginning(config: Config, folder: RunFolder) -> None:
    """The run has no complete checkpoint, so it starts at the beginning. Collective.

    ValueError: it has incomplete ones, so that work would be lost; or it shall evaluate the newest.
    """
    latest = config.run.resume == "latest"
    there = on_main(lambda: sorted(path.name for path in folder.checkpoints.glob("*.pt")))
    if there:
        raise ValueError(
            f"{'--resume latest' if latest else f'--name {folder.name}'}: none of the {len(there)} files in "
            f"{folder.checkpoints} ({', '.join(there[-3:])}) is a complete checkpoint, as the warnings say; put a "
            "whole one there or, to start at the beginning, move them away or give another --name"
        )
    if latest and not config.trains:
        raise ValueError(
            f"--resume latest: there is no checkpoint in {folder.checkpoints} to evaluate; check --logs and "
            "--name, or give a file"
        )
    if latest and rank_in() == 0:
        _log.info("--resume latest: no checkpoint in %s yet: the run starts at the beginning", folder.checkpoints)


def resume(
    path: Path, state: RunState, *, steps_per_epoch: int, global_batch: int, u_format: str | None = None
) -> bool:
    """Fill ``state`` from ``path``, our checkpoint or a published one; False: bare weights, for the model only.

    Collective. ``steps_per_epoch``, ``global_batch``: see ``RunState.fill``; ``u_format``: see
    ``published.from_published``. The file has been checked (``problem``).
    ValueError: it cannot be read, or does not fit the model, the optimizer or the sample state.
    """
    held = pt_file.read(path)
    if not state.fill(held, path, steps_per_epoch=steps_per_epoch, global_batch=global_batch):
        return False
    if state.sample_state is not None:
        with of_a_run(path):
            _check_parts(path, held.get("data_sizes"), state.data_sizes)
        _load_rows(path, held, state.sample_state, u_format)
    return True


def _load_rows(path: Path, held: Mapping[str, Any], state: SampleState, u_format: str | None) -> None:
    with of_a_run(path):
        saved = SavedState.named_in(held, path)
    missing = sample_state_io.missing(saved.folder, saved.files) if saved else None
    if saved and not missing:
        changed = sample_state_io.read(saved.folder, state)
        if changed and rank_in() == 0:
            _log.info("%s: %s", path, changed)
        return
    with of_a_run(path):
        columns = published.from_published(held, u_format)
    if not columns and missing:
        raise ValueError(
            f"checkpoint {path}: its sample state is incomplete ({missing}); copy its folder beside the file"
        )
    if not columns:
        if rank_in() == 0:
            _log.warning("%s holds no sample state: every sample counts as never seen", path)
        return
    length = max(len(column) for column in columns.values())
    if length > state.num_samples:
        raise ValueError(
            f"--data_size {state.num_samples}: checkpoint {path} has {length} rows, and none may be lost; give at "
            f"least {length}"
        )
    if missing and rank_in() == 0:
        _log.warning(
            "checkpoint %s: its sample state is incomplete (%s); the columns in the file are used instead",
            path,
            missing,
        )
    unseen = {name: F.pad(c, (0, state.num_samples - len(c)), value=torch.nan) for name, c in columns.items()}
    state.load_state_dict(unseen)


def _check_parts(path: Path, then: list[int] | None, now: tuple[int, ...]) -> None:
    """ValueError: rows would belong to other samples. With a --data_size per source only the last may grow."""
    if then and (len(then) > 1 or len(now) > 1) and list(now[: len(then) - 1]) != list(then[:-1]):
        raise ValueError(
            f"--data_size {'::'.join(map(str, now))}: checkpoint {path} has {'::'.join(map(str, then))}, and if a "
            "size before the last changes, its rows belong to other samples; append sources, or let only the last "
            "one grow"
        )
