"""The results of one checkpoint: a line per task in a file that the benchmark's own scripts read, and a table.

A line is ``{"key", "dataset", "metrics": {..., "main_metric"}, "num_samples", "digest"}``. Lines of other weights,
or of another program, which say nothing of theirs, are moved to a file beside it: the scripts take every line of a
file as one of the same model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from training.evaluation.benchmark.classification import Measured
from training.evaluation.benchmark.sets import FoundSet
from training.evaluation.benchmark.tasks import GROUPS, TASKS, WITH_MAIN_METRIC
from training.files import replacing
from training.predictions import keep


@dataclass(frozen=True)
class Results:
    """The lines of one model in the file ``path``, by key. ``predictions``: the folder for these; None: none."""

    path: Path
    digest: str
    lines: dict[str, dict[str, Any]]
    predictions: Path | None = None

    def keep(self, one: FoundSet, found: Measured) -> None:
        """Append the line of a set, so that it is on disk when this returns, and keep its predictions."""
        main_metric = one.task.metric if one.task else None
        held = {name: _plain(value) for name, value in found.metrics.items()}
        line = {
            "key": one.key,
            "dataset": one.name,
            "metrics": {**held, "main_metric": held.get(main_metric) if main_metric else None},
            "num_samples": found.samples,
            **({} if found.captions is None else {"num_captions": found.captions}),
            "digest": self.digest,
        }
        if self.predictions is not None and found.kept is not None:
            keep(self.predictions, found.kept)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines[one.key] = line


def open_results(path: Path, digest: str, predictions: Path | None = None) -> tuple[Results, str]:
    """The results in ``path``, which need not exist, and a remark, or nothing. ``predictions``: as in ``Results``.

    ValueError: the file or its folder cannot be read or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = path.read_bytes().splitlines() if path.exists() else []
        own: dict[str, tuple[bytes, dict[str, Any]]] = {}
        others: list[bytes] = []
        for text in filter(bytes.strip, held):
            line = _line(text)
            if line is not None and line.get("digest") == digest:
                own[line["key"]] = (text, line)
            else:
                others.append(text)
        remark = ""
        if others:
            aside = path.with_name(f"{path.stem}.others{path.suffix}")
            with aside.open("ab") as file:
                file.writelines(text + b"\n" for text in others)
            lines = "1 line is" if len(others) == 1 else f"{len(others)} lines are"
            remark = f"{path.name}: {lines} of other weights or of another program, and in {aside.name} now"
        kept = b"".join(text + b"\n" for text, _ in own.values())
        if not path.exists() or path.read_bytes() != kept:
            with replacing(path) as file:
                file.write(kept)
    except OSError as error:
        raise ValueError(f"--out {path}: it cannot be written ({error.strerror}); give another file") from error
    return Results(path, digest, {key: line for key, (_, line) in own.items()}, predictions), remark


def digest_of(model: nn.Module, *settings: object) -> str:
    """BLAKE2b of a model's layers, of its weights, and of ``settings`` that change what it computes."""
    found = hashlib.blake2b("\n".join(map(str, (model, *settings))).encode(), digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def averages(lines: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, int, int]]:
    """Group, and ``Average`` -> (mean main metric, tasks that are there, tasks that it has)."""
    found = {}
    for name in (*GROUPS, "Average"):
        tasks = [task for task in WITH_MAIN_METRIC if name in ("Average", task.group)]
        values = [lines[task.key]["metrics"]["main_metric"] for task in tasks if task.key in lines]
        values = [value for value in values if value is not None]
        if values:
            found[name] = (float(np.mean(values)), len(values), len(tasks))
    return found


def table(lines: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as text: a line per task, the groups, and the average; of the 38 only where all are there."""
    rows = [("task", "metric", "value")]
    for task in TASKS:
        if task.key in lines:
            value = lines[task.key]["metrics"]["main_metric"]
            rows.append((task.name, task.metric or "no main metric", _shown(value)))
    for key, line in lines.items():
        if key not in _KEYS:
            name, value = headline(key, line["metrics"])
            rows.append((line["dataset"], f"{name} (not of the benchmark)", _shown(value)))
    rows.append(("", "", ""))
    for name, (value, there, all_of_them) in averages(lines).items():
        if name != "Average":
            of = f"of {there}" if there == all_of_them else f"of {there} of {all_of_them}: incomplete"
            rows.append((name, of, _shown(value)))
        elif there == all_of_them:
            rows.append((f"Average of the {there}", f"of {there}", _shown(value)))
        else:
            rows.append(("Average of what was there", f"of {there} of {all_of_them}: incomplete", _shown(value)))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>6}".rstrip() for a, b, c in rows)


def headline(key: str, metrics: Mapping[str, Any]) -> tuple[str, float | None]:
    """Name and value of the metric that stands for a set: the main one, or where it has none, another."""
    main = next((task.metric for task in TASKS if task.key == key), None)
    for name in (main or "", "mean_recall@1", "mean_average_precision", "acc_gender_wg", "acc1"):
        if name in metrics:
            return name, metrics[name]
    return next(iter(metrics.items()))


_KEYS = {task.key for task in TASKS}


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _plain(value: Any) -> Any:
    """NaN and infinity, which JSON does not know, as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(text: bytes) -> dict[str, Any] | None:
    """A line of results; None: it is none, or only a part of one."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    complete = isinstance(line, dict) and "key" in line and isinstance(line.get("metrics"), dict)
    return line if complete and "main_metric" in line["metrics"] else None
