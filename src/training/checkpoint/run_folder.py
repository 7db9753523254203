"""A run's folder, ``LOGS/NAME/``: which one this run uses, and what is written there at the start.

    out.log              the log (``--log-local``: ``out-RANK.log``, one per node)
    params.txt           every flag, ``name: value``, sorted, with the optimizer's defaults for the model filled in
    launch.json          which job and which launcher started the run, so that a restart finds its folder
    run.lock             while a run writes here: which one (``run_lock``)
    checkpoints/         epoch_N.pt
    tensorboard/         events, with --report-to tensorboard
    eval_results.jsonl   one JSON object per evaluation
    job.done             the run reached its end

Without ``--name`` the name is made of the time and the main settings. A job that Slurm requeues or torchrun
restarts would then start another run each time; instead it is recognized by ``launch.json`` and continues in the
folder that it had.

A folder is protected from other runs while one writes there, once it holds a checkpoint, and once the run has
ended. If a command failed before that, the next run of that name takes over the folder, and appends to its log.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.checkpoint.catalog import FETCHED, newest_time
from training.checkpoint.run_lock import Held, Holder, RunLock, living_holder
from training.config.params import Config
from training.distributed.collectives import broadcast_object, gather_object, node_main_first, on_main
from training.distributed.process_group import World
from training.files import replacing

_LOOKS, _PAUSE = 20, 1.0  # for what another node has written: how often, and seconds between
_SHOWN = 8  # nodes named one by one
_RUN_ID = "TORCHELASTIC_RUN_ID"
_COUNTERS = {"slurm": "SLURM_RESTART_COUNT", "torchrun": "TORCHELASTIC_RESTART_COUNT"}


@dataclass(frozen=True)
class RunFolder:
    """A run's folder. ``restarted``: the launcher has started this job before, so it resumes what is there."""

    path: Path
    name: str
    restarted: bool = False

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def fetched(self) -> Path:
        """The folder for checkpoints fetched from elsewhere, separate from the run's own."""
        return self.checkpoints / FETCHED

    @property
    def done(self) -> Path:
        return self.path / "job.done"

    @property
    def results(self) -> Path:
        return self.path / "eval_results.jsonl"

    @property
    def found_newest(self) -> float:
        """When the newest checkpoint that this job found here at its first start was saved; 0: there was none."""
        return _read_launch(self.path / "launch.json").get("newest", 0.0)

    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of ``eval_results.jsonl``; a line that was cut off is ignored."""
        found = []
        for line in self.results.read_text(encoding="utf-8").splitlines() if self.results.is_file() else []:
            with suppress(ValueError):
                found.append(json.loads(line))
        return found


def choose_folder(config: Config, world: World) -> RunFolder:
    """The folder of this run, the same on every rank; nothing is created.

    ValueError (on every rank): the folder holds another run, and ``--resume`` was not given.
    """
    answer: RunFolder | str | None = None
    restarts = _restarted_launchers(os.environ, gather_object(_restarts(os.environ)))
    if world.is_main:
        try:
            answer = _choose(config, os.environ, restarts)
        except ValueError as error:
            answer = str(error)
        except OSError as error:
            answer = f"--logs {config.run.logs}: the run's folder cannot be used ({error})"
    answer = broadcast_object(answer)
    if isinstance(answer, str):
        raise ValueError(answer)
    return answer


@contextmanager
def claim_folder(config: Config, world: World) -> Iterator[RunFolder]:
    """The folder of this run, the same on every rank, in which no other run starts while the body runs.

    All ranks enter together. ValueError (on every rank): as ``choose_folder``, or another run writes there now.
    Runs that write a cache may share a folder, as the jobs that share the work may have one name.
    """
    if config.cache.writes:
        yield choose_folder(config, world)
        return
    lock = None
    while lock is None:
        folder = choose_folder(config, world)
        try:
            lock = RunLock.take(folder.path)
        except Held as held:
            # Without --name, another run of this second was faster; there is a next free name.
            if config.run.name is not None or folder.restarted:
                raise ValueError(_in_use(folder.path, folder.name, held.holder)) from None
    with lock:
        yield folder


def create_folder(folder: RunFolder, config: Config, world: World) -> None:
    """Create the folder on rank 0 (``--log-local``: on every node), and write what is known at the start.

    All ranks call it together. ValueError on the rank that cannot write there, PeerFailed on the others; on all
    ranks, where nodes keep parts of a checkpoint and one does not see what rank 0 wrote.
    """
    with node_main_first():
        try:
            if world.is_main:
                _fill(folder, config)
            elif config.run.log_local and world.is_local_main:
                folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--logs {config.run.logs}: the run's folder cannot be written ({error})") from error
    if config.trains and config.loss.state_columns and world.world_size > world.local_world_size:
        _check_shared(folder, config, world)


def _check_shared(folder: RunFolder, config: Config, world: World) -> None:
    """ValueError on all ranks: a node does not see what rank 0 writes. It would be found at the first save."""

    def make() -> Path:
        mark = folder.path / f".shared-{uuid.uuid4().hex}"  # never looked up before, so that no cache denies it
        mark.touch()
        return mark

    mark = on_main(make)
    blind = None if not world.is_local_main or _appears(mark) else socket.gethostname()
    hosts = [host for host in gather_object(blind) if host is not None]
    if world.is_main:
        mark.unlink(missing_ok=True)
    if hosts:
        raise ValueError(
            f"--logs {config.run.logs}: what rank 0 has written there is not seen on {', '.join(hosts[:_SHOWN])}; "
            "every node writes its part of the sample state into a checkpoint: give a folder that all nodes share"
        )


def _appears(path: Path) -> bool:
    """Whether ``path`` can be seen, which may take a network's file system a while."""
    for _ in range(_LOOKS):
        if path.exists():
            return True
        time.sleep(_PAUSE)
    return False


def _fill(folder: RunFolder, config: Config) -> None:
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    folder.done.unlink(missing_ok=True)  # left by an earlier part of the run, and this one has not reached its end
    (folder.path / "params.txt").write_text(
        "".join(f"{name}: {value}\n" for name, value in sorted(config.recorded_flags.items())),
        encoding="utf-8",
        errors="backslashreplace",  # paths need not be text
    )
    _write_launch(folder, launch_identity(os.environ))
    if config.run.copy_codebase:
        copy_code(folder.path)


def default_name(config: Config, now: float) -> str:
    """Time, model, learning rate, batch size, workers and precision, as the published code names a run."""
    model = config.model.model
    model = Path(model).stem if model.endswith(".json") else model.replace("/", "-")
    stamp = time.strftime("%Y_%m_%d-%H_%M_%S", time.localtime(now))
    return (
        f"{stamp}-model_{model}-lr_{config.optim.lr}-b_{config.run.batch_size}"
        f"-j_{config.data.workers}-p_{config.run.precision}"
    )


def launch_identity(env: Mapping[str, str]) -> dict[str, str]:
    """What stays the same when a launcher restarts this job: launcher name -> identity.

    Slurm keeps job and step number across a requeue. torchrun keeps its run id across restarts; if it has none
    ("none", its default), its agent stays the same: host and process id.
    """
    identity = {}
    if "SLURM_JOB_ID" in env:
        identity["slurm"] = f"{env['SLURM_JOB_ID']}.{env.get('SLURM_STEP_ID', '')}"
    if _RUN_ID in env:
        run_id = env[_RUN_ID]
        identity["torchrun"] = run_id if run_id != "none" else f"{socket.gethostname()}:{os.getppid()}"
    return identity


def copy_code(folder: Path) -> Path:
    """Copy the ``src`` that is running into ``folder/code/src`` (``code_TIME`` beside an earlier copy)."""
    target = folder / "code"
    if target.exists():
        target = folder / time.strftime("code_%Y_%m_%d-%H_%M_%S")
    source = Path(__file__).resolve().parents[2]
    packages = ("training", "drrho_clip")  # by name, because the parent of installed packages is site-packages
    for package in packages:
        shutil.copytree(
            source / package,
            target / "src" / package,
            ignore=shutil.ignore_patterns("__pycache__", "*.pyc"),
            dirs_exist_ok=True,
        )
    return target


def _write_launch(folder: RunFolder, identity: Mapping[str, str]) -> None:
    """Write ``launch.json``. ``newest``: when the newest checkpoint that the job found there was saved."""
    file = folder.path / "launch.json"
    newest = _read_launch(file).get("newest", 0.0) if folder.restarted else newest_time(folder.checkpoints)
    with replacing(file) as writing:
        writing.write(json.dumps({**identity, "newest": newest}).encode() + b"\n")


def _read_launch(file: Path) -> dict[str, Any]:
    """The content of ``launch.json``; empty if it is missing or damaged."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def _choose(config: Config, env: Mapping[str, str], restarts: Mapping[str, str]) -> RunFolder:
    logs, name = Path(config.run.logs), config.run.name
    if name is None:
        earlier = _find_launched(logs, restarts)
        if earlier is not None:
            return RunFolder(earlier, earlier.name, restarted=True)
        if config.run.resume == "latest":
            raise ValueError(
                "--resume latest: give --name (the run's folder under --logs), or the file of a checkpoint"
            )
        name = _free_name(logs, default_name(config, time.time()))
    path = logs / name
    # A new torchrun agent, for a node that was lost, counts restarts from 0; --name shows that it is this run.
    same_job = {k: v for k, v in launch_identity(env).items() if k == "torchrun" and env[_RUN_ID] != "none"}
    if _launched_by(path, {**same_job, **restarts}) and (restarts or not (path / "job.done").exists()):
        return RunFolder(path, name, restarted=True)
    if _holds_run(path) and config.run.resume is None:
        if (holder := living_holder(path)) is not None:
            raise ValueError(_in_use(path, name, holder))
        raise ValueError(
            f"--name {name}: {path} already holds a run; resume it with --resume latest, "
            "give the new run another --name, or remove the folder"
        )
    return RunFolder(path, name)


def _in_use(path: Path, name: str, holder: Holder) -> str:
    return (
        f"--name {name}: another run writes into {path} ({holder}); give this run another --name, wait until that "
        "one has ended, or stop it"
    )


def _restarts(env: Mapping[str, str]) -> dict[str, int]:
    """How often each launcher has started this process before, by its own count."""
    return {launcher: int(env.get(counter) or 0) for launcher, counter in _COUNTERS.items()}


def _restarted_launchers(env: Mapping[str, str], counts: Sequence[Mapping[str, int]]) -> dict[str, str]:
    """The launchers that have started this job before, by any rank's count: each torchrun agent has its own."""
    return {k: v for k, v in launch_identity(env).items() if any(count[k] > 0 for count in counts)}


def _launched_by(path: Path, launchers: Mapping[str, str]) -> bool:
    """Whether one of ``launchers`` started the run in ``path``."""
    recorded = _read_launch(path / "launch.json") if launchers else {}
    return any(recorded.get(k) == v for k, v in launchers.items())


def _find_launched(logs: Path, launchers: Mapping[str, str]) -> Path | None:
    """The newest run under ``logs`` that one of ``launchers`` started."""
    if not launchers:
        return None
    files = sorted(logs.glob("*/launch.json"), key=lambda f: f.stat().st_mtime, reverse=True)
    return next((f.parent for f in files if _launched_by(f.parent, launchers)), None)


def _free_name(logs: Path, name: str) -> str:
    """``name``, with a number if a run of the same second has it."""
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    return next(free for free in names if not (logs / free).exists())


def _holds_run(path: Path) -> bool:
    """Whether there is something to lose. What a failed start leaves behind is not protected."""
    checkpoints = path / "checkpoints"
    return (path / "job.done").exists() or any(checkpoints.glob("*.pt"))
