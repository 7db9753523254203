"""The demo's own parts: its model configs, what it counts, what it refuses."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def demo():
    """The modules of scripts/demo, imported as report.py imports them."""
    names = ("measure", "drawing", "report")
    earlier = {name: sys.modules.pop(name) for name in names if name in sys.modules}  # of the benchmarks
    sys.path.insert(0, str(ROOT / "scripts" / "demo"))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(ROOT / "scripts" / "demo"))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(earlier)


def a_test_set(measure, count: int = 12):
    """`count` pictures of 4 classes, two of which are flags; every fifth name was held out."""
    labels = torch.arange(count) % 4
    return measure.TestSet(
        pictures=[Image.new("RGB", (8, 8), (5 * i, 0, 0)) for i in range(count)],
        names=[f"name {i}" for i in range(count)],
        labels=labels,
        classes=["country flag", "food", "hand", "flag"],
        held_out=torch.arange(count) % 5 == 0,
    )


def random_features(measure, seed: int, count: int = 12):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, 6, generator=generator) for n in (count, count, 4)]
    return measure.Features(*(torch.nn.functional.normalize(r, dim=1) for r in rows))


@pytest.mark.parametrize("config", sorted((ROOT / "assets" / "models").glob("*.json")), ids=lambda path: path.stem)
def test_model_configs_load_in_open_clip(config: Path) -> None:
    open_clip.add_model_config(config)
    model, _, preprocess = open_clip.create_model_and_transforms(config.stem)
    size = json.loads(config.read_text())["vision_cfg"]["image_size"]
    pixels = preprocess(Image.new("RGB", (size, size)))[None]
    tokens = open_clip.get_tokenizer(config.stem)(["a hand prop"])
    image, text, _ = model(pixels.expand(2, -1, -1, -1), tokens.expand(2, -1))
    assert image.shape == text.shape == (2, json.loads(config.read_text())["embed_dim"])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_measures_agree_with_counting_by_hand(demo, seed: int) -> None:
    measure = demo["measure"]
    tests, features = a_test_set(measure), random_features(measure, seed)
    assert tests.flags.tolist() == [label in (0, 3) for label in tests.labels.tolist()]
    for rows in (torch.ones(12, dtype=torch.bool), ~tests.flags):
        chosen = rows.nonzero()[:, 0].tolist()
        hits = dict.fromkeys(measure.COLUMNS, 0)
        present = sorted({int(tests.labels[i]) for i in chosen})
        for i in chosen:
            by_image = sorted(chosen, key=lambda j: -float(features.image[i] @ features.text[j]))
            by_text = sorted(chosen, key=lambda j: -float(features.text[i] @ features.image[j]))
            for k in (1, 5):
                hits[f"image_to_text_R@{k}"] += i in by_image[:k]
                hits[f"text_to_image_R@{k}"] += i in by_text[:k]
            answer = max(present, key=lambda c: float(features.image[i] @ features.classes[c]))
            hits["subcategory"] += answer == tests.labels[i]
        expected = {column: float(count) / len(chosen) for column, count in hits.items()}
        assert measure.measure(features, tests, rows) == pytest.approx(expected)


def test_chance_is_what_features_without_meaning_score(demo) -> None:
    measure = demo["measure"]
    tests = a_test_set(measure)
    point = torch.nn.functional.normalize(torch.ones(1, 6), dim=1)
    features = measure.Features(point.expand(12, -1), point.expand(12, -1), point.expand(4, -1))
    for rows in (torch.ones(12, dtype=torch.bool), ~tests.flags):
        assert measure.measure(features, tests, rows) == pytest.approx(tests.chance(rows))
    assert tests.largest_class(torch.tensor([True] * 5 + [False] * 7)) == pytest.approx(2 / 5)


def test_held_out_recall_counts_only_unseen_names(demo) -> None:
    measure = demo["measure"]
    tests, random = a_test_set(measure), random_features(measure, 0)
    text = random.text.clone()
    text[tests.held_out] = random.image[tests.held_out]  # perfect on what is held out, whatever the rest
    assert measure.held_out_recall(measure.Features(random.image, text, random.classes), tests, 1) == 1
    text = -random.image
    assert measure.held_out_recall(measure.Features(random.image, text, random.classes), tests, 1) == 0


def test_a_checkpoint_that_measures_otherwise_is_not_reported(demo) -> None:
    columns = demo["measure"].COLUMNS
    in_run = dict.fromkeys(columns, 0.25) | {"imagenet-zeroshot-val-top1": 0.25}
    same = dict.fromkeys(columns, 0.25)
    demo["report"].compare_with_the_run("openclip", in_run, same)
    with pytest.raises(SystemExit, match=r"openclip: text_to_image_R@5 is 0\.2600 from the checkpoint"):
        demo["report"].compare_with_the_run("openclip", in_run, {**same, "text_to_image_R@5": 0.26})


def test_last_checkpoint_is_that_of_the_most_epochs(demo, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("epoch_9.pt", "epoch_10.pt", "epoch_latest.pt"):
        (tmp_path / "checkpoints" / name).touch()
    assert demo["report"].last_checkpoint(tmp_path).name == "epoch_10.pt"


def test_picture_shows_right_near_and_wrong(demo, tmp_path: Path) -> None:
    measure, drawing = demo["measure"], demo["drawing"]
    assert drawing._verdict(torch.tensor([3, 1, 2]), 3)[0] == "✓"
    assert drawing._verdict(torch.tensor([3, 1, 2]), 2)[0] == "○"
    assert drawing._verdict(torch.tensor([3, 1, 2]), 7)[0] == "✗"
    tests = a_test_set(measure, 30)
    points = [{"epoch": e, **dict.fromkeys(drawing.CURVES, e / 10)} for e in (1, 2)]
    runs = dict.fromkeys(("openclip", "drrho_clip"), points)
    features = {run: random_features(measure, 0, 30) for run in runs}
    chance = dict.fromkeys(drawing.CURVES, 0.01)
    drawing.draw(tmp_path / "a" / "report.png", demo["report"].TITLES, runs, features, tests, chance)
    image = Image.open(tmp_path / "a" / "report.png")
    assert image.width > 1000 and len(image.convert("RGB").getcolors(2**24)) > 50
    assert math.isclose(image.width / image.height, 19 / 14, rel_tol=0.01)
