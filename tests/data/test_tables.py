from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from tests.support.shards import caption, write_csv
from training.config.params import parse
from training.data.lanes import Lane
from training.data.sources.tables import PROBES, CsvSource, SyntheticSource, Table, look_for_pictures, open_csv


def flags(path, *more):
    return parse(["--model", "RN50", "--train-data", str(path), *more]).data


ALONE = Lane()


def samples(source, lane=ALONE, epoch=0, n=None):
    return list(islice((item.sample for item in source.stream(epoch, lane) if item.sample is not None), n))


def test_csv_columns_and_separators(tmp_path):
    write_csv(tmp_path, 3)
    source = open_csv(str(tmp_path / "data.csv"), flags(tmp_path / "data.csv"), 0)
    assert list(source.texts) == [caption(i) for i in range(3)] and source.images[2].endswith("000002.jpg")
    other = tmp_path / "other.csv"
    other.write_text('id,image,"what, it is"\n7,a.png,"a, b"\n8,b.png,NA\n9,c.png,\n')
    config = flags(other, "--csv-separator", ",", "--csv-img-key", "image", "--csv-caption-key", "what, it is")
    source = open_csv(str(other), config, 0)
    assert list(source.images) == ["a.png", "b.png", "c.png"] and list(source.texts) == ["a, b", "NA", ""]
    assert source.count() == 3
    with pytest.raises(ValueError, match="'id', 'image'"):
        open_csv(str(other), flags(other, "--csv-separator", ","), 0)
    other.write_text("filepath\ttitle\n")
    with pytest.raises(ValueError, match="no rows"):
        open_csv(str(other), flags(other), 0)


def test_several_csv_files_are_one_table(tmp_path):
    """Rows in the order of the files; columns may stand in another order in each."""
    (tmp_path / "b.csv").write_text("filepath,title\n0.jpg,zero\n1.jpg,one\n")
    (tmp_path / "a.csv").write_text("n,title,filepath\n9,two,2.jpg\n")
    both = f"{tmp_path}/b.csv::{tmp_path}/a.csv"
    source = open_csv(both, flags(both, "--csv-separator", ","), 0)
    assert (list(source.images), list(source.texts)) == (["0.jpg", "1.jpg", "2.jpg"], ["zero", "one", "two"])
    every = f"{tmp_path}/*.csv"
    assert list(open_csv(every, flags(every, "--csv-separator", ","), 0).texts) == ["two", "zero", "one"]
    (tmp_path / "a.csv").write_text("n,title,path\n9,two,2.jpg\n")
    with pytest.raises(ValueError, match=r"--train-data /.*/a\.csv: it has no column 'filepath'"):
        open_csv(both, flags(both, "--csv-separator", ","), 0)
    with pytest.raises(ValueError, match=r"--val-data /.*/a\.csv: it has no column 'filepath'"):
        open_csv(both, flags(both, "--csv-separator", ","), 0, "--val-data")


def test_quoting_and_encoding_are_those_of_the_flags(tmp_path):
    file = tmp_path / "x.tsv"
    file.write_bytes('filepath\ttitle\na.jpg\t"café\n'.encode("latin-1"))
    source = open_csv(str(file), flags(file, "--csv_quoting", "none", "--csv_encoding", "latin-1"), 0)
    assert list(source.texts) == ['"café']


def pictures_of(folder, paths, name="x.csv"):
    """A file with these pictures, and the table that is read from it."""
    file = folder / name
    file.write_text("filepath\ttitle\n" + "".join(f"{path}\tt\n" for path in paths))
    return str(file), open_csv(str(file), flags(file), 0)


def test_pictures_that_do_not_exist_are_told_before_a_run(tmp_path, monkeypatch):
    (tmp_path / "sets" / "lists").mkdir(parents=True)
    (tmp_path / "sets" / "img").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for i in range(4):
        (tmp_path / "sets" / "img" / f"{i}.jpg").write_bytes(b"")

    def cure(*paths):
        data, source = pictures_of(tmp_path / "sets" / "lists", paths)
        with pytest.raises(
            ValueError, match=f"--train-data .*: of {len(paths)} pictures that were looked for"
        ) as told:
            look_for_pictures(source, data, "--train-data")
        assert look_for_pictures(source, data, "--train-data", allowed=1.0) == [str(told.value)]
        return str(told.value)

    relative = cure("img/0.jpg", "img/1.jpg")
    assert (
        f"the first is 'img/0.jpg' in the working directory {tmp_path}/elsewhere: it exists in {tmp_path}/sets; "
        in relative
    )
    assert "start the run there (cd), or write absolute paths into the file" in relative
    assert "the first is '/nowhere/0.jpg': correct the paths, or --csv-img-key" in cure("/nowhere/0.jpg")
    assert "download them first" in cure("https://host/0.jpg")
    assert "correct the paths" in cure("")
    monkeypatch.chdir(tmp_path / "sets")
    assert "it exists without the spaces around it; correct" in cure(" img/0.jpg")
    assert "it exists with / instead of \\; correct" in cure("img\\0.jpg")
    assert "it exists without the quote signs around it; correct" in cure("'img/0.jpg'")
    assert "it exists without file://; correct" in cure(f"file://{tmp_path}/sets/img/0.jpg")
    monkeypatch.setenv("HOME", str(tmp_path / "sets"))
    assert "it exists with the home directory for ~; correct" in cure("~/img/0.jpg")

    data, source = pictures_of(tmp_path, ["img/0.jpg", "img/8.jpg", "img/9.jpg"])
    (remark,) = look_for_pictures(source, data, "--train-data")
    assert "of 3 pictures that were looked for, 2 do not exist; the first is 'img/8.jpg'" in remark
    data, source = pictures_of(tmp_path, ["img/0.jpg", "img/9.jpg"])
    assert look_for_pictures(source, data, "--train-data") == []


def test_pictures_are_looked_for_all_over_a_large_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.jpg").write_bytes(b"")
    data, source = pictures_of(tmp_path, ["0.jpg"] * 900 + ["9.jpg"] * 1100)
    (remark,) = look_for_pictures(source, data, "--val-data")
    assert (
        f"--val-data {data}: of {PROBES} pictures that were looked for, {PROBES * 11 // 20} do not exist" in remark
    )


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
