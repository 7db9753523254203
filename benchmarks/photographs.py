"""Shards of photographs with captions like those of the web, made on the spot.

The photographs are crops, mirrored or not, of those that installed packages ship: matplotlib's one, and those of
scikit-learn and scikit-image where they are installed.

Captions have 4 to 20 words of CLIP's vocabulary, which is in the order of frequency, drawn by Zipf's law: few
words make most of the text, and rare ones keep coming. Every eighth has a character beyond ASCII or an entity.
"""

from __future__ import annotations

import io
import json
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image, ImageOps

WIDTH, HEIGHT = 560, 423
QUALITY = 90

_SHIPPED = {
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "skimage": ("data/rocket.jpg", "data/coffee.png", "data/chelsea.png"),
}
_ODD = ("café", "“{}”", "{} – {}", "{} &amp; {}", "{}’s", "Zürich", "{} &quot;{}&quot;", "™", "日本", "½")


def write_shards(folder: Path, samples: int, shards: int, seed: int = 0) -> str:
    """``samples`` dealt to ``shards`` tar files, keys 0, 1, …; returns the value for ``--train-data``."""
    rng = np.random.default_rng(seed)
    sources, words = _photographs(), _words()
    for number in range(shards):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for key in range(number * samples // shards, (number + 1) * samples // shards):
                caption = _caption(words, odd=key % 8 == 7, rng=rng)
                about = {"key": f"{key:09d}", "caption": caption, "url": f"https://example.com/{key}.jpg"}
                about |= {"width": WIDTH, "height": HEIGHT, "status": "success", "sha256": rng.bytes(32).hex()}
                _add(tar, f"{key:09d}.jpg", _jpeg(sources[key % len(sources)], rng))
                _add(tar, f"{key:09d}.txt", caption.encode())
                _add(tar, f"{key:09d}.json", json.dumps(about).encode())
    return str(folder / f"{{00000..{shards - 1:05d}}}.tar")


def _photographs() -> list[Image.Image]:
    paths = []
    for package, names in _SHIPPED.items():
        if spec := find_spec(package):
            paths += [path for name in names if (path := Path(spec.origin).parent / name).exists()]
    if not paths:
        raise FileNotFoundError(
            "matplotlib's sample photograph is missing; pip install --force-reinstall matplotlib"
        )
    return [Image.open(path).convert("RGB") for path in paths]


def _jpeg(photo: Image.Image, rng: np.random.Generator) -> bytes:
    """A random part of the photograph, at least 70 % of what fits, at the size of the benchmark."""
    most = min(photo.width, photo.height * WIDTH / HEIGHT)
    width = most * rng.uniform(0.7, 1.0)
    height = width * HEIGHT / WIDTH
    left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
    part = photo.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    file = io.BytesIO()
    (ImageOps.mirror(part) if rng.integers(2) else part).save(file, "jpeg", quality=QUALITY)
    return file.getvalue()


def _words() -> list[str]:
    whole = (token.removesuffix("</w>") for token in SimpleTokenizer().encoder if token.endswith("</w>"))
    return [word for word in whole if word.isascii() and word.isalpha() and len(word) > 1]


def _caption(words: list[str], odd: bool, rng: np.random.Generator) -> str:
    chances = 1 / np.arange(3, len(words) + 3)
    drawn = [words[i] for i in rng.choice(len(words), rng.integers(4, 21), p=chances / chances.sum())]
    drawn[0] = drawn[0].capitalize()
    if odd:
        drawn.append(rng.choice(_ODD).format(*drawn))
    return " ".join(drawn) + rng.choice(["", ".", ", 2021", " | Blog", "!", " (1 of 3)"])


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
