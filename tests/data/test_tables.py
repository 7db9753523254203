from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from tests.support.shards import caption, write_csv
from training.config.params import parse
from training.data.lanes import Lane
from training.data.sources.tables import CsvSource, SyntheticSource, Table, open_csv


def flags(path, *more):
    return parse(["--model", "RN50", "--train-data", str(path), *more]).data


ALONE = Lane()


def samples(source, lane=ALONE, epoch=0, n=None):
    return list(islice((item.sample for item in source.stream(epoch, lane) if item.sample is not None), n))


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


def table(kind: str, rows: int, **options) -> Table:
    if kind == "csv":
        return CsvSource([f"{i}.jpg" for i in range(rows)], ["t"] * rows, 3, **options)
    return SyntheticSource(rows, (4, 4), 3, **options)


@pytest.mark.parametrize("kind", ["csv", "synthetic"])
@pytest.mark.parametrize(("ranks", "workers", "share"), [(1, 1, 1), (2, 1, 3), (1, 3, 2), (2, 2, 1)])
def test_lanes_deliver_the_rows_step_by_step(kind, ranks, workers, share):
    source = table(kind, 7)
    whole = [(raw.row, raw.turn) for raw in samples(source, n=28)]
    assert sorted(whole) == [(row, turn) for row in range(7) for turn in range(4)]
    assert [row for row, _ in whole[:7]] != [row for row, _ in whole[7:14]] != list(range(7))
    lanes = [[Lane(p, ranks, q, workers, share) for p in range(ranks)] for q in range(workers)]
    streams = {lane: iter(samples(source, lane, n=30)) for row in lanes for lane in row}
    for step in range(28 // (ranks * share)):
        got = [raw for lane in lanes[step % workers] for raw in islice(streams[lane], share)]
        first = step * ranks * share
        assert [(raw.row, raw.turn) for raw in got] == whole[first : first + ranks * share]


def test_a_stream_goes_on_from_any_place():
    source, lane = table("csv", 5), Lane(1, 2, 0, 2, 2)
    items = list(islice(source.stream(3, lane), 20))
    assert sum(raw is None for raw, _, _ in items) > 2  # the ends of turns are marked
    for i, (_, place, _) in enumerate(items[:10]):
        rest = list(islice(source.stream(3, lane, place), 25))
        assert [raw for raw, _, _ in rest if raw is not None][:5] == [
            raw for raw, _, _ in items[i + 1 :] if raw is not None
        ][:5]


@pytest.mark.parametrize("kind", ["csv", "synthetic"])
def test_resampling_draws_with_replacement(kind):
    drawn = samples(table(kind, 50, resampled=True), n=50)
    rows = [raw.row for raw in drawn]
    assert 20 < len(set(rows)) < 42  # 50 (1 - 1/e) = 32 are expected
    assert len({(raw.row, raw.turn) for raw in drawn}) == 50  # and each draw has a view of its own
    assert rows != [raw.row for raw in samples(table(kind, 50, resampled=True), epoch=1, n=50)]


def test_csv_order_depends_on_seed_and_epoch():
    images = [f"{i}.jpg" for i in range(20)]

    def order(seed, epoch):
        return [raw.row for raw in samples(CsvSource(images, images, seed), epoch=epoch, n=20)]

    assert order(0, 0) == order(0, 0) and len({tuple(order(*key)) for key in ((0, 0), (0, 1), (1, 0))}) == 3


def test_synthetic_samples_are_fixed_and_of_the_right_shape():
    source = SyntheticSource(5, (6, 8), 1)
    first, again = (sorted(samples(source, epoch=e, n=5), key=lambda raw: raw.row) for e in (0, 1))
    pixels = [np.asarray(raw.image) for raw in first]
    assert all(p.shape == (6, 8, 3) for p in pixels)
    assert all(np.array_equal(p, np.asarray(raw.image)) for p, raw in zip(pixels, again))
    assert len({p.tobytes() for p in pixels}) == 5 and [raw.text for raw in first] == [raw.text for raw in again]
    assert np.asarray(samples(SyntheticSource(1, (6, 8), 2), n=1)[0].image).tobytes() != pixels[0].tobytes()
