"""``--ref_features_cache_mb`` keeps a part of the features in memory, whatever else the kernel drops."""

from __future__ import annotations

import errno
import logging
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tests.cache.test_features import CACHED, FIXED, CacheLab, fails
from tests.support.page_cache import PAGE, forget, in_memory
from training.cache import resident
from training.cache.resident import MB, Resident, plan
from training.cache.row_store import StoreWriter, open_store
from training.machine import limits
from training.machine.mapped import MappedFile, may_lock

KEEPS = """
import sys, time
from pathlib import Path
from training.cache.resident import Resident
with Resident([Path(path) for path in sys.argv[2:]], int(sys.argv[1])) as kept:
    kept.wait()
    print(kept.held, flush=True)
    time.sleep(600)
"""
# No capability to lock memory, and the limits that are named: (name, value) pairs.
LIMITED = """
import ctypes, resource, sys
from pathlib import Path
from training.cache import resident
from training.machine.mapped import may_lock
libc = ctypes.CDLL(None, use_errno=True)
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(header, sets) == 0
sets[0] &= ~(1 << 14)
assert libc.capset(header, sets) == 0
for name, value in {limits}:
    hard = resource.getrlimit(getattr(resource, name))[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(getattr(resource, name), (value, value))
files = [Path(path) for path in sys.argv[1:]]
{script}
"""


def limited(script: str, *files, **limits: int) -> subprocess.CompletedProcess:
    program = LIMITED.format(limits=list(limits.items()), script=script)
    command = [sys.executable, "-c", program, *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def files(tmp_path):
    """Three of 20 pages each, not in memory."""
    if not may_lock(100 * PAGE):
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

    def slowly(file: MappedFile, start: int, size: int) -> None:
        locked.append(size)
        time.sleep(0.05)

    monkeypatch.setattr(MappedFile, "lock", slowly)
    with Resident(files, 60 * PAGE):
        pass
    assert len(locked) < 60


def test_the_log_says_when_it_is_there(files, caplog):
    with caplog.at_level(logging.INFO), Resident(files, 60 * PAGE) as kept:
        kept.wait(60)
    assert re.fullmatch(r"0.2 MB of the reference's features are in memory, after \d+ s", caplog.messages[-1])


def test_an_error_does_not_wait_for_a_disk_that_hangs(files, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(MappedFile, "lock", lambda *_: over.wait(60))
    started = time.monotonic()
    with pytest.raises(KeyError), Resident(files, 60 * PAGE):
        raise KeyError
    assert time.monotonic() - started < 30
    over.set()


@pytest.mark.parametrize(
    ("lost", "held", "told"),
    [
        ("file", 20, "No such file"),
        ("right", 0, "limits.conf"),
        ("memory", 0, "has 0.0 MB left"),
        ("maps", 20, "2 f"),
    ],
)
def test_what_goes_wrong_is_told_and_training_goes_on(files, lost, held, told, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    kept = Resident(files, 60 * PAGE)
    if lost == "file":
        files[1].unlink()
    elif lost == "right":
        monkeypatch.setattr(MappedFile, "lock", refuse)
    elif lost == "memory":
        monkeypatch.setattr(limits, "available_memory", lambda: 0)
    else:
        monkeypatch.setattr(resident, "_most_maps", lambda: 2)
    with caplog.at_level(logging.WARNING), kept:
        kept.wait(60)
        assert kept.held == held * PAGE
    (record,) = caplog.records
    assert (
        f"{held * PAGE / MB:.1f} MB of the reference's features are kept in memory and no more (" in record.message
    )
    assert told in record.message


def test_empty_files_are_passed_over(files):
    files[1].write_bytes(b"")
    with Resident(files, 60 * PAGE) as kept:
        kept.wait(60)
        assert kept.held == 40 * PAGE


def test_more_files_than_a_process_may_open(tmp_path):
    """Neither the thread nor lookups keep a file open: what training opens later still can be."""
    paths = [tmp_path / f"{i}.npy" for i in range(80)]
    for path in paths:
        np.save(path, np.arange(3))
    script = """
from training.cache.row_store import _open_array
arrays = [_open_array(path) for path in files]
assert all(array.tolist() == [0, 1, 2] for array in arrays)
with resident.Resident(files, 10**6) as kept:
    kept.wait()
    assert kept.held == sum(path.stat().st_size for path in files) or not may_lock(10**5)
    open(files[0]).close()
"""
    ended = limited(script, *paths, RLIMIT_NOFILE=40, RLIMIT_MEMLOCK=2**23)
    assert ended.returncode == 0, ended.stderr


def test_a_lookup_reads_the_table_first_and_the_values(tmp_path):
    """Parts without rows, whose shards had none, have no values."""
    writer = StoreWriter(tmp_path, "things", {"made": "by hand"})
    for part in range(2):
        rows = np.arange(4) + 4 * part
        writer.write([(part, f"{part}.tar")], rows, np.zeros(4), things=rows, others=rows)
    writer.write([(2, "2.tar")], np.empty(0, np.int64), np.empty(0))
    writer.index()
    table, *values = open_store(tmp_path, "things", "--flag").paths(("things",))
    assert table.name.startswith("table-")
    assert [path.name for path in values] == ["00000000.things.npy", "00000001.things.npy"]
    assert table.exists() and all(path.exists() for path in values)


def test_more_than_the_machine_has_is_refused(monkeypatch):
    monkeypatch.setattr(resident, "may_lock", lambda size: True)
    assert plan(2, MB) == (MB, "--ref_features_cache_mb 2: 1.0 MB of their 1.0 MB stay in the memory of each node")
    assert plan(1, 4 * MB)[0] == MB
    for whole, available in ((0.95 * MB, math.inf), (2 * MB, 1.05 * MB)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(limits, "memory", lambda whole=whole: whole)
            patch.setattr(limits, "available_memory", lambda available=available: available)
            with pytest.raises(ValueError, match=r"--ref_features_cache_mb 2: it would keep 1.0 MB .* 0.[89] MB"):
                plan(2, MB)


def test_a_process_that_may_not_lock_so_much():
    ended = limited("print(may_lock(2**15)); resident.plan(1, 2**20)", RLIMIT_MEMLOCK=2**16)
    assert ended.stdout == "True\n"
    assert "processes here may lock no more than 0.1 MB: raise the hard limit of `ulimit -l`" in ended.stderr


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare here")
def test_root_of_a_container_that_may_not_lock_so_much():
    """Its capabilities do not count outside, where the limit is."""
    script = "from training.machine.mapped import may_lock; print(may_lock(2**30))"
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", 'ulimit -l 64 && exec "$0" "$@"']
    ended = subprocess.run([*command, sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    if "unshare" in ended.stderr:
        pytest.skip("no user namespaces here")
    assert ended.stdout == "False\n", ended.stderr


def test_training_is_the_same_and_says_what_stays(one_thread, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resident, "may_lock", lambda size: True)
    lab = CacheLab(tmp_path)
    runs = [
        lab.run(lab.words(f"{FIXED} {CACHED} --gamma 0.5 {more}"))
        for more in ("", "--ref_features_cache_mb 1", "--ref_features_cache_mb 1 --workers 1")
    ]
    first, *others = (run.saved["state_dict"] for run in runs)
    assert all((first[name] == other[name]).all() for other in others for name in first)
    for run in runs[1:]:
        assert "--ref_features_cache_mb 1: 0.0 MB of their 0.0 MB stay in the memory of each node" in run.log
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "memory", lambda: 10)
        said = fails(lab, f"{FIXED} {CACHED} --gamma 0.5 --ref_features_cache_mb 1", capsys)
    assert "--ref_features_cache_mb 1: it would keep" in said
