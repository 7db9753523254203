"""What is kept of an evaluation: bounded in size, read again as it was, and never run as code."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest

from training import predictions
from training.predictions import LEFT_OUT, classified, evenly, load, save

RNG = np.random.default_rng(0)


def made(pictures=60_000, classes=1000):
    labels = np.sort(RNG.integers(0, classes, pictures))
    top = RNG.integers(0, classes, (pictures, 5))
    top[::7, 0] = labels[::7]
    top[3::1000] = LEFT_OUT
    top[4::1000] = -1
    names = [f"class number {i} of a set" for i in range(classes)]

    def place(number):
        return ("file", f"/sets/a folder/class{labels[number]}/{number:08}.jpeg", 0, -1)

    probability = -np.sort(-RNG.dirichlet(np.ones(5), pictures))
    return labels, top, classified("vtab/x", "A set", names, labels, top, probability, place)


def test_large_sets_stay_small(tmp_path):
    labels, top, kept = made()
    path = save(tmp_path / "epoch_1", kept)
    assert path.name == "vtab-x.npz" and path.stat().st_size < 500_000
    assert len(kept.number) < len(labels) / 20 and len(kept.confused) == predictions.CONFUSED
    used = top[:, 0] != LEFT_OUT
    assert kept.right.sum() == kept.class_right.sum() == sum((top[:, 0] == labels) & used)
    assert kept.class_pictures.sum() == kept.used.sum() == used.sum()
    wrong = Counter((y, p) for y, p in zip(labels.tolist(), top[:, 0].tolist()) if y != p and p >= 0)
    assert kept.confused[:, 2].tolist() == sorted(wrong.values(), reverse=True)[: predictions.CONFUSED]
    assert all(wrong[y, p] == n for y, p, n in kept.confused.tolist())
    assert kept.label.tolist() == labels[kept.number].tolist()
    assert [where[1] for where in kept.places][9].endswith(f"{kept.number[9]:08}.jpeg")


@pytest.mark.parametrize("classes", [1, 3])
def test_what_is_read_is_what_was_written(tmp_path, classes):
    _, _, kept = made(13, classes)
    found = load(save(tmp_path, kept))
    for field in fields(kept):
        was, now = getattr(kept, field.name), getattr(found, field.name)
        if field.name == "probability":
            assert now == pytest.approx(was, abs=1e-3)
        elif isinstance(was, np.ndarray):
            assert now.dtype == was.dtype and now.tolist() == was.tolist(), field.name
        else:
            assert json.loads(json.dumps(was)) == now, field.name


def test_examples_are_the_same_for_every_model():
    assert evenly(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly(3, 4).tolist() == [0, 1, 2] and evenly(0, 4).tolist() == []


def test_nothing_else_is_read(tmp_path):
    """Neither damaged files nor objects, whose reading would run code."""
    path = save(tmp_path, made(13, 3)[2])
    whole = path.read_bytes()
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (ran.touch, ())

    np.savez(path, about=np.array([Evil()], dtype=object))
    for content in (None, whole[:300], b"", pickle.dumps(Evil())):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=r"vtab-x\.npz"):
            load(path)
    assert not ran.exists()
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "gone.npz")


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path, caplog):
    (tmp_path / "predictions").write_text("a file")
    predictions.keep(tmp_path / "predictions/epoch_1", replace(made(13, 3)[2], name="My set"))
    assert "predictions of My set cannot be written" in caplog.text
