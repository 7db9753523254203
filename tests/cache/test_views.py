"""Stored views: training on the embeddings of random views equals training on a live reference that sees them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg

from tests.cache.test_features import assert_same, fails, trained
from tests.support import shards
from tests.support.flag_parts import train_data
from tests.support.lab import CPU, WORLD, Lab
from training.cache import captions, features
from training.cache.captioner import packed
from training.cache.features import StoredFeatures, open_features
from training.cache.row_store import RowStore, StoreWriter, caption_checksum
from training.cache.storage import reader
from training.check_cache import main as check_cache
from training.config.params import parse
from training.data.samples import Shown, StoredViews
from training.data.transforms import KeptViews, TrainView
from training.distributed.process_group import World
from training.main import main
from training.rng import sample_seed, seed_of

REFERENCE = "--ref_model @reference --ref_model_pretrained @reference_weights"
AUGMENT = "--aug-cfg scale=(0.2,1.0)"
WRITE = f"{REFERENCE} --cache_ref_model_features --ref_features_views 3 --seed 5 {AUGMENT}"
STORED = "--cached_ref_features_dir @features"
TRAIN = "--train-num-samples 16 --batch-size 4 --optimizer sgd --lr 0.01 --seed 1 --fastclip --gamma 0.5"


def synthetic(row: int) -> list[str]:
    """Two captions of a sample."""
    return [f"synthetic {number}, {shards.caption(row)}" for number in ("one", "two")]


def write_captions(folder: Path, rows: int, add: str = "") -> str:
    """A store of them, as a run writes it."""
    writer = StoreWriter(folder, captions.KIND, {"model": "none", "weights": "none", "seed": 0})
    checksums = np.array([caption_checksum(shards.caption(row)) for row in range(rows)], np.uint32)
    texts = packed([[text + add for text in synthetic(row)] for row in range(rows)])
    writer.write([(0, "0.tar")], np.arange(rows), checksums, captions=texts)
    writer.index()
    return str(folder)


class ViewLab(Lab):
    """A lab whose features are of three views of each image: its pictures are not square."""

    @property
    def features(self) -> str:
        return self.written("features", "")

    @property
    def captions(self) -> str:
        folder = self.root / "captions"
        return str(folder) if folder.exists() else write_captions(folder, 16)

    @property
    def captioned(self) -> str:
        """With embeddings of two synthetic captions of each image."""
        return self.written("captioned", "--cached_syn_texts_dir @captions")

    def written(self, name: str, line: str) -> str:
        folder = self.root / name
        if not folder.exists():
            words = self.words(f"{WRITE} {line} --cached_ref_features_dir {folder}")
            assert main([*words, "--name", name]) == 0
        return str(folder)


@pytest.fixture(scope="module")
def lab(one_thread, tmp_path_factory) -> ViewLab:
    return ViewLab(tmp_path_factory.mktemp("lab"))


def view_of(epoch: int, turn: int, row: int) -> int:
    """The number of the view, by the formula in ``rng``: in turn, from a start that follows from (seed, row)."""
    return (seed_of(1, -1, row) + epoch + turn) % 3


def live(lab: Lab, line: str) -> dict[str, torch.Tensor]:
    """The weights after a run with a live reference whose crops are those of the store with seed 5."""
    replayed = {
        sample_seed(1, epoch, turn, row): seed_of(5, -1, view_of(epoch, turn, row), row)
        for epoch in range(2)
        for turn in range(3)
        for row in range(16)
    }
    call = TrainView.__call__
    with mock.patch.object(TrainView, "__call__", lambda self, image, seed: call(self, image, replayed[seed])):
        return trained(lab, f"{line} {REFERENCE} --name live{next(lab.numbers)}")


@pytest.mark.parametrize(
    "use",
    [
        AUGMENT,
        f"{AUGMENT} --workers 1 --accum-freq 2 --ref_features_usage ref,distill",
    ],
)
def test_as_with_a_live_reference_that_sees_the_same_views(lab, use):
    line = f"{TRAIN} {use}"
    stored = trained(lab, f"{line} {STORED}")
    assert_same(stored, live(lab, line))
    with pytest.raises(AssertionError, match="not close"):  # the crops matter
        assert_same(stored, trained(lab, f"{line} {REFERENCE}"))


def test_as_with_a_live_reference_on_synthetic_captions(lab):
    """The embedding is of the caption that the target reads, its own one or one of two synthetic ones."""
    line = f"{TRAIN} {AUGMENT} --cached_syn_texts_dir @captions"
    stored = trained(lab, f"{line} --cached_ref_features_dir @captioned")
    assert_same(stored, live(lab, line))
    with pytest.raises(AssertionError, match="not close"):
        assert_same(stored, trained(lab, f"{TRAIN} {AUGMENT} --cached_ref_features_dir @captioned"))


def test_captions_without_views(lab):
    """One fixed view of each image, and an embedding of each caption."""
    folder = lab.written("fixed", "--cached_syn_texts_dir @captions --ref_features_views 0")
    line = f"{TRAIN} {AUGMENT} --cached_syn_texts_dir @captions --cached_ref_features_dir {folder}"
    run = lab.run(lab.words(line))
    assert run.code == 0
    assert "16 rows of 1 + 3 (views and captions) x 24 float32" in run.log
    assert "They are of one fixed view of each image" in run.log


@pytest.mark.parametrize(
    "augment",
    [
        {"scale": (0.2, 0.7)},
        {
            "scale": (0.2, 0.7),
            "color_jitter": (0.4, 0.4, 0.4, 0.1),
            "color_jitter_prob": 0.9,
            "gray_scale_prob": 0.3,
        },
        {"scale": (0.2, 0.7), "use_timm": True, "color_jitter": 0.4},
    ],
)
@pytest.mark.parametrize("rand_augment", [False, True])
def test_a_stored_view_is_what_a_live_reference_sees(augment, rand_augment):
    """Pixel by pixel, in another size and interpolation than the target's."""
    picture, row = shards.encode(shards.picture(7, (90, 60))), 12
    reference = PreprocessCfg(size=24, interpolation="bilinear", mean=(0.1, 0.2, 0.3))
    kept = KeptViews(reference, 4, 5, augment, rand_augment)
    both = TrainView(PreprocessCfg(size=32), reference, augment, rand_augment)
    views = kept(kept.decode(picture), row)
    assert len({view.double().sum().item() for view in views}) == 4
    for number, view in enumerate(views):
        seen = both(both.decode(picture), seed_of(5, -1, number, row)).reference
        assert torch.equal(view, seen)


def test_views_come_in_turn_and_do_not_depend_on_ranks_and_workers(lab):
    """Each of three epochs has another view of every sample: what two ranks get is what one gets."""
    words = f"{STORED} {AUGMENT} --train-num-samples 16 --fastclip --seed 1"

    def seen(world: World, line: str) -> list[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
        train = train_data(lab.words(f"{words} {line}"), world)
        epochs = [[batch.clone() for batch in train.epoch(epoch)] for epoch in range(3)]
        train.close()
        return [
            {row: (image, ref) for b in of for row, image, ref in zip(b.index.tolist(), b.image, b.ref_features)}
            for of in epochs
        ]

    alone = seen(WORLD, "--lanes 2,1 --batch-size 4")
    halves = [seen(World(rank, rank, 2, 2, CPU), "--lanes 2,1 --workers 1") for rank in range(2)]
    for epoch in range(3):
        both = halves[0][epoch] | halves[1][epoch]
        assert sorted(both) == sorted(alone[epoch]) == list(range(16))
        for row in range(16):
            assert all(torch.equal(*pair) for pair in zip(both[row], alone[epoch][row]))
    for row in range(16):
        assert len({alone[epoch][row][1].sum().item() for epoch in range(3)}) == 3


# ---------------------------------------------------------------------------------------------------- the store


def features_of(lab: Lab, folder: str, shown: list[Shown]) -> np.ndarray:
    """The features of the 16 samples by row, as training gets them. [16, 2, d]"""
    features = open_features(parse(lab.words(f"{TRAIN} {AUGMENT} --cached_ref_features_dir {folder}")))
    rows = range(16)
    return features(rows, [shards.caption(i) for i in rows], [str(i) for i in rows], shown).float().numpy()


def test_within_a_promised_error(lab):
    """Every view and every caption comes back within the bound."""
    texts = [[shards.caption(row), *synthetic(row)] for row in range(16)]
    bounded = lab.written("bounded", "--cached_syn_texts_dir @captions --ref_features_error_bound 0.002")
    for view in range(3):
        shown = [Shown(texts[row][(row + view) % 3], (row + view) % 3, view) for row in range(16)]
        exact, packed = (features_of(lab, folder, shown) for folder in (lab.captioned, bounded))
        assert 0 < np.abs(packed.astype(np.float64) - exact).max() <= 0.002


def test_earlier_versions_refuse_such_a_store(lab, capsys):
    """They would take the first two vectors of a row for its image and its text."""
    folder = Path(lab.path("features"))
    for file in (folder / "index.json", folder / "parts/00000000.json"):
        assert json.loads(file.read_text())["format"] == 3
    assert check_cache([str(folder)]) == 0
    said = capsys.readouterr().out
    assert "--ref_features_views 3, --seed 5, augmentation --aug-cfg 'scale=(0.2,1.0)'" in said


def test_a_run_says_what_the_target_sees(lab):
    run = lab.run(lab.words(f"{TRAIN} {AUGMENT} {STORED}"))
    assert "16 rows of 3 + 1 (views and captions) x 24 float32" in run.log
    assert "They are of 3 random views of each image, and the target sees the one that is used" in run.log


def test_what_cannot_work_is_refused(lab, capsys):
    stored = f"{TRAIN} {STORED}"
    drawn = "were drawn with --aug-cfg 'scale=(0.2,1.0)', and training shows the target these very views"
    for other, said in (
        ("", "--aug-cfg 'scale=(0.9,1.0)'"),
        ("--aug-cfg scale=(0.2,0.9)", "--aug-cfg 'scale=(0.2,0.9)'"),
        (f"{AUGMENT} --rand_augment", "--aug-cfg 'scale=(0.2,1.0)' --rand_augment"),
    ):
        sentence = fails(lab, f"{stored} {other}", capsys)
        assert sentence.startswith(f"error: {said}: the views in ") and drawn in sentence
    folder = f"--cached_ref_features_dir {lab.path('features')}"
    for other, was, now in (
        ("--seed 6", "--seed 5", "--seed 6"),
        ("--ref_features_views 2", "--ref_features_views 3", "--ref_features_views 2"),
        (
            "--aug-cfg scale=(0.1,1)",
            "augmentation --aug-cfg 'scale=(0.2,1.0)'",
            "augmentation --aug-cfg 'scale=(0.1",
        ),
        ("--ref_features_views 0", "--ref_features_views 3, --seed 5", "no --ref_features_views, no --seed"),
        ("--cached_syn_texts_dir @captions", "no synthetic captions", "synthetic captions 2 by "),
    ):
        sentence = fails(lab, f"{WRITE} {folder} {other}", capsys)
        assert f"was begun with {was}" in sentence and f"and this run has {now}" in sentence


def test_a_run_that_goes_on_sees_the_same_views(lab):
    """From the middle of an epoch, as without the interruption."""
    words = lab.words(f"{STORED} {AUGMENT} --train-num-samples 16 --fastclip --seed 1 --batch-size 4")
    whole = train_data(words)
    for _ in whole.epoch(0):
        pass
    batches, state = [], None
    for step, batch in enumerate(whole.epoch(1)):
        batches.append(batch.clone())
        state = whole.state_dict() if step == 1 else state
    again = train_data(words)
    assert again.resume(state, 1, 2) == 2
    for batch, other in zip(again.epoch(1, 2), batches[2:], strict=True):
        assert torch.equal(batch.image, other.image) and torch.equal(batch.ref_features, other.ref_features)


def test_the_views_that_are_looked_up_were_announced(lab):
    """The disk is told of the very views that training reads."""
    announced, shown = [], []

    class Told(StoredFeatures):
        def coming(self, row: int, view: int = 0) -> None:
            announced.append((row, view))
            super().coming(row, view)

        def __call__(self, rows, texts, names, uses=()):
            shown.extend((row, use.view) for row, use in zip(rows, uses))
            return super().__call__(rows, texts, names, uses)

    with mock.patch.object(features, "StoredFeatures", Told):
        train = train_data(lab.words(f"{STORED} {AUGMENT} --train-num-samples 16 --fastclip --seed 1"))
    train._stream.source.by_sample = False  # small sets are not announced
    for epoch in range(2):
        assert len(list(train.epoch(epoch))) == 8
    assert len(shown) == 32 and set(shown) <= set(announced)
    assert len(set(shown)) == 32  # another view of each row in each epoch


@pytest.mark.parametrize(("name", "checked"), [("features", False), ("captioned", True)])
def test_all_that_a_lookup_reads_is_announced(lab, name, checked):
    """Where synthetic captions were embedded, the checksums with which they are compared too."""
    found = open_features(parse(lab.words(f"{TRAIN} {AUGMENT} --cached_ref_features_dir {lab.path(name)}")))
    asked, pieces = [], RowStore.pieces

    def noted(self, key, *where):
        asked.append(key)
        return pieces(self, key, *where)

    texts = [shards.caption(row) for row in range(16)]
    with mock.patch.object(RowStore, "pieces", noted):
        for row in [*range(16)] * 8:  # two calls of 64: the second asks for the values of the first
            found.coming(row)
        announced = sorted(asked)
        asked.clear()
        found(range(16), texts, texts, [Shown(text) for text in texts])
    assert announced == sorted(asked) and ("caption_checksums" in asked) == checked


def test_rows_that_an_offset_shifts_have_the_views_of_the_stores_rows():
    number, seed = StoredViews(3, 5, offset=10).draw(1, 4, 0, 12)
    assert number == (seed_of(1, -1, 12) + 4) % 3
    assert seed == seed_of(5, -1, number, 2)


def test_a_part_with_fewer_views_is_refused(lab, tmp_path):
    """Otherwise another row's vector would be read."""
    folder = shutil.copytree(lab.path("features"), tmp_path / "features")
    (part,) = folder.glob("parts/*.images.npy")
    np.save(part, np.load(part)[:, :2])
    read, _, _ = reader(RowStore(folder, json.loads((folder / "index.json").read_text())))
    with pytest.raises(
        ValueError, match=r"images.npy has 2 values per row, and number 2 is wanted; copy the store"
    ):
        read(np.array([3]), np.array([[2], [0]]))


def test_captions_that_were_not_embedded_are_refused(lab, tmp_path, capsys):
    line = f"{TRAIN} {AUGMENT} --cached_syn_texts_dir @captions"
    sentence = fails(lab, f"{line} {STORED}", capsys)
    assert "--cached_ref_features_dir holds features of the samples' own captions alone" in sentence
    one = lab.written("one", "--cached_syn_texts_dir @captions --num_syn_texts 1")
    sentence = fails(lab, f"{line} --cached_ref_features_dir {one}", capsys)
    assert "--num_syn_texts 2: " in sentence and "has embeddings of 1 synthetic captions per sample" in sentence
    other = write_captions(tmp_path / "other", 16, add=" again")
    line = f"{TRAIN} {AUGMENT} --cached_syn_texts_dir {other} --cached_ref_features_dir @captioned"
    sentence = fails(lab, line, capsys)
    assert re.search(r"sample \S+ \(row \d+ of the cache\) has another synthetic caption [12] than in", sentence)


def test_a_sample_without_synthetic_captions_ends_the_writing(lab, tmp_path, capsys):
    few = write_captions(tmp_path / "few", 9)
    folders = f"--cached_syn_texts_dir {few} --cached_ref_features_dir {tmp_path}/features"
    sentence = fails(lab, f"{WRITE} {folders} --workers 1", capsys)
    assert re.search(r"error: --cached_syn_texts_dir: sample \S+00002.tar/000009 \(row 9 of the", sentence)
    assert sentence.endswith(f"is not in {few}")


def test_the_plan_of_a_run_that_writes_views(lab, tmp_path, capsys):
    line = f"{WRITE} --cached_syn_texts_dir @captions --cached_ref_features_dir {tmp_path}/none"
    assert main([*lab.words(line), "--dry_run"]) == 0
    told = capsys.readouterr().out
    assert f"the reference's features of 3 views and of the captions in {lab.path('captions')} of each" in told
