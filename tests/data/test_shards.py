"""Tars as people pack them: files apart or in other folders, what macOS adds, dots, links, names not in UTF-8."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support.shards import sample
from training.data.audit import check
from training.data.bad_samples import Skips, usable
from training.data.lanes import Lane, Part
from training.data.sources.shards import APART, Group, Shard, count_samples, read_shard
from training.data.sources.webdataset import ShardSource

COUNT = 12
Files = list[tuple[str, bytes]]


def files(count: int = COUNT, name=lambda i, extension: f"{i:04d}.{extension}") -> Files:
    """Path and content of the files of ``count`` samples, side by side."""
    return [
        (name(i, extension), value.encode() if isinstance(value, str) else value)
        for i in range(count)
        for extension, value in (sample(i, (8, 8)) | {"json": json.dumps({"key": i})}).items()
        if extension != "__key__"
    ]


def pack(path: Path, members: Iterable[tuple[str, bytes | tarfile.TarInfo]], **options) -> str:
    """A tar of these members, where a header stands for a link."""
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data) if isinstance(data, bytes) else 0
            tar.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    return str(path)


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tuple[str, tarfile.TarInfo]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return name, info


def read(url: str, **options) -> tuple[list[int], Skips]:
    """Rows, and what was left out."""
    skips = Skips()
    source = ShardSource([Shard(url, 0, 1000)], 0, **options)
    return [raw.row for raw in usable(source.in_order(Part(0, 1)), skips)], skips


ALL = list(range(COUNT))


@pytest.mark.parametrize(
    "members",
    {
        "apple doubles": [x for n, d in files() for x in ((f"d/._{n}", bytes(99)), (f"d/{n}", d))],
        "apple doubles at the top": [x for n, d in files() for x in ((f"._{n}", bytes(99)), (n, d))],
        "a folder of them": [*((f"__MACOSX/d/._{n}", bytes(99)) for n, _ in files()), *files()],
        "other files": [("README", b"x"), ("d/.DS_Store", b"x"), ("d/Thumbs.db", b"x"), *files()],
        "folders": files(name=lambda i, e: f"./part {i % 2}/v1.0/{i // 2:03d}.{e}"),
        "folders of one name": files(name=lambda i, e: f"class{i}/image.{e}"),
        "upper case": files(name=lambda i, e: f"{i}.{e.upper()}"),
        "a dot": files(name=lambda i, e: f"photo.{i:04d}.{e}"),
        "dots": files(name=lambda i, e: f"2024.01.{i:02d} St. Ives.{e}"),
        "dots and upper case": files(name=lambda i, e: f"a.{i}.{e.title()}"),
    }.items(),
    ids=lambda members: members[0],
)
def test_samples_that_are_there_are_used(members, tmp_path):
    path = pack(tmp_path / "0.tar", members[1])
    rows, skips = read(path)
    bad = {"missing image": 1} if members[0] == "other files" else {}  # Thumbs.db could be a sample's
    assert sorted(rows) == ALL and skips.counts == bad
    assert count_samples(path) == COUNT + len(bad)


def test_samples_with_dots_are_entered_in_the_middle(tmp_path):
    path = pack(tmp_path / "0.tar", files(name=lambda i, e: f"photo.{i:04d}.{e}"))
    groups = [group for group in read_shard(path) if isinstance(group, Group)]
    assert [group.name for group in groups] == [f"photo.{i:04d}" for i in ALL]
    for group in groups:
        again = [g for g in read_shard(path, group.position, group.offset) if isinstance(g, Group)]
        assert [g.name for g in again] == [g.name for g in groups[group.position :]]
        assert [g.position for g in again] == list(range(group.position, COUNT))


def test_the_first_dot_counts_where_it_makes_a_sample(tmp_path):
    """As in webdataset: of 'a.jpg' and 'a.seg.png' the latter belongs to a."""
    path = pack(tmp_path / "0.tar", [x for n, d in files() for x in ((n, d), (n[:4] + ".seg.png", b"x"))][::2])
    assert read(path)[0] == ALL
    path = pack(tmp_path / "1.tar", [(f"{n[:4]}.{e}", d) for n, d in files() for e in (n[5:], f"x.{n[5:]}")])
    assert read(path)[0] == ALL
    (group, *_) = read_shard(path)
    assert isinstance(group, Group) and group.files.members["x.jpg"] == group.files.members["jpg"]


@pytest.mark.parametrize(
    ("order", "fragments"),
    [
        (lambda found: random.Random(0).sample(found, len(found)), None),
        (lambda found: sorted(found, key=lambda file: file[0][-3:]), 3 * COUNT),
        (
            lambda found: [f for f in found if f[0][-3:] != "txt"] + [f for f in found if f[0][-3:] == "txt"],
            2 * COUNT,
        ),
    ],
    ids=["at random", "by extension", "texts at the end"],
)
def test_files_that_are_not_side_by_side_are_told_and_counted_as_samples(order, fragments, tmp_path):
    path = pack(tmp_path / "0.tar", order(files()))
    rows, skips = read(path)
    assert fragments is None or len(rows) + skips.counts.total() == fragments
    assert all(APART in skips.examples[reason] for reason in list(skips.counts)[:1])
    summary = check([[path]])
    assert summary.skips.counts == {"files not side by side": COUNT - len(summary.good)}
    assert sum(report.samples for report in summary.reports) == COUNT
    assert any("sorted by name (tar --sort=name" in remark for remark in summary.remarks)


def test_a_rest_that_nobody_needs_costs_no_sample(tmp_path):
    path = pack(tmp_path / "0.tar", [*files(), ("0003.npy", b"x"), ("0004.npy", b"x")])
    summary = check([[path]])
    assert len(summary.good) == COUNT and sum(report.samples for report in summary.reports) == COUNT


def test_captions_in_a_folder_of_their_own(tmp_path):
    path = pack(
        tmp_path / "0.tar",
        sorted(files(name=lambda i, e: f"{'images' if e == 'jpg' else 'texts'}/{i}.{e}")),
    )
    rows, skips = read(path)
    assert not rows and skips.counts == {"missing text": COUNT, "missing image": COUNT}
    assert "it is in another folder of the tar, as texts/0.txt: put the files" in skips.examples["missing text"]
    summary = check([[path]])
    assert summary.skips.counts == {"files not side by side": COUNT}
    assert sum(report.samples for report in summary.reports) == COUNT


def test_a_sample_of_the_same_name_in_another_folder_is_another_sample(tmp_path):
    members = [(f"{folder}/{n}", d) for folder in "ab" for n, d in files(2)]
    members = [(n, d.replace(b'"key": ', b'"key": 5') if n[0] == "b" else d) for n, d in members]
    path = pack(tmp_path / "0.tar", [file for file in members if file[0] != "a/0001.txt"])
    rows, skips = read(path)
    assert rows == [0, 50, 51] and skips.examples == {
        "missing text": f"{path}/a/0001: it has .jpg, .json (with key)"
    }
    assert check([[path]]).skips.counts == {"missing text": 1}


def linked() -> list[tuple[str, bytes | tarfile.TarInfo]]:
    """Links of all kinds: to files before and behind, in other folders, and to links."""
    (picture, caption), key = [data for _, data in files(1)[:2]], files(3)
    return [
        ("d/0.jpg", picture),
        ("d/0.txt", caption),
        ("d/0.json", key[2][1]),
        link("d/1.jpg", "0.jpg"),
        link("d/1.txt", "d/0.txt", tarfile.LNKTYPE),
        ("d/1.json", key[5][1]),
        link("d/2.jpg", "../e/far.jpg"),
        link("d/2.txt", "1.txt"),
        ("d/2.json", key[8][1]),
        ("e/far.jpg", picture),
        ("e/far.txt", b"x"),
        ("e/far.json", b'{"key": 3}'),
    ]


def test_links_are_followed(tmp_path):
    path = pack(tmp_path / "0.tar", linked())
    rows, skips = read(path)
    assert rows == [0, 1, 2, 3] and not skips.counts
    assert count_samples(path) == 4
    groups = [group for group in read_shard(path) if isinstance(group, Group)]
    assert groups[1].files.members["jpg"] == groups[0].files.members["jpg"]
    again = [group for group in read_shard(path, 2, groups[2].offset) if isinstance(group, Group)]
    assert [group.files for group in again] == [group.files for group in groups[2:]]


def test_links_that_cannot_be_followed_are_told(tmp_path):
    path = pack(tmp_path / "0.tar", linked())
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(Path(path).read_bytes()))
    for url in (f"{path}.gz", f"pipe:cat {path}"):
        rows, skips = read(url)
        assert rows == [0, 3] and skips.counts == {"missing image": 2}
        assert "its .jpg is a symbolic link to 0.jpg, and links cannot be followed" in str(skips)
        assert "(tar --dereference)" in str(skips)
    path = pack(
        tmp_path / "1.tar",
        [
            *files(1),
            link("1.jpg", "/data/1.jpg"),
            ("1.txt", b"x"),
            link("2.jpg", "2.jpg"),
            ("2.txt", b"x"),
            link("3.jpg", "4.jpg", tarfile.LNKTYPE),
            ("3.txt", b"x"),
        ],
    )
    rows, skips = read(path)
    assert rows == [0] and skips.counts == {"missing image": 3}
    assert "a symbolic link to /data/1.jpg, which is not in the tar: pack the files themselves" in str(skips)


def test_names_that_are_not_utf8(tmp_path):
    members = files(name=lambda i, e: f"café {i:03d}.{e}")
    members[3] = (members[3][0], b"junk")
    path = pack(tmp_path / "0.tar", members, format=tarfile.GNU_FORMAT, encoding="latin-1")
    for index in ("key", "position", None):
        found = ShardSource([Shard(path, 0, 100)], 0, sample_index=index)
        skips = Skips()
        samples = list(usable(found.in_order(Part(0, 1)), skips))
        assert len({raw.row for raw in samples}) == COUNT
        assert all(raw.name.encode().endswith(rb"/caf\xe9 %03d" % i) for i, raw in enumerate(samples))
    summary = check([[path]])
    why = "its format is not known, it begins with b'junk'"
    assert summary.skips.examples == {"undecodable image": rf"{path}/caf\xe9 001: {why}"}
    "\n".join(summary.lines()).encode()


def test_a_path_that_is_not_utf8(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.makedirs(folder)
    path = os.fsdecode(folder) + "/0\udce9.tar"
    pack(Path(path), files()[:-2])
    rows, skips = read(path)
    assert rows == ALL[:-1]
    str(skips).encode()
    source = ShardSource([Shard(path, 0, 100)], 0)
    assert json.dumps(source.identity())
    source.describe(1).encode()
    assert source.identity() != ShardSource([Shard(path.replace("\udce9", "\udcea"), 0, 100)], 0).identity()


def test_counts_are_the_same_for_all_lanes(tmp_path):
    """What is told about a sample may depend on what was read before; what is counted does not."""
    path = pack(tmp_path / "0.tar", random.Random(1).sample(files(), 3 * COUNT))
    counts = []
    for lanes in (1, 3):
        skips = Skips()
        for number in range(lanes):
            lane = Lane(number, lanes, 0, 1, 1)
            for item in ShardSource([Shard(path, 0, 100)], 0, by_sample=True).stream(0, lane):
                skips.extend(item.faults)
                if item.sample is None:
                    break
        counts.append(Counter(skips.counts))
    assert counts[0] == counts[1] == read(path)[1].counts
