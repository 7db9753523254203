"""Zero-shot data sets in both layouts, and what is counted on them."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from torchvision.transforms.functional import pil_to_tensor

from tests.support import shards
from tests.support.pictures import write_folders
from training.evaluation.zero_shot import (
    PictureBatches,
    Pictures,
    accuracies,
    hits,
    nearest,
    open_set,
    zero_shot_metrics,
)


def write_datacomp(path, labels, per_shard=4, formats=("jpeg", "png", "webp")):
    """The layout of the DataComp evaluation, three classes."""
    (path / "test").mkdir(parents=True)
    (path / "classnames.txt").write_text("red fox\ngrey wolf\ntiger\n")
    (path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nthe {c}\n")
    extensions = {"jpeg": "jpg", "png": "png", "webp": "webp"}
    samples = []
    for i, label in enumerate(labels):
        form = formats[i % len(formats)]
        data = shards.encode(shards.picture(i), form)
        samples.append({"__key__": f"s{i:04d}", extensions[form]: data, "cls": str(label), "json": {}})
    starts = range(0, len(samples), per_shard)
    for number, start in enumerate(starts):
        shards.write_tar(path / "test" / f"{number}.tar", samples[start : start + per_shard])
    (path / "test" / "nshards.txt").write_text(f"{len(starts)}\n")
    return str(path)


def test_folder_names_become_class_names(tmp_path):  # the rest of such folders: test_class_folders
    found = open_set(write_folders(tmp_path, ["tabby_cat", "dog", "ant"], pictures=2), "--imagenet-val")
    assert found.classnames == ["ant", "dog", "tabby cat"]
    assert [p.label for p in found.pictures] == [0, 0, 1, 1, 2, 2]
    prompts = [template("ant") for template in found.templates]
    assert prompts == [template("ant") for template in OPENAI_IMAGENET_TEMPLATES]


def test_classnames_file_wins_and_must_fit(tmp_path):
    folder = write_folders(tmp_path, ["n01440764", "n01443537"])
    with pytest.raises(ValueError, match=r"classnames\.txt"):
        open_set(folder, "--imagenet-val")
    (tmp_path / "classnames.txt").write_text("tench\ngoldfish\n")
    assert open_set(folder, "--imagenet-val").classnames == ["tench", "goldfish"]
    (tmp_path / "classnames.txt").write_text("tench\n")
    with pytest.raises(ValueError, match="1 lines for 2 class folders"):
        open_set(folder, "--imagenet-val")


def test_imagenet_v2_folders_are_sorted_as_numbers(tmp_path):
    for number in range(1000):
        (tmp_path / str(number)).mkdir()
    for number in (9, 10, 100, 999):
        shards.picture(number, (8, 8)).save(tmp_path / str(number) / "x.jpeg")
    found = open_set(str(tmp_path), "--imagenet-v2")
    assert found.classnames == list(IMAGENET_CLASSNAMES)
    assert [p.label for p in found.pictures] == [9, 10, 100, 999]


def test_imagenet_synsets_get_open_clips_names(tmp_path):
    synsets = ["n01440764", *(f"n{2_000_000 + i:08d}" for i in range(998)), "n15075141"]
    for name in synsets:
        (tmp_path / name).mkdir()
    shards.picture(0, (8, 8)).save(tmp_path / "n15075141" / "x.JPEG", format="jpeg")
    found = open_set(str(tmp_path), "--imagenet-val")
    assert found.classnames[found.pictures[0].label] == "toilet paper"


@pytest.mark.parametrize("make", [lambda path: None, lambda path: (path / "empty_class").mkdir()])
def test_nothing_to_read_is_an_error(tmp_path, make):
    make(tmp_path)
    with pytest.raises(ValueError, match="--imagenet-val"):
        open_set(str(tmp_path), "--imagenet-val")
    with pytest.raises(ValueError, match="no such folder"):
        open_set(str(tmp_path / "absent"), "--imagenet-val")


def test_datacomp_layout(tmp_path):
    labels = [2, 0, 1, 1, 0, 2, 2]
    found = open_set(write_datacomp(tmp_path, labels), "--imagenet-val")
    assert found.classnames == ["red fox", "grey wolf", "tiger"]
    assert [p.label for p in found.pictures] == labels
    assert [t("tiger") for t in found.templates] == ["a photo of a tiger.", "the tiger"]
    pictures = Pictures(found.pictures, pil_to_tensor)
    for i, label in enumerate(labels):  # lossy formats: near the picture that was written, far from all others
        image, read = pictures[i]
        assert read == label
        errors = [(image.float() - pil_to_tensor(shards.picture(j)).float()).abs().mean() for j in range(7)]
        assert int(np.argmin(errors)) == i


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: (path / "classnames.txt").unlink(), "classnames.txt is missing"),
        (lambda path: (path / "test" / "1.tar").unlink(), "1.tar is missing"),
        (lambda path: (path / "classnames.txt").write_text("one\ntwo\n"), "holds '2', not a class number 0..1"),
        (
            lambda path: (path / "classnames.txt").write_text("one\n\nthree\n"),
            r"line 2 of classnames\.txt is empty",
        ),
        (
            lambda path: (path / "classnames.txt").write_text('["a", "b", "c"]'),
            r"classnames\.txt holds JSON; write one",
        ),
        (
            lambda path: (path / "classnames.txt").write_bytes(b"a\nb\xe9\nc"),
            r"classnames\.txt, line 2: byte 0xe9 is",
        ),
        (
            lambda path: (path / "test" / "nshards.txt").write_text("two"),
            r"nshards\.txt holds 'two', not the number",
        ),
        (lambda path: (path / "test" / "1.tar").write_bytes(b"x" * 700), r"1\.tar cannot be read as a tar file"),
        (
            lambda path: (path / "test" / "0.tar").write_bytes((path / "test" / "0.tar").read_bytes()[:1500]),
            r"0\.tar",
        ),
    ],
)
def test_datacomp_layout_that_contradicts_itself(tmp_path, spoil, message):
    folder = write_datacomp(tmp_path, [2, 0, 1, 1, 0])
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_set(folder, "--imagenet-val")


def test_a_picture_without_a_class_is_named(tmp_path):
    folder = write_datacomp(tmp_path, [0])
    shards.write_tar(tmp_path / "test" / "0.tar", [{"__key__": "lonely", "png": b"x"}])
    with pytest.raises(ValueError, match="lonely"):
        open_set(folder, "--imagenet-val")


@pytest.mark.parametrize(
    "text",
    ["a {c}.\nthe {c}", "\ufeffa {c}.\r\nthe {c}\r\n", "\n  \na {}.\n\nthe {}\n\n\n", "a {c}.\nthe {}\n"],
)
def test_prompts_in_all_forms(tmp_path, text):
    folder = write_folders(tmp_path, ["ant", "bee"])
    (tmp_path / "zeroshot_classification_templates.txt").write_bytes(text.encode())
    (tmp_path / "classnames.txt").write_bytes("\ufeffred ant\r\nbee \r\n\r\n".encode())
    found = open_set(folder, "--imagenet-v2")
    assert [template("fox") for template in found.templates] == ["a fox.", "the fox"]
    assert found.classnames == ["red ant", "bee"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a {c}.\na photo", r"--imagenet-v2 .*: line 2 of .*templates\.txt, 'a photo', has no \{c\}; put it"),
        ("a %s", r"line 1 of .*templates\.txt, 'a %s', has no \{c\}"),
        ('["a {}.", "the {}"]', r"templates\.txt holds JSON; write one entry per line"),
        ('{"imagenet1k": ["a {c}"]}', r"templates\.txt holds JSON"),
        ("a {} of {c}", r"line 1 .*, 'a \{\} of \{c\}', has other braces than those of \{c\}; write"),
        ("a {c}.\n\na {{c}}", r"line 3 .* has other braces"),
        ("a {c} in {place}", r"line 1 .* has other braces"),
        ("a {classname}", r"line 1 .* has no \{c\}"),
        ("a {C}", r"line 1 .* has no \{c\}"),
        (
            "lambda c: f'a photo of a {c}.',",
            r"line 1 .* looks like code or an item of a list; write the prompt alone",
        ),
        ("'a bad photo of a {}.',\n'a {}.'", r"line 1 .* looks like code"),
        ("- a photo of a {c}.", r"line 1 .* looks like code or an item"),
        ("templates = ['a {}']", r"line 1 .* looks like code"),
        ("  \n\t\n", r"templates\.txt has no prompts; write one per line, or remove it"),
        ("version https://git-lfs.github.com/spec/v1\noid", r"templates\.txt: it is a pointer of Git LFS"),
        ("", r"templates\.txt: it is empty|templates\.txt has no prompts"),
    ],
)
def test_prompts_that_are_none(tmp_path, text, says):
    folder = write_folders(tmp_path, ["ant", "bee"])
    (tmp_path / "zeroshot_classification_templates.txt").write_text(text)
    with pytest.raises(ValueError, match=says):
        open_set(folder, "--imagenet-v2")


@pytest.mark.parametrize(
    ("count", "says"),
    [
        (None, r"test/nshards\.txt is missing; write the number"),
        ("1", r"test/nshards\.txt counts 1 shards, but there is 1\.tar; correct it"),
        ("two", r"test/nshards\.txt holds 'two', not the number"),
    ],
)
def test_all_shards_are_counted(tmp_path, count, says):
    folder = write_datacomp(tmp_path, [2, 0], per_shard=1)
    (tmp_path / "test" / "nshards.txt").unlink()
    if count is not None:
        (tmp_path / "test" / "nshards.txt").write_text(count)
    with pytest.raises(ValueError, match=f"--imagenet-v2 .*: {says}"):
        open_set(folder, "--imagenet-v2")


@pytest.mark.parametrize("kind", ["jpg", "jfif", "png", "webp", "gif", "bmp", "ppm", "pgm", "tiff"])
def test_pictures_of_all_kinds(tmp_path, kind):
    folder = write_folders(tmp_path, ["ant", "bee"])
    form = {"jpg": "jpeg", "jfif": "jpeg", "pgm": "ppm"}.get(kind, kind)
    shards.picture(0, (8, 8)).convert("L" if kind == "pgm" else "RGB").save(tmp_path / "ant" / f"1.{kind}", form)
    found = Pictures(open_set(folder, "--imagenet-val").pictures, pil_to_tensor)
    assert [found[i][0].shape for i in range(len(found))] == [(3, 8, 8)] * 3


def test_files_of_macos_in_shards(tmp_path):
    folder = write_datacomp(tmp_path, [2, 0])
    samples = [{"__key__": "a", "png": shards.encode(shards.picture(0), "png"), "cls": "1"}]
    shards.write_tar(
        tmp_path / "test" / "0.tar", [*samples, {"__key__": "._a", "png": b"\0\5\x16\7", "cls": b"\0\5"}]
    )
    assert [picture.label for picture in open_set(folder, "--imagenet-val").pictures] == [1]


def test_pictures_none_of_which_can_be_decoded(tmp_path):
    folder = write_folders(tmp_path, ["ant", "bee"], pictures=2)
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(
        ValueError, match=r"--imagenet-val .*: of 4 pictures .* none .* 4 undecodable image .* Git LFS; run git"
    ):
        open_set(folder, "--imagenet-val")
    shards.picture(0, (8, 8)).save(tmp_path / "bee" / "1.png")
    assert len(open_set(folder, "--imagenet-val").pictures) == 4


def test_batches_without_broken_pictures(tmp_path):
    folder = write_folders(tmp_path, ["ant", "bee", "cat"], pictures=2)
    for broken in ("ant/0", "ant/1", "cat/0"):
        (tmp_path / f"{broken}.png").write_bytes(b"not a picture")
    batches = PictureBatches(Pictures(open_set(folder, "--imagenet-val").pictures, pil_to_tensor), 2)
    assert [batches[i].label.tolist() for i in range(len(batches))] == [[], [1, 1], [2]]
    assert [len(batches[i].image) for i in range(len(batches))] == [0, 2, 1]
    assert [batches[i].skips.counts.total() for i in range(len(batches))] == [2, 0, 1]
    assert "cat/0.png" in str(batches[2].skips)
    (tmp_path / "bee" / "1.png").unlink()
    assert "bee/1.png: No such file" in str(batches[1].skips)


def test_names_that_are_not_utf8_can_be_printed(tmp_path):
    folder = write_folders(tmp_path, ["ant", "bee"])
    (tmp_path / "ant" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"not a picture")
    batches = PictureBatches(Pictures(open_set(folder, "--imagenet-val").pictures, pil_to_tensor), 3)
    assert batches[0].label.tolist() == [0, 1] and r"ant/caf\xe9.png: its format" in str(batches[0].skips)


def test_a_broken_picture_is_named(tmp_path):
    folder = write_folders(tmp_path, ["ant", "bee"])
    (tmp_path / "bee" / "0.png").write_bytes(b"not a picture")
    pictures = Pictures(open_set(folder, "--imagenet-val").pictures, pil_to_tensor)
    assert pictures[0][0].shape == (3, 8, 8)
    with pytest.raises(ValueError, match=r"bee.0\.png"):
        pictures[1]


def test_accuracies_equal_a_sort():
    """Against numpy's sort; class 3 has no picture, classes have different sizes."""
    rng = np.random.default_rng(0)
    image, classes = rng.standard_normal((300, 6)), rng.standard_normal((6, 12))
    labels = rng.choice([c for c in range(12) if c != 3], 300, p=np.arange(1, 12) / 66)
    image += 0.8 * classes.T[labels]
    classifier = F.normalize(torch.from_numpy(classes), dim=0)
    order = np.argsort(-(image @ classifier.numpy()), axis=1)
    first, five = order[:, 0] == labels, (order[:, :5] == labels[:, None]).any(1)
    found = zero_shot_metrics(torch.from_numpy(image), torch.from_numpy(labels), classifier)
    assert found["top1"] == pytest.approx(first.mean())
    assert found["top5"] == pytest.approx(five.mean())
    recalls = [first[labels == c].mean() for c in range(12) if c != 3]
    assert found["mean_per_class_recall"] == pytest.approx(np.mean(recalls))
    assert 1 / 12 < found["top1"] < found["top5"] < 1 and found["top1"] != found["mean_per_class_recall"]


def test_nearest_equals_a_sort():
    similarity = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).double()
    similarity[2, 4:] = similarity[2, 3]  # of equal ones the first
    similarity[5, 1] = torch.nan
    top, probability = nearest(similarity, 20.0)
    for row, classes, shares in zip(similarity.numpy()[:5], top.numpy(), probability.numpy()):
        expected = np.exp(20 * row) / np.exp(20 * row).sum()
        assert classes.tolist() == sorted(range(9), key=lambda c: -row[c])[:5]
        assert shares == pytest.approx(expected[classes])
    assert top[5].tolist() == probability[5].tolist() == [-1] * 5
    assert nearest(similarity[:, :3], 1.0)[0].shape == (6, 3)


def test_collapsed_classes_score_chance_and_nan_scores_nothing():
    image, labels = F.normalize(torch.randn(40, 4), dim=1), torch.arange(40) % 10
    same = F.normalize(torch.ones(4, 10), dim=0)
    assert zero_shot_metrics(image, labels, same)["top1"] == pytest.approx(0.1)
    assert zero_shot_metrics(image, labels, same)["top5"] == pytest.approx(0.5)
    assert zero_shot_metrics(image * float("nan"), labels, same)["top5"] == 0.0


def test_counts_add_up_over_batches():
    image, labels = F.normalize(torch.randn(60, 8), dim=1), torch.randint(0, 5, (60,))
    classifier = F.normalize(torch.randn(8, 5), dim=0)
    parts = sum(hits(image[i : i + 7], labels[i : i + 7], classifier) for i in range(0, 60, 7))
    assert accuracies(parts) == pytest.approx(zero_shot_metrics(image, labels, classifier))
