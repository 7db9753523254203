"""Cached reference features: their size, and how long the lookup of a batch takes, from memory and from the disk.

    python benchmarks/features.py --rows 10000000 --dim 256 --batch 5120 [--folder DIR --json]
    python benchmarks/features.py --rows 200000 --dim 512 --error-bound 1e-3      or --dtype int8, or --views 4

A store of ``--rows`` rows [2, dim] of unit norm, from a normal distribution, is written to ``--folder`` (default:
a temporary one) in parts of 256 MB before they are packed, with every fourth row number left out. With ``--views``
each row has so many views of its image, of which one is looked up. Then batches of rows drawn at random from all
of it are looked up as training does it, captions' checksums included, by one thread; values are compared with what
was written.

warm        files in the page cache
cold        after the kernel was asked to forget the files: every row is a read from the disk
ahead       cold, but the rows of the next batch are announced while the present one is trained on for
            ``--step-ms``, as the loader does with those of the next window of samples
half kept   cold, but for the half of the store's bytes that ``--ref_features_cache_mb`` keeps in memory (left out
            where a process may not lock so much)
one by one  cold, without asking for all pages of a batch first: reads wait for each other

Lookups per second and core are those of the processor time, warm. ``dfn_gb`` is what 192 million such rows take.
Training steps with stored features, with a live reference and without any are timed by ``train_step.py``, in a
process of its own (``--no-steps``: they are not).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from unittest import mock

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import torch

import report
from training.cache import row_store
from training.cache.features import KIND, SEED, VIEWS, StoredFeatures
from training.cache.resident import Resident
from training.cache.row_store import PartValues, StoreWriter, caption_checksum, open_store
from training.cache.storage import Storage
from training.data.samples import Shown
from training.machine.mapped import may_lock

PART_BYTES = 2**28
MADE = {"model": "noise", "weights": "none"}
DFN_ROWS = 192_000_000
POOL = 16_384  # different vectors
STEPS = {"none": "none", "cached": "store", "ours": "live"}  # variant of train_step.py -> name
SHOWN = {
    "warm": "warm",
    "cold": "cold",
    "cold, announced": "ahead",
    "cold, half of it kept": "half_kept",
    "cold, one by one": "one_by_one",
}
STEP_TITLES = {"without a reference": "none", "stored features": "store", "live reference": "live"}
ERRORS = {"float32": 0.0, "float16": 2.0**-11, "int8": 0.5 / 127 * 1.001}  # of components up to 1


@dataclass(frozen=True)
class Options:
    """``repeats`` batches are looked up in each way; the median counts."""

    rows: int
    dim: int
    batch: int
    repeats: int
    folder: str | None
    dtype: str
    error_bound: float | None
    views: int = 0
    step_ms: float = 200.0

    @property
    def storage(self) -> Storage:
        """How features are stored."""
        return Storage(self.dtype, self.error_bound)

    @property
    def largest_error(self) -> float:
        """By which a component may be wrong."""
        return ERRORS[self.dtype] if self.error_bound is None else self.error_bound


def numbers(options: Options, first: int, stop: int) -> np.ndarray:
    """The row numbers of places ``first`` to ``stop``: three out of every four."""
    places = np.arange(first, min(stop, options.rows))
    return places + places // 3


@lru_cache(maxsize=1)
def pool(dim: int) -> np.ndarray:
    """Vectors of unit norm, float32 [POOL, dim]."""
    noise = np.random.default_rng(0).standard_normal((POOL, dim), np.float32)
    return noise / np.linalg.norm(noise, axis=1, keepdims=True)


def values(rows: np.ndarray, dim: int, views: int | np.ndarray = 0) -> np.ndarray:
    """What is stored for these rows and ``views`` of them, before it is packed, float32 [n, 2, dim]."""
    return pool(dim)[np.stack([(rows * 7919 + views) % POOL, rows * 104_729 % POOL], 1)]


def packed(options: Options, rows: np.ndarray, checksums: np.ndarray) -> PartValues:
    """A part with these rows."""
    kind, storage = options.storage.brought, options.storage

    def brought(exact: np.ndarray) -> np.ndarray:
        return torch.from_numpy(exact).to(kind).numpy()

    if not options.views:
        return storage.pack(brought(values(rows, options.dim)))
    sides = [brought(values(rows, options.dim, view)) for view in range(options.views)]
    images = np.stack([side[:, 0] for side in sides], 1)
    return storage.pack_several(images, sides[0][:, 1:], checksums[:, None])


def write(options: Options, folder: Path) -> None:
    """The store, unless it is there."""
    if (folder / "index.json").exists():
        return
    storage = options.storage
    views = {VIEWS: options.views, SEED: 0} if options.views else {}
    writer = StoreWriter(folder, KIND, MADE | storage.identity() | views)
    vectors = max(options.views, 1) + 1
    per_part = max(PART_BYTES // (vectors * options.dim * storage.brought.itemsize), 1)
    checksum = np.uint32(caption_checksum(""))
    for number, first in enumerate(range(0, options.rows, per_part)):
        rows = numbers(options, first, first + per_part)
        checksums = np.full(len(rows), checksum)
        part = packed(options, rows, checksums)
        writer.write(
            [(number, f"{number}.tar")],
            rows,
            checksums,
            constants=part.constants,
            facts=part.facts,
            **part.values,
        )
    writer.index()


def forget(folder: Path) -> None:
    """Drop the store's files from the page cache."""
    for file in folder.rglob("*.npy"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(options: Options, folder: Path, *, cold: bool, ahead: bool = False) -> tuple[float, float]:
    """Milliseconds per batch, each of rows of its own: the median, and that of the processor's time."""
    rng, times, worked = np.random.default_rng(), [], []
    names, texts = [""] * options.batch, [""] * options.batch
    features = None
    for _ in range(options.repeats):
        if cold or features is None:
            features = StoredFeatures(open_store(folder, KIND, "--folder"))  # pages that are mapped are kept
        if cold:
            forget(folder)
        places = rng.integers(0, options.rows, options.batch)
        rows = places + places // 3
        asked = rows.tolist()
        views = rng.integers(0, max(options.views, 1), options.batch)
        shown = [Shown("", view=view) for view in views.tolist()]
        if ahead:
            for row, view in zip(asked, views.tolist()):
                features.coming(row, view)
            time.sleep(options.step_ms / 1e3)
        started, working = time.perf_counter(), time.thread_time()
        found = features(asked, texts, names, shown)
        times.append(1e3 * (time.perf_counter() - started))
        worked.append(1e3 * (time.thread_time() - working))
        if not np.abs(found.numpy() - values(rows, options.dim, views)).max() <= options.largest_error:
            raise AssertionError("the store gave other values than were written")
    return float(np.median(times)), float(np.median(worked))


def run(options: Options, folder: Path) -> dict[str, float]:
    """All measurements."""
    started = time.perf_counter()
    write(options, folder)
    result = {"write_seconds": time.perf_counter() - started}
    result["cold_ms"], _ = measure(options, folder, cold=True)
    result["ahead_ms"], _ = measure(options, folder, cold=True, ahead=True)
    paths = StoredFeatures(open_store(folder, KIND, "--folder")).paths
    half = sum(path.stat().st_size for path in paths) // 2
    if may_lock(half):
        with Resident(paths, half) as kept:
            kept.wait()
            result["half_kept_ms"], _ = measure(options, folder, cold=True)
    with mock.patch.object(row_store._Mapped, "expect", lambda *_: None):
        result["one_by_one_ms"], _ = measure(options, folder, cold=True)
    for file in folder.rglob("*.npy"):
        file.read_bytes()
    result["warm_ms"], worked = measure(options, folder, cold=False)
    result["lookups_per_second_per_core"] = 1e3 * options.batch / worked
    sizes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    rows = len(open_store(folder, KIND, "--folder"))
    return {
        "rows": rows,
        "bytes": sizes,
        "bytes_per_pair": sizes / rows,
        "dfn_gb": DFN_ROWS * sizes / rows / 1e9,
    } | result


def step_times(*flags: str) -> dict[str, float]:
    """Milliseconds of a training step: with stored features, with a live reference, and without any.

    ``flags``: more of those of ``train_step.py``.
    """
    report.say("timing training steps")
    program = str(Path(__file__).with_name("train_step.py"))
    command = [sys.executable, program, "--variants", ",".join(STEPS), "--json", *flags]
    made = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    result = json.loads(made.stdout)
    return {f"step_{name}_ms": 1e3 * result[variant]["seconds_per_step"] for variant, name in STEPS.items()}


def parse() -> tuple[Options, bool, bool]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batch", type=int, default=5120)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", help="where the store is, or is to be written and left")
    parser.add_argument("--dtype", choices=sorted(ERRORS), default="float16")
    parser.add_argument("--error-bound", type=float)
    parser.add_argument("--views", type=int, default=0)
    parser.add_argument("--step-ms", type=float, default=200.0)
    parser.add_argument("--no-steps", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = vars(parser.parse_args())
    as_json, without_steps = given.pop("json"), given.pop("no_steps")
    return Options(**given), not without_steps, as_json


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    options, with_steps, as_json = parse()
    with tempfile.TemporaryDirectory() as temporary:
        result = run(options, Path(options.folder or temporary))
    if with_steps:
        result |= step_times()
    rows = [(name, f"{result[f'{key}_ms']:.1f} ms") for name, key in SHOWN.items() if f"{key}_ms" in result]
    rows.append(("per second and core, warm", f"{result['lookups_per_second_per_core']:,.0f}"))
    form = options.dtype if options.error_bound is None else f"error of at most {options.error_bound:g}"
    each = f"{options.views} + 1 (views and captions)" if options.views else "2"
    title = (
        f"Lookup of {options.batch:,} random rows of {result['rows']:,}, {each} x {options.dim}, {form} "
        f"({result['bytes'] / 1e9:.3g} GB, {result['bytes_per_pair']:.0f} bytes per row)"
    )
    text = report.table(title, ("", "per batch"), rows)
    if with_steps:
        none = result["step_none_ms"]
        steps = [(title, result[f"step_{name}_ms"]) for title, name in STEP_TITLES.items()]
        timed = [(title, f"{time:.1f} ms", f"{time / none:.2f}") for title, time in steps]
        text += "\n\n" + report.table("Training step", ("", "time", "of none"), timed)
    report.emit(vars(options) | result, text, as_json)


if __name__ == "__main__":
    main()
