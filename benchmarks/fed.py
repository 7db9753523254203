"""The whole program on JPEG shards: does the data keep up with the GPU, and how long does a checkpoint stop it?

    python benchmarks/fed.py [--model ViT-B-16 --ref-model ViT-B-32 --batch-size 640 --workers 12 --steps 60
                              --torchcompile --json]

Shards of 560x423 photographs (quality 90) are made on the spot. ``training.main`` trains on them, DRRho-CLIP with
a learnable temperature, and saves a checkpoint in the middle. Times are from the start of one step to the start of
the next one, after a third of the steps; a few of them wait for the GPU at a log line.

``samples_per_second``   between these steps, without the one in which the checkpoint is saved.
``synthetic_per_second`` the same program on random pixels that no loader decodes: what the GPU takes by itself.
``share``                the first over the second.
``data_wait``            share of the time in which the loop waited for a batch.
``images_per_core``      images per second of processor time of the loader processes.
``save_seconds``         by how much the step with the checkpoint was longer than the others' median.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "src"))

import torch

import measure
import photographs
import report
from train_step import SMALL_REFERENCE, SMALL_TARGET, write_config, write_random_weights
from training import main as program
from training.loop.speed_monitor import StepTimes
from training.loop.step import Stepper

SHARDS = 16
DISTINCT = 2048  # pictures; a shard's pictures are read again in the next pass over the data


@dataclass(frozen=True)
class Options:
    model: str
    ref_model: str
    ref_checkpoint: str
    batch_size: int
    workers: int
    steps: int
    precision: str
    torchcompile: bool


@dataclass
class Times:
    """Of each step, in seconds: its start, its wait for a batch, the loaders' processor time up to it."""

    started: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    loaders: list[float] = field(default_factory=list)


def loaders_seconds() -> float:
    """Processor time that the loader processes have used so far."""
    ticks = 0
    for process in multiprocessing.active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # proc_pid_stat(5): utime, stime
    return ticks / os.sysconf("SC_CLK_TCK")


def train(options: Options, data: str, folder: str, save_at: int) -> Times:
    """The steps of one run of the program."""
    words = f"""{data} --batch-size {options.batch_size} --model {options.model} --precision {options.precision}
        --ref_model {options.ref_model} --ref_model_checkpoint {options.ref_checkpoint}
        --fastclip --multiply_tau --temperature_scheme global_learnable --lr 1e-4 --warmup 0 --epochs 10000
        --stop_iters {options.steps} --workers {options.workers} --log-every-n-steps 20 --save-frequency 0
        --save_every_n_steps {save_at} --keep_last 1 --logs {folder} --name run{save_at}"""
    times, step, loaded = Times(), Stepper.__call__, StepTimes.loaded

    def timed(self: Stepper, *args: Any) -> Any:
        times.started.append(time.perf_counter())
        times.loaders.append(loaders_seconds())
        return step(self, *args)

    def waiting(self: StepTimes) -> None:
        before = self._waited
        loaded(self)
        times.waited.append(self._waited - before)

    logging.disable(logging.WARNING)
    with mock.patch.object(Stepper, "__call__", timed), mock.patch.object(StepTimes, "loaded", waiting):
        code = program.main([*words.split(), *(["--torchcompile"] if options.torchcompile else [])])
    if code:
        raise RuntimeError(f"the run has failed with exit code {code}")
    return times


def rate(times: Times, batch: int, without: int | None) -> float:
    """Samples per second after the first third of the steps, leaving out the step ``without``."""
    first = len(times.started) // 3
    steps = range(first, len(times.started) - 1)
    seconds = [times.started[i + 1] - times.started[i] for i in steps if i != without]
    return batch * len(seconds) / sum(seconds)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    on_cuda = torch.cuda.is_available()
    add("--model", help="target (ViT-B-16; on the CPU a small one)")
    add("--ref-model", help="reference (ViT-B-32)")
    add("--batch-size", type=int, default=640 if on_cuda else 16)
    add("--workers", type=int, default=12 if on_cuda else 1)
    add("--steps", type=int, default=60 if on_cuda else 12)
    add("--pictures", type=int, default=DISTINCT if on_cuda else 64)
    add("--precision", default="amp_bf16")
    add("--torchcompile", action="store_true")
    add("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    given = vars(parser.parse_args(argv))
    as_json, pictures = given.pop("json"), given.pop("pictures")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = {"model": SMALL_TARGET, "ref_model": SMALL_REFERENCE}
        for key, published in (("model", "ViT-B-16"), ("ref_model", "ViT-B-32")):
            default = published if on_cuda else write_config(folder / f"{key}.json", small[key])
            given[key] = given[key] or default
        checkpoint = write_random_weights(folder / "reference.pt", given["ref_model"])
        options = Options(**given, ref_checkpoint=checkpoint)
        result = compare(options, folder, pictures)
    result |= asdict(options) | {"machine": report.machine(torch.device("cuda" if on_cuda else "cpu"))}
    report.emit(result, describe(result), as_json)
    return 0


def compare(options: Options, folder: Path, pictures: int) -> dict[str, Any]:
    report.say(f"writing {pictures} photographs to {SHARDS} shards")
    (folder / "shards").mkdir()
    pattern = photographs.write_shards(folder / "shards", pictures, SHARDS)
    epoch = f"--train-num-samples {options.batch_size * options.steps}"  # one, as in a run on many samples
    real = f"--train-data {pattern} {epoch} --data_size {pictures} --dataset-resampled"
    random = f"--dataset-type synthetic {epoch} --data_size {options.batch_size * options.steps}"
    middle = 2 * options.steps // 3
    report.say("training on the shards")
    times = measure.in_fresh_process(train, options, real, str(folder / "logs"), middle)
    report.say("training on random pixels")
    free = measure.in_fresh_process(train, options, random, str(folder / "logs"), 10**9)
    first = len(times.started) // 3
    gaps = [b - a for a, b in zip(times.started[first:], times.started[first + 1 :])]
    processor = times.loaders[-1] - times.loaders[first]
    fed, synthetic = (rate(t, options.batch_size, middle - 1) for t in (times, free))
    return {
        "samples_per_second": fed,
        "synthetic_per_second": synthetic,
        "share": fed / synthetic,
        "data_wait": sum(times.waited[first:-1]) / sum(gaps),
        "images_per_core": options.batch_size * len(gaps) / processor if processor else None,
        "save_seconds": gaps[middle - 1 - first] - statistics.median(gaps),
    }


def describe(r: dict[str, Any]) -> str:
    cores = "-" if r["images_per_core"] is None else f"{r['images_per_core']:.0f}"
    rows = [
        ("from shards", f"{r['samples_per_second']:.0f} samples/s"),
        ("random pixels", f"{r['synthetic_per_second']:.0f} samples/s"),
        ("share", f"{r['share']:.1%}"),
        ("waits for data", f"{r['data_wait']:.1%}"),
        ("per core", f"{cores} images/s"),
        ("a checkpoint", f"{r['save_seconds']:.2f} s"),
    ]
    title = f"The program on JPEG shards, batch {r['batch_size']}, {r['workers']} workers; {r['machine']}"
    return report.table(title, ("", ""), rows)


if __name__ == "__main__":
    sys.exit(main())
