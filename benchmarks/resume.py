"""How long a run waits for data after a start, anywhere in an epoch.

    python benchmarks/resume.py [--shards 1000 --samples 1000 --batch 64 --lanes 2 --json]

``--shards`` tar files of ``--samples`` JPEGs each are read by ``--lanes`` virtual workers. A stream is built at
the beginning of the epoch and where a run was stopped: at the beginning, in the middle and at the end of windows,
early and late in the epoch. Reported are the seconds from its construction to its first batch, in this process:
loader processes would only add their own start. That a stream taken up there delivers what the uninterrupted one
does is checked for one of the stops.

``seconds_worst``  of all stops; ``seconds_fresh`` of a start at the epoch's beginning; ``stops`` one by one.

The shards are one file under many names, so the disk plays no part; every sample has a caption and a json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import torch
from open_clip.transform import PreprocessCfg
from PIL import Image

import report
from training.data.lanes import Layout
from training.data.loader import TrainData
from training.data.progress import Place, Progress, pack
from training.data.sources.shards import Shard, read_shard
from training.data.sources.webdataset import WINDOW, ShardSource
from training.data.transforms import TrainView
from training.data.worker import TrainStream

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    shards: int
    samples: int
    batch: int
    lanes: int

    @property
    def steps(self) -> int:
        return self.shards * self.samples // self.batch


def write_shards(folder: Path, options: Options) -> list[Shard]:
    """One shard under many names."""
    pixels = np.random.default_rng(0).normal(0, 20, (12, 16, 3)).cumsum(0).cumsum(1)
    picture = Image.fromarray(np.uint8(128 + 127 * np.tanh(pixels / 100))).resize((320, 240), Image.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=90)
    first = folder / "0.tar"
    with tarfile.open(first, "w") as tar:
        for i in range(options.samples):
            about = json.dumps({"key": f"{i:09d}", "width": 320, "height": 240})
            for extension, data in (("jpg", file.getvalue()), ("txt", b"a photo"), ("json", about.encode())):
                member = tarfile.TarInfo(f"{i:09d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    for i in range(1, options.shards):
        os.link(first, folder / f"{i}.tar")
    return [Shard(str(folder / f"{i}.tar"), 0, 10**9) for i in range(options.shards)]


def open_stream(shards: list[Shard], options: Options) -> TrainData:
    source = ShardSource(shards, 0, sample_index=None)
    stream = TrainStream(
        source,
        TrainView(PreprocessCfg(size=224)),
        lambda texts: torch.zeros(len(texts), 77, dtype=torch.int64),
        None,
        seed=0,
        batch_size=options.batch,
        steps=options.steps,
        layout=Layout(1, options.lanes),
    )
    return TrainData(stream, world_size=1, workers=0, device=CPU)


def seconds_to_first_batch(shards: list[Shard], options: Options, state: dict | None) -> float:
    started = time.perf_counter()
    data = open_stream(shards, options)
    epoch, step = (state["epoch"], state["step"]) if state else (0, 0)
    data.resume(state, epoch, step)
    next(data.epoch(epoch, step))
    return time.perf_counter() - started


def stopped_at(data: TrainData, options: Options, offsets: list[int], window: int, taken: int) -> dict:
    """The state of a run that stopped with each lane ``taken`` samples into its ``window``.

    It follows from what a lane has read: whole shards, and of the next one the samples before an offset.
    """
    first = window * WINDOW
    visit, position = divmod(first, options.samples)
    place = Place(0, window, first, visit, position, offsets[position], taken)
    step = (first + taken) // options.batch * options.lanes
    return pack(data._identity(), [Progress(0, step, {(0, lane): place for lane in range(options.lanes)})])


def check(shards: list[Shard], options: Options, offsets: list[int]) -> None:
    """AssertionError: a stream taken up behind a few steps is not the uninterrupted one."""
    whole = open_stream(shards, options)
    steps = list(islice(whole.epoch(0), 6 * options.lanes))
    state = whole.state_dict()
    assert state == stopped_at(whole, options, offsets, 0, 6 * options.batch), "not the state that was expected"
    expected = next(whole.epoch(0, len(steps)))
    resumed = open_stream(shards, options)
    resumed.resume(state, 0, len(steps))
    batch = next(resumed.epoch(0, len(steps)))
    assert torch.equal(batch.index, expected.index) and torch.equal(batch.image, expected.image)


def measure(options: Options) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        report.say(f"writing {options.shards} shards of {options.samples} samples")
        shards = write_shards(Path(folder), options)
        offsets = [group.offset for group in read_shard(shards[0].url)]
        report.say("checking that a stream goes on where it was stopped")
        check(shards, options, offsets)
        per_lane = options.shards * options.samples // options.lanes
        last = max(per_lane // WINDOW - 1, 0)
        fresh = seconds_to_first_batch(shards, options, None)
        stops = {}
        data = open_stream(shards, options)
        for window in sorted({0, last // 2, last}):
            for taken in (options.batch, WINDOW // 2, WINDOW - options.batch):
                state = stopped_at(data, options, offsets, window, taken)
                name = f"{state['step'] / options.steps:.1%} of the epoch, {taken} of {WINDOW} in the window"
                stops[name] = seconds_to_first_batch(shards, options, state)
                report.say(f"{name}: {stops[name]:.2f} s")
    return {
        "benchmark": "resume",
        "machine": report.machine(CPU),
        "shards": options.shards,
        "samples_per_shard": options.samples,
        "batch": options.batch,
        "lanes": options.lanes,
        "window": WINDOW,
        "seconds_fresh": fresh,
        "seconds_worst": max(stops.values()),
        "stops": stops,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=1000, help="per shard")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lanes", type=int, default=2, help="virtual workers")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    result = measure(Options(given.shards, given.samples, given.batch, given.lanes))
    rows = [[name, f"{seconds:.2f}"] for name, seconds in result["stops"].items()]
    rows = [["a new epoch", f"{result['seconds_fresh']:.2f}"], *rows]
    title = f"From a stream's construction to its first batch ({result['machine']})"
    report.emit(result, report.table(title, ["stopped at", "seconds"], rows), given.json)


if __name__ == "__main__":
    main()
