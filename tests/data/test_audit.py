"""check_data: counts, keys, sizes and verdicts on sound data and on data with faults."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tests.support.shards import encode, picture, sample, write_shards, write_tar
from tests.support.spoiled import SAMPLES, SHARDS
from training import check_data
from training.check_data import main
from training.data import audit
from training.data.audit import check
from training.data.sources.paths import expand_shards


def small(i: int, **changes) -> dict:
    return sample(i, (16, 12)) | changes


def summary(*patterns: str, sizes=(), **options) -> audit.Summary:
    return check(expand_shards("::".join(patterns)), sizes, **options)


def printed(capsys, *flags: str) -> tuple[int, dict[str, str], str]:
    """Exit code; the labelled lines; everything."""
    code = main([str(flag) for flag in flags])
    text = capsys.readouterr().out
    return code, dict(re.findall(r"^(\w[\w ]+?)  +(.*)$", text, re.MULTILINE)), text


def test_sound_data(tmp_path, capsys):
    members = [small(i, txt="x" * i) for i in range(1, 9)]
    members[2]["jpg"] = encode(picture(2, (64, 30)))
    pattern = write_shards(tmp_path, members, (5, 3))
    code, lines, text = printed(capsys, "--train-data", pattern, "--data_size", 9, "--workers", 2)
    assert code == 0 and lines["safe to train"] == "yes" and "problem" not in lines
    assert lines["shards"] == "2" and lines["samples"] == "8, of which 8 can be used"
    assert re.search(r"^ +5  \S*/00000\.tar$", text, re.MULTILINE)
    assert re.search(r"^ +3  \S*/00001\.tar$", text, re.MULTILINE)
    assert lines["keys"] == "1 to 8"
    assert lines["image width"] == "min 16, quartiles 16 16 16, max 64"
    assert lines["image height"] == "min 12, quartiles 12 12 12, max 30"
    assert lines["caption length"] == "min 1, quartiles 3 4 6, max 8 characters"
    assert lines["suggested"] == "--train-num-samples 8 --data_size 9"


def test_every_kind_of_bad_sample_is_counted_and_named(tmp_path, capsys):
    members, planted = [small(i) for i in range(40)], Counter()
    for i, fault in enumerate(SAMPLES.values()):
        members.append(small(100 + i))
        fault.spoil(members[-1])
        planted += Counter([fault.reason] if fault.reason else [])
    pattern = write_shards(tmp_path, members, 19)
    code, lines, text = printed(capsys, "--train-data", pattern, "--data_size", 1000)
    assert code == 1 and lines["safe to train"] == "no"
    good = len(members) - planted.total()
    assert lines["samples"] == f"{len(members)}, of which {good} can be used"
    for reason, n in planted.items():
        (name,) = re.findall(rf"^left out +{n} {reason}, e\.g\. (.*)$", text, re.MULTILINE)
        assert str(tmp_path) in name
    assert len(re.findall("^left out", text, re.MULTILINE)) == len(planted)
    assert "more than --max_bad_fraction 0.05" in text and "4 keys are negative or not below" in text


@pytest.mark.parametrize("name", SHARDS)
def test_broken_shards(name, tmp_path):
    pattern = write_shards(tmp_path, [small(i) for i in range(8)], 4)
    broken = SHARDS[name]
    broken.make(tmp_path / "00002.tar", [10, 11, 12, 13])
    second = str(tmp_path / "{00002..00002}.tar")  # a range, as a folder may be given as such
    found = summary(pattern, second, sizes=[100], max_bad_fraction=0.4)
    assert found.skips.counts == broken.reasons
    assert sorted(found.good[:, 0]) == [*range(8), *range(10, 10 + broken.whole)]
    assert not found.problems and found.remarks
    assert summary(pattern, second, sizes=[100]).problems
    alone = summary(second)
    assert ("there is no usable sample" in alone.problems) == (broken.whole == 0)
    assert list(alone.lines())[-1] == "safe to train      no"


def test_a_bad_sample_among_many_is_a_remark(tmp_path):
    members = [small(i) for i in range(30)]
    del members[3]["txt"]
    pattern = write_shards(tmp_path, members, 30)
    assert not summary(pattern).problems
    assert summary(pattern).remarks == ["1 of 30 samples (3.33%) are unusable: training leaves them out"]
    assert summary(pattern, max_bad_fraction=0.02).problems


def test_keys_that_occur_twice(tmp_path, capsys):
    a = write_tar(tmp_path / "a.tar", [small(0), small(1), small(2)])
    b = write_tar(tmp_path / "b.tar", [small(2), small(3)])
    code, lines, text = printed(capsys, "--train-data", f"{tmp_path}/{{a,b}}.tar", "--data_size", 4)
    assert code == 1 and lines["problem"].startswith("1 keys occur twice")
    assert f"key 2 is in {a} and in {b}" in text
    # As two sources each has rows of its own, if they are asked for.
    assert not summary(str(a), str(b), sizes=[3, 4]).problems
    assert summary(str(a), str(b), sizes=[4]).problems
    unasked = summary(str(a), str(b))
    assert not unasked.problems and unasked.suggestion() == "--train-num-samples 5 --data_size 3::4"
    assert summary(str(write_tar(tmp_path / "c.tar", [small(0), small(1, json={"key": 0})]))).problems


def test_a_data_size_that_is_too_small(tmp_path):
    pattern = write_shards(tmp_path, [small(i) for i in range(6)], 3)
    found = summary(pattern, sizes=[4])
    assert found.problems and "2 keys are negative or not below --data_size 4" in "\n".join(found.problems)
    (problem,) = summary(pattern, sizes=[4], sample_index="position").problems
    assert problem.startswith("--data_size 4 is less than the 6 samples")


def test_data_without_keys(tmp_path):
    members = [small(i) for i in range(25)]
    for m in members:
        del m["json"]
    del members[0]["txt"]
    pattern = write_shards(tmp_path, members, 9)
    assert summary(pattern).problems and "--sample_index position" in "\n".join(summary(pattern).remarks)
    by_position = summary(pattern, sample_index="position")
    assert not by_position.problems
    assert by_position.suggestion() == "--train-num-samples 24 --sample_index position --data_size 25"
    assert summary(pattern, sample_index="none").suggestion() == "--train-num-samples 24"


def test_many_shards_are_summed_up(tmp_path):
    members = [small(i) for i in range(61)]
    del members[30]["jpg"]
    pattern = write_shards(tmp_path, members, [*[2] * 28, 5])
    text = "\n".join(summary(pattern).lines())
    listed = re.findall(r"^ +[\d,]+  \S+/(\d+)\.tar", text, re.MULTILINE)
    assert listed == ["00015", "00028"]  # with a fault, and of unusual size


def test_wrong_commands(tmp_path, capsys):
    pattern = write_shards(tmp_path, [small(0)], 1)
    for flags in (
        ["--train-data", f"{tmp_path}/*.zip"],
        ["--train-data", pattern, "--data_size", "1::2"],
        ["--train-data", pattern, "--data-size", "many"],
        [],
    ):
        try:
            code = main(flags)
        except SystemExit as left:
            code = left.code
        assert code == 2 and re.search("--train-data|--data.size", capsys.readouterr().err)


def test_the_suggested_size_has_room_for_the_keys_that_are_out_of_range(tmp_path):
    low = write_shards(tmp_path, 12, per_shard=6)
    (tmp_path / "other").mkdir()
    high = write_shards(tmp_path / "other", [sample(i, key=250 + i) for i in range(4)], per_shard=4)
    assert "--train-num-samples 8 --data_size 12" in summary(low, sizes=[8]).suggestion()
    found = summary(low, high, sizes=[12, 100])
    assert "--train-num-samples 12 --data_size 12::254" in found.suggestion()
    assert any("4 keys are negative or not below --data_size 12::100" in text for text in found.problems)


def test_csv_is_left_to_training(capsys):
    assert check_data.main(["--train-data", "pairs.tsv"]) == 2
    assert (
        capsys.readouterr().err == "error: --train-data pairs.tsv: this checks webdataset shards, not csv files\n"
    )
