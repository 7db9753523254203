"""Features in fewer bytes: no component is wrong by more than promised, whatever the parts look like."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support import shards
from tests.support.lab import Lab
from training.cache.features import KIND, StoredFeatures, open_features
from training.cache.row_store import StoreWriter, caption_checksum, damaged, open_store
from training.cache.storage import Storage, reader
from training.cache.storage import several as several_of
from training.check_cache import main as check_cache
from training.config.params import parse
from training.data.bad_samples import WrongRow
from training.main import main

WRITE = "--ref_model @reference --ref_model_pretrained @reference_weights --cache_ref_model_features"
TRAIN = "--fastclip --gamma 0.5 --optimizer sgd --lr 0.01 --epochs 1 --train-num-samples 16"
MADE = {"model": "noise", "weights": "none"}
PACKED = [Storage("float32", 1e-3), Storage("float32", 2e-2), Storage("int8")]


def unit(rows: int, dim: int, seed: int, mean: float = 0.0) -> np.ndarray:
    """Features of unit norm, float32 [rows, 2, dim], with a common part."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, dim, generator=generator)
    return F.normalize(x + mean * torch.randn(2, dim, generator=generator), dim=2).numpy()


def write(folder, storage: Storage, parts: dict[int, np.ndarray]) -> StoredFeatures:
    """Parts whose first row is their key, opened again."""
    writer = StoreWriter(folder, KIND, MADE | storage.identity())
    for first, features in parts.items():
        part = storage.pack(features)
        rows = np.arange(first, first + len(features))
        checksums = np.full(len(rows), caption_checksum(""), np.uint32)
        writer.write(
            [(first, f"{first}.tar")], rows, checksums, constants=part.constants, facts=part.facts, **part.values
        )
    writer.index()
    return StoredFeatures(open_store(folder, KIND, "--folder"))


def found(features: StoredFeatures, rows: np.ndarray) -> np.ndarray:
    return features(rows.tolist(), [""] * len(rows), [f"s{row}" for row in rows]).numpy()


# Of all kinds: with a common part and without, of few components, and of few rows.
PARTS = {
    0: unit(300, 40, 0, mean=1.5),
    1000: unit(200, 40, 1),
    2000: np.repeat(unit(1, 40, 2), 50, 0),
    3000: F.normalize(torch.eye(40)[:, None].repeat(1, 2, 1) + 1e-3, dim=2).numpy(),
    4000: unit(1, 40, 3),
}


@pytest.mark.parametrize("storage", PACKED)
def test_rows_of_unlike_parts_come_back_in_any_order(tmp_path, storage):
    features = write(tmp_path, storage, PARTS)
    assert features.width == 40
    rows = np.concatenate([np.arange(first, first + len(part)) for first, part in PARTS.items()])
    exact = np.concatenate(list(PARTS.values()))
    order = np.random.default_rng(0).permutation(len(rows))[:400]
    back = found(features, rows[order])
    assert back.dtype == np.float32
    allowed = storage.bound or np.abs(exact[order]).max(2, keepdims=True) * (0.5 / 127 + 1e-6)
    assert (np.abs(back.astype(np.float64) - exact[order]) <= allowed).all()
    (again,) = found(features, rows[order[7:8]])
    assert np.array_equal(again, back[7])
    assert not damaged(features.store)


@pytest.mark.parametrize("storage", PACKED)
def test_what_was_broken_is_still_noticed(tmp_path, storage):
    exact = unit(9, 16, 0, mean=2.0)
    exact[2, 1, 3], exact[5, 0], exact[7, 1, 0] = np.nan, 0.0, np.inf
    features = write(tmp_path, storage, {0: exact})
    assert np.isfinite(found(features, np.array([0, 1, 3, 4, 6, 8]))).all()
    for row in (2, 5, 7):
        with pytest.raises(
            WrongRow, match=rf"sample s{row} \(row {row} of the cache\): its features in .* not finite"
        ):
            found(features, np.array([0, row]))


@pytest.mark.parametrize("storage", PACKED)
def test_the_store_knows_what_it_has_changed(tmp_path, storage, capsys):
    """The largest error and the similarities' errors, computed here from what training reads."""
    parts = {0: PARTS[0], 1000: PARTS[1000]}
    features = write(tmp_path, storage, parts)
    largest, similarity, rms = 0.0, 0.0, 0.0
    for first, exact in parts.items():
        back = found(features, np.arange(first, first + len(exact))).astype(np.float64)
        largest = max(largest, np.abs(back - exact).max())
        image, text = np.moveaxis(back / np.linalg.norm(back, axis=2, keepdims=True), 1, 0)
        wrong = image @ text.T - exact[:, 0].astype(np.float64) @ exact[:, 1].T.astype(np.float64)
        similarity = max(similarity, np.abs(wrong).max())
        rms = max(rms, np.sqrt(np.square(wrong).mean()))
    facts = features.store.facts
    assert max(part["largest"] for part in facts) == pytest.approx(largest, rel=1e-5)
    assert max(part["similarity"]["largest"] for part in facts) == pytest.approx(similarity, rel=1e-2)
    assert max(part["similarity"]["rms"] for part in facts) == pytest.approx(rms, rel=1e-2)
    assert check_cache([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"the largest error of a component is {largest:.3g}, that of a similarity" in said


@pytest.mark.parametrize("storage", [Storage("float32"), *PACKED])
def test_each_of_several_views_and_captions_is_found(tmp_path, storage):
    """Of rows of unlike parts, in any order; what was broken is noticed where it is read, and only there."""
    writer, images, texts = StoreWriter(tmp_path, KIND, MADE | storage.identity()), {}, {}
    for first, count, mean in ((0, 9, 2.0), (100, 5, 0.0)):
        several = [unit(count, 16, 10 * first + i, mean).swapaxes(0, 1) for i in range(3)]
        held = np.stack([side for both in several for side in both], 1)  # [n, 6, d]
        held[3, 1, 2] = np.nan
        part = storage.pack_several(held[:, :4], held[:, 4:], np.arange(2 * count, dtype=np.uint32).reshape(-1, 2))
        rows, checksums = np.arange(first, first + count), np.full(count, caption_checksum(""), np.uint32)
        name = [(first, f"{first}.tar")]
        writer.write(name, rows, checksums, constants=part.constants, facts=part.facts, **part.values)
        images |= dict(zip(rows.tolist(), held[:, :4]))
        texts |= dict(zip(rows.tolist(), held[:, 4:]))
    writer.index()
    store = open_store(tmp_path, KIND, "--folder")
    read, width, _ = reader(store)
    assert (width, several_of(store)) == (16, (4, 2))
    rng = np.random.default_rng(0)
    asked = [(row, view, caption) for row in images for view in range(4) for caption in range(2)]
    order = [asked[i] for i in rng.permutation(len(asked))]
    places = store.find(np.array([row for row, *_ in order]), np.full(len(order), caption_checksum("")), str)
    back = read(places, np.array([which for _, *which in order]).T)
    exact = np.array([(images[row][view], texts[row][caption]) for row, view, caption in order])
    broken = np.array([(row % 100, view) == (3, 1) for row, view, _ in order])
    assert np.isnan(back[broken][:, 0]).any(1).all() and np.isfinite(back[~broken]).all()
    exact, back = np.nan_to_num(exact), np.nan_to_num(back)
    exact[broken, 0] = back[broken, 0]
    allowed = storage.bound or np.abs(exact).max(2, keepdims=True) * (0.5 / 127 + 1e-6)
    assert (np.abs(back.astype(np.float64) - exact) <= (0 if storage.plain else allowed)).all()


def test_a_common_part_of_all_rows_is_stored_once(tmp_path):
    sizes = {}
    for mean in (0.0, 3.0):
        features = write(tmp_path / str(mean), Storage("float32", 1e-3), {0: unit(2000, 64, 0, mean)})
        sizes[mean] = sum(features.store.facts[0]["bytes"])
    assert sizes[3.0] < sizes[0.0] - 2 * 64 * 1.3 / 8  # the rest has a third of the spread: log2(3) = 1.58 bits


def test_the_sizes_promised_for_dfn(tmp_path):
    """192 million pairs of 2 x 512: 200 GB at 1e-3, 150 GB at 2e-3, with 24 bytes for row and checksum."""
    for bound, most in ((1e-3, 200e9), (2e-3, 150e9)):
        part = Storage("float32", bound).pack(unit(400, 512, 0))
        assert 192e6 * (sum(part.facts["bytes"]) + 24) < most


def test_a_plain_store_is_written_as_by_earlier_versions(tmp_path):
    """No byte of it says that values may be packed, and earlier versions open it."""
    features = write(tmp_path, Storage("float16"), {0: unit(9, 16, 0).astype(np.float16)})
    part = json.loads((tmp_path / "parts/00000000.json").read_text())
    index = json.loads((tmp_path / "index.json").read_text())
    assert set(part) == {"format", "kind", "shards", "rows", "files", "identity"} and part["format"] == 1
    assert set(index["parts"][0]) == {"name", "rows", "shards", "files"} and index["format"] == 1
    assert found(features, np.arange(9)).dtype == np.float16
    packed = write(tmp_path / "packed", PACKED[0], {0: unit(9, 16, 0)})
    assert json.loads((packed.store.folder / "index.json").read_text())["format"] == 2


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def lab(one_thread, tmp_path_factory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


def written(lab: Lab, flags: str) -> tuple[str, np.ndarray]:
    """A folder that a run writes, and what training reads from it."""
    folder = str(lab.root / f"features{next(lab.numbers)}")
    assert main([*lab.words(f"{WRITE} --cached_ref_features_dir {folder} {flags}"), "--name", folder[-9:]]) == 0
    features = open_features(parse(lab.words(f"{TRAIN} --cached_ref_features_dir {folder}")))
    return folder, features(range(16), [shards.caption(i) for i in range(16)], [str(i) for i in range(16)]).numpy()


def test_a_run_writes_what_the_flags_say_and_another_trains_on_it(lab, capsys):
    _, exact = written(lab, "")
    assert exact.dtype == np.float32
    assert written(lab, "--ref_features_dtype float16")[1].dtype == np.float16
    folder, packed = written(lab, "--ref_features_error_bound 0.001")
    assert 0 < np.abs(packed.astype(np.float64) - exact).max() <= 1e-3
    run = lab.run(lab.words(f"{TRAIN} --cached_ref_features_dir {folder}"))
    assert run.code == 0
    assert "features are read from disk: 16 rows of 2 x 24 with an error of at most 0.001" in run.log
    other = f"{WRITE} --cached_ref_features_dir {folder} --ref_features_error_bound 0.002 --name other"
    capsys.readouterr()
    assert main(lab.words(other)) == 2
    assert "was begun with error bound 0.001, and this run has error bound 0.002" in capsys.readouterr().err
