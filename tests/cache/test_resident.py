"""``--ref_features_cache_mb`` keeps a part of the features in memory, whatever else the kernel drops."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.cache.test_features import CACHED, FIXED, CacheLab, fails
from tests.support.page_cache import PAGE, forget, in_memory
from training.cache import resident
from training.cache.resident import MB, Resident, plan
from training.cache.row_store import StoreWriter, open_store
from training.machine import limits

KEEPS = """
import sys, time
from pathlib import Path
from training.cache.resident import Resident
with Resident([Path(path) for path in sys.argv[2:]], int(sys.argv[1])) as kept:
    kept.wait()
    print(kept.held, flush=True)
    time.sleep(600)
"""
UNPRIVILEGED = """
import os, resource, sys
from pathlib import Path
from training.cache import resident
resource.setrlimit(resource.RLIMIT_MEMLOCK, (2**16, 2**16))
if os.getuid() == 0:
    os.setuid(65534)
{}
"""


@pytest.fixture
def files(tmp_path):
    """Three of 20 pages each, not in memory."""
    if limits.lockable() < 100 * PAGE:
        pytest.skip("processes here may not lock memory")
    paths = [tmp_path / f"{i}.bin" for i in range(3)]
    for path in paths:
        path.write_bytes(bytes(20 * PAGE))
        forget(path)
        if in_memory(path).any():
            pytest.skip("files here cannot leave memory")
    return paths


def left_after_forgetting(files) -> list[int]:
    """How many pages of each file the kernel may not drop."""
    for path in files:
        forget(path)
    return [int(in_memory(path).sum()) for path in files]


def test_a_part_stays_until_the_end(files):
    with Resident(files, 30 * PAGE) as kept:
        kept.wait(60)
        assert kept.held == 30 * PAGE
        assert left_after_forgetting(files) == [20, 10, 0]
        assert in_memory(files[1])[:10].all()
    assert left_after_forgetting(files) == [0, 0, 0]


def test_another_process_finds_it_and_a_kill_leaves_nothing(files):
    command = [sys.executable, "-c", KEEPS, f"{60 * PAGE}", *map(str, files)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == f"{60 * PAGE}\n"
        assert left_after_forgetting(files) == [20, 20, 20]
        process.send_signal(signal.SIGKILL)
    end = time.monotonic() + 20
    while sum(left_after_forgetting(files)) and time.monotonic() < end:
        time.sleep(0.05)
    assert left_after_forgetting(files) == [0, 0, 0]


def test_it_does_not_keep_a_run_from_ending(files, monkeypatch):
    monkeypatch.setattr(resident, "_CHUNK", PAGE)
    locked = []

    def slowly(address: int, size: int) -> None:
        locked.append(size)
        time.sleep(0.05)

    monkeypatch.setattr(resident, "_lock", slowly)
    with Resident(files, 60 * PAGE):
        pass
    assert len(locked) < 60


@pytest.mark.parametrize("lost", ["file", "permission"])
def test_what_goes_wrong_is_told_and_training_goes_on(files, lost, monkeypatch, caplog):
    kept = Resident(files, 60 * PAGE)
    if lost == "file":
        files[1].unlink()
    else:
        monkeypatch.setattr(resident._LIBC, "mlock", lambda *_: -1)
    with caplog.at_level(logging.WARNING), kept:
        kept.wait(60)
    held = {"file": 20 * PAGE, "permission": 0}[lost]
    assert kept.held == held
    (record,) = caplog.records
    assert f"{held / MB:.1f} MB of the reference's features are kept in memory and no more (" in record.message


def test_a_lookup_reads_the_table_first_and_the_values(tmp_path):
    writer = StoreWriter(tmp_path, "things", {"made": "by hand"})
    for part in range(2):
        rows = np.arange(4) + 4 * part
        writer.write([(part, f"{part}.tar")], rows, np.zeros(4), things=rows, others=rows)
    writer.index()
    table, *values = open_store(tmp_path, "things", "--flag").paths(("things",))
    assert table.name.startswith("table-")
    assert [path.name for path in values] == ["00000000.things.npy", "00000001.things.npy"]
    assert table.exists() and all(path.exists() for path in values)


def test_more_than_the_machine_has_is_refused(files, monkeypatch):
    assert plan(1, files) == (
        60 * PAGE,
        "--ref_features_cache_mb 1: 0.2 MB of their 0.2 MB stay in the memory of each node",
    )
    monkeypatch.setattr(limits, "memory", lambda: 61 * PAGE)
    with pytest.raises(ValueError, match=r"--ref_features_cache_mb 1: it would keep 0.2 MB .* have 0.2 MB for"):
        plan(1, files)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("print(resident.plan(1, [Path(sys.argv[1])]))", "ulimit -l unlimited"),
        ("with resident.Resident([Path(sys.argv[1])], 80 * 4096) as kept: kept.wait()", "Cannot allocate memory"),
    ],
)
def test_a_process_that_may_not_lock_memory(tmp_path, line, expected):
    path = tmp_path / "large.bin"
    path.write_bytes(bytes(80 * PAGE))
    for folder in (path, *path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o555)
    script = UNPRIVILEGED.format(line)
    ended = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=120)
    assert expected in ended.stderr, ended.stderr


def test_training_is_the_same_and_says_what_stays(one_thread, tmp_path, capsys):
    lab = CacheLab(tmp_path)
    runs = [
        lab.run(lab.words(f"{FIXED} {CACHED} --gamma 0.5 {more}"))
        for more in ("", "--ref_features_cache_mb 1", "--ref_features_cache_mb 1 --workers 1")
    ]
    first, *others = (run.saved["state_dict"] for run in runs)
    assert all((first[name] == other[name]).all() for other in others for name in first)
    for run in runs[1:]:
        assert "--ref_features_cache_mb 1: 0.0 MB of their 0.0 MB stay in the memory of each node" in run.log
        assert "0.0 MB of the reference's features are in memory, after 0 s" in run.log
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "memory", lambda: 10)
        said = fails(lab, f"{FIXED} {CACHED} --gamma 0.5 --ref_features_cache_mb 1", capsys)
    assert "--ref_features_cache_mb 1: it would keep" in said
