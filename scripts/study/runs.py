"""One cell is one run of ``training.main``, a process of its own; here are its flags, its start and its row."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import socket
import subprocess
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

from study import sets
from study.cells import Cell, Reference
from study.methods import METHODS
from study.program import Program
from study.tuning import shown

ROOT = Path(__file__).resolve().parents[2]
# What all runs share, on any device: rows of a CPU and of a GPU are compared (whose towers multiply in TF32). The
# reference's stored features are of the whole picture, the target sees a crop of it.
COMMON = (
    "--precision fp32 --wd 0.1 --beta2 0.98 --channels_last --zeroshot-frequency 1000000 --save-frequency 0 "
    "--save_every_minutes 10"
)
# The order of samples follows from the lanes: it is the same with one process and with the loaders of a GPU.
LANES, GPU_WORKERS = 4, 4
LOGGING = "--log-every-n-steps 100 --resume latest"
WARMUP = 10  # a tenth of the steps


class RunFailed(Exception):
    """A run ended with an error. The message names its log."""


@dataclass(frozen=True)
class Studio:
    """Where a study reads and writes, and how its runs compute.

    ``data``: the folder of ``scripts/icons.py``. ``out``: runs, features and logs. ``gpus``: 0 for the CPU.
    """

    data: Path
    out: Path
    threads: int = 1
    gpus: int = 0
    running: set[Program] = field(default_factory=set, compare=False)
    stopping: threading.Event = field(default_factory=threading.Event, compare=False)
    making: threading.Lock = field(default_factory=threading.Lock, compare=False)

    # What is where

    def folder(self, run: str) -> Path:
        return self.out / "runs" / run

    def features(self, reference: Reference, data: str, store: str = "") -> Path:
        """The reference's features of a training set, as the flags ``store`` keep them."""
        form = f"_{store.split()[-1]}" if store else ""
        return self.out / "features" / f"{reference.name}_{data}{form}"

    def checkpoint(self, reference: Reference) -> Path:
        return self.out / "references" / f"{reference.name}.pt"

    def training_set(self, name: str) -> sets.TrainingSet:
        return sets.find(self.data, name)

    def make_set(self, name: str) -> None:
        """Write the training set ``name`` where it is derived from another one and not there yet."""
        with self.making:
            sets.make(self.data, name)

    @property
    def workers(self) -> int:
        """Loader processes of a run. On a CPU they would only take turns with the model."""
        return GPU_WORKERS if self.gpus else 0

    def model(self, cell: Cell) -> Path:
        """The model's config file; a method with entries of its own gets a copy with these."""
        base, own = ROOT / "assets" / "models" / f"study-{cell.model}.json", METHODS[cell.method].model
        if not own:
            return base
        # open_clip would give a model with siglip in its name another tokenizer.
        path = self.out / "models" / f"study-{cell.model}-{cell.method.replace('siglip', 'sigmoid')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(json.loads(base.read_text()) | dict(own), indent=2))
        return path

    # Runs

    def epochs(self, cell: Cell) -> float:
        """How often a run reads its data."""
        read = cell.samples * METHODS[cell.method].super_batch
        return read / self.training_set(cell.data).samples

    def flags(self, cell: Cell, settings: dict[str, str], run: str) -> list[str]:
        """The flags of a cell's run, whose name is ``run``."""
        method, data = METHODS[cell.method], self.training_set(cell.data)
        steps, epochs = cell.samples // cell.batch, math.ceil(self.epochs(cell))
        given = [
            *("--train-data", data.pattern, "--train-num-samples", str(data.samples)),
            *("--data_size", data.data_size, "--lanes", f"{method.ranks},{LANES}", "--workers", str(self.workers)),
            *("--batch-size", str(cell.batch * method.super_batch // method.ranks)),
            *("--model", str(self.model(cell))),
            *("--iters", str(steps), "--epochs", str(epochs), "--warmup", str(steps // WARMUP)),
            *("--seed", str(cell.seed)),
            *COMMON.split(),
            *LOGGING.split(),
            *method.flags,
        ]
        for flag, value in settings.items():
            given += [flag, str(gamma_advice(epochs)) if value == "advice" else value]
        if "--gamma" in settings:
            given += ["--gamma_decay_epochs", str(epochs)]
        if cell.reference is not None:
            given += ["--cached_ref_features_dir", str(self.features(cell.reference, cell.data, method.store))]
        given += ["--eval_data_dir", str(self.data), "--eval_tasks", sets.TASKS]
        return [*given, "--logs", str(self.out / "runs"), "--name", run]

    def train(
        self, kind: str, cell: Cell, settings: dict[str, str], slot: int, more: tuple[str, ...] = ()
    ) -> dict:
        """Run a cell to its end, or the rest of an interrupted run; returns its row. Its checkpoints are left."""
        text = shown(settings)
        run = cell.id(text)
        self.make_set(cell.data)
        flags = [*self.flags(cell, settings, run), *more]
        resumed = self._begun(run, flags)
        used = self.start("training.main", flags, run, slot, METHODS[cell.method].ranks)
        steps = cell.samples // cell.batch
        return {
            **self.row(run, kind, cell, text, used, flags),
            **measured(self.folder(run) / "eval_results"),
            **dict.fromkeys(("b_first", "b_loss_spread"), ""),
            "steps": steps,
            "samples_read": steps * cell.batch * METHODS[cell.method].super_batch,
            "epochs": round(self.epochs(cell), 3),
            "resumed": int(resumed),
        }

    def _begun(self, run: str, flags: list[str]) -> bool:
        """Whether there is a run to go on with. One that was begun with other flags is removed."""
        noted = self.out / "runs" / f"{run}.flags"
        if noted.exists() and noted.read_text() == shlex.join(flags):
            return (self.folder(run) / "checkpoints").exists()
        shutil.rmtree(self.folder(run), ignore_errors=True)
        noted.parent.mkdir(parents=True, exist_ok=True)
        noted.write_text(shlex.join(flags))
        return False

    def known(self, reference: Reference, slot: int) -> dict[str, float]:
        """What ``training.check_reference`` says of a reference on the set b, both directions averaged."""
        name, data = f"check_{reference.name}", self.training_set("b")
        out = self.out / "references" / f"{reference.name}.check.json"
        flags = ["--ref_model_checkpoint", str(self.checkpoint(reference)), "--train-data", data.pattern]
        flags += ["--samples", str(min(4096, data.samples)), "--workers", str(self.workers), "--out", str(out)]
        self.start("training.check_reference", flags, name, slot)
        both = json.loads(out.read_text())["directions"].values()
        shares = [100 * one["first"].get("256", list(one["first"].values())[-1]) for one in both]
        spreads = [one["loss_spread"] for one in both]
        return {"b_first": round(sum(shares) / 2, 3), "b_loss_spread": round(sum(spreads) / 2, 4)}

    def row(self, run: str, kind: str, cell: Cell, settings: str, used: Used, flags: list[str]) -> dict:
        """What is known of a run beside what it measured."""
        shared = {str(self.data): "DATA", str(self.out): "OUT", str(ROOT): "."}
        told = shlex.join(flags)
        for path, name in shared.items():
            told = told.replace(path, name)
        return {
            "id": run,
            "kind": kind,
            "method": cell.method,
            "data": cell.data,
            "samples": cell.samples,
            "batch": cell.batch,
            "seed": cell.seed,
            "model": cell.model,
            "reference": cell.reference_name,
            "settings": settings,
            "seconds": round(used.seconds, 1),
            "cpu_seconds": round(used.cpu_seconds, 1),
            "device": self.device,
            "torch": torch_version(),
            "revision": revision(),
            "flags": told,
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }

    def start(self, module: str, flags: list[str], name: str, slot: int, ranks: int = 1) -> Used:
        """Run a program of the trainer, in ``ranks`` processes; its output goes to ``logs/NAME.txt``.

        RunFailed: it did not end well.
        """
        log = self.out / "logs" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        if self.stopping.is_set():
            raise RunFailed("stopped")
        began = time.monotonic()
        children = [Program(module, flags, log, one) for one in self._environments(slot, ranks)]
        self.running.update(children)
        if self.stopping.is_set():  # it came while they were being started
            for child in children:
                child.stop()
        try:
            ended = [child.wait() for child in children]
        finally:
            self.running.difference_update(children)
        code, cpu_seconds = max(code for code, _ in ended), sum(seconds for _, seconds in ended)
        if code or (module == "training.main" and not (self.folder(name) / "job.done").exists()):
            raise RunFailed(f"{name}: python -m {module} ended early, with code {code}; its output is in {log}")
        return Used(time.monotonic() - began, cpu_seconds)

    def _environments(self, slot: int, ranks: int) -> list[dict[str, str]]:
        """The variables of each rank of a run. RunFailed: there are too few GPUs for it."""
        if self.gpus and ranks > self.gpus:
            raise RunFailed(f"a run of {ranks} ranks needs as many GPUs, and there are {self.gpus}")
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        mine = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self.gpus)))).split(",")
        found = []
        for rank in range(ranks):
            one = {"CUDA_VISIBLE_DEVICES": mine[(slot * ranks + rank) % self.gpus]} if self.gpus else {}
            found.append(one | (group | {"RANK": str(rank), "LOCAL_RANK": "0"} if ranks > 1 else {}))
        return found

    def stop(self) -> None:
        """Ask the running processes to save and to end; nothing is started after."""
        self.stopping.set()
        for child in list(self.running):
            child.stop()

    def discard_checkpoints(self, run: str) -> None:
        shutil.rmtree(self.folder(run) / "checkpoints", ignore_errors=True)

    @cached_property
    def device(self) -> str:
        if self.gpus:
            import torch

            return torch.cuda.get_device_name(0)
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return f"{names[0].partition(':')[2].strip() if names else 'CPU'}, {self.threads} threads"


@dataclass(frozen=True)
class Used:
    """Wall time of a process, and processor time of it and of those that it waited for."""

    seconds: float
    cpu_seconds: float


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def gamma_advice(epochs: int) -> float:
    """The authors' advice for a run of so many epochs: min(1, 4.177 E^-0.7265)."""
    return round(min(1.0, 4.177 * epochs**-0.7265), 4)


def measured(folder: Path) -> dict[str, float]:
    """The test and validation columns, in percent, of the newest evaluation in a run's ``eval_results``."""
    newest = max(folder.glob("*_eval_results.jsonl"), key=lambda path: path.stat().st_mtime)
    return measures_of(newest)


def measures_of(path: Path) -> dict[str, float]:
    """The test and validation columns, in percent, of a file that ``training.evaluate`` writes."""
    found = {one["key"]: one["metrics"] for one in map(json.loads, path.read_text().splitlines())}
    values = {}
    for part, (zero_shot, retrieval) in sets.EVALUATED.items():
        values[f"{part}_top1"] = found[zero_shot]["acc1"]
        values[f"{part}_top5"] = found[zero_shot]["acc5"]
        values[f"{part}_recall1"] = found[retrieval]["mean_recall@1"]
    return {name: round(100 * value, 4) for name, value in values.items()}


def revision() -> str:
    """The commit of this checkout, with a + where files differ from it; '' outside of git."""
    run = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"],
        capture_output=True,
        text=True,
    )
    return run.stdout.strip()


def torch_version() -> str:
    from importlib.metadata import version

    return version("torch")
