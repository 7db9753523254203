"""A made-up data set in the layout of ``scripts/icons.py``, learned in seconds: colored shapes and their names."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from study.sets import write

COLORS = {"red": "#d22", "green": "#2a2", "blue": "#22d", "black": "#111", "orange": "#e80", "purple": "#82a"}
SHAPES = ("circle", "square", "triangle", "cross", "bar")
NAMES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
TEMPLATES = ("{c}", "a {c}")


def make(root: Path, train: int = 192, test: int = 60) -> None:
    """Write halves, zero-shot and retrieval sets below ``root``."""
    for seed, half in enumerate(("a", "b", "emoji")):
        write(root / half, [_pair(seed, i) for i in range(train)], per_shard=train // 2)
    for seed, part in enumerate(("test", "val"), start=2):
        write(root / f"retrieval_{part}", [_pair(seed, i) for i in range(len(NAMES))], per_shard=16)
        _zero_shot(root / f"wds_icons_{part}", seed, test)


def _pair(seed: int, i: int) -> dict[str, bytes]:
    return {"png": _picture(seed, i), "txt": NAMES[i % len(NAMES)].encode()}


def _picture(seed: int, i: int) -> bytes:
    """Picture ``i`` of name ``i`` modulo their number: at a random place, of a random size."""
    rng = np.random.default_rng((seed, i))
    color, shape = NAMES[i % len(NAMES)].split()
    size = int(rng.integers(14, 28))
    left, top = (int(rng.integers(0, 32 - size)) for _ in range(2))
    right, bottom, middle = left + size, top + size, left + size // 2
    image = Image.new("RGB", (32, 32), "white")
    draw, fill = ImageDraw.Draw(image), COLORS[color]
    match shape:
        case "circle":
            draw.ellipse((left, top, right, bottom), fill=fill)
        case "square":
            draw.rectangle((left, top, right, bottom), fill=fill)
        case "triangle":
            draw.polygon([(middle, top), (left, bottom), (right, bottom)], fill=fill)
        case "cross":
            draw.line((left, top, right, bottom), fill=fill, width=4)
            draw.line((left, bottom, right, top), fill=fill, width=4)
        case "bar":
            draw.rectangle((left, top + size // 3, right, bottom - size // 3), fill=fill)
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def _zero_shot(folder: Path, seed: int, count: int) -> None:
    samples = [{"png": _picture(seed, i), "cls": str(i % len(NAMES)).encode()} for i in range(count)]
    write(folder / "test", samples, per_shard=count)
    (folder / "test" / "00000.tar").rename(folder / "test" / "0.tar")
    (folder / "test" / "nshards.txt").write_text("1\n")
    (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    (folder / "set.json").write_text(json.dumps({"samples": count, "classes": len(NAMES)}))
