"""What a run's folder holds, read for a report: log, flags, TensorBoard's events, evaluations, the largest u.

Each part is read as far as it is there. A run that goes on may be read at any time.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from drrho_clip.losses import registry
from drrho_clip.losses.registry import LOG_U, TAU, LossSpec
from training.config.flags import ALL
from training.config.given import frozen
from training.config.objective import fastclip_loss
from training.config.optim import optimizer_defaults
from training.predictions import FOLDER, Kept, load
from training.run_report import log_file
from training.run_report.log_file import LogLines

_STATE, _MFU = "sample_state/", "train/mfu"


@dataclass(frozen=True)
class Histogram:
    """How the values of a column were spread after ``epoch`` epochs: ``edges`` [n + 1], ``counts`` [n]."""

    epoch: int
    edges: list[float]
    counts: list[float]

    def quantile(self, share: float) -> float:
        """The value below which ``share`` of all lie, linear inside a bin."""
        left = share * sum(self.counts)
        for i, count in enumerate(self.counts):
            if left <= count and count:
                return self.edges[i] + (self.edges[i + 1] - self.edges[i]) * left / count
            left -= count
        return self.edges[-1]


@dataclass
class History:
    """One run. ``name``: of its folder. ``flags``: ``params.txt``. ``problems``: what could not be read.

    ``mfu``: step -> share, from TensorBoard. ``histograms``: column -> one for each epoch.
    ``evaluations``: lines of ``eval_results.jsonl`` by progress, of each part of the run those written last.
    ``tasks``: lines of the newest file in ``eval_results/``, which is called ``tasks_file``. ``kept``: key of a
    set -> what its newest evaluation has kept, and ``kept_at``: of which checkpoint that was.
    """

    folder: Path
    name: str
    flags: dict[str, str] = field(default_factory=dict)
    log: LogLines = field(default_factory=LogLines)
    mfu: dict[int, float] = field(default_factory=dict)
    histograms: dict[str, list[Histogram]] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    tasks_file: str = ""
    kept: dict[str, Kept] = field(default_factory=dict)
    kept_at: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether the run reached its end."""
        return (self.folder / "job.done").exists()

    def place(self, line: Mapping[str, Any]) -> float:
        """After how many epochs ``line`` of ``evaluations`` was measured, a fraction inside an epoch."""
        epoch, step, steps = float(line["epoch"]), line.get("step"), self.log.steps_per_epoch
        # A launch with another batch size has taken steps of another size, so that they say less than the epoch.
        if steps and is_number(step) and epoch <= step / steps < epoch + 1:
            return step / steps
        return epoch

    @property
    def chosen(self) -> dict[str, str]:
        """The flags whose values are not their defaults."""
        filled = _filled(self.flags)
        return {
            key: value
            for key, value in self.flags.items()
            if key not in ALL or value not in (str(frozen(ALL[key].default)), filled.get(key))
        }

    @property
    def loss(self) -> LossSpec | None:
        """The registry's entry of ``--loss`` or ``--fastclip``; None: neither was given, or it is not there."""
        name = self.flags.get("loss", "None")
        if name == "None" and self.flags.get("fastclip") == "True":
            name = fastclip_loss(self.flags.get("temperature_scheme", ""))
        return registry.get(name) if name in registry.names() else None

    @property
    def temperatures(self) -> tuple[list[float], list[float]]:
        """Epochs and τ: the mean of a batch where each sample has its own, else the model's; empty: none."""
        own = self.log.series("mean_tau")
        if own[0]:
            return own
        if self.log.no_temperature or (self.loss is not None and self.loss.temperature != "model"):
            return [], []  # the model's is in the log all the same, and the loss does not use it
        found = [(x, 1 / scale) for x, scale in zip(*self.log.series("scale")) if scale > 0]
        return [x for x, _ in found], [tau for _, tau in found]


def read_run(folder: Path) -> History:
    """Read ``folder``. ValueError: it is none of a run."""
    if not folder.is_dir():
        what = "is a file: give the run's folder" if folder.exists() else "does not exist"
        raise ValueError(f"RUN_DIR {folder}: {what}")
    logs = [folder / "out.log", *sorted(folder.glob("out-*.log"))]
    log = next((path for path in logs if path.is_file()), None)
    if log is None and not (folder / "params.txt").is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/out.log"))
        cure = f"give one of the runs in it: {', '.join(inside[:5])}" if inside else "give LOGS/NAME"
        raise ValueError(
            f"RUN_DIR {folder}: there is neither out.log nor params.txt, so it is not a run's; {cure}"
        )
    run = History(folder, folder.resolve().name)
    if log is None:
        run.problems.append("there is no out.log")
    else:
        with log.open(encoding="utf-8", errors="replace") as lines:
            run.log = log_file.read(lines)
    run.flags = _flags(folder / "params.txt")
    if not run.flags:
        run.problems.append("there is no params.txt, so flags are not known")
    _read_events(run)
    measured: dict[tuple[float, float], dict[str, Any]] = {}
    for line in _json_lines(folder / "eval_results.jsonl"):
        if is_number(line.get("epoch")):
            at = _progress(line)
            # Training that went back measures again what follows. Without any, checkpoints come in any order.
            later = {other for other in measured if other >= at} if run.log.points else {at}
            measured = {other: old for other, old in measured.items() if other not in later} | {at: line}
    run.evaluations = [measured[at] for at in sorted(measured)]
    _read_tasks(run)
    _read_kept(run)
    return run


def signature(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Changes when something in ``folder`` does that a report shows."""
    found = []
    for pattern in ("*", "tensorboard/*", "eval_results/*", f"eval_results/{FOLDER}/*/*", "checkpoints/*.pt"):
        for path in folder.glob(pattern):
            with suppress(OSError):
                if path.is_file() and path.suffix not in (".html", ".lock"):
                    status = path.stat()
                    found.append((str(path), status.st_size, status.st_mtime_ns))
    return tuple(sorted(found))


def _flags(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(": ") for line in text.split("\n") if ": " in line)
    flags = {name: value for name, _, value in pairs}
    for name, value in _filled(flags).items():
        if flags.get(name) in ("None", "-1.0"):  # as version 0.1 wrote what was left out
            flags[name] = value
    return flags


def _filled(flags: Mapping[str, str]) -> dict[str, str]:
    """The values of the optimizer's flags that are left out."""
    found = {
        name: str(value) for name, value in optimizer_defaults(flags.get("model", ALL["model"].default)).items()
    }
    lr = flags.get("lr", "None")
    return {**found, "lr_tau": found["lr"] if lr == "None" else lr}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a line that was cut off is ignored."""
    found = []
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    found.append(value)
    return found


def _progress(line: Mapping[str, Any]) -> tuple[float, float]:
    """Complete epochs and steps; lines of other programs have no steps."""
    step = line.get("step")
    return line["epoch"], step if is_number(step) else 0


def _read_tasks(run: History) -> None:
    files = sorted((run.folder / "eval_results").glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
    if files:
        run.tasks, run.tasks_file = [t for t in _json_lines(files[-1]) if "metrics" in t], files[-1].name


def _read_kept(run: History) -> None:
    """Of each set the file that was written last."""
    files = sorted((run.folder / "eval_results" / FOLDER).glob("*/*.npz"), key=lambda path: path.stat().st_mtime)
    newest = {file.name: file for file in files}
    for _, file in sorted(newest.items()):
        try:
            kept = load(file)
        except ValueError as error:
            run.problems.append(str(error))
        else:
            run.kept[kept.key], run.kept_at[kept.key] = kept, file.parent.name


def _read_events(run: History) -> None:
    folder = run.folder / "tensorboard"
    if not folder.is_dir():
        return
    # It warns of steps that were taken again, which the report tells in its own way.
    told = logging.getLogger("tensorboard")
    level = told.level
    told.setLevel(logging.ERROR)
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder), {"scalars": 0, "histograms": 0}).Reload()
        tags: Mapping[str, Any] = events.Tags()
        if _MFU in tags["scalars"]:  # the log has the others
            run.mfu = {event.step: event.value for event in events.Scalars(_MFU)}
        for column in LOG_U + TAU:  # no others: what is in a folder of somebody else names no file and no element
            tag = f"{_STATE}{column}"
            if tag in tags["histograms"]:
                by_epoch = {event.step: event.histogram_value for event in events.Histograms(tag)}
                found = [_histogram(epoch, by_epoch[epoch]) for epoch in sorted(by_epoch)]
                run.histograms[column] = [each for each in found if each is not None]
    except Exception as error:  # a file that is being written, or of another program, fails in any way
        run.problems.append(f"TensorBoard's events cannot be read ({' '.join(str(error).split())[:200]})")
    finally:
        told.setLevel(level)


def _histogram(epoch: int, value: Any) -> Histogram | None:
    """From TensorBoard's upper ends of bins; the first bin begins at the least value."""
    edges, counts = list(value.bucket_limit), list(value.bucket)
    if not counts or not sum(counts):
        return None
    if counts[0] == 0 and len(counts) > 1:
        return Histogram(epoch, edges, counts[1:])
    return Histogram(epoch, [min(value.min, edges[0]), *edges], counts)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a JSON file is one that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def finite(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    """The points whose values are finite."""
    kept = [(x, y) for x, y in zip(xs, ys) if math.isfinite(y)]
    return [x for x, _ in kept], [y for _, y in kept]
