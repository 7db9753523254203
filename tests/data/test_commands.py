"""Commands that shards are read from, after the process that read them has been killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.support import shards
from training.data.sources import commands
from training.data.sources.shards import read_shard

READ = """
import sys, time
from training.data.sources.shards import read_shard
streams = [read_shard(url) for url in sys.argv[1:]]
print(len([next(stream) for stream in streams]), flush=True)
time.sleep(300)
"""


def alive(mark: str) -> list[str]:
    """What runs with ``mark`` in its environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " ").strip())
        except OSError:
            continue
    return found


@pytest.fixture
def reader(tmp_path):
    """``reader()``: a process that has read one sample of each of two commands that stall, and its mark."""
    shards.write_shards(tmp_path, 8, per_shard=8)
    stalls = [
        f"pipe:(cat {tmp_path}/00000.tar; sleep 300) | cat",
        f"pipe:cat {tmp_path}/00000.tar; exec sleep 300",
    ]
    started = []

    def start() -> tuple[subprocess.Popen, str]:
        mark = f"MARK={uuid.uuid4()}"
        env = os.environ | {"PYTHONPATH": str(Path(commands.__file__).parents[3]), "MARK": mark[5:]}
        process = subprocess.Popen(
            [sys.executable, "-c", READ, *stalls], env=env, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "2\n"
        assert sum("sleep 300" in line for line in alive(mark)) >= 2
        return process, mark

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_they_end_with_it(reader, how):
    process, mark = reader()
    process.send_signal(how)
    process.wait(20)
    deadline = time.monotonic() + 60
    while left := alive(mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def test_each_process_has_a_guard_of_its_own(tmp_path, monkeypatch):
    """One that is forked has to be missed by its own."""
    monkeypatch.setattr(commands, "_guards", {})
    url = f"pipe:cat {shards.write_shards(tmp_path, 2, per_shard=2)}".replace("{00000..00000}", "00000")
    assert len(list(read_shard(url))) == len(list(read_shard(url))) == 2
    (own,) = commands._guards.values()
    pid = os.fork()
    if pid == 0:
        list(read_shard(url))
        os._exit(int(commands._guard().pid == own.pid))
    assert os.waitpid(pid, 0)[1] == 0
    assert commands._guard() is own
    own.stdin.close()
    assert own.wait(5) == 0
