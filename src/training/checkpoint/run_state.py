"""The complete state of a run, and how it is stored in a checkpoint and restored from it.

Weights, optimizer, scaler and counters are the same on all ranks and go into the checkpoint's file; the sample
state is sharded and goes beside it (``sample_state_io``). Random numbers need not be saved: each step seeds its
own from (seed, step, rank), and the stream of samples from its position.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from drrho_clip.sample_state import SampleState
from training.checkpoint import pt_file

_log = logging.getLogger(__name__)

FORMAT = 2


@dataclass
class RunState:
    """The complete state of a run.

    ``model``         the bare model, without DDP around it.
    ``optimizer``     None where nothing is trained (``--epochs 0``).
    ``scaler``        of fp16, else None. ``sample_state``: None where the loss keeps none.
    ``epoch``         completed epochs.
    ``epoch_step``    steps taken of the epoch after those; 0 at an epoch's boundary.
    ``step``          optimizer steps in all. ``samples_seen``: samples of all ranks in these steps.
    ``stream``        the position in the training data and what determines its order: plain values of all ranks
                      (``data.loader.TrainData.state_dict``).
    ``meters``        sums of the epoch's log lines (``loop.metrics.hold``). ``skipped``: the count of steps left
                      out.
    ``best``          metric -> [best value, after which epoch].
    ``flags``         the value of every flag, as text. ``data_sizes``: rows per source.
    """

    name: str
    model: nn.Module
    optimizer: Optimizer | None = None
    scaler: GradScaler | None = None
    sample_state: SampleState | None = None
    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    samples_seen: int = 0
    stream: Mapping[str, Any] | None = None
    meters: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, Any] = field(default_factory=dict)
    best: Mapping[str, Sequence[float]] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    data_sizes: tuple[int, ...] = ()

    @property
    def stem(self) -> str:
        """The name of a checkpoint of this state, without suffix: after its epoch, or its step inside an epoch."""
        return f"epoch_{self.epoch}" if self.epoch_step == 0 else f"step_{self.step}"

    def held(self) -> dict[str, Any]:
        """What the file of a checkpoint holds of this state, in the published format; tensors are not copied."""
        held = {
            "format": FORMAT,
            "name": self.name,
            "epoch": self.epoch,
            "epoch_step": self.epoch_step,
            "step": self.step,
            "samples_seen": self.samples_seen,
            "meters": dict(self.meters),
            "skipped": dict(self.skipped),
            "best": dict(self.best),
            "flags": dict(self.flags),
            "data_sizes": list(self.data_sizes),
            "state_dict": pt_file.plain_names(self.model.state_dict()),
        }
        if self.optimizer is not None:
            held["optimizer"] = self.optimizer.state_dict()
            held["optimizer_class"] = type(self.optimizer).__name__
        if self.scaler is not None:
            held["scaler"] = self.scaler.state_dict()
        if self.stream is not None:
            held["stream"] = self.stream
        return held

    def fill(self, held: Mapping[str, Any], path: Path, *, steps_per_epoch: int, global_batch: int) -> bool:
        """Take all but the sample state from ``held``, the content of ``path``; False: it is bare weights.

        Counts that a published file lacks follow from its completed epochs: ``steps_per_epoch`` steps of
        ``global_batch`` samples each. ValueError: it is of another model or optimizer.
        """
        _load_model(self.model, pt_file.weights_of(held, path), path)
        if "epoch" not in held:
            _log.info("%s holds weights only: the run starts at the beginning", path)
            return False
        if self.optimizer is not None and "optimizer" in held:
            _load_optimizer(self.optimizer, held, path)
        if self.scaler is not None and held.get("scaler"):
            self.scaler.load_state_dict(held["scaler"])
        self.epoch = int(held["epoch"])
        self.epoch_step = int(held.get("epoch_step", 0))
        self.step = int(held.get("step", self.epoch * steps_per_epoch))
        self.samples_seen = int(held.get("samples_seen", self.step * global_batch))
        self.stream = held.get("stream")
        self.meters, self.skipped, self.best = (held.get(name, {}) for name in ("meters", "skipped", "best"))
        _log.info("resumed %s: %d epochs, %d steps", path, self.epoch, self.step)
        self._log_changes(held.get("flags", {}))
        return True

    def _log_changes(self, then: Mapping[str, str]) -> None:
        """Log the flags whose values differ from ``then``, those with which the checkpoint was saved."""
        changed = [
            f"--{key} {self.flags[key]} (it was {then[key]})"
            for key in sorted(self.flags.keys() & then.keys() - {"resume"})
            if self.flags[key] != then[key]
        ]
        if changed:
            _log.info("flags that have changed since the checkpoint was saved: %s", ", ".join(changed))


def _load_model(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    missing, surplus = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    differing = [n for n in own if n in weights and own[n].shape != weights[n].shape]
    for what, names in (("lacks", missing), ("has an unknown", surplus), ("has another shape of", differing)):
        if names:
            raise ValueError(
                f"checkpoint {path} {what} {names[0]!r} ({len(names)} in all): it was saved with another --model"
            )
    model.load_state_dict(weights)


def _load_optimizer(optimizer: Optimizer, held: Mapping[str, Any], path: Path) -> None:
    """Take moments and step counts; rates, betas and decay remain those of this run's flags."""
    saved, current = held["optimizer"], optimizer.state_dict()
    kind = type(optimizer).__name__
    if held.get("optimizer_class", kind) != kind:
        raise ValueError(
            f"checkpoint {path} was saved with the optimizer {held['optimizer_class']}, but --optimizer is {kind}"
        )
    # The published code keeps a group for the temperature, without a parameter, even where it is constant.
    saved_groups = [group for group in saved["param_groups"] if group["params"]]
    _check_groups(saved_groups, current["param_groups"], path)
    groups = []
    for theirs, ours in zip(saved_groups, current["param_groups"], strict=True):
        progress = {"step": theirs["step"]} if "step" in theirs else {}
        groups.append(ours | progress | {"params": theirs["params"]})
    shapes = {
        index: parameter.shape
        for group, live in zip(groups, optimizer.param_groups, strict=True)
        for index, parameter in zip(group["params"], live["params"], strict=True)
    }
    for index, values in saved["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != shapes[index]:
                raise ValueError(
                    f"checkpoint {path}: the optimizer's {key} of parameter {index} has shape "
                    f"{list(value.shape)}, the parameter has shape {list(shapes[index])}: its parameters are in "
                    "another order"
                )
    # A deep copy, because torch keeps tensors that need no conversion, and these are mapped from the file.
    optimizer.load_state_dict({"state": deepcopy(saved["state"]), "param_groups": groups})


def _check_groups(saved: list[dict[str, Any]], current: list[dict[str, Any]], path: Path) -> None:
    hint = "it was saved with other locked parts or another temperature scheme"
    sizes = [len(g["params"]) for g in saved], [len(g["params"]) for g in current]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"checkpoint {path}: its optimizer has groups of {sizes[0]} parameters, this run of {sizes[1]}: {hint}"
        )
    for theirs, ours in zip(saved, current, strict=True):
        names = zip(theirs.get("param_names", ()), ours.get("param_names", ()))
        differing = next(((a, b) for a, b in names if a != b), None)
        if differing:
            raise ValueError(
                f"checkpoint {path}: its optimizer has {differing[0]!r} in place of {differing[1]!r}: {hint}"
            )
