"""Which folders are taken for classes, and what is refused or left out with a remark."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from open_clip import IMAGENET_CLASSNAMES

from training.evaluation.class_folders import find_classes

SYNSETS = ["n01440764", *(f"n{2_000_000 + i:08d}" for i in range(998)), "n15075141"]


def make(path: Path, *files: str) -> Path:
    """Files, which need not be pictures here; a name that ends in / is a folder."""
    for name in files:
        file = path / name
        (file if name.endswith("/") else file.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            file.write_bytes(b"")
    return path


def find(path: Path, names: list[str] | None = None):
    found = find_classes(path, "--imagenet-val X", names)
    return found.names, [[str(Path(file).relative_to(path)) for file in files] for files in found.pictures]


def remarks(path: Path) -> list[str]:
    return [remark.removeprefix("--imagenet-val X: ") for remark in find_classes(path, "--imagenet-val X").remarks]


def test_what_others_leave_in_folders(tmp_path):
    make(tmp_path, "ant/0.jpg", "ant/._0.jpg", "ant/Thumbs.db", "ant/.DS_Store", "ant/notes.txt", "bee/1.PNG")
    make(
        tmp_path,
        "ant/.ipynb_checkpoints/0-checkpoint.jpg",
        "ant/inner/2.webp",
        "._bee",
        "Thumbs.db",
        "README.jpg.txt",
    )
    for stray in (".ipynb_checkpoints", "__MACOSX", "lost+found", "@eaDir", "$RECYCLE.BIN", ".git"):
        make(tmp_path, f"{stray}/ant/0.jpg")
    assert find(tmp_path) == (["ant", "bee"], [["ant/0.jpg", "ant/inner/2.webp"], ["bee/1.PNG"]])
    assert remarks(tmp_path) == ["1 files whose names begin with a dot are not taken as pictures"]


def test_folders_without_pictures_are_no_classes(tmp_path):
    make(tmp_path, "ant/0.jpg", "bee/0.jpg", "empty/", "logs/out.txt", *(f"z{i}/" for i in range(5)))
    assert find(tmp_path)[0] == ["ant", "bee"]
    assert remarks(tmp_path) == [
        "folders without pictures are not taken as classes: empty, logs, z0, z1, z2 and 2 more"
    ]


def test_names_that_are_given(tmp_path):
    """For all folders, or for those with pictures; numbers in their order."""
    make(tmp_path, "2/a.jpg", "10/b.jpg", "11/")
    assert find(tmp_path, ["two", "ten", "eleven"]) == (["two", "ten", "eleven"], [["2/a.jpg"], ["10/b.jpg"], []])
    make(tmp_path, "notes/")
    assert find(tmp_path, ["two", "ten"]) == (["two", "ten"], [["2/a.jpg"], ["10/b.jpg"]])
    with pytest.raises(ValueError, match=r"X: classnames\.txt has 1 lines for 4 class folders, of which 2 have"):
        find(tmp_path, ["two"])


@pytest.mark.parametrize("names", [SYNSETS, list(map(str, range(1000))), [f"{i:04d}" for i in range(1000)]])
def test_imagenets_folders_with_others_beside_them(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir()
    make(tmp_path, f"{names[999]}/x.JPEG", "stray/", "999999.txt")
    found, pictures = find(tmp_path)
    assert found == list(IMAGENET_CLASSNAMES) and [files for files in pictures if files] == [
        [f"{names[999]}/x.JPEG"]
    ]
    assert pictures[999]
    assert remarks(tmp_path)[0] == "folders without pictures are not taken as classes: stray"
    assert remarks(tmp_path)[1].startswith("999 of 1000 classes have no pictures: ")
    make(tmp_path, "stray/0.jpg")
    with pytest.raises(ValueError, match=r"folders beside ImageNet's 1000 have pictures, too: stray; move them"):
        find(tmp_path)


def test_names_that_are_those_of_the_folders(tmp_path):
    """Then they say which is which, in whatever order."""
    make(tmp_path, "red_ant/0.jpg", "bee/0.jpg", "cat/0.jpg")
    for names in (["cat", "Red ant", "bee"], ["Red ant", "bee", "cat"]):
        found, pictures = find(tmp_path, names)
        assert found == names
        assert {name: files[0] for name, files in zip(found, pictures)} == {
            "cat": "cat/0.jpg",
            "Red ant": "red_ant/0.jpg",
            "bee": "bee/0.jpg",
        }
    assert find(tmp_path, ["one", "two", "three"])[1] == [["bee/0.jpg"], ["cat/0.jpg"], ["red_ant/0.jpg"]]


def test_names_with_numbers_before_them(tmp_path):
    """As in CUB, Caltech-256 and Stanford Dogs."""
    make(tmp_path / "a", "001.Black_footed_Albatross/0.jpg", "002.Laysan_Albatross/0.jpg")
    assert find(tmp_path / "a")[0] == ["Black footed Albatross", "Laysan Albatross"]
    assert remarks(tmp_path / "a") == [
        "class names are those of the folders without their numbers: Black footed Albatross, Laysan Albatross"
    ]
    make(tmp_path / "b", "n02085620-Chihuahua/0.jpg", "n02110958-pug/0.jpg")
    assert find(tmp_path / "b")[0] == ["Chihuahua", "pug"]
    make(tmp_path / "c", "3 amigos/0.jpg", "7-up/0.jpg", "cola/0.jpg")
    assert find(tmp_path / "c")[0] == ["3 amigos", "7-up", "cola"]


def test_names_that_say_nothing(tmp_path):
    make(tmp_path, "class_0/0.jpg", "Class1/0.jpg", "ant/0.jpg")
    assert find(tmp_path)[0] == ["Class1", "ant", "class 0"]
    (remark,) = remarks(tmp_path)
    assert remark.startswith("models will hardly know classes called Class1, class_0; put the class names into a")


def test_names_that_are_not_utf8(tmp_path):
    make(tmp_path, "ant/0.jpg", os.fsdecode(b"b\xe9e/0.jpg"))
    with pytest.raises(ValueError, match=r"the names of b\\xe9e are not utf-8; rename these folders, or put the"):
        find(tmp_path)
    found, pictures = find(tmp_path, ["ant", "bee"])
    assert found == ["ant", "bee"] and len(pictures[1]) == 1


def test_folders_that_are_links(tmp_path):
    make(tmp_path / "elsewhere", "ant/0.jpg", "bee/0.jpg")
    (tmp_path / "x").mkdir()
    for name in ("ant", "bee", "gone"):
        (tmp_path / "x" / name).symlink_to(tmp_path / "elsewhere" / name)
    assert find(tmp_path / "x") == (["ant", "bee"], [["ant/0.jpg"], ["bee/0.jpg"]])


def test_pictures_of_other_kinds(tmp_path):
    make(tmp_path, "ant/0.jpg", "ant/1.HEIC", "ant/2.heic", "ant/3.txt", "bee/0.gif", "bee/1.svg", "cat/0.jp2")
    assert find(tmp_path) == (["ant", "bee"], [["ant/0.jpg"], ["bee/0.gif"]])
    assert remarks(tmp_path) == [
        "folders without pictures are not taken as classes: cat",
        "pictures of other kinds are not used (2 .heic, 1 .svg, 1 .jp2); convert them to jpg or png",
    ]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            ["n01440764/0.jpg", "n01443537/0.jpg"],
            r"2 class folders are named by WordNet numbers .*, but are not ImageNet",
        ),
        (
            ["n01440764/0.jpg", "dog/0.jpg"],
            r"1 class folders are named by WordNet numbers .* into a classnames\.txt",
        ),
        (
            ["0/0.jpg", "1/0.jpg", "2/0.jpg"],
            r"3 class folders are named by numbers .*, but are not ImageNet's 1000; put",
        ),
        (["0/0.jpg", "1/0.jpg", "notes/"], r"2 class folders are named by numbers"),
        (["0/0.jpg", "1/0.jpg", "thumbs/0.jpg"], r"2 class folders are named by numbers \(0, 1\)"),
        (["ant/0.jpg", "(2)/0.jpg"], r"1 class folders are named by numbers \(\(2\)\)"),
        (
            ["ant/0.jpg", "bee/0.jpg", "thumbs/0.jpg"],
            r"it has pictures in thumbs, which looks like no class; move",
        ),
        (["ant/0.jpg", "bee/0.jpg", "Annotations/0.png", "ant (1)/0.jpg"], r"in Annotations, ant \(1\), which"),
        (
            ["ant/0.jpg", "bee/0.jpg", "val/0.jpg"],
            r"it has val, which is a part of a data set, no class; give .*/val",
        ),
        (["ant/0.jpg", "bee/0.jpg", "val/ant/0.jpg", "train/"], r"it has train and val, which are parts"),
        (
            ["ant/0.jpg", "bee/0.jpg", "more/ant/0.jpg", "more/bee/0.jpg"],
            r"further down, as .*/more/ant: give one",
        ),
        (
            ["v2-a/0/0.jpg", "v2-a/1/0.jpg", "v2-b/0/0.jpg"],
            r"one level further down, as .*/v2-a/0: give one of them",
        ),
        (["images/0.jpg", "notes.txt"], r"pictures in images, which looks like no class"),
        (["ant/0.jpg", "bee/"], r"ant is its only folder with pictures, .* one class every answer is right; give"),
        (
            ["train/a/0.jpg", "val/a/0.jpg"],
            r"it has train and val, which are parts of a data set, .*; give .*/val, or move",
        ),
        (
            ["train/a/0.jpg", "Val/0.jpg", "meta/0.jpg"],
            r"it has Val and train, which are parts .*; give .*/Val, or",
        ),
        (["test/0.jpg"], r"it has test, which is a part of a data set, no class; give .*/test, or"),
        (["train/ant/0.jpg", "train/bee/0.jpg"], r"it has train, .*; give .*/train, or"),
        (
            ["imagenetv2/0/a.jpg", "imagenetv2/1/b.jpg"],
            r"class folders seem to be one level further down, as .*/imagenetv2/0: give that folder$",
        ),
        (["0.jpg", "1.jpg"], r"its 2 pictures are not in a folder per class; move each into that of its class"),
        (["0.jpg", ".ipynb_checkpoints/1.jpg"], r"its 1 pictures are not in a folder per class"),
        (["ILSVRC2012_img_val.tar"], r"it has no folder per class, but ILSVRC2012_img_val\.tar; unpack it"),
        (["nshards.txt", "0.tar"], r"it is the inner folder of DataComp's webdataset; give /"),
        ([], r"it has neither a folder per class nor the files of DataComp's webdataset"),
    ],
)
def test_refused(tmp_path, files, says):
    with pytest.raises(ValueError, match=f"^--imagenet-val X: .*{says}"):
        find(make(tmp_path, *files))


def test_classes_that_are_called_like_parts_of_a_set(tmp_path):
    """CIFAR-100 has trains, and pictures may lie deeper."""
    assert find(make(tmp_path / "a", "train/0.jpg", "tank/0.jpg"))[0] == ["tank", "train"]
    assert find(make(tmp_path / "b", "ant/images/0.jpg", "bee/images/0.jpg"))[0] == ["ant", "bee"]
    make(tmp_path / "c", "ant/0.jpg", "bee/0.jpg", "val/", "train/")
    assert find(tmp_path / "c")[0] == ["ant", "bee"]


def test_names_that_look_like_none_can_be_given(tmp_path):
    make(tmp_path, "images/0.jpg", "masks/0.jpg", "class_2/a/0.jpg", "class_2/b/0.jpg")
    assert find(tmp_path, ["a", "b", "c"])[1] == [
        ["class_2/a/0.jpg", "class_2/b/0.jpg"],
        ["images/0.jpg"],
        ["masks/0.jpg"],
    ]
    (tmp_path / "empty").mkdir()  # it may be one of the three
    with pytest.raises(ValueError, match="it has pictures in images, masks, which"):
        find(tmp_path, ["a", "b", "c"])
    assert len(find(tmp_path, ["a", "b", "c", "d"])[1]) == 4
