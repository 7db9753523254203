"""The data path: images per second and core of ours, of the pipeline that everyone writes, of decoding alone.

    python benchmarks/data.py [--shards GLOB] [--workers W] [--json]

All three read the same shards (made on the spot, see ``photographs``), in one run, in turns; the best block of
each counts. A block begins when what the loader processes had prepared before is used up.

``ours``    ``training.data.build.build_train``: bytes of the tar to uint8 batches of ViT-B-16 with ids, loader
            processes and hand-over included.
``plain``   webdataset's pipeline with open_clip's train transform and tokenizer, in its ``WebLoader``.
``decode``  torchvision's JPEG decoder on bytes in memory, nothing else.

A rate is images per second of processor time, of all processes together: per core, whatever else the machine does.
``wall_...`` divides by the clock and by the number of loader processes; it needs as many idle cores and one more.

``ratio_plain``   ours / plain.     ``ratio_decode``  ours / decode.
``microseconds``  where our time goes, per sample, stage by stage in one process; ``the rest`` is what the whole
                  takes beyond the stages: parsing, shuffling, memory between processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "src"))

import open_clip
import torch
import webdataset as wds
from open_clip.transform import PreprocessCfg, image_transform_v2
from torchvision.io import ImageReadMode, decode_jpeg

import photographs
import report
from training.config.params import parse
from training.data.batch_memory import PREFETCH, BatchMemory
from training.data.build import build_train
from training.data.sources.paths import expand_shards
from training.data.sources.shards import read_shard
from training.data.tokenizer import Tokens
from training.data.transforms import TrainView
from training.distributed.process_group import World

FEW = 64  # images that the stages after decoding are timed with


@dataclass(frozen=True)
class Options:
    """Blocks of ``batches`` batches are timed, ``repeats`` of each variant."""

    shards: str
    workers: int
    batch_size: int
    batches: int
    repeats: int
    model: str

    @property
    def images(self) -> int:
        """Images of one block."""
        return self.batches * self.batch_size


@dataclass(frozen=True)
class Model:
    """What the data path asks of a model."""

    preprocess: PreprocessCfg
    tokenizer: Callable[[list[str]], torch.Tensor]


@dataclass(frozen=True)
class Block:
    """Seconds of one block: processor time of this process and its children, and the clock's."""

    cpu: float
    wall: float


def make_model(name: str) -> Model:
    """Preprocessing and tokenizer of an open_clip model, without the model."""
    size = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    return Model(PreprocessCfg(size=size), open_clip.get_tokenizer(name))


def ours(options: Options, model: Model) -> Iterator[object]:
    """Batches of the trainer's own data, as its flags make it, without an end."""
    config = parse(
        [
            *("--train-data", options.shards, "--dataset-type", "webdataset", "--data_size", "1000000000"),
            *("--train-num-samples", str(options.images), "--batch-size", str(options.batch_size)),
            *("--workers", str(options.workers), "--fastclip", "--model", options.model),
        ]
    )
    train = build_train(config, World(0, 0, 1, 1, torch.device("cpu")), model, None)
    return (batch for epoch in count() for batch in train.epoch(epoch))


def plain(options: Options, model: Model) -> Iterator[object]:
    """The same from webdataset's own parts."""
    transform = image_transform_v2(model.preprocess, is_train=True)
    dataset = (
        wds.WebDataset(expand(options.shards), resampled=True, shardshuffle=False)
        .shuffle(256)
        .decode("pilrgb")
        .rename(image="jpg;png;jpeg;webp", text="txt")
        .map_dict(image=transform, text=lambda text: model.tokenizer(text)[0])
        .to_tuple("image", "text")
        .batched(options.batch_size)
    )
    prefetch = {"prefetch_factor": PREFETCH} if options.workers else {}
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=options.workers, **prefetch))


def decode(options: Options, model: Model) -> Iterator[object]:
    """As many decoded JPEGs, one after the other; none is kept."""
    encoded = [torch.frombuffer(bytearray(image), dtype=torch.uint8) for image, _ in read(options.shards)]
    while True:
        for start in range(0, options.images, options.batch_size):
            for i in range(start, start + options.batch_size):
                decode_jpeg(encoded[i % len(encoded)], mode=ImageReadMode.RGB)
            yield None


MAKERS = {"ours": ours, "plain": plain, "decode": decode}


def expand(shards: str) -> list[str]:
    return [url for source in expand_shards(shards) for url in source]


def read(shards: str) -> list[tuple[bytes, str]]:
    """Encoded image and caption of all samples."""
    groups = (group for url in expand(shards) for group in read_shard(url))
    return [(group.files.members["jpg"], group.files.members["txt"].decode()) for group in groups]


def cpu_seconds() -> float:
    """Processor time that this process and its living children have used."""
    children = (child.pid for child in multiprocessing.active_children())
    return time.process_time() + sum(time.clock_gettime(_clock_of(pid)) for pid in children)


def _clock_of(pid: int) -> int:
    return (~pid << 3) | 2  # Linux: clock_getcpuclockid(3) of another process


def wait_until_idle() -> None:
    """Until the loader processes have filled their queues, so that variants do not run into each other."""
    before = -1.0
    while cpu_seconds() - before > 0.002:
        before = cpu_seconds()
        time.sleep(0.1)


def time_block(batches: Iterator[object], options: Options) -> Block:
    """One block, after what was prepared before it has been taken."""
    for _ in islice(batches, PREFETCH * options.workers + 1):
        pass
    cpu, wall = cpu_seconds(), time.perf_counter()
    for _ in islice(batches, options.batches):
        pass
    block = Block(cpu_seconds() - cpu, time.perf_counter() - wall)
    wait_until_idle()
    return block


def time_variants(options: Options, model: Model) -> dict[str, list[Block]]:
    """Blocks of each variant, in turns; a first one of each, with cold caches, is left out."""
    streams = {name: make(options, model) for name, make in MAKERS.items()}
    blocks: dict[str, list[Block]] = {name: [] for name in MAKERS}
    for turn in range(options.repeats + 1):
        for name, batches in streams.items():
            block = time_block(batches, options)
            if turn:
                blocks[name].append(block)
    return blocks


def time_stages(options: Options, model: Model) -> dict[str, float]:
    """Microseconds per sample of each stage of our path in one process, best of the repeats."""
    view, tokens, memory = TrainView(model.preprocess), Tokens(model.tokenizer), BatchMemory(shared=True)
    samples = read(options.shards)
    texts, seeds = [text for _, text in samples], range(len(samples))
    few = [image for image, _ in samples[:FEW]]  # their pixels stay in memory, where more would be slower
    images = [view.decode(image) for image in few]
    views = [view(image, i).target for i, image in enumerate(images)]

    def decoding() -> None:
        for image in few:
            view.decode(image)

    def cropping() -> None:
        for i, image in enumerate(images):
            view(image, i)

    stages = {
        "reading": (lambda: read(options.shards), len(samples)),
        "decoding": (decoding, len(few)),
        "crop and resize": (cropping, len(few)),
        "stacking": (lambda: memory.stack(views), len(few)),
        "tokens": (lambda: tokens(texts, seeds), len(samples)),
    }
    best = dict.fromkeys(stages, float("inf"))
    for _ in range(options.repeats + 1):
        for name, (stage, n) in stages.items():
            started = time.process_time()
            stage()
            best[name] = min(best[name], 1e6 * (time.process_time() - started) / n)
    return best


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        options, as_json = options_from(Path(folder))
        torch.set_num_threads(1)
        model = make_model(options.model)
        report.say(f"timing {options.repeats} x {options.images} images of each, in turns")
        blocks = time_variants(options, model)
        report.say("timing the stages")
        stages = time_stages(options, model)
    cores = {name: max(options.workers, 1) if name in ("ours", "plain") else 1 for name in MAKERS}
    rates = {name: [options.images / block.cpu for block in of] for name, of in blocks.items()}
    wall = {name: [options.images / block.wall / cores[name] for block in of] for name, of in blocks.items()}
    result = {
        **{f"{name}_per_second": max(rates[name]) for name in MAKERS},
        "ratio_plain": ratio(rates, "plain"),
        "ratio_decode": ratio(rates, "decode"),
        **{f"wall_{name}_per_second": max(wall[name]) for name in MAKERS},
        "wall_ratio_plain": ratio(wall, "plain"),
        "wall_ratio_decode": ratio(wall, "decode"),
        "microseconds": stages | {"the rest": 1e6 / max(rates["ours"]) - sum(stages.values())},
        "workers": options.workers,
        "batch_size": options.batch_size,
        "batches": options.batches,
        "repeats": options.repeats,
        "model": options.model,
        "machine": report.machine(torch.device("cpu")),
    }
    report.emit(result, describe(result), as_json)


def ratio(rates: dict[str, list[float]], other: str) -> float:
    """Ours to ``other``, the best block of each."""
    return max(rates["ours"]) / max(rates[other])


def describe(r: dict) -> str:
    rows = [(name, f"{r[f'{name}_per_second']:.0f}", f"{r[f'wall_{name}_per_second']:.0f}") for name in MAKERS]
    rows += [(f"ours / {n}", f"{r[f'ratio_{n}']:.2f}", f"{r[f'wall_ratio_{n}']:.2f}") for n in ("plain", "decode")]
    title = (
        f"Data path: {r['workers']} loader process(es), batch {r['batch_size']}, best of {r['repeats']} blocks of "
        f"{r['batches']} batches; {r['machine']}"
    )
    text = report.table(title, ("images/s", "per core", "by the clock"), rows)
    total = sum(r["microseconds"].values())
    rows = [(name, f"{us:.0f}", f"{us / total:.0%}") for name, us in r["microseconds"].items()]
    rows.append(("", f"{total:.0f}", ""))
    return f"{text}\n{report.table('Where our time goes', ('', 'us/sample', 'share'), rows)}"


def options_from(folder: Path) -> tuple[Options, bool]:
    """Options; shards are written to ``folder`` where none are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shards", help="shards of JPEGs with captions, a value for --train-data (default: made on the spot)")
    add("--samples", type=int, default=512, help="samples of the shards that are made")
    add("--workers", type=int, default=1, help="loader processes of ours and plain; 0: none")
    add("--batch-size", type=int, default=64, help="images of a batch")
    add("--batches", type=int, default=8, help="batches of one timed block")
    add("--repeats", type=int, default=15, help="timed blocks of each; the best counts")
    add("--model", default="ViT-B-16", help="open_clip model whose preprocessing and tokenizer are used")
    add("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    given = vars(parser.parse_args())
    as_json, samples = given.pop("json"), given.pop("samples")
    if given["shards"] is None:
        report.say(f"making {samples} samples")
        given["shards"] = photographs.write_shards(folder, samples, shards=2)
    return Options(**given), as_json


if __name__ == "__main__":
    main()
