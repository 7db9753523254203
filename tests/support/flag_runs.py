"""What a command does to a run as a whole: what it reports and leaves, and how its ranks meet.

An observation takes the lab and the words of a command and returns plain values.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.support.lab import WORLD, Lab, Run
from training import logger
from training.checkpoint import published, run_folder
from training.checkpoint.remote_sync import remote_sync
from training.config.params import parse
from training.distributed import process_group
from training.distributed.process_group import World
from training.loop.checkpointer import Checkpointer
from training.main import main

# -------------------------------------------------------------------------------------------- runs


def observe_run(look: Callable[[Run], Any]) -> Callable[[Lab, list[str]], Any]:
    """What ``look`` finds after a whole run."""

    def observe(lab: Lab, words: list[str]) -> Any:
        run = lab.run(words)
        assert run.code == 0
        return look(run)

    return observe


def exit_code(lab: Lab, words: list[str]) -> int:
    return lab.run(words).code


def losses(run: Run) -> dict[str, list[float]]:
    return {name: run.logged(name) for name in ("Contrastive_loss", "Distill_loss", "Loss")}


def weights(run: Run) -> list[float]:
    return [value.double().sum().item() for value in run.saved["state_dict"].values()]


def files(run: Run) -> list[str]:
    return run.files


def evaluations(run: Run) -> list[str]:
    file = run.folder / "eval_results.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def epochs_evaluated(run: Run) -> list[int]:
    return [json.loads(line)["epoch"] for line in evaluations(run)]


def files_or_refusal(lab: Lab, words: list[str]) -> list[str] | str:
    """What a run leaves, or that it is refused."""
    run = lab.run(words)
    return run.files if run.code == 0 else "refused"


def written(lab: Lab, words: list[str]) -> Path:
    """The empty folder to which a run has written features."""
    number = next(lab.numbers)
    folder = lab.root / f"cache{number}"
    assert main([*words, "--cached_ref_features_dir", str(folder), "--name", f"caching{number}"]) == 0
    return folder


def kept_features(run: Run) -> list[str]:
    """What the log says of features that stay in memory."""
    return re.findall(r"\d of the reference's features are in memory|stay in the memory of each node", run.log)


def cached_rows(lab: Lab, words: list[str]) -> list[int]:
    """The rows that a run writes."""
    files = sorted(written(lab, words).glob("parts/*.rows.npy"))
    return [int(row) for file in files for row in np.load(file)[:, 0]]


def cached_bytes(lab: Lab, words: list[str]) -> list[int]:
    """The sizes of the files of a run's features."""
    return [file.stat().st_size for file in sorted(written(lab, words).glob("parts/*.npy"))]


def compilations(lab: Lab, words: list[str]) -> list[str]:
    """What a run gives to torch.compile."""
    seen = []

    def compile(part: Any, **settings: Any) -> Any:
        seen.append(type(part).__name__)
        return part

    with mock.patch("torch.compile", compile):
        lab.runs.pop(tuple(words), None)
        lab.run(words)
    return seen


# -------------------------------------------------------------------------------------------- the run


def opened(words: list[str], world: World = WORLD) -> tuple[list[str], int, dict[str, Any]]:
    """The files that a run starts with, its log level, and what W&B is told."""
    told: dict[str, Any] = {}
    wandb, own = types.ModuleType("wandb"), types.SimpleNamespace(mode="offline")
    run = mock.MagicMock(settings=own, dir="wandb/offline-run/files")
    wandb.Settings, wandb.setup = dict, lambda: types.SimpleNamespace(settings=own)
    wandb.init = lambda *, notes, project, **_: told.update(notes=notes, project=project) or run
    config = parse(words)
    place = run_folder.choose_folder(config, WORLD)
    with mock.patch.dict(sys.modules, wandb=wandb), logger.open_run(config, world, place):
        level = logging.getLogger().level
    names = sorted(str(file.relative_to(place.path)) for file in place.path.rglob("*") if file.suffix != ".pyc")
    return [re.sub(r"/events.*", "/events", name) for name in names], level, told


def observe_opened(look: Callable[..., Any], world: World = WORLD) -> Callable[[Lab, list[str]], Any]:
    """What ``look(files, level, wandb)`` finds once the run's folder is open."""

    def observe(lab: Lab, words: list[str]) -> Any:
        return look(*opened([*words, "--name", f"opened{next(lab.numbers)}"], world))

    return observe


def repeatable(lab: Lab, words: list[str]) -> bool:
    """Whether a run asks torch for kernels that always give the same bits."""
    try:
        assert Lab.run(replace(lab, runs={}), words).code == 0
        return torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def place(lab: Lab, words: list[str]) -> str:
    return str(run_folder.choose_folder(parse(words), WORLD).path)


def copied(lab: Lab, words: list[str]) -> list[str]:
    """What a run leaves at the place that it is copied to, whatever the run's name."""
    shutil.rmtree(lab.elsewhere, ignore_errors=True)
    lab.runs.pop(tuple(words), None)
    assert lab.run(words).code == 0
    files = (file.relative_to(lab.elsewhere) for file in Path(lab.elsewhere).rglob("*.pt"))
    return [str(Path(*file.parts[1:])) for file in files]


def requeues(lab: Lab, words: list[str]) -> int:
    """How often a run that a signal stops asks Slurm to queue its job again."""
    after_step = Checkpointer.after_step

    def signalled(self: Checkpointer) -> bool:
        os.kill(os.getpid(), signal.SIGUSR1)
        return after_step(self)

    with (
        mock.patch.object(Checkpointer, "after_step", signalled),
        mock.patch("training.run.requeue") as requeue,
    ):
        assert Lab.run(replace(lab, runs={}), words).code == 0
    return requeue.call_count


def ends_for_a_hang(lab: Lab, words: list[str]) -> list[int]:
    """The exit codes with which a run would be ended, one of whose steps takes long."""
    codes: list[int] = []
    after_step = Checkpointer.after_step

    def slow(self: Checkpointer) -> bool:
        time.sleep(0.5 if self._trainer.step == 2 else 0)
        return after_step(self)

    with (
        mock.patch.object(Checkpointer, "after_step", slow),
        mock.patch("training.distributed.failures.end", codes.append),
    ):
        assert Lab.run(replace(lab, runs={}), words).code == 0
    return codes


def waits(lab: Lab, words: list[str]) -> list[float]:
    """How long the copying thread waits between copies."""
    waited: list[float] = []

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.append(timeout)
            return super().wait(timeout)

    run = parse(words).run
    with mock.patch("training.checkpoint.remote_sync.threading.Event", Event), remote_sync(run, lab.root / "none"):
        pass
    return [seconds for seconds in waited if seconds is not None]  # starting a thread waits without a limit


def addresses(lab: Lab, words: list[str]) -> list[str]:
    """Where the run's folder is copied to."""
    told: list[str] = []

    def recorded(source: Path, target: str) -> mock.Mock:
        told.append(target)
        return mock.Mock(return_value=0)

    with (
        mock.patch("training.checkpoint.remote_sync.RemoteSync", recorded),
        remote_sync(parse(words).run, Path("run")),
    ):
        pass
    return told


def published_rows(lab: Lab, words: list[str]) -> list[float]:
    """What is read from a published checkpoint that does not say how it stores u."""
    held = {"u_im": torch.tensor([[0.5], [2.0]]), "u_tt": torch.tensor([[0.5], [2.0]])}
    return published.from_published(held, parse(words).run.u_format)["log_u_image"].tolist()


# -------------------------------------------------------------------------------------------- ranks


def group(lab: Lab, words: list[str], gpus: int = 0, **environment: str) -> tuple[dict[str, Any], str]:
    """Where rank 1 of 2 looks for the others, what the process group is told, and the rank's device."""
    told: dict[str, Any] = {}
    environment = {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"} | environment

    def init(backend: str, **settings: Any) -> None:
        told.update(settings, backend=backend)

    def meet(url: str, port: str, place: Any) -> None:
        told.update(url=url, port=port, ranks=place.world_size)

    with contextlib.ExitStack() as stack:
        patch = lambda name, value: stack.enter_context(mock.patch(name, value))  # noqa: E731
        stack.enter_context(mock.patch.dict("os.environ", environment, clear=True))
        patch("torch.distributed.init_process_group", init)
        patch("training.distributed.rendezvous.meet", meet)
        patch("training.distributed.devices.agree", lambda *_: None)
        patch("torch.cuda.is_available", lambda: gpus > 0)
        patch("torch.cuda.device_count", lambda: gpus)
        patch("torch.cuda.set_device", lambda device: None)
        world = process_group.start(parse(words).distributed)
    told.pop("timeout", None)
    return told, str(world.device)


def group_of_two(lab: Lab, words: list[str]) -> tuple[dict[str, Any], str]:
    return group(lab, words, WORLD_SIZE="2")


def group_on_gpus(lab: Lab, words: list[str]) -> tuple[dict[str, Any], str]:
    return group(lab, words, gpus=2, WORLD_SIZE="2")
