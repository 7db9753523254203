from __future__ import annotations

from itertools import islice, takewhile

import numpy as np
import pytest

from shards import caption, write_csv
from training.order import Lane
from training.params import parse
from training.samples import Skips
from training.tabular import CsvSource, SyntheticSource, open_csv


def flags(path, *more):
    return parse(["--model", "RN50", "--train-data", str(path), *more]).data


ALONE = Lane(0, 1)


def samples(source, lane=ALONE, epoch=0, n=None):
    return list(islice((raw for raw in source.stream(epoch, lane, Skips()) if raw is not None), n))


def test_csv_columns_and_separators(tmp_path):
    write_csv(tmp_path, 3)
    source = open_csv(str(tmp_path / "data.csv"), flags(tmp_path / "data.csv"), 0)
    assert source.texts == [caption(i) for i in range(3)] and source.images[2].endswith("000002.jpg")
    other = tmp_path / "other.csv"
    other.write_text('id,image,"what, it is"\n7,a.png,"a, b"\n8,b.png,NA\n9,c.png,\n')
    config = flags(other, "--csv-separator", ",", "--csv-img-key", "image", "--csv-caption-key", "what, it is")
    source = open_csv(str(other), config, 0)
    assert source.images == ["a.png", "b.png", "c.png"] and source.texts == ["a, b", "NA", ""]
    assert source.count() == 3
    with pytest.raises(ValueError, match="'id', 'image'"):
        open_csv(str(other), flags(other, "--csv-separator", ","), 0)
    other.write_text("filepath\ttitle\n")
    with pytest.raises(ValueError, match="no rows"):
        open_csv(str(other), flags(other), 0)


@pytest.mark.parametrize("kind", ["csv", "synthetic"])
@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_lanes_share_the_rows_turn_after_turn(kind, lanes):
    source = CsvSource([f"{i}.jpg" for i in range(7)], ["t"] * 7, 3) if kind == "csv" else None
    source = source or SyntheticSource(7, (4, 4), 3)
    whole = [(raw.index, raw.turn) for raw in samples(source, n=21)]
    assert sorted(whole) == [(row, turn) for row in range(7) for turn in range(3)]
    for lane in range(lanes):
        share = [(raw.index, raw.turn) for raw in samples(source, Lane(lane, lanes), n=7)]
        assert share == whole[lane::lanes][:7]
    first = list(takewhile(lambda raw: raw is not None, source.stream(0, Lane(0, lanes), Skips())))
    assert len(first) == len(range(0, 7, lanes))  # the end of a turn is marked


def test_csv_order_depends_on_seed_and_epoch():
    images = [f"{i}.jpg" for i in range(20)]

    def order(seed, epoch):
        return [raw.index for raw in samples(CsvSource(images, images, seed), epoch=epoch, n=20)]

    assert order(0, 0) == order(0, 0) and len({tuple(order(*key)) for key in ((0, 0), (0, 1), (1, 0))}) == 3


def test_synthetic_samples_are_fixed_and_of_the_right_shape():
    source = SyntheticSource(5, (6, 8), 1)
    first, again = samples(source, n=5), samples(source, epoch=1, n=5)
    pixels = [np.asarray(raw.image) for raw in first]
    assert all(p.shape == (6, 8, 3) for p in pixels)
    assert all(np.array_equal(p, np.asarray(raw.image)) for p, raw in zip(pixels, again))
    assert len({p.tobytes() for p in pixels}) == 5 and [raw.text for raw in first] == [raw.text for raw in again]
    assert np.asarray(samples(SyntheticSource(1, (6, 8), 2), n=1)[0].image).tobytes() != pixels[0].tobytes()
