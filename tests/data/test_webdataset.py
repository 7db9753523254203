"""Shards: what is read, in which order, and what is left out."""

from __future__ import annotations

import bz2
import io
import lzma
import os
import shutil
import tarfile
import time
from collections import Counter
from itertools import islice, pairwise
from types import SimpleNamespace

import pytest
import torch
import webdataset as wds
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from tests.support.lab import WORLD
from tests.support.shards import caption, encode, picture, sample, write_shards, write_tar
from training.config.params import parse
from training.data.bad_samples import NothingUsable, Skips, usable
from training.data.lanes import Lane, Part
from training.data.sources import rows as rows_of_shards
from training.data.sources import urls
from training.data.sources.fields import DEFAULT
from training.data.sources.paths import expand_shards, look_for_shards
from training.data.sources.rows import count_all
from training.data.sources.shards import Shard, count_samples, read_shard
from training.data.sources.webdataset import ShardSource, open_shards
from training.distributed.process_group import World


def small(i: int, **changes) -> dict:
    return sample(i, (8, 8)) | changes


def source(pattern: str, **options) -> ShardSource:
    return ShardSource([Shard(url, 0, 10**6) for url in expand_urls(pattern)], 7, **options)


ALONE = Part(0, 1)


def lane(number: int, count: int) -> Lane:
    """One of ``count`` virtual ranks, a sample per step."""
    return Lane(number, count, 0, 1, 1)


def turn(stream, skips: Skips | None = None) -> list[int]:
    """Rows up to the end of the turn; its faults are counted in ``skips``."""
    found = []
    for item in stream:
        (skips or Skips()).extend(item.faults)
        if item.sample is None:
            return found
        found.append(item.sample.row)


def endless(stream) -> list:
    return (item.sample for item in stream if item.sample is not None)


def test_what_we_rely_on_in_webdataset(tmp_path):
    """Names, arguments and results; a release that changes one of these fails here and not in a run."""
    path = write_tar(tmp_path / "a.tar", [small(0), {"__key__": "x/y.z", "JPG": b"1", "seg.png": b"2"}])
    assert expand_urls("a{0..1}.tar::b.tar") == ["a0.tar", "a1.tar", "b.tar"]
    assert expand_urls("pipe:cat {a,b}.tar") == ["pipe:cat a.tar", "pipe:cat b.tar"]
    assert base_plus_ext("d.e/f.g.h") == ("d.e/f", "g.h") and base_plus_ext("README") == (None, None)
    for url in (str(path), f"file:{path}", f"pipe:cat {path}"):
        with wds.gopen(url) as stream:
            assert stream.read() == path.read_bytes()


def test_expanding_sources(tmp_path):
    for name in ("b1.tar", "b0.tar", "c.tar", "x00.tar", "x01.tar", "x02.tar"):
        write_tar(tmp_path / name, [])
    assert expand_shards(f"{tmp_path}/b?.tar::{tmp_path}/x{{00..02}}.tar::pipe:cat {tmp_path}/*.tar") == [
        [f"{tmp_path}/b0.tar", f"{tmp_path}/b1.tar"],
        [f"{tmp_path}/x00.tar", f"{tmp_path}/x01.tar", f"{tmp_path}/x02.tar"],
        [f"pipe:cat {tmp_path}/*.tar"],
    ]
    for wrong in (f"{tmp_path}/d*.tar", f"{tmp_path}/c.tar::"):
        with pytest.raises(ValueError, match="--train-data"):
            expand_shards(wrong)


def test_shards_that_are_not_there(tmp_path):
    write_tar(tmp_path / "01.tar", [])
    write_tar(tmp_path / "02.tar", [])
    there, some = f"{tmp_path}/{{01..02}}.tar", f"{tmp_path}/{{00..04}}.tar"
    assert look_for_shards(there, "--train-data") == []
    assert look_for_shards(f"{there}::{some}", "--train-data") == [
        f"--train-data: 3 of 5 shards are missing, the first is {tmp_path}/00.tar"
    ]
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=rf"--val-data .*: there is no {folder}/03\.tar"):
            look_for_shards(f"{there}::{folder}/{{03..09}}.tar", "--val-data")
    assert look_for_shards("pipe:cat {0..1}.tar::https://nowhere/{0..1}.tar", "--train-data") == []


@pytest.mark.parametrize("lanes", [1, 2, 3, 4])
@pytest.mark.parametrize(("shards", "size"), [(4, 12), (5, 12), (2, 12), (1, 24)])
def test_dealt_shards_are_seen_once_per_turn(tmp_path, shards, size, lanes):
    dealt = source(write_shards(tmp_path, [small(i) for i in range(shards * size)], size), window=8)
    for epoch in range(2):
        shares = [turn(dealt.stream(epoch, lane(number, lanes))) for number in range(lanes)]
        assert {len(share) for share in shares} == {shards * size // lanes}
        assert sorted(sum(shares, [])) == list(range(shards * size))  # noqa: RUF017


def test_unequal_shards_leave_no_lane_dry(tmp_path):
    dealt = source(write_shards(tmp_path, [small(i) for i in range(20)], (1, 14, 3, 2)))
    seen = Counter()
    for number in range(4):
        stream = endless(dealt.stream(0, lane(number, 4)))
        share = [raw.row for raw in islice(stream, 10)]
        assert len(share) == 10
        seen.update(share)
    several = {row for epoch in range(8) for row in turn(dealt.stream(epoch, lane(0, 4)))}
    assert several == set(range(20))  # over the epochs a lane meets all shards


def test_turns_epochs_and_lanes_have_orders_of_their_own(tmp_path):
    pattern = write_shards(tmp_path, [small(i) for i in range(24)], 6)
    for options in ({}, {"by_sample": True}, {"weights": (1, 1, 1, 1)}):
        shards = source(pattern, **options)
        stream = shards.stream(0, lane(0, 2))
        first, second = turn(stream), turn(stream)
        assert first != second and len(first) == len(second) == 12
        assert turn(shards.stream(0, lane(0, 2))) == first != turn(shards.stream(1, lane(0, 2)))
        assert turn(shards.stream(0, lane(1, 2))) != first
        again = ShardSource(shards.shards, 8, **options)
        assert turn(again.stream(0, lane(0, 2))) != first


def test_samples_mix_across_shards(tmp_path):
    shards = source(write_shards(tmp_path, [small(i) for i in range(40)], 10))
    order = turn(shards.stream(0, lane(0, 1)))
    assert len({row // 10 for row in order[:10]}) > 1


@pytest.mark.parametrize("by_sample", [False, True])
def test_the_next_window_is_read_sample_by_sample(tmp_path, monkeypatch, by_sample):
    """After the first window no step reads many samples, and an error ahead does not come before its window."""
    pattern = write_shards(tmp_path, [small(i) for i in range(40)], per_shard=10)
    read = []

    def counting(self, group, number, turn):
        read.append(group.position)
        if len(read) == 25:
            raise ZeroDivisionError
        return parse_group(self, group, number, turn)

    parse_group = ShardSource._parse
    monkeypatch.setattr(ShardSource, "_parse", counting)
    stream, counts, rows = source(pattern, window=10, by_sample=by_sample).stream(0, lane(0, 1)), [], []
    with pytest.raises(ZeroDivisionError):
        for item in stream:
            counts.append(len(read))
            rows.append(item.sample.row)
    assert counts[0] <= 12 and len(rows) == 20
    assert max(b - a for a, b in pairwise(counts)) <= 2


def test_drawing_follows_the_weights(tmp_path):
    shards = source(write_shards(tmp_path, [small(i) for i in range(3)], 1), weights=(1, 2, 5))
    for number in range(2):
        stream = endless(shards.stream(0, lane(number, 2)))
        seen = Counter(raw.row for raw in islice(stream, 1000))
        assert [seen[i] / 1000 for i in range(3)] == pytest.approx([0.125, 0.25, 0.625], abs=0.045)  # 3 deviations


def test_visits_of_one_epoch_are_told_apart(tmp_path):
    pattern = write_shards(tmp_path, [small(i) for i in range(2)], 2)
    for options in ({}, {"by_sample": True}, {"weights": (1,)}):
        stream = source(pattern, **options).stream(0, lane(0, 1))
        visits = [(raw.row, raw.turn) for raw in islice(endless(stream), 6)]
        assert len(set(visits)) == len(visits) == 6


def test_images_of_every_kind_and_files_beside_them(tmp_path):
    members = [
        small(0),
        {"__key__": "1", "PNG": encode(picture(1), "png"), "txt": "png", "json": {"key": 1}},
        {"__key__": "2", "webp": encode(picture(2), "webp"), "txt": "webp", "json": {"key": "2"}, "npy": b"0"},
        {"__key__": "3", "jpeg": encode(picture(3)), "txt": "jpeg", "json": {"key": 3}},
        {"__key__": "__meta__/shard", "json": {"shard": 1}},
    ]
    skips = Skips()
    shards = source(str(write_tar(tmp_path / "0.tar", members)))
    raws = list(usable(shards.in_order(ALONE), skips))
    assert [(raw.row, raw.text) for raw in raws][1:] == [(1, "png"), (2, "webp"), (3, "jpeg")]
    assert all(isinstance(raw.image, bytes) and len(raw.image) > 50 for raw in raws) and not skips.counts


BAD_KEYS = {"a": "key is not an integer", "3.0": "key is not an integer", True: "key is not an integer"} | {
    None: "key is not an integer",
    1.0: "key is not an integer",
    "9" * 5000: "key is not an integer",
    -1: "key out of range",
    10**6: "key out of range",
    "1000000": "key out of range",
}


def test_every_kind_of_bad_sample_is_named_and_counted_once(tmp_path):
    members = [small(i, json={"key": key}) for i, key in enumerate(BAD_KEYS)]
    planted = Counter(BAD_KEYS.values())
    for i, (change, reason) in enumerate(
        [
            ({"json": "[" * 100_000}, "json is not valid"),
            ({"json": b"\xff{}"}, "json is not valid"),
            ({"json": ""}, "json is not valid"),
            ({"json": "[1, 2]"}, "json without key"),
            ({"json": "7"}, "json without key"),
            ({"json": {"key_": 1}}, "json without key"),
            ({"txt": b"caf\xe9"}, "text is not utf-8"),
        ],
        start=100,
    ):
        members.append(small(i, **change))
        planted[reason] += 1
    for i, part in enumerate(("jpg", "txt", "json"), start=200):
        members.append({name: value for name, value in small(i).items() if name != part})
        planted[f"missing {({'jpg': 'image', 'txt': 'text'}).get(part, part)}"] += 1
    members += [small(i) for i in (300, 301)]
    pattern = write_shards(tmp_path, members, 7)
    for options in ({}, {"by_sample": True}):
        shards = source(pattern, **options)
        for lanes in (1, 3):
            counts, rows, examples = Counter(), [], {}
            for number in range(lanes):
                skips = Skips()
                rows += turn(shards.stream(0, lane(number, lanes)), skips)
                counts += skips.counts
                examples |= skips.examples
            assert counts == planted and sorted(rows) == [300, 301]
        assert ".tar/000202: " in examples["missing json"]


def test_broken_shards_give_what_is_whole_in_them(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", [small(i) for i in range(4)]).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        offsets = {member.name: member.offset for member in tar}
    cut = {
        "data.tar": whole[: offsets["000002.json"] + 512 + 3],
        "header.tar": whole[: offsets["000002.txt"] + 100],
        "empty.tar": b"",
        "page.tar": b"<html>404 not found</html>" * 50,
    }
    for name, data in cut.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder.tar").mkdir()
    with tarfile.open(tmp_path / "nothing.tar", "w"):
        pass
    for name, rows, reasons in (
        ("data.tar", [0, 1], {"unreadable shard": 1, "missing json": 1}),
        ("header.tar", [0, 1], {"unreadable shard": 1, "missing text": 1}),
        ("empty.tar", [], {"unreadable shard": 1}),
        ("page.tar", [], {"unreadable shard": 1}),
        ("folder.tar", [], {"unreadable shard": 1}),
        ("missing.tar", [], {"unreadable shard": 1}),
        ("nothing.tar", [], {"empty shard": 1}),
    ):
        skips = Skips()
        shards = source(str(tmp_path / name))
        assert [raw.row for raw in usable(shards.in_order(ALONE), skips)] == rows, name
        assert skips.counts == reasons, name
        assert all(name in example for example in skips.examples.values())


@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_a_broken_shard_is_counted_once_per_turn(tmp_path, by_sample, lanes):
    pattern = write_shards(tmp_path, [small(i) for i in range(8)], 2)
    (tmp_path / "00002.tar").write_bytes(b"")
    shards = source(pattern, by_sample=by_sample)
    counts, rows = Counter(), []
    for number in range(lanes):
        skips = Skips()
        rows += turn(shards.stream(0, lane(number, lanes)), skips)
        counts += skips.counts
    assert counts == {"unreadable shard": 1} and sorted(rows) == [0, 1, 2, 3, 6, 7]


@pytest.mark.parametrize(
    "options",
    [lambda _: {}, lambda _: {"by_sample": True}, lambda lanes: {"sizes": (7, 7, 7, 3), "steps": 24 // lanes}],
)
@pytest.mark.parametrize("lanes", [1, 2])
def test_every_fault_comes_once_wherever_a_stream_is_taken_up(tmp_path, options, lanes):
    """At the beginnings and ends of shards, windows and turns, and beside any sample."""
    members = [small(i) for i in range(24)]
    bad = (0, 1, 6, 7, 8, 13, 20, 21, 23)
    for i in bad:
        del members[i]["txt"]
    pattern = write_shards(tmp_path, members, 7)
    with tarfile.open(tmp_path / "00002.tar") as tar:
        last = tar.getmembers()[-1].offset_data
    os.truncate(tmp_path / "00002.tar", last + 3)  # inside sample 20, which is bad anyway
    shards = source(pattern, window=3, **options(lanes))
    names = Counter()
    for number in range(lanes):
        items = list(islice(shards.stream(5, lane(number, lanes)), 40))
        end = [item.sample is None for item in items].index(True)
        names.update(fault.name for item in items[: end + 1] for fault in item.faults)
        for i, item in enumerate(items[:30]):
            again = list(islice(shards.stream(5, lane(number, lanes), item.place), 9))
            expected = items[i + 1 : i + 10]
            assert [(*a[:2], *a.faults) for a in again] == [(*b[:2], *b.faults) for b in expected]
    assert sum("00002.tar: " in name for name in names) == 1
    assert names.total() == len(names) == len(bad) + 1


def test_a_flood_of_faults_ends_the_stream_and_scattered_ones_do_not(tmp_path):
    members = [small(i) for i in range(60)]
    for i in range(0, 60, 2):
        del members[i]["txt"]
    for i in range(40, 49):
        members[i].pop("txt", None)
    shards = source(write_shards(tmp_path, members, 60))
    assert len(turn(shards.stream(0, lane(0, 1), limit=10))) == 26
    with pytest.raises(NothingUsable, match=r"8 samples .* in a row .*; left out: 8 missing text \(e\.g"):
        turn(shards.stream(0, lane(0, 1), limit=7))


def test_samples_never_mix_across_shards(tmp_path):
    first, second = small(0), small(0, json={"key": 5}, txt="other")
    del first["txt"], first["json"]  # as after a cut; the next shard begins with the same name
    write_tar(tmp_path / "0.tar", [first])
    write_tar(tmp_path / "1.tar", [second])
    skips = Skips()
    (raw,) = usable(source(f"{tmp_path}/{{0..1}}.tar").in_order(ALONE), skips)
    assert (raw.row, raw.text, raw.image) == (5, "other", second["jpg"]) and skips.counts == {"missing text": 1}


def test_duplicate_members_are_counted_and_the_first_one_stays(tmp_path):
    twice = [small(0), small(0, txt="again", json={"key": 9}), small(1)]
    skips = Skips()
    raws = usable(source(str(write_tar(tmp_path / "0.tar", twice))).in_order(ALONE), skips)
    assert [(raw.row, raw.text) for raw in raws] == [(0, caption(0)), (1, caption(1))]
    assert skips.counts == {"duplicate member": 3}


def test_commands_and_compression(tmp_path, monkeypatch):
    monkeypatch.setattr(urls, "WAITS", (0.0,))
    path = write_tar(tmp_path / "0.tar", [small(i) for i in range(3)])
    with tarfile.open(path) as plain, tarfile.open(tmp_path / "0.tar.gz", "w:gz") as packed:
        for member in plain:
            packed.addfile(member, plain.extractfile(member))
    for module in (bz2, lzma):
        (tmp_path / f"0.tar.{module.__name__}").write_bytes(module.compress(path.read_bytes()))
    packed = (f"{path}.gz", f"{path}.bz2", f"{path}.lzma", f"pipe:cat {path}.gz", f"pipe:cat {path}.bz2")
    for url in (*packed, f"pipe:cat {path}", f"pipe:gzip -dc {path}.gz", f"file:{path}"):
        skips = Skips()
        assert [raw.row for raw in usable(source(url).in_order(ALONE), skips)] == [0, 1, 2] and not skips.counts
        assert count_samples(url) == 3
    for url, rows in ((f"pipe:cat {path}; exit 3", [0, 1, 2]), ("pipe:exit 4", []), ("gopher://x/0.tar", [])):
        skips = Skips()
        assert [raw.row for raw in usable(source(url).in_order(ALONE), skips)] == rows
        assert skips.counts == {"unreadable shard": 1}, url


def test_a_command_that_fails_at_last_gives_all_that_it_gave(tmp_path):
    path = write_tar(tmp_path / "0.tar", [sample(i, (96, 96)) for i in range(5)])
    assert 2**14 < path.stat().st_size < 2**16  # more than a read, less than a pipe holds: it has long failed
    groups = read_shard(f"pipe:cat {path}; exit 3")
    names = [next(groups).name]
    time.sleep(0.2)
    *more, damage = groups
    assert names + [group.name for group in more] == [f"{i:06d}" for i in range(5)]
    assert damage.fault.reason == "unreadable shard" and "exit 3" in damage.fault.name


def test_a_command_that_is_left_early_is_no_fault(tmp_path):
    path = write_tar(tmp_path / "0.tar", [sample(i, (256, 256)) for i in range(60)])
    assert path.stat().st_size > 2**18  # more than a pipe holds
    groups = read_shard(f"pipe:cat {path}")
    assert next(groups).name == "000000"
    groups.close()


def test_counting_agrees_with_reading(tmp_path):
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as tar:
        for name in (
            *("a/1.jpg", "a/1.txt", "b/1.jpg", "README", "__index__.json", "__x__/2.jpg", "2.jpg", ".hidden"),
            *("3.seg.png", "3.jpg", "2.txt", "n" * 150 + ".jpg", "n" * 150 + ".txt", "ü.jpg"),
        ):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        folder = tarfile.TarInfo("folder.d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    read = [group.name for group in read_shard(str(path))]
    assert read == ["a/1", "b/1", "__index__", "2", "3", "2", "n" * 150, "ü"]
    assert count_samples(str(path)) == len(read) == count_samples(f"pipe:cat {path}")


def test_rows_by_position_survive_bad_samples_and_need_whole_shards(tmp_path):
    members = [small(i) for i in range(9)]
    del members[2]["txt"]
    pattern = write_shards(tmp_path, members, 4)
    flags = ["--train-data", pattern, "--train-num-samples", "9", "--sample_index", "position", "--data_size", "9"]
    config = parse([*flags, "--model", "RN50"]).data
    alone = World(0, 0, 1, 1, torch.device("cpu"))
    raws = {raw.row: raw.text for raw in usable(open_shards(config, 0, alone, 1).in_order(ALONE), Skips())}
    assert raws == {i: caption(i) for i in range(9) if i != 2}
    shutil.copy(tmp_path / "00000.tar", tmp_path / "saved")
    (tmp_path / "00000.tar").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match=r"00000\.tar"):
        open_shards(config, 0, alone, 1)


def test_rows_by_position_need_a_data_size_for_all_samples(tmp_path):
    """With fewer rows the same samples, the last ones of the list, would be left out of every epoch."""
    for name in "ab":
        (tmp_path / name).mkdir()
    a, b = (write_shards(tmp_path / name, [small(i) for i in range(n)], 4) for name, n in (("a", 9), ("b", 6)))
    alone = World(0, 0, 1, 1, torch.device("cpu"))

    def opened(data, size, index="position"):
        flags = ["--train-data", data, "--train-num-samples", "9", "--sample_index", index, "--data_size", size]
        return open_shards(parse([*flags, "--model", "RN50"]).data, 0, alone, 1)

    for data, size, samples, enough in (
        (a, "8", "9", "9"),
        (f"{a}::{b}", "14", "15", "15"),
        (f"{a}::{b}", "9::5", "9::6", "9::6"),
        (f"{a}::{b}", "8::20", "9::6", "9::20"),
    ):
        with pytest.raises(ValueError) as told:
            opened(data, size)
        said = str(told.value)
        assert said.startswith(f"--data_size {size}: {data} has {samples} samples, and ")
        assert said.endswith(f"; give at least {enough}")
        opened(data, enough)
        opened(data, size, "key")


def test_rows_are_announced_before_they_come(tmp_path):
    """A window ahead of those that are handed out, each once; not where all lanes read all samples."""
    write_shards(tmp_path, [small(i) for i in range(40)], per_shard=10)
    pattern = f"{tmp_path}/{{00000..00003}}.tar"
    shards, announced, given = source(pattern, window=8), [], []
    shards.announce = lambda row, epoch, turn: announced.append(row)
    for item in shards.stream(0, lane(1, 2)):
        if item.sample is None:
            break
        given.append(item.sample.row)
        assert given[-1] in announced
        assert len(announced) >= min(8 * (-(-len(given) // 8)) + (len(given) - 1) % 8, 20)
    assert sorted(announced) == sorted(given) and len(given) == 20
    all_read, told = source(pattern, window=8, by_sample=True), []
    all_read.announce = lambda row, epoch, turn: told.append(row)
    assert turn(all_read.stream(0, lane(1, 2))) and not told


def test_a_count_whose_transfer_breaks_is_repeated(tmp_path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(rows_of_shards, "time", SimpleNamespace(sleep=waits.append))
    path = write_tar(tmp_path / "0.tar", [sample(i, (8, 8)) for i in range(3)])
    tries = tmp_path / "tries"
    flaky = f"pipe:echo >> {tries}; test $(wc -l < {tries}) -ge 3 && cat {path} || (head -c 3000 {path}; exit 1)"
    assert count_all([flaky, str(path)], DEFAULT.known, WORLD, "--flag") == [3, 3] and waits == [*urls.WAITS]

    broken = f"pipe:head -c 3000 {path}; exit 1"
    with pytest.raises(ValueError, match="1 of 2 shards cannot be read: try again; if it stays so, repair or rem"):
        count_all([broken, str(path)], DEFAULT.known, WORLD, "--flag")
    assert waits == [*urls.WAITS] * 2

    cut = tmp_path / "cut.tar"
    cut.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"1 of 2 shards cannot be read: repair or remove them, .*cut\.tar: "):
        count_all([str(cut), str(path)], DEFAULT.known, WORLD, "--flag")
    assert waits == [*urls.WAITS] * 2  # a local file stays as it is
