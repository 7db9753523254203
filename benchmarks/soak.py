"""Memory of the loader's processes over many epochs of a small set: it has to stay flat.

    python benchmarks/soak.py [--epochs 50 --samples 600 --workers 2 --json]

Shards are made on the spot; a few of their samples are spoiled, as leaving out must not cost memory either. After
each epoch the memory that belongs to each loader process alone is read (``Private_*`` in /proc/PID/smaps_rollup,
Linux), and the main process's resident size. The curve is printed.

``growth_bytes``  per process, from the median of epochs 10 to 19 (before, processes make copies of pages that they
                  shared with the main one) to the median of the last ten.
``flat``          no process grew by more than ``--limit`` MiB; the exit code says the same.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import re
import statistics
import sys
import tarfile
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg
from PIL import Image
from tqdm import tqdm

import report
from training.config.params import parse
from training.data.build import build_train
from training.distributed.process_group import World

SETTLED = 10  # epochs until memory is looked at
TENTH = 10  # epochs of which medians are taken
SHARDS, SPOILED = 4, 50  # one sample of SPOILED has a broken image
WIDTH = 60  # characters of the longest bar


def write_shards(folder: Path, samples: int) -> str:
    """``samples`` JPEGs of 320 x 240 with captions and keys, in ``SHARDS`` shards; the pattern that names them."""
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for key in range(shard, samples, SHARDS):
                coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
                file = io.BytesIO()
                coarse.resize((320, 240), Image.Resampling.BICUBIC).save(file, "jpeg")
                image = file.getvalue() if key % SPOILED else file.getvalue()[:900]
                text = f"a picture of colors, number {key}".encode()
                for extension, data in (
                    ("jpg", image),
                    ("txt", text),
                    ("json", json.dumps({"key": key}).encode()),
                ):
                    member = tarfile.TarInfo(f"{key:06d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(folder / f"{{0..{SHARDS - 1}}}.tar")


def private_bytes(pid: int) -> int:
    """Memory of a process that no other one shares."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(size) for size in re.findall(r"^Private_\w+: +(\d+) kB", text, re.MULTILINE))


def resident_bytes() -> int:
    """This process's resident size, all of it."""
    return 1024 * int(re.search(r"^VmRSS:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def soak(epochs: int, samples: int, workers: int, folder: Path) -> dict[str, list[int]]:
    """Bytes after each epoch, by process."""
    torch.set_num_threads(1)
    flags = ["--train-data", write_shards(folder, samples), "--train-num-samples", samples, "--data_size", samples]
    flags += ["--batch-size", 32, "--workers", workers, "--max_bad_fraction", 1, "--model", "ViT-B-32"]
    model = SimpleNamespace(preprocess=PreprocessCfg(size=224), tokenizer=open_clip.SimpleTokenizer())
    world = World(0, 0, 1, 1, torch.device("cpu"))
    data = build_train(parse([str(flag) for flag in flags]), world, model, None)
    curves: dict[str, list[int]] = {}
    for epoch in tqdm(range(epochs), unit="epoch", desc="soak"):
        for _ in data.epoch(epoch):
            pass
        sizes = {"main": resident_bytes()}
        for number, process in enumerate(sorted(multiprocessing.active_children(), key=lambda p: p.pid)):
            sizes[f"worker {number}"] = private_bytes(process.pid)
        for name, size in sizes.items():
            curves.setdefault(name, []).append(size)
    assert len(curves) == 1 + workers, f"{len(curves) - 1} loader processes, not {workers}"
    return curves


def growth(curve: list[int]) -> int:
    """From the median of the epochs after ``SETTLED`` to that of the last ones."""
    count = min(TENTH, (len(curve) - SETTLED) // 2)
    return round(statistics.median(curve[-count:]) - statistics.median(curve[SETTLED : SETTLED + count]))


def describe(result: dict) -> str:
    curves = result["bytes"]
    top = max(max(curve) for name, curve in curves.items() if name != "main")
    rows = []
    for epoch, sizes in enumerate(zip(*curves.values())):
        bar = "#" * round(WIDTH * max(size for name, size in zip(curves, sizes) if name != "main") / top)
        rows.append((str(epoch), *(f"{size / 2**20:.1f}" for size in sizes), bar))
    title = (
        f"MiB after each epoch of {result['samples']} samples, {result['workers']} loader processes; bar: worker"
    )
    lines = report.table(title, ("epoch", *curves, "."), rows).replace("  .", "")
    grown = ", ".join(f"{name} {size / 2**20:+.1f} MiB" for name, size in result["growth_bytes"].items())
    return f"{lines}\ngrowth: {grown}: {'flat' if result['flat'] else 'NOT FLAT'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=50, help="epochs to run")
    parser.add_argument("--samples", type=int, default=600, help="samples of an epoch")
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--limit", type=float, default=4.0, help="MiB that a process may grow")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, the curve on stderr")
    given = parser.parse_args()
    if given.epochs < SETTLED + 2:
        parser.error(f"--epochs {given.epochs}: give at least {SETTLED + 2}, memory is looked at after {SETTLED}")
    with tempfile.TemporaryDirectory() as folder:
        curves = soak(given.epochs, given.samples, given.workers, Path(folder))
    grown = {name: growth(curve) for name, curve in curves.items()}
    result = {
        "epochs": given.epochs,
        "samples": given.samples,
        "workers": given.workers,
        "bytes": curves,
        "growth_bytes": grown,
        "flat": all(size <= given.limit * 2**20 for size in grown.values()),
        "machine": report.machine(torch.device("cpu"), threads=1),
    }
    report.emit(result, describe(result), given.json)
    return 0 if result["flat"] else 1


if __name__ == "__main__":
    sys.exit(main())
