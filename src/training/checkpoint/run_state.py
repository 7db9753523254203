"""The complete state of a run, and how it is stored in a checkpoint and restored from it.

Weights, optimizer, scaler and counters are the same on all ranks and go into the checkpoint's file; the sample
state is sharded and goes beside it (``sample_state_io``). Random numbers need not be saved: each step seeds its
own from (seed, step, rank), and the stream of samples from its position.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from drrho_clip.sample_state import SampleState
from training.checkpoint import architecture, optimizer_state, pt_file
from training.checkpoint.architecture import ModelDescription
from training.distributed.powersgd import PowerSGD

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
    ``description``   how ``model`` was built; None where that is not known.
    ``compression``   of gradients, where it keeps a state.
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
    description: ModelDescription | None = None
    compression: PowerSGD | None = None

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
        if self.description is not None:
            held[architecture.KEY] = self.description.held()
        if self.optimizer is not None:
            held["optimizer"] = self.optimizer.state_dict()
            held["optimizer_class"] = type(self.optimizer).__name__
        if self.compression is not None:
            held["powersgd"] = self.compression.state_dict()
        if self.scaler is not None:
            held["scaler"] = self.scaler.state_dict()
        if self.stream is not None:
            held["stream"] = self.stream
        return held

    def fill(self, held: Mapping[str, Any], path: Path, *, steps_per_epoch: int, global_batch: int) -> bool:
        """Take all but the sample state from ``held``, the content of ``path``; False: it is bare weights.

        Counts that a published file lacks follow from its completed epochs: ``steps_per_epoch`` steps of
        ``global_batch`` samples each. ValueError: it is of another model, optimizer or trainer.
        """
        if "epoch" in held and self.optimizer is not None:
            _check_trainer(held, path)
        _load_model(self.model, pt_file.weights_of(held, path), path)
        if "epoch" not in held:
            _log.info("%s holds weights only: the run starts at the beginning", path)
            return False
        with of_a_run(path):
            self._fill_counters(held, path, steps_per_epoch, global_batch)
            _log.info("resumed %s: %d epochs, %d steps", path, self.epoch, self.step)
            self._log_changes(_mapping(held, "flags"))
        return True

    def _fill_counters(self, held: Mapping[str, Any], path: Path, steps_per_epoch: int, global_batch: int) -> None:
        if self.optimizer is not None and "optimizer" in held:
            optimizer_state.load(self.optimizer, self.model, held, path)
        elif self.optimizer is not None:
            _log.warning("%s holds no state of the optimizer, whose moments start anew", path)
        if self.compression is not None and held.get("powersgd"):
            self.compression.load_state_dict(held["powersgd"])
        if self.scaler is not None and held.get("scaler"):
            self.scaler.load_state_dict(held["scaler"])
        self.epoch = _count(held, "epoch", 0)
        self.epoch_step = _count(held, "epoch_step", 0)
        self.step = _count(held, "step", self.epoch * steps_per_epoch)
        self.samples_seen = _count(held, "samples_seen", self.step * global_batch)
        self.stream = held.get("stream")
        self.meters, self.skipped, self.best = (_mapping(held, key) for key in ("meters", "skipped", "best"))

    def _log_changes(self, then: Mapping[str, str]) -> None:
        """Log the flags whose values differ from ``then``, those with which the checkpoint was saved."""
        changed = [
            f"--{key} {self.flags[key]} (it was {then[key]})"
            for key in sorted(self.flags.keys() & then.keys() - {"resume"})
            if self.flags[key] != then[key]
        ]
        if changed:
            _log.info("flags that have changed since the checkpoint was saved: %s", ", ".join(changed))


@contextmanager
def of_a_run(path: Path) -> Iterator[None]:
    """The body reads entries of the checkpoint ``path``. ValueError: one of them is not what a run keeps there."""
    try:
        yield
    except (TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"checkpoint {path} is not the state of a run ({' '.join(repr(error).split())})"
        ) from error


def _count(held: Mapping[str, Any], name: str, default: int) -> int:
    value = held.get(name, default)
    if not issubclass(type(value), Real):
        raise TypeError(f"{name} is {value!r}")
    return int(value)


def _mapping(held: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = held.get(name, {})
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is {value!r}")
    return dict(value)


def _check_trainer(held: Mapping[str, Any], path: Path) -> None:
    """ValueError: another trainer has written ``held``, whose counts and optimizer mean something else."""
    if "state_dict" not in held or any("lightning" in str(name) for name in held):
        raise ValueError(
            f"checkpoint {path} is of another trainer, whose epochs and optimizer cannot be continued exactly: "
            f"--pretrained {path} takes its weights alone"
        )


def _load_model(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    for name in ("logit_scale", "logit_bias"):  # some versions of open_clip keep them as one number, some as [1]
        if name in weights and name in own and weights[name].numel() == own[name].numel():
            weights[name] = weights[name].reshape(own[name].shape)
    missing, surplus = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    differing = [n for n in own if n in weights and own[n].shape != weights[n].shape]
    for what, names in (("lacks", missing), ("has an unknown", surplus), ("has another shape of", differing)):
        if names:
            first = names[0]
            shapes = (
                f"{list(weights[first].shape)} there, {list(own[first].shape)} here; " if what[-2:] == "of" else ""
            )
            raise ValueError(
                f"checkpoint {path} {what} {first!r} ({shapes}{len(names)} in all): it was saved with another "
                f"--model; --pretrained {path} takes weights of other kinds and image sizes, without their run"
            )
    model.load_state_dict(weights)
