"""Cached reference features: how long the lookup of a batch takes, from memory and from the disk.

    python benchmarks/features.py --rows 10000000 --dim 256 --batch 5120 [--folder DIR --json]

A store of ``--rows`` rows of float16 [2, dim] in parts of 256 MB is written to ``--folder`` (default: a temporary
one), with every fourth row number left out. Then batches of rows drawn at random from all of it are looked up as
training does it, captions' checksums included; values are compared with what was written.

warm        files in the page cache
cold        after the kernel was asked to forget the files: every row is a read from the disk
one by one  the same without asking for all pages of a batch first: reads wait for each other
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np

import report
from training.cache import row_store
from training.cache.features import KIND, StoredFeatures
from training.cache.row_store import StoreWriter, caption_checksum, open_store

PART_BYTES = 2**28
MADE = {"model": "noise", "weights": "none"}


@dataclass(frozen=True)
class Options:
    """``repeats`` batches are looked up in each way; the median counts."""

    rows: int
    dim: int
    batch: int
    repeats: int
    folder: str | None


def numbers(options: Options, first: int, stop: int) -> np.ndarray:
    """The row numbers of places ``first`` to ``stop``: three out of every four."""
    places = np.arange(first, min(stop, options.rows))
    return places + places // 3


def values(rows: np.ndarray, dim: int) -> np.ndarray:
    """What is stored for these rows, float16 [n, 2, dim]: fixed noise times a factor that tells rows apart."""
    noise = np.random.default_rng(0).standard_normal((2, dim)).astype(np.float16)
    return noise * (1 + (rows % 997) / 997).astype(np.float16)[:, None, None]


def write(options: Options, folder: Path) -> None:
    """The store, unless it is there."""
    if (folder / "index.json").exists():
        return
    writer = StoreWriter(folder, KIND, MADE)
    per_part = max(PART_BYTES // (4 * options.dim), 1)
    checksum = np.uint32(caption_checksum(""))
    for number, first in enumerate(range(0, options.rows, per_part)):
        rows = numbers(options, first, first + per_part)
        writer.write(
            [(number, f"{number}.tar")],
            rows,
            np.full(len(rows), checksum),
            features=values(rows, options.dim),
        )
    writer.index()


def forget(folder: Path) -> None:
    """Drop the store's files from the page cache."""
    os.sync()
    for file in folder.rglob("*.npy"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(options: Options, folder: Path, *, cold: bool) -> float:
    """Milliseconds per batch, each of rows of its own; the median."""
    rng, times = np.random.default_rng(), []
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
        started = time.perf_counter()
        found = features(asked, texts, names)
        times.append(1e3 * (time.perf_counter() - started))
        if not np.array_equal(found.numpy(), values(rows, options.dim)):
            raise AssertionError("the store gave other values than were written")
    return float(np.median(times))


def run(options: Options, folder: Path) -> dict[str, float]:
    """All measurements."""
    started = time.perf_counter()
    write(options, folder)
    result = {"write_seconds": time.perf_counter() - started}
    result["cold_ms"] = measure(options, folder, cold=True)
    with mock.patch.object(row_store._Mapped, "expect", lambda *_: None):
        result["one_by_one_ms"] = measure(options, folder, cold=True)
    for file in folder.rglob("*.npy"):
        file.read_bytes()
    result["warm_ms"] = measure(options, folder, cold=False)
    sizes = (file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"rows": len(open_store(folder, KIND, "--folder")), "bytes": sum(sizes), **result}


def parse() -> tuple[Options, bool]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batch", type=int, default=5120)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", help="where the store is, or is to be written and left")
    parser.add_argument("--json", action="store_true")
    given = vars(parser.parse_args())
    as_json = given.pop("json")
    return Options(**given), as_json


def main() -> None:
    """Measure and print."""
    options, as_json = parse()
    with tempfile.TemporaryDirectory() as temporary:
        result = run(options, Path(options.folder or temporary))
    rows = [(name, f"{result[f'{key}_ms']:.1f} ms") for name, key in
            (("warm", "warm"), ("cold", "cold"), ("cold, one by one", "one_by_one"))]  # fmt: skip
    title = (
        f"Lookup of {options.batch:,} random rows of {result['rows']:,}, float16 [2, {options.dim}] "
        f"({result['bytes'] / 1e9:.3g} GB)"
    )
    report.emit(vars(options) | result, report.table(title, ("", "per batch"), rows), as_json)


if __name__ == "__main__":
    main()
