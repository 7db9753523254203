"""Does the training loop make the host wait for the GPU between two log lines? Where, and how often?

    python benchmarks/waits.py [--recipes drrho,v2 --steps 24 --json]

The program trains small models on synthetic data, once per recipe. From the ninth step on, outside of log lines,
every operation that makes the host wait is counted and named by its place in the code
(``torch.cuda.set_sync_debug_mode``), and so are the copies that the program starts early and waits for when it
needs them (``Readback``). Exits with 1 if a recipe has more waits per step than it is meant to have.

On the CPU nothing waits. There the values are counted that the host reads from tensors, which a GPU would have to
wait for; no recipe fails for them, as the program may read them there.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import report
from drrho_clip.state.readback import Readback
from train_step import SMALL_REFERENCE, SMALL_TARGET, write_config, write_random_weights
from training import main as program
from training.loop.trainer import Trainer

SETTLED = 8  # steps before anything is counted: the first ones compile, allocate and choose kernels
SYNC = "synchronizing CUDA operation"
TRAINING = Path(program.__file__).parent

DRRHO = "--fastclip --multiply_tau --temperature_scheme global_learnable {reference} --precision amp_bf16"
RECIPES = {
    "drrho": DRRHO,
    "v2": "--fastclip --temperature_scheme individual_learnable --precision amp_bf16",
    "accumulation": f"{DRRHO} --accum-freq 4",
    "selection": f"{DRRHO} --ref_features_usage ref,select --ref_filter_ratio 0.5",
    "fp16": "--fastclip --multiply_tau --temperature_scheme global_learnable {reference} --precision amp",
    "host": f"{DRRHO} --sample_state_device cpu",
    "host-selection": f"{DRRHO} --sample_state_device cpu --ref_features_usage ref,select --ref_filter_ratio 0.5",
    "step_thresh": f"{DRRHO} --lr_tau_scheduler step_thresh",
    "clipped": f"{DRRHO} --grad-clip-norm 1.0",
    "lamb": f"{DRRHO} --optimizer lamb",
    "lion": f"{DRRHO} --optimizer lion",
    "openclip": "--precision amp_bf16",
}
# Waits per step that are meant to be there. Lion has no kernel that can leave out a step on the device.
MEANT = {"lion": 1, "lamb": 1}
# Waits for copies that were started a step or more before.
LATE = {"step_thresh": 1, "host": 2, "host-selection": 2}


@dataclass
class Watch:
    """Counts waits by their place in the code while ``active``; ``steps``: over how many steps."""

    active: bool = False
    steps: int = 0
    places: Counter[str] = field(default_factory=Counter)
    late: int = 0

    def note(self) -> None:
        """A wait happens now, in the code that calls."""
        if self.active:
            self.places[_place()] += 1

    def per_step(self) -> float:
        return sum(self.places.values()) / max(self.steps, 1)


def _place() -> str:
    """The innermost place in this project that is running, outside of this file."""
    frame, found = sys._getframe(1), "elsewhere"
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if TRAINING.parent in path.parents:
            return f"{path.relative_to(TRAINING.parent)}:{frame.f_lineno}"
        frame = frame.f_back
    return found


class Reads(TorchDispatchMode):
    """On the CPU: the host asks for a tensor's value."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            self.watch.note()
        return function(*args, **(kwargs or {}))


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Training in this context is watched."""
    report_line, train_epoch, value = Trainer._report, Trainer.train_epoch, Readback.value

    def reported(self: Trainer, *args: Any) -> None:
        was, watch.active = watch.active, False
        with _unwatched():
            report_line(self, *args)
        watch.active = was

    def trained(self: Trainer, after_step: Callable[[], bool]) -> None:
        def counted() -> bool:
            stop = after_step()
            watch.steps += watch.active
            watch.active = self.step >= SETTLED
            return stop

        train_epoch(self, counted)
        watch.active = False

    def read(self: Readback) -> Any:
        watch.late += watch.active
        return value(self)

    with (
        mock.patch.object(Trainer, "_report", reported),
        mock.patch.object(Trainer, "train_epoch", trained),
        mock.patch.object(Readback, "value", read),
        counted_on_gpu(watch) if torch.cuda.is_available() else Reads(watch),
    ):
        yield


@contextmanager
def counted_on_gpu(watch: Watch) -> Iterator[None]:
    """A context in which every wait for the GPU is noted."""

    def shown(message: Warning | str, *_: Any, **__: Any) -> None:
        if SYNC in str(message):
            watch.note()

    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = shown
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_warn_always(before)


@contextmanager
def _unwatched() -> Iterator[None]:
    mode = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else 0
    if mode:
        torch.cuda.set_sync_debug_mode("default")
    yield
    if mode:
        torch.cuda.set_sync_debug_mode(mode)


def measure(name: str, folder: Path, steps: int, batch: int) -> dict[str, Any]:
    """Train ``steps`` steps of the recipe ``name``: its waits per step and where they are."""
    reference = f"--ref_model {folder}/reference.json --ref_model_checkpoint {folder}/reference.pt"
    words = f"""--dataset-type synthetic --train-num-samples {batch * steps} --data_size {batch * steps}
        --model {folder}/target.json --batch-size {batch} --epochs 1 --workers 1 --lr 1e-4 --warmup 0
        --log-every-n-steps 8 --save-frequency 0 --logs {folder}/logs --name {name}
        {RECIPES[name].format(reference=reference)}"""
    watch = Watch()
    with watched(watch):
        code = program.main(words.split())
    if code or not watch.steps:
        raise RuntimeError(f"recipe {name} has failed with exit code {code} after {watch.steps} steps")
    allowed, late = MEANT.get(name, 0), watch.late / watch.steps
    places = {place: count / watch.steps for place, count in watch.places.most_common(10)}
    judged = torch.cuda.is_available()
    return {
        "waits_per_step": watch.per_step(),
        "meant": allowed,
        "late_reads_per_step": late,
        "places": places,
        "fine": not judged or (watch.per_step() <= allowed and late <= LATE.get(name, 0) + 0.1),
    }


def describe(found: dict[str, dict[str, Any]], device: torch.device) -> str:
    what = (
        "Waits for the GPU" if device.type == "cuda" else "Values that the host reads (on the CPU nothing waits)"
    )
    rows = []
    for name, r in found.items():
        where = ", ".join(r["places"]) or "-"
        counts = f"{r['waits_per_step']:.2f}", str(r["meant"]), f"{r['late_reads_per_step']:.2f}"
        rows.append((name, *counts, "yes" if r["fine"] else "NO", where))
    title = f"{what}, per step between two log lines; {report.machine(device)}"
    return report.table(title, ("", "waits", "meant", "of early copies", "fine", "where"), rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default=",".join(RECIPES), help="which, separated by commas")
    parser.add_argument("--steps", type=int, default=24, help="steps of each recipe, more than 9")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(folder / "target.json", SMALL_TARGET)
        reference = write_config(folder / "reference.json", SMALL_REFERENCE)
        write_random_weights(folder / "reference.pt", reference)
        for recipe in options.recipes.split(","):
            report.say(f"training: {recipe}")
            logging.disable(logging.WARNING)  # the runs' own lines
            found[recipe] = measure(recipe, folder, options.steps, options.batch_size)
            logging.disable(logging.NOTSET)
    fine = all(r["fine"] for r in found.values())
    result = {"recipes": found, "fine": fine, "machine": report.machine(device)}
    report.emit(result, describe(found, device), options.json)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
