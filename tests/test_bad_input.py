"""Bad input on its way to the loss: what is good arrives, what is not is counted and named, up to a limit."""

from __future__ import annotations

import logging
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import shards
from flag_lab import Lab
from training.samples import Allowance, SkipLog, Skips, Tolerance, TooManyBad, allowance


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


# --------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


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
