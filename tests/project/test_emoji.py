"""The shard builder, on invented packages that a stand-in npm hands out."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from training.evaluation.zero_shot import open_set

SOURCE = Path(__file__).resolve().parents[2] / "scripts" / "emoji.py"
SPEC = importlib.util.spec_from_file_location("emoji_builder", SOURCE)
emoji = sys.modules["emoji_builder"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(emoji)

NAMES = [f"thing {i}" for i in range(120)] + ["flag: A", "flag: B"]
KINDS = ["food-fruit", "sky & weather", "hand-prop"]
NPM = """#!{python}
import pathlib, shutil, sys
assert sys.argv[1:3] == ["pack", "--loglevel=error"], sys.argv
with open("{log}", "a") as log:
    print(sys.argv[5], file=log)
file = sys.argv[5].strip("@").replace("/", "-").replace("@", "-") + ".tgz"
shutil.copy(pathlib.Path("{store}") / file, sys.argv[4])
"""


def picture(color: tuple[int, int, int, int], form: str) -> bytes:
    """48 × 48 pixels: the left half in `color`, the right half transparent black."""
    image = Image.new("RGBA", (48, 48))
    image.paste(color, (0, 0, 24, 48))
    out = io.BytesIO()
    image.save(out, form, **({"lossless": True} if form == "WEBP" else {}))
    return out.getvalue()


def pack(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages with 122 emoji, of which Fluent lacks the first two; 'thing 5' has one skin tone."""
    folder = tmp_path / "store"
    folder.mkdir()
    listing, words, art, fluent = [], [], {}, {}
    for i, name in enumerate(NAMES):
        code = f"{0x1F000 + i:X}" + ("-FE0F" if i % 2 else "")
        flag = name.startswith("flag")
        entry = {
            "unified": code,
            "image": f"{code.lower()}.png",
            "category": "Flags" if flag else "Objects",
            "subcategory": "country-flag" if flag else KINDS[i % 3],
            "sort_order": i,
        }
        word = {"hexcode": code, "label": name, "tags": [f"tag{i}{letter}" for letter in "abcd"]}
        color = (2 * i, 255 - 2 * i, 60, 255)
        art[entry["image"]] = picture(color, "PNG")
        if i > 1:  # Fluent's file names have no FE0F here
            fluent[f"{code.lower().split('-')[0]}.webp"] = picture(color, "WEBP")
        if name == "thing 5":
            entry["skin_variations"] = {"1F3FB": {"unified": f"{code}-1F3FB", "image": "tone.png"}}
            word["skins"] = [{"hexcode": f"{code}-1F3FB", "label": f"{name}: light skin tone"}]
            art["tone.png"] = picture(color, "PNG")
        listing.insert(0, entry)
        words.append(word)
    for vendor in ("google", "twitter"):
        files = {f"img/{vendor}/64/{name}": content for name, content in art.items()}
        pack(
            folder / f"emoji-datasource-{vendor}-16.0.0.tgz", {"emoji.json": json.dumps(listing).encode(), **files}
        )
    pack(folder / "lobehub-fluent-emoji-3d-1.1.0.tgz", {f"assets/{k}": v for k, v in fluent.items()})
    pack(folder / "emojibase-data-17.0.0.tgz", {"en/data.json": json.dumps(words).encode()})
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(NPM.format(python=sys.executable, store=folder, log=tmp_path / "npm.log"))
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent), prepend=":")
    monkeypatch.chdir(tmp_path)
    return folder


def fetched(store: Path) -> list[str]:
    log = store.parent / "npm.log"
    return log.read_text().split() if log.exists() else []


def read(folder: Path) -> list[dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("*.tar"), key=lambda path: int(path.stem)):
        with tarfile.open(shard) as tar:
            for member in tar:
                name, _, extension = member.name.partition(".")
                samples.setdefault(name, {})[extension] = tar.extractfile(member).read()
    return list(samples.values())


def names(samples: list[dict[str, bytes]]) -> set[str]:
    return {json.loads(sample["json"])["name"] for sample in samples}


def expected_held_out() -> set[str]:
    """First 64 bits of SHA-256 of the name in the lowest tenth: a tenth as exact as 122 names allow."""
    return {name for name in NAMES if int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 2**64 < 0.1}


def test_training_never_sees_the_held_out_tenth(store: Path) -> None:
    held_out = expected_held_out()
    assert 5 <= len(held_out) <= 20
    for vendor, missing in (("google", set()), ("fluent", {"thing 0", "thing 1"})):
        emoji.main(["train", "--vendor", vendor, "--out", f"{vendor}/train"])
        emoji.main(["train", "--vendor", vendor, "--names", "held-out", "--out", f"{vendor}/rest"])
        assert names(read(Path(vendor, "train"))) == set(NAMES) - held_out - missing
        assert names(read(Path(vendor, "rest"))) == held_out - missing


def test_keys_are_dense_rows(store: Path) -> None:
    emoji.main(["train", "--vendor", "google", "--out", "train", "--names", "all", "--shard-size", "100"])
    samples = read(Path("train"))
    keys = [json.loads(sample["json"])["key"] for sample in samples]
    assert keys == list(range(4 * len(NAMES)))
    assert json.loads(Path("train/sizes.json").read_text()) == {
        **{f"{i:05d}.tar": 100 for i in range(4)},
        "00004.tar": 88,
    }
    assert json.loads(Path("train/set.json").read_text())["samples"] == 488
    for turn in range(4):  # each round shows every picture once, in an order of its own
        assert names(samples[turn * 122 : (turn + 1) * 122]) == set(NAMES)
    orders = [[json.loads(s["json"])["name"] for s in samples[t * 122 : (t + 1) * 122]] for t in range(2)]
    assert orders[0] != orders[1]


def test_captions_are_of_three_kinds(store: Path) -> None:
    emoji.main(["train", "--vendor", "google", "--out", "train", "--names", "all", "--captions", "20"])
    kinds = {}
    for sample in read(Path("train")):
        about, text = json.loads(sample["json"]), sample["txt"].decode()
        name, *tags = text.split(", ")
        if text == "a " + about["subcategory"].replace("-", " "):
            kind = "subcategory"
        else:
            number = NAMES.index(name)
            assert name == about["name"] and set(tags) <= {f"tag{number}{letter}" for letter in "abcd"}
            assert len(tags) == len(set(tags)) and len(tags) in (0, 3)
            kind = "tags" if tags else "name"
        kinds.setdefault(about["name"], Counter())[kind] += 1
    for counts in kinds.values():  # systematic sampling: each picture's shares are exact
        assert (counts["subcategory"], counts["name"], counts["tags"]) == (6, 7, 7)


def test_four_captions_include_every_kind(store: Path) -> None:
    for name in NAMES:
        one = emoji.Emoji(name, name, ("x", "y", "z"), "Objects", "hand-prop", "1f000")
        for seed in range(5):
            texts = emoji.captions(one, 4, seed)
            assert "a hand prop" in texts and name in texts and any(", " in text for text in texts)


def test_pictures_are_composited_on_white(store: Path) -> None:
    emoji.main(["retrieval", "--vendor", "fluent", "--out", "set", "--size", "16"])
    for sample in read(Path("set")):
        number = NAMES.index(sample["txt"].decode())
        image = Image.open(io.BytesIO(sample["png"]))
        assert (image.mode, image.size) == ("RGB", (16, 16))
        left, right = image.getpixel((3, 8)), image.getpixel((13, 8))
        assert left == (2 * number, 255 - 2 * number, 60) and right == (255, 255, 255)


def test_retrieval_with_and_without_flags(store: Path) -> None:
    emoji.main(["retrieval", "--vendor", "twitter", "--out", "all"])
    emoji.main(["retrieval", "--vendor", "twitter", "--no-flags", "--out", "some"])
    assert [sample["txt"].decode() for sample in read(Path("all"))] == NAMES  # Unicode's order
    assert [sample["txt"].decode() for sample in read(Path("some"))] == NAMES[:-2]


def test_classification_is_datacomps_layout(store: Path) -> None:
    emoji.main(["classification", "--vendor", "twitter", "--out", "wds_emoji_test", "--shard-size", "50"])
    found = open_set("wds_emoji_test", "--imagenet-val")
    assert found.classnames == ["country flag", "food fruit", "hand prop", "sky & weather"]
    assert [template("hand prop") for template in found.templates] == ["a hand prop"]
    assert Counter(picture.label for picture in found.pictures) == {0: 2, 1: 40, 2: 40, 3: 40}
    assert {Path(picture.path).name for picture in found.pictures} == {"0.tar", "1.tar", "2.tar"}


def test_skin_tones_are_rows_of_their_own(store: Path) -> None:
    emoji.main(["train", "--vendor", "google", "--names", "all", "--captions", "1", "--skin-tones", "--out", "t"])
    samples = read(Path("t"))
    assert len(samples) == len(NAMES) + 1
    tone = emoji.Emoji("thing 5: light skin tone", "thing 5", (), "Objects", "hand-prop", "tone")
    assert tone.name in names(samples)
    assert tone.held_out == ("thing 5" in expected_held_out())


def test_same_arguments_same_bytes_and_a_second_run_does_nothing(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    for out in ("one", "two"):
        emoji.main(["train", "--vendor", "fluent", "--out", out])
    first = {path.name: path.read_bytes() for path in Path("one").glob("*.tar")}
    assert first == {path.name: path.read_bytes() for path in Path("two").glob("*.tar")}
    marked = Path("one/00000.tar").stat().st_mtime_ns
    capsys.readouterr()
    emoji.main(["train", "--vendor", "fluent", "--out", "one"])
    assert "there already" in capsys.readouterr().out
    assert Path("one/00000.tar").stat().st_mtime_ns == marked
    emoji.main(["train", "--vendor", "fluent", "--out", "one", "--seed", "1"])
    assert Path("one/00000.tar").read_bytes() != first["00000.tar"]


def test_an_interrupted_build_leaves_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setitem(emoji.BUILDERS, "train", interrupt)
        with pytest.raises(KeyboardInterrupt):
            emoji.main(["train", "--vendor", "google", "--out", "sets/train"])
    assert list(Path("sets").iterdir()) == []


def test_packages_are_fetched_once_and_again_when_broken(store: Path) -> None:
    emoji.main(["fetch", "--cache", "art"])
    emoji.main(["fetch", "--cache", "art"])
    assert sorted(fetched(store)) == sorted(emoji.PACKAGES.values())
    broken = Path("art/emojibase-data-17.0.0.tgz")
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    emoji.main(["fetch", "--cache", "art"])
    assert fetched(store)[4:] == ["emojibase-data@17.0.0"] and broken.read_bytes() == whole


def test_a_failing_npm_is_said(store: Path) -> None:
    (store / "emojibase-data-17.0.0.tgz").unlink()
    with pytest.raises(SystemExit, match=r"(?s)cannot fetch emojibase-data@17\.0\.0: .*FileNotFoundError"):
        emoji.main(["retrieval", "--vendor", "twitter", "--out", "set"])
    assert not Path("set").exists()


def test_refuses_what_cannot_be(capsys: pytest.CaptureFixture) -> None:
    for argument in ("--size", "--captions", "--shard-size"):
        with pytest.raises(SystemExit) as stopped:
            emoji.main(["train", "--vendor", "google", "--out", "x", argument, "0"])
        assert stopped.value.code == 2 and argument in capsys.readouterr().err
