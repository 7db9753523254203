"""Bad input: good samples reach the loss, bad ones are counted and named, up to a limit."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from open_clip import SimpleTokenizer
from open_clip.transform import PreprocessCfg
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support import shards
from tests.support.lab import WORLD
from tests.support.ranks import ranks
from tests.support.spoiled import SAMPLES, SHARDS
from training.config.params import parse
from training.data import audit
from training.data.bad_samples import Allowance, SkipLog, Skips, Tolerance, TooManyBad, allowance
from training.data.build import build_train
from training.data.lanes import Lane
from training.data.loader import TrainData
from training.data.sources import webdataset
from training.data.sources.paths import expand_shards
from training.distributed.collectives import gather_object
from training.distributed.process_group import World
from training.main import main

ROWS = 1000


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def skips(**counts: int) -> Skips:
    found = Skips()
    for reason, n in counts.items():
        for i in range(n):
            found.add(reason, f"{reason}-{i}")
    return found


# ------------------------------------------------------------------------------------- counting, and the limit


def test_log_names_what_is_skipped_and_does_not_flood(caplog):
    log = SkipLog()
    with caplog.at_level(logging.WARNING):
        for _ in range(200):
            log.update(skips(a=1), used=9)
        log.update(skips(b=1), used=9)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 9  # 1, 2, 4, ... 128, and the new reason
    assert lines[0] == "skipped 1 samples so far: 1 a (e.g. a-0)"
    assert lines[-1] == "skipped 201 samples so far: 200 a (e.g. a-0), 1 b (e.g. b-0)"


def test_epochs_are_counted_apart():
    log = SkipLog()
    log.update(skips(a=2, b=1))
    log.update(skips(a=1))
    assert log.take_epoch().counts == {"a": 3, "b": 1}
    log.update(skips(b=4))
    assert log.take_epoch().counts == {"b": 4} and not log.take_epoch().counts
    assert log.total.counts == {"a": 3, "b": 5}


def test_tolerance_compares_with_a_full_window():
    few = Tolerance(Allowance(0.05, 1000))
    few.update(0, skips(a=50))  # nothing but bad ones yet: as many as 1,000 may hold
    for _ in range(94):
        few.update(10, skips())
    with pytest.raises(TooManyBad, match=r"--max_bad_fraction 0.05: 51 of the last 991 .*1 a \(e\.g\. a-0\)"):
        few.update(0, skips(a=1))


def test_tolerance_forgets():
    steady = Tolerance(Allowance(0.05, 1000))
    for _ in range(1000):
        steady.update(96, skips(a=4))
    with pytest.raises(TooManyBad):
        for _ in range(10):
            steady.update(94, skips(a=6))


def test_edges_of_the_fraction():
    with pytest.raises(TooManyBad):
        Tolerance(Allowance(0.0, 1000)).update(999, skips(a=1))
    Tolerance(Allowance(0.0, 1000)).update(10**6, skips())
    Tolerance(Allowance(1.0, 1000)).update(0, skips(a=5000))


def test_window_is_an_epoch_within_limits():
    assert [allowance(0.1, n).window for n in (5, 1000, 54_321, 10**9)] == [1000, 1000, 54_321, 100_000]
    assert allowance(0.05, 5).samples == 50


# --------------------------------------------------------------------------------------------------- the loader


def loaded(pattern: str, samples: int, *flags: object, world: World = WORLD) -> TrainData:
    words = ["--train-data", pattern, "--train-num-samples", samples, "--data_size", ROWS, "--model", "RN50"]
    words += ["--dataset-type", "webdataset", "--batch-size", 1, "--workers", 0, "--max_bad_fraction", 1, *flags]
    model = SimpleNamespace(preprocess=PreprocessCfg(size=8), tokenizer=SimpleTokenizer(context_length=16))
    return build_train(parse([str(word) for word in words]), world, model, None)


def epoch(pattern: str, samples: int, *flags: object) -> tuple[list[int], Counter, SkipLog]:
    """Rows of the batches of one epoch of ``samples``; what was left out, by reason; the log of it."""
    data = loaded(pattern, samples, *flags)
    rows = [row for batch in data.epoch(0) for row in batch.index.tolist()]
    return rows, data.skips.total.counts, data.skips


def test_every_kind_of_bad_sample_stays_out_and_is_counted(tmp_path, caplog):
    members, planted, good = [shards.sample(i, (8, 8)) for i in range(100, 120)], Counter(), set(range(100, 120))
    for i, fault in enumerate(SAMPLES.values()):
        members.append(shards.sample(i, (8, 8)))
        fault.spoil(members[-1])
        planted += Counter([fault.reason] if fault.reason else [])
        good |= set() if fault.reason else {i}
    assert len(planted) == 10
    pattern = shards.write_shards(tmp_path, members, 9)
    for seed in range(4):
        rows, counts, log = epoch(pattern, len(good), "--seed", seed)
        assert sorted(rows) == sorted(good) and counts == planted
        assert all(str(tmp_path) in name and ".tar/" in name for name in log.total.examples.values())
    assert "key is not an integer (e.g. " in caplog.text and "image too large (e.g. " in caplog.text


def test_check_data_finds_what_training_leaves_out(tmp_path):
    members = [shards.sample(100 + i, (8, 8)) for i in range(20)]
    for i, fault in enumerate(SAMPLES.values()):
        members.append(shards.sample(i, (8, 8)))
        fault.spoil(members[-1])
    pattern = shards.write_shards(tmp_path / "samples", members, 9)
    for i, broken in enumerate(SHARDS.values()):
        broken.make(tmp_path / f"{i:02d}.tar", range(200 + 10 * i, 204 + 10 * i))
    pattern = f"{pattern}::{tmp_path}/{{00..{len(SHARDS) - 1:02d}}}.tar"
    found = audit.check(expand_shards(pattern), [ROWS])
    rows, counts, _ = epoch(pattern, len(found.good))
    assert sorted(rows) == sorted(found.good[:, 0]) and counts == found.skips.counts
    assert {"unreadable shard", "empty shard", "undecodable image", "image too large"} < set(counts)


def spoiled_set(folder, samples: int = 100) -> tuple[str, Counter]:
    """Every 25th sample has no text, and the next one no image that can be decoded."""
    members = [shards.sample(i, (8, 8)) for i in range(samples)]
    for i in range(0, samples, 25):
        del members[i]["txt"]
        members[i + 1]["jpg"] = b"no image"
    n = len(range(0, samples, 25))
    return shards.write_shards(folder, members, 30), Counter({"missing text": n, "undecodable image": n})


@pytest.mark.parametrize("size", [92, 93, 150, 184])
def test_counts_of_an_epoch_are_those_of_the_passes_it_has_delivered(tmp_path, size):
    """Samples that were read ahead, for the next batch or in the next pass, do not count."""
    pattern, planted = spoiled_set(tmp_path)
    data = loaded(pattern, size, "--batch-size", size)
    for number in range(3):
        seen = Counter(row for batch in data.epoch(number) for row in batch.index.tolist())
        counts = data.skips.take_epoch().counts
        whole, more = min(seen.values()), max(seen.values())
        least, most = ({reason: n * times for reason, n in planted.items()} for times in (whole, more))
        assert all(least[r] <= counts[r] <= most[r] for r in planted) and counts.keys() == planted.keys()
        assert counts == least or size in (93, 150)  # whose last sample is not the last one of a pass


def test_four_percent_are_less_than_five(tmp_path):
    """The set is smaller than a window, and its epochs end just after a pass: no sample counts twice."""
    members = [shards.sample(i, (8, 8)) for i in range(100)]
    for i in range(4):
        del members[25 * i]["txt"]
    data = loaded(shards.write_shards(tmp_path, members, 20), 97, "--max_bad_fraction", 0.05, "--batch-size", 97)
    for number in range(25):
        list(data.epoch(number))
    assert 100 <= data.skips.total.counts["missing text"] <= 105


@pytest.mark.parametrize("name", SHARDS)
def test_broken_shards_give_what_is_whole_in_them(name, tmp_path):
    shards.write_shards(tmp_path, [shards.sample(i, (8, 8)) for i in range(6)], 3)
    SHARDS[name].make(tmp_path / "00002.tar", [10, 11, 12, 13])
    expected = [*range(6), *range(10, 10 + SHARDS[name].whole)]
    rows, counts, log = epoch(f"{tmp_path}/{{00000..00002}}.tar", len(expected))
    assert sorted(rows) == expected and counts == SHARDS[name].reasons
    assert all("00002.tar" in example for example in log.total.examples.values())


def vanish(path) -> None:
    path.unlink()


def become_a_folder(path) -> None:
    path.unlink()
    path.mkdir()


def be_cut(path) -> None:
    os.truncate(path, 700)  # in place, inside the first image


def be_no_tar(path) -> None:
    path.write_bytes(b"<html>" * 100)


@pytest.mark.parametrize("change", [vanish, become_a_folder, be_cut, be_no_tar])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_shard_that_is_lost_inside_an_epoch(tmp_path, change, workers, monkeypatch, caplog):
    """The run continues with the rest; the shard is counted and named once per pass, in the next epoch too."""
    monkeypatch.setattr(webdataset, "SPLIT_BY_SAMPLE", 0)
    monkeypatch.setitem(webdataset.ShardSource.__init__.__kwdefaults__, "window", 5)
    pattern = shards.write_shards(tmp_path, [shards.sample(i, (8, 8)) for i in range(80)], 20)
    data = loaded(pattern, 60, "--batch-size", 4, "--workers", workers)
    source = data._stream.source
    last = source._visits(0, 0, Lane(workers=max(workers, 1), share=4))[-1].piece.shard
    lost = set(range(20 * last, 20 * last + 20))
    rest = sorted(set(range(80)) - lost)
    for number in range(2):
        met = []
        for step, batch in enumerate(data.epoch(number)):
            met += batch.index.tolist()
            if (number, step) == (0, 0):
                change(tmp_path / f"{last:05d}.tar")
        counts = data.skips.take_epoch().counts
        assert len(met) == 60 and not lost & set(met)
        if workers < 2:  # one lane: an epoch is one pass
            assert sorted(met) == rest and counts == {"unreadable shard": 1}
        else:
            assert set(counts) == {"unreadable shard"} and counts.total() <= 2
    assert "1 unreadable shard (e.g. " in caplog.text and f"{last:05d}.tar: " in caplog.text


@pytest.mark.parametrize(
    ("command", "rows", "counts"),
    [
        ("sleep 0.5; cat {0}", range(3), {}),
        ("head -c 700 {0}; sleep 0.3; tail -c +701 {0}", range(3), {}),
        ("cat {0}; exit 3", range(3), {"unreadable shard": 1}),
        ("no-such-command {0} 2>/dev/null", [], {"unreadable shard": 1}),
        ("true", [], {"unreadable shard": 1}),
    ],
)
def test_slow_and_failing_commands(command, rows, counts, tmp_path):
    path = shards.write_tar(tmp_path / "0.tar", [shards.sample(i, (8, 8)) for i in range(3)])
    beside = shards.write_tar(tmp_path / "1.tar", [shards.sample(i, (8, 8)) for i in range(10, 13)])
    met, found, _ = epoch(f"pipe:{command.format(path)}::{beside}", 3 + len(rows), "--dataset-type", "webdataset")
    assert sorted(met) == [*rows, 10, 11, 12] and found == counts


def on_ranks(pattern: str, samples: int, *flags: object) -> list[tuple[list[list[int]], Counter]]:
    """On a real rank: per epoch, the rows of its batches, and what all ranks have left out."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    data = loaded(pattern, samples, *flags, world=World(rank, rank, ranks, ranks, WORLD.device))
    epochs = []
    for number in range(2):
        rows = [batch.index.tolist() for batch in data.epoch(number)]
        total = Skips()
        for skips in gather_object(data.skips.take_epoch()):
            total.merge(skips)
        epochs.append((rows, total.counts))
    return epochs


def test_bad_input_on_two_ranks(tmp_path):
    """Both take equally many steps, each good sample comes once, and exactly the planted faults are left out."""
    members = [shards.sample(i, (8, 8)) for i in range(30)]
    planted = Counter()
    for i, name in enumerate(
        ("missing text", "missing json", "json that is no json", "negative key", "float key")
    ):
        SAMPLES[name].spoil(members[5 * i])
        planted[SAMPLES[name].reason] += 1
    good = [i for i in range(30) if i % 5 or i == 25] + [40, 41, 50, 51, 52]
    pattern = shards.write_shards(tmp_path, members, (13, 17))
    SHARDS["header with a wrong byte"].make(tmp_path / "cut.tar", [40, 41, 42, 43])
    SHARDS["zero bytes"].make(tmp_path / "zero.tar", [])
    shards.write_tar(tmp_path / "slow.tar", [shards.sample(i, (8, 8)) for i in range(50, 53)])
    slow = f"pipe:sleep 0.3; cat {tmp_path}/slow.tar; exit 9"
    pattern = f"{pattern}::{tmp_path}/cut.tar::{tmp_path}/zero.tar::{slow}::pipe:no-such-command 2>/dev/null"
    planted["unreadable shard"] = 4
    samples = len(good)
    first, second = ranks(2).run(on_ranks, pattern, samples, "--batch-size", samples // 2)
    for (rows, counts), (others, same_counts) in zip(first, second, strict=True):
        assert len(rows) == len(others) == 1 and sorted(rows[0] + others[0]) == good
        assert counts == same_counts == planted


def test_every_kind_of_bad_sample_on_two_ranks(tmp_path):
    members, planted, good = [], Counter(), set()
    for i, fault in enumerate(SAMPLES.values()):
        members += [shards.sample(i, (8, 8)), shards.sample(100 + i, (8, 8))]
        fault.spoil(members[-2])
        planted += Counter([fault.reason] if fault.reason else [])
        good |= {100 + i} if fault.reason else {i, 100 + i}
    pattern = shards.write_shards(tmp_path, members, 16)
    epochs = ranks(2).run(on_ranks, pattern, 2 * len(good), "--batch-size", 4)
    for (rows, counts), (others, same_counts) in zip(*epochs, strict=True):
        assert len(rows) == len(others) == -(-2 * len(good) // 8)
        assert {row for batch in rows + others for row in batch} == good
        assert counts == same_counts and all(n <= counts[r] <= 3 * n for r, n in planted.items())
        assert counts.keys() == planted.keys()


# --------------------------------------------------------------------------------------------------- whole runs


def test_counts_of_each_epoch_are_logged_and_in_tensorboard(lab):
    samples = [shards.sample(i) for i in range(8)]
    del samples[2]["txt"], samples[5]["json"]
    pattern = shards.write_shards(lab.root / "two", samples, 4)
    run = lab.run(lab.words(f"--train-data {pattern} --train-num-samples 6 --report-to tensorboard --epochs 3"))
    assert run.code == 0
    told = re.findall(r"left out since the last epoch: (.*)", run.log)
    assert len(told) == 3
    for line in told:
        assert "1 missing text (e.g. " in line and "00000.tar/000002" in line and "1 missing json" in line
    found = scalars(run.folder)
    assert found["data/skipped"] == [(1, 2), (2, 2), (3, 2)]
    assert found["data/skipped/missing_text"] == found["data/skipped/missing_json"] == [(1, 1), (2, 1), (3, 1)]
    assert all(0 <= share <= 1 for _, share in found["train/data_share"])


def test_counts_of_an_epoch_are_those_of_all_its_launches(lab):
    samples = [shards.sample(i) for i in range(12)]
    del samples[1]["txt"], samples[5]["json"], samples[9]["txt"]
    pattern = shards.write_shards(lab.root / "three", samples, 4)
    words = lab.words(f"--train-data {pattern} --train-num-samples 9 --batch-size 1 --epochs 2 --name in-parts")
    assert main([*words, "--stop_iters", "7"]) == 0
    assert main([*words, "--resume", "latest"]) == 0
    log = (lab.root / "logs/in-parts/out.log").read_text()
    before, *epochs = re.findall(r"left out since the last epoch: (.*)", log)
    assert re.findall(r"\d+ missing (?:text|json) \(", before) and len(epochs) == 2
    assert all("2 missing text (e.g. " in line and "1 missing json (e.g. " in line for line in epochs)


def counted_by_ranks(pattern: str) -> tuple[dict, dict, list[Counter]]:
    """The state of two ranks inside an epoch, and the counts of the whole epoch: all at once, and resumed."""
    world = World(torch.distributed.get_rank(), torch.distributed.get_rank(), 2, 2, torch.device("cpu"))
    data = loaded(pattern, 8, world=world)
    steps = data.epoch(0)
    for _ in range(3):
        next(steps)
    inside = data.state_dict()
    list(steps)
    at_its_end = data.state_dict()
    resumed = loaded(pattern, 8, world=world)
    list(resumed.epoch(0, resumed.resume(inside, 0, 3)))
    whole = gather_object((data.skips.take_epoch().counts, resumed.skips.take_epoch().counts))
    return inside, at_its_end, [sum(counts, Counter()) for counts in zip(*whole)]


def test_counts_travel_in_the_state(tmp_path):
    members = [shards.sample(i, (8, 8)) for i in range(12)]
    for bad in members[::3]:
        del bad["txt"]
    pattern = shards.write_shards(tmp_path, members, 4)
    for inside, at_its_end, (whole, resumed) in ranks(2).run(counted_by_ranks, pattern):
        assert 0 < inside["skips"]["counts"]["missing text"] <= whole["missing text"] == 4
        assert resumed == whole and "skips" not in at_its_end
    older = {name: value for name, value in inside.items() if name != "skips"}
    data = loaded(pattern, 8, "--lanes", "2,1", "--batch-size", 2)
    assert data.resume(older, 0, 3) == 3 and not data.skips.take_epoch().counts


def test_too_many_bad_samples_end_the_run_with_counts_and_examples(lab, capsys):
    samples = [shards.sample(i) for i in range(64)]
    for i in range(0, 64, 2):
        samples[i]["json"] = {"key": -1}
    pattern = shards.write_shards(lab.root / "half", samples, 32)
    words = f"--train-data {pattern} --train-num-samples 64 --batch-size 8 --epochs 5"
    stopped = lab.run(lab.words(words))
    error = capsys.readouterr().err
    assert stopped.code == 2 and "Traceback" not in error
    assert re.search(r"error: --max_bad_fraction 0\.05: \d+ of the last \d+ samples are unusable", error)
    assert re.search(r"\d+ key out of range \(e\.g\. \S+\.tar/\d+\)", error)
    assert lab.run(lab.words(f"{words} --max_bad_fraction 0.6 --epochs 1")).code == 0
