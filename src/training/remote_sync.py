"""``--remote-sync``: rank 0 copies the run's folder elsewhere while the run goes on.

Every ``--remote-sync-frequency`` seconds a thread copies the files that changed since, through fsspec, so that the
target may be anything that fsspec knows. Of the checkpoints only complete ones go, the sample state before the
file that names it, and each file gets its name at the target once it is there in full: what is found there can be
resumed. Nothing is ever deleted at the target.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from fsspec.core import url_to_fs

from training.checkpoint import contents
from training.distributed import on_main
from training.params import RunConfig

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
        """Copy what is new or has changed since the last call; the number of files copied."""
        versions = {file: _version(file) for file in self._folder.rglob("*") if file.is_file()}
        copied = 0
        for file in self._in_order(versions):
            # What has appeared since the look at the folder waits for the next call.
            version = versions.get(file)
            if version is not None and self._copied.get(file) != version and self._copy(file, version):
                self._copied[file] = version
                copied += 1
        return copied

    def _in_order(self, files: Iterable[Path]) -> list[Path]:
        """The files to copy: those of the sample states first, then the checkpoints, then the rest."""
        complete, unreadable = contents(self._checkpoints)
        for path in unreadable:
            _log.warning("--remote-sync: %s cannot be read and is not copied", path)
        states = dict.fromkeys(found.folder for found in complete if found.folder)
        rows = [file for state in states for file in sorted(state.iterdir())]
        rest = sorted(f for f in files if self._checkpoints not in f.parents)
        return [*rows, *(found.path for found in complete), *rest]

    def _copy(self, file: Path, version: tuple[int, int]) -> bool:
        """Whether ``file`` is at the target now: a checkpoint that was replaced meanwhile is not put in place."""
        target = PurePosixPath(self._target, *file.relative_to(self._folder).parts)
        partial = target.with_name(f".{target.name}.part")
        self._files.makedirs(str(target.parent), exist_ok=True)
        self._files.put_file(str(file), str(partial))
        if self._checkpoints in file.parents and _version(file) != version:
            return False
        self._files.mv(str(partial), str(target))
        return True


def _version(file: Path) -> tuple[int, int] | None:
    """What changes with a file's content; None where it is gone."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


@contextmanager
def remote_sync(config: RunConfig, folder: Path) -> Iterator[None]:
    """Keep ``folder`` copied while the body runs, and once more after it; does nothing without ``--remote-sync``.

    All ranks enter. A first copy is made on entry: a target that cannot be written to is a ValueError there. Later
    ones that fail are logged and tried again, the run goes on.
    """
    if config.remote_sync is None:
        yield
        return
    stopped = threading.Event()
    started: list[threading.Thread] = []

    def start() -> None:
        copy = RemoteSync(folder, _url(config, folder.name))
        try:
            copy()
        except Exception as error:  # each backend has exceptions of its own
            raise ValueError(f"--remote-sync {config.remote_sync}: cannot be written to ({error})") from error
        started.append(threading.Thread(target=_keep, args=(copy, config.remote_sync_frequency, stopped)))
        started[0].start()

    on_main(start)
    try:
        yield
    finally:
        stopped.set()
        for thread in started:
            thread.join()


def _keep(copy: RemoteSync, every: float, stopped: threading.Event) -> None:
    """Copy every ``every`` seconds, and a last time when told to stop."""
    while True:
        last = stopped.wait(every)
        try:
            copy()
        except Exception as error:  # as above, and a file may just have been removed
            _log.warning("--remote-sync failed%s: %s", "" if last else ", trying again later", error)
        if last:
            return


def _url(config: RunConfig, name: str) -> str:
    target = config.remote_sync.rstrip("/")
    if config.remote_sync_protocol == "s3":
        target = target if "://" in target else f"s3://{target}"
        if not target.startswith("s3://"):
            raise ValueError(
                f"--remote-sync {config.remote_sync} with --remote-sync-protocol s3: give s3://BUCKET/PREFIX, or "
                "--remote-sync-protocol fsspec"
            )
    return f"{target}/{name}"
