"""Small data sets with real pixels for the tests: webdataset shards and csv files.

pattern = write_shards(tmp_path, 16, per_shard=8)          # a value for --train-data, keys 0..15
samples = [sample(i) for i in range(16)]                   # the same samples, to be spoiled one by one
samples[3].pop("json"); samples[5]["jpg"] = b"no image"
pattern = write_shards(tmp_path, samples, per_shard=8)
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = ("red", "green", "blue", "yellow", "purple", "white", "orange", "black")
SHAPES = ("waves", "rings", "stripes", "clouds", "hills")


def picture(i: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Picture ``i``, RGB, ``size`` = (width, height): smooth like a photograph and unlike every other one."""
    rng = np.random.default_rng(i)
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    waves = sum(
        np.sin(2 * np.pi * (fx * x + fy * y))[..., None] * color
        for fx, fy, color in zip(rng.uniform(-2, 2, 4), rng.uniform(-2, 2, 4), rng.uniform(-1, 1, (4, 3)))
    )
    return Image.fromarray(np.uint8(np.clip(128 + 45 * waves, 0, 255)))


def caption(i: int) -> str:
    return f"{COLORS[i % len(COLORS)]} {SHAPES[i // len(COLORS) % len(SHAPES)]} number {i}"


def encode(image: Image.Image, format: str = "jpeg", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **({"quality": 95} | options if format == "jpeg" else options))
    return file.getvalue()


def sample(i: int, size: tuple[int, int] = (48, 40), key: int | str | None = None) -> dict:
    """The members of sample ``i`` by extension; the json's ``key`` is a string of digits, like img2dataset's."""
    return {
        "__key__": f"{i:06d}",
        "jpg": encode(picture(i, size)),
        "txt": caption(i),
        "json": {"key": f"{i:09d}" if key is None else key, "caption": caption(i)},
    }


def write_tar(path: Path, samples: Iterable[Mapping]) -> Path:
    """One shard. Values may be bytes, str (utf-8) or anything that json can hold."""
    with tarfile.open(path, "w") as tar:
        for members in samples:
            for extension, value in members.items():
                if extension == "__key__":
                    continue
                data = (
                    value if isinstance(value, bytes) else value if isinstance(value, str) else json.dumps(value)
                )
                data = data.encode() if isinstance(data, str) else data
                info = tarfile.TarInfo(f"{members['__key__']}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(
    folder: Path,
    samples: int | Iterable[Mapping],
    per_shard: int | Iterable[int],
    size: tuple[int, int] = (48, 40),
) -> str:
    """Write ``00000.tar``, ``00001.tar``, … into ``folder`` and return the brace range that names them.

    ``samples`` is a number or a list of what ``sample`` returns; ``per_shard`` one size or each shard's.
    """
    samples = [sample(i, size) for i in range(samples)] if isinstance(samples, int) else list(samples)
    if isinstance(per_shard, int):
        per_shard = [len(samples[i : i + per_shard]) for i in range(0, len(samples), per_shard)]
    sizes = list(per_shard)
    assert sum(sizes) == len(samples), f"shards of {sizes} do not hold {len(samples)} samples"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ends = np.cumsum(sizes)
    for number, (end, count) in enumerate(zip(ends, sizes)):
        write_tar(folder / f"{number:05d}.tar", samples[end - count : end])
    return str(folder / f"{{00000..{len(sizes) - 1:05d}}}.tar")


def write_csv(folder: Path, samples: int, separator: str = "\t", size: tuple[int, int] = (48, 40)) -> str:
    """``data.csv`` with columns ``filepath`` and ``title`` (the flags' defaults), and its images; its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "data.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file, delimiter=separator)
        rows.writerow(["filepath", "title"])
        for i in range(samples):
            image = folder / f"{i:06d}.jpg"
            image.write_bytes(encode(picture(i, size)))
            rows.writerow([str(image), caption(i)])
    return str(path)
