"""``--remote-sync``: rank 0 copies the run's folder elsewhere during the run.

Every ``--remote-sync-frequency`` seconds a thread copies the files that have changed, through fsspec, so that the
target may be anything that fsspec supports. Only complete checkpoints are copied, the sample state before the file
that names it, and a file gets its name at the target when its copy is complete: every checkpoint found there can
be resumed. Nothing is ever deleted at the target.

With ``--resume latest``, a run that has no checkpoint of its own (on another cluster, for example) fetches the
newest one from there; ``--resume URL`` fetches a particular one.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from training.checkpoint import pt_file, run_lock
from training.checkpoint.catalog import contents, problem
from training.checkpoint.sample_state_io import SavedState
from training.config.run import RunConfig
from training.distributed.collectives import on_main, rank_in

T = TypeVar("T")

HURRY = 30.0  # seconds for the last copy of a run that must end soon

_log = logging.getLogger(__name__)


class RemoteSync:
    """Copies ``folder`` to the fsspec URL ``target``. ValueError: fsspec cannot handle the URL."""

    def __init__(self, folder: Path, target: str) -> None:
        try:
            self._files, self._target = url_to_fs(target)
        except (ImportError, ValueError) as error:
            raise ValueError(f"--remote-sync {target}: {error}") from error
        self._folder, self._checkpoints = folder, folder / "checkpoints"
        self._copied: dict[Path, tuple[int, int]] = {}

    def __call__(self) -> int:
        """Copy what is new or has changed since the last call; returns the number of files copied."""
        files = (file for file in self._folder.rglob("*") if file.is_file() and file.name != run_lock.NAME)
        versions = {file: _version(file) for file in files}
        copied = 0
        for file in self._in_order(versions):
            # A file that has appeared since the folder was listed waits for the next call.
            version = versions.get(file)
            if version is None or self._copied.get(file) == version:
                continue
            if self._is_there(file, version):
                self._copied[file] = version
            elif self._copy(file, version):
                self._copied[file] = version
                copied += 1
        return copied

    def probe(self) -> None:
        """Write a small file at the target and remove it again."""
        file = str(PurePosixPath(self._target, ".probe"))
        self._files.makedirs(self._target, exist_ok=True)
        self._files.pipe_file(file, b"?")
        self._files.rm_file(file)

    def _in_order(self, files: Iterable[Path]) -> list[Path]:
        """The files to copy, in order: those of sample states, then the checkpoints, then all others."""
        complete, unreadable = contents(self._checkpoints)
        for path in unreadable:
            _log.warning("--remote-sync: %s cannot be read and is not copied", path)
        complete = sorted(complete, key=lambda found: found.order)  # the last one copied is taken for the newest
        states = dict.fromkeys(found.state.folder for found in complete if found.state)
        rows = [file for state in states for file in sorted(state.iterdir())]
        rest = sorted(f for f in files if self._checkpoints not in f.parents)
        return [*rows, *(found.path for found in complete), *rest]

    def _is_there(self, file: Path, version: tuple[int, int]) -> bool:
        """Whether an earlier launch has copied ``file`` as it is: as large there, and written later than here."""
        target = self._place(file)
        try:
            there = self._files.info(target)["size"] == version[0]
            return there and self._files.modified(target).timestamp() > version[1] / 1e9
        except (OSError, NotImplementedError, KeyError):
            return False

    def _place(self, file: Path) -> str:
        return str(PurePosixPath(self._target, *file.relative_to(self._folder).parts))

    def _copy(self, file: Path, version: tuple[int, int]) -> bool:
        """Copy ``file``; whether it is at the target now: a checkpoint replaced during the copy is not."""
        target = PurePosixPath(self._place(file))
        partial = target.with_name(f".{target.name}.part")
        self._files.makedirs(str(target.parent), exist_ok=True)
        self._files.put_file(str(file), str(partial))
        if self._checkpoints in file.parents and _version(file) != version:
            return False
        self._files.mv(str(partial), str(target))
        return True


def _version(file: Path) -> tuple[int, int] | None:
    """Values that change with the content of a file; None: the file is gone."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def fetch_newest(config: RunConfig, name: str, folder: Path, into: Path) -> Path | None:
    """Fetch the newest checkpoint of the run ``name`` from the target of ``--remote-sync``; None: there is none.

    The run's log and results are fetched too, into ``folder``, where the run appends to them. All ranks call it
    together. ValueError: the target cannot be read, or none of the checkpoints there is complete.
    """
    root = _url(config, name)
    there = on_main(lambda: _attempt(f"{root}/checkpoints", _names))
    for found in there:
        try:
            path = fetch(f"{root}/checkpoints/{found}", into)
        except ValueError as error:
            if rank_in() == 0:
                _log.warning("skipped: %s", error)
            continue
        on_main(lambda: _attempt(root, lambda files, remote: _fetch_records(files, remote, folder)))
        return path
    if there:
        raise ValueError(
            f"--resume latest: none of the {len(there)} checkpoints in {root}/checkpoints could be fetched "
            "whole, as the warnings say; to start at the beginning, give another --name"
        )
    return None


def fetch(url: str, folder: Path) -> Path:
    """Copy the checkpoint at ``url``, a .pt, with its sample state into ``folder``, which is emptied before.

    All ranks call it together. ValueError: it cannot be read, or is damaged.
    """
    path = on_main(lambda: _attempt(url, lambda files, remote: _fetch(files, remote, folder)))
    fault = problem(path)
    if fault:
        on_main(lambda: shutil.rmtree(folder, ignore_errors=True))
        raise ValueError(f"--resume {url}: {fault}")
    return path


def _fetch(files: AbstractFileSystem, remote: str, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder / PurePosixPath(remote).name
    _log.info("fetching %s", remote)
    try:
        files.get_file(remote, str(path))
        state = SavedState.named_in(pt_file.read(path), path)
        if state:
            state.folder.mkdir()
            for name in state.files:
                source = PurePosixPath(remote).with_name(state.folder.name) / PurePosixPath(name).name
                files.get_file(str(source), str(state.folder / source.name))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return path


def _fetch_records(files: AbstractFileSystem, remote: str, folder: Path) -> None:
    """Fetch the files that a run appends to, unless ``folder`` has them."""
    for name in ("out.log", "eval_results.jsonl"):
        if not (folder / name).exists() and files.exists(f"{remote}/{name}"):
            files.get_file(f"{remote}/{name}", str(folder / name))


def _names(files: AbstractFileSystem, folder: str) -> list[str]:
    """The names of the checkpoints in the remote ``folder``, newest first."""
    there = files.ls(folder, detail=False) if files.exists(folder) else []
    found = [p for p in map(PurePosixPath, there) if p.suffix == ".pt" and not p.name.startswith(".")]
    return [path.name for path in sorted(found, key=lambda p: files.modified(str(p)), reverse=True)]


def _attempt(url: str, function: Callable[[AbstractFileSystem, str], T]) -> T:
    try:
        return function(*url_to_fs(url))
    except Exception as error:  # each backend has exceptions of its own
        raise ValueError(f"{url} cannot be read ({error})") from error


@dataclass
class Copying:
    """A running ``--remote-sync``. ``patience``: seconds that the last copy may take; None: no limit."""

    patience: float | None = None


@contextmanager
def remote_sync(config: RunConfig, folder: Path) -> Iterator[Copying]:
    """Copy ``folder`` while the body runs, and once more after it; without ``--remote-sync`` do nothing.

    All ranks enter. ValueError on entry: the target cannot be written to. Later copies that fail are logged and
    tried again, and the run continues. If the body fails, the last copy may take ``HURRY`` seconds.
    """
    copying = Copying()
    if config.remote_sync is None:
        yield copying
        return
    stopped = threading.Event()
    started: list[threading.Thread] = []

    def start() -> None:
        copy = RemoteSync(folder, _url(config, folder.name))
        try:
            copy.probe()
        except Exception as error:  # each backend has exceptions of its own
            raise ValueError(f"--remote-sync {config.remote_sync}: it cannot be written to ({error})") from error
        keep = (copy, config.remote_sync_frequency, stopped)
        started.append(threading.Thread(target=_keep, args=keep, name="remote sync", daemon=True))
        started[0].start()

    on_main(start)
    try:
        yield copying
    except BaseException:
        copying.patience = HURRY
        raise
    finally:
        stopped.set()
        for thread in started:
            thread.join(copying.patience)
            if thread.is_alive():
                _log.warning("--remote-sync: the last copy is not complete; the next launch continues it")


def _keep(copy: RemoteSync, every: float, stopped: threading.Event) -> None:
    """Copy now, then every ``every`` seconds, and a last time when ``stopped`` is set."""
    last = False
    while True:
        try:
            copy()
        except Exception as error:  # as above; or a file has just been removed
            _log.warning("--remote-sync failed%s: %s", "" if last else ", will try again later", error)
        if last:
            return
        last = stopped.wait(every)


def _url(config: RunConfig, name: str) -> str:
    assert config.remote_sync is not None  # callers have checked that the flag is given
    target = config.remote_sync.rstrip("/")
    if config.remote_sync_protocol == "s3" and "://" not in target:
        target = f"s3://{target}"
    return f"{target}/{name}"
