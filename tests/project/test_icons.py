"""The builder of icons, on an invented package that a stand-in npm hands out."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from PIL import Image

from training.evaluation.zero_shot import open_set

pytest.importorskip("resvg_py", reason="icons are drawn by resvg-py")

BUILDER = Path(__file__).resolve().parents[2] / "scripts" / "icons.py"
PACKAGE = "iconify-json-2.2.535.tgz"
CATEGORY = "UI 24px"
# prefix: names. Of the rest, a gets the 1st, 3rd, ... by size, b the 2nd, 4th, ...
CONCEPTS = ("home", "user", "mail")
STYLES = ("", "-outline", "-filled", "-bold", "-thin")
TRAINING = {
    "first": [f"{concept}{style}" for concept in CONCEPTS for style in STYLES]
    + ["only-in-a", "tree-24", "tree-48"],
    "second": [f"{concept}{style}" for concept in CONCEPTS for style in STYLES] + ["copied"],
    "third": ["lamp"],
}
EVALUATED = {
    "lucide": ["home", "user", "house-2", "copied"],
    "tabler": ["home", "home-filled", "user", "360", "blank", "broken"],
    "ri": ["home-line", "home-fill", "user-fill", "mail-line"],
    "carbon": ["home", "user-line", "user-alt"],
    "uil": ["home", "user"],
    "gg": ["home", "mail", "mail-outline", "user"],
}
OTHERS = {"famicons": ["home"], "hidden": ["home"], "noto": ["home"]}
NPM = """#!{python}
import pathlib, shutil, sys
assert sys.argv[1:3] == ["pack", "--loglevel=error"], sys.argv
with open("{log}", "a") as log:
    print(sys.argv[5], file=log)
shutil.copy("{store}", pathlib.Path(sys.argv[4]) / "{package}")
"""


def icon(number: int, name: str) -> dict:
    """A rectangle whose place and height are its own, in a drawing of 24 × 12 that starts at (2, 0)."""
    body = f'<path fill="currentColor" d="M{2 + number % 12} 0h8v{2 + number // 12}h-8z"/>'
    if name == "copied":
        body = '<circle cx="8" cy="6" r="5" fill="#f00"/>'
    if name in ("user-line", "user-alt"):
        body = '<circle cx="9" cy="6" r="5" fill="currentColor"/>'
    if name == "blank":
        body = '<path fill="none" d="M0 0h8v2h-8z"/>'
    if name == "broken":
        body = "<path"
    return {"body": body, "height": 48 if name == "tree-48" else 12, "width": 48 if name == "tree-48" else 24}


def pack(path: Path) -> None:
    collections, files = {}, {}
    number = 0
    for prefix, names in (TRAINING | EVALUATED | OTHERS).items():
        category = "Emoji" if prefix == "noto" else CATEGORY
        about = {"name": prefix.title(), "author": {"name": "A"}, "license": {"title": "MIT", "spdx": "MIT"}}
        collections[prefix] = about | {"category": category, "hidden": prefix == "hidden"}
        icons = {}
        for name in names:
            icons[name] = icon(number, name)
            number += 1
        icons[f"{names[0]}-secret"] = icon(number, "x") | {"hidden": True}
        files[f"json/{prefix}.json"] = {"prefix": prefix, "icons": icons, "left": 2, "width": 24, "height": 12}
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {"collections.json": collections, **files}.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def build(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    command = [sys.executable, str(BUILDER), "--workers", "2", "--shard-size", "10", *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an npm, and data/icons as a real process has built it."""
    folder = tmp_path_factory.mktemp("icons")
    pack(folder / "store.tgz")
    npm = folder / "bin" / "npm"
    npm.parent.mkdir()
    names = {
        "python": sys.executable,
        "store": folder / "store.tgz",
        "package": PACKAGE,
        "log": folder / "npm.log",
    }
    npm.write_text(NPM.format(**names))
    npm.chmod(0o755)
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


def read(folder: Path) -> list[dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("*.tar"), key=lambda path: int(path.stem)):
        with tarfile.open(shard) as tar:
            for member in tar:
                name, _, extension = member.name.partition(".")
                samples.setdefault(name, {})[extension] = tar.extractfile(member).read()
    return list(samples.values())


def names_by_set(samples: list[dict[str, bytes]]) -> dict[str, set[str]]:
    found = defaultdict(set)
    for sample in samples:
        about = json.loads(sample["json"])
        found[about["set"]].add(about["name"])
    return dict(found)


def test_halves_are_dealt_by_set_and_share_no_picture_with_the_test(made: Path) -> None:
    a, b = (names_by_set(read(made / "data/icons" / half)) for half in "ab")
    # One size of a name is kept, the larger; 'third' is the third largest, so that it is a's again.
    assert a == {"first": set(TRAINING["first"]) - {"tree-24"}, "third": {"lamp"}}
    assert b == {"second": set(TRAINING["second"]) - {"copied"}}  # lucide has the same circle
    listed = json.loads((made / "data/icons/sets.json").read_text())
    assert listed.keys() == (TRAINING | EVALUATED | OTHERS).keys() - {"hidden", "noto"}
    assert listed["famicons"]["part"] == "left out" and listed["gg"]["part"] == "val"
    assert listed["lucide"] == {"part": "test", "pictures": 4, "name": "Lucide", "author": "A", "license": "MIT"}


def test_training_samples_have_captions_and_dense_rows_in_a_mixed_order(made: Path) -> None:
    samples = read(made / "data/icons/a")
    abouts = [json.loads(sample["json"]) for sample in samples]
    assert [about["key"] for about in abouts] == list(range(len(samples)))
    text = {about["name"]: sample["txt"].decode() for about, sample in zip(abouts, samples)}
    assert text["home-outline"] == "home outline" and text["tree-48"] == "tree"
    assert [about["name"] for about in abouts] != sorted(about["name"] for about in abouts)
    described = json.loads((made / "data/icons/a/set.json").read_text())
    assert described["samples"] == len(samples) == 18 and described["shards"] == 2 and described["sets"] == 2


def test_pictures_are_centred_on_white(made: Path) -> None:
    samples = {json.loads(sample["json"])["name"]: sample["png"] for sample in read(made / "data/icons/a")}
    first = Image.open(io.BytesIO(samples["home"])).convert("RGB")
    assert first.size == (32, 32)
    # 24 × 12 from (2, 0) becomes a square of 24 with 6 above: the rectangle (2..10, 0..2) is at 0..10.7, 8..10.7.
    dark = [(x, y) for x in range(32) for y in range(32) if first.getpixel((x, y)) == (0, 0, 0)]
    assert (min(dark), max(dark)) == ((0, 8), (9, 9))
    assert first.getpixel((20, 9)) == first.getpixel((3, 4)) == (255, 255, 255)


def test_zero_shot_set_is_datacomps_layout(made: Path) -> None:
    folder = made / "data/icons/wds_icons_test"
    found = open_set(str(folder), "--imagenet-val")
    # home has 7 test pictures; user 6, of which carbon's two are the same; mail 1; others are not in both halves.
    assert found.classnames == ["home", "user"]
    assert Counter(picture.label for picture in found.pictures) == {0: 7, 1: 5}
    assert [template("home") for template in found.templates] == ["home", "home outline", "home filled"]
    assert (folder / "test/nshards.txt").read_text() == "2"
    sets = names_by_set(read(folder / "test"))
    assert sets.keys() == {"lucide", "tabler", "ri", "carbon", "uil"}


def test_validation_has_its_own_concepts(made: Path) -> None:
    folder = made / "data/icons/wds_icons_val"
    assert (folder / "classnames.txt").read_text().split() == ["mail"]  # twice in gg, home and user once
    assert names_by_set(read(folder / "test")) == {"gg": {"mail", "mail-outline"}}


def test_retrieval_has_each_caption_once(made: Path) -> None:
    samples = read(made / "data/icons/retrieval_test")
    captions = Counter(sample["txt"].decode() for sample in samples)
    # A name of numbers alone stays as it is; what is blank or cannot be drawn is not there.
    assert set(captions.values()) == {1}
    assert captions.keys() == {
        *("home", "user", "house", "copied", "home filled", "360", "home line", "home fill", "user fill"),
        *("mail line", "user line", "user alt"),
    }


def test_same_arguments_same_bytes_from_drawn_sets(made: Path) -> None:
    drawn = {path: path.stat().st_mtime_ns for path in made.glob(".cache/icons/*/*.zip")}
    assert len(drawn) == 10
    gone = next(iter(drawn))
    gone.unlink()  # as if the first run had been stopped
    done = build(made, "--out", "again")
    assert done.returncode == 0, done.stderr
    first, second = (
        {path.relative_to(made / out): path.read_bytes() for path in (made / out).rglob("*.*") if path.is_file()}
        for out in ("data/icons", "again")
    )
    assert first == second and len(first) > 15
    after = {path: path.stat().st_mtime_ns for path in drawn}
    assert [path for path in drawn if after[path] != drawn[path]] == [gone]
    assert (made / "npm.log").read_text().split() == ["@iconify/json@2.2.535"]


def test_what_is_there_is_not_made_again_unless_it_differs(made: Path) -> None:
    flags = ("--out", "small")
    assert build(made, *flags, "--size", "8").returncode == 0
    made_at = (made / "small/recipe.json").stat().st_mtime_ns
    assert "small: there already" in build(made, *flags, "--size", "8").stdout
    assert (made / "small/recipe.json").stat().st_mtime_ns == made_at
    first = [json.loads(sample["json"])["name"] for sample in read(made / "small/a")]
    assert build(made, *flags, "--size", "8", "--seed", "1").returncode == 0
    assert [json.loads(sample["json"])["name"] for sample in read(made / "small/a")] != first


def test_what_has_emoji_besides_serves_without(made: Path) -> None:
    assert build(made, "--out", "more", "--size", "8").returncode == 0
    described = made / "more" / "recipe.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"emoji": True}))
    assert "more: there already" in build(made, "--out", "more", "--size", "8").stdout


def test_a_folder_with_other_files_is_left_alone(made: Path) -> None:
    (made / "mine").mkdir()
    (made / "mine" / "thesis.txt").write_text("years")
    done = build(made, "--out", "mine")
    assert done.returncode == 1 and "--out mine: it holds other files" in done.stderr
    assert (made / "mine" / "thesis.txt").read_text() == "years"


def test_sets_are_listed_with_their_licences(made: Path) -> None:
    done = build(made, "--list")
    assert "| test | lucide | Lucide | A | MIT | 4 |" in done.stdout.splitlines()
    assert len(done.stdout.splitlines()) == 2 + len(TRAINING | EVALUATED) + 1
    done = build(made, "--list", "--out", "nowhere")
    assert done.returncode == 1 and "run scripts/icons.py --out nowhere first" in done.stderr


def test_a_failing_npm_is_said_and_leaves_nothing(made: Path) -> None:
    npm = made / "bin" / "npm"
    words = npm.read_text()
    npm.write_text("#!/bin/sh\necho no such package >&2\nexit 1\n")
    try:
        done = build(made, "--cache", "empty", "--out", "none")
    finally:
        npm.write_text(words)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot fetch @iconify/json@2.2.535" in done.stderr and "no such package" in done.stderr
    assert not (made / "none").exists() and list((made / "empty").iterdir()) == []


@pytest.mark.parametrize("flag", ["--size", "--shard-size", "--workers"])
def test_refuses_what_cannot_be(flag: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(BUILDER), flag, "0"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and f"{flag} 0: must be at least 1" in done.stderr
