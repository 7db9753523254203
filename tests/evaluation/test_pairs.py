"""Validation pairs: each once, as open_clip shows them to the model."""

from __future__ import annotations

import pytest
import torch
from open_clip.transform import image_transform_v2

from tests.support.shards import caption, encode, picture, sample, write_csv, write_shards
from tests.support.streams import config, model, text_of, world
from training.evaluation.pairs import build_val


@pytest.mark.parametrize("kind", ["webdataset", "csv"])
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 1), (3, 0)])
def test_validation_sees_each_sample_once(tmp_path, kind, ranks, workers):
    if kind == "webdataset":
        samples = [sample(i) for i in range(11)]
        for s in samples:
            del s["json"]
        samples[3]["jpg"] = encode(picture(3).convert("CMYK"))
        samples[7]["jpg"] = b"no image"
        val = write_shards(tmp_path, samples, (6, 4, 1))
    else:
        val = write_csv(tmp_path, 11)
        (tmp_path / "000007.jpg").unlink()
    c = config(None, "--epochs", 0, "--val-data", val, batch=3, workers=workers, rows=-1)
    target, captions = model(), []
    for rank in range(ranks):
        pairs = build_val(c, world(rank, ranks), target)
        batches = list(pairs)
        assert len(batches) <= len(pairs) <= len(batches) + 1
        for image, text, *_ in batches:
            assert image.shape == (len(text), 3, 16, 16) and image.is_floating_point() and len(text) <= 3
            captions += [text_of(t) for t in text]
        assert [len(batch.image) for batch in pairs] == [len(batch.image) for batch in batches]  # once more
    assert sorted(captions) == sorted(caption(i) for i in range(11) if i != 7)


def test_validation_image_is_open_clips(tmp_path):
    val = write_csv(tmp_path, 2)
    target = model(16, mean=(0.1, 0.2, 0.3))
    flags = ("--epochs", 0, "--val-data", val, "--val-num-samples", 1)
    ((image, *_),) = build_val(config(None, *flags, rows=-1), world(), target)
    from PIL import Image

    expected = image_transform_v2(target.preprocess, is_train=False)(Image.open(tmp_path / "000000.jpg"))
    assert torch.equal(image, expected[None])
    assert build_val(config(None, "--dataset-type", "synthetic", samples=4), world(), target) is None
