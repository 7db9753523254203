"""Cores, memory and open files that a process may use, and sockets between processes."""

from __future__ import annotations

import math
import os
import resource
import tempfile

import pytest

from training.machine.limits import available_memory, check_open_files, check_sockets, cores, memory
from training.machine.prepare import Unfit


@pytest.fixture
def allowed(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize(
    ("limit", "around", "expected"),
    [("max 100000", "max 100000", 64), ("250000 100000", "max 100000", 3), ("max 100000", "400000 100000", 4)],
)
def test_a_container_that_gets_less_time(tmp_path, allowed, limit, around, expected):
    """``docker --cpus 2.5`` and Kubernetes limits, on the group itself or on one around it."""
    write(tmp_path / "kubepods/pod", cpu__max=limit)
    write(tmp_path / "kubepods", cpu__max=around)
    write(tmp_path, own="0::/kubepods/pod\n")
    assert cores(tmp_path, tmp_path / "own") == expected


def test_control_groups_of_the_first_version(tmp_path, allowed):
    write(tmp_path / "cpu/docker/x", cpu__cfs_quota_us="150000\n", cpu__cfs_period_us="100000\n")
    write(tmp_path / "cpu", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    write(tmp_path, own="9:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n")
    assert cores(tmp_path, tmp_path / "own") == 2


def test_without_control_groups_the_cores_are_those_that_it_may_run_on(tmp_path, allowed):
    assert cores(tmp_path, tmp_path / "missing") == 64


def test_a_tiny_share_is_one_core(tmp_path, allowed):
    write(tmp_path, cpu__max="5000 100000", own="0::/\n")
    assert cores(tmp_path, tmp_path / "own") == 1


@pytest.mark.parametrize(
    ("limit", "high", "around", "expected"),
    [
        ("3000", "max", "max", 3000),
        ("3000", "2500", "max", 2500),
        ("3000", "max", "2000", 2000),
        ("max", "max", "max", None),
    ],
)
def test_a_container_with_less_memory(tmp_path, limit, high, around, expected):
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    write(tmp_path / "kubepods/pod", memory__max=limit, memory__high=high)
    write(tmp_path / "kubepods", memory__max=around)
    write(tmp_path, own="0::/kubepods/pod\n")
    assert memory(tmp_path, tmp_path / "own") == (expected or machine)
    assert memory(tmp_path, tmp_path / "missing") == machine


def test_memory_of_a_control_group_of_the_first_version(tmp_path):
    write(tmp_path / "memory/docker/x", memory__limit_in_bytes="4096\n")
    write(tmp_path, own="9:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n")
    assert memory(tmp_path, tmp_path / "own") == 4096


def test_memory_that_is_left(tmp_path):
    write(tmp_path, meminfo="MemTotal:    24690000 kB\nMemFree: 1 kB\nMemAvailable:    2048 kB\nBuffers: 7 kB\n")
    assert available_memory(tmp_path / "meminfo") == 2 * 2**20
    assert available_memory(tmp_path / "missing") == math.inf
    assert available_memory() > 0


def test_too_few_open_files_for_the_workers():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        check_open_files(4)
        with pytest.raises(Unfit, match=r"--workers 16: .* the limit is 100: raise it \(ulimit -n\)"):
            check_open_files(16)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_sockets_in_the_temporary_folder(tmp_path, monkeypatch):
    check_sockets()
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setattr("multiprocessing.process._current_process._config", {})  # where it keeps its own folder
    with pytest.raises(Unfit, match=r"--workers: .*AF_UNIX path too long.*set TMPDIR"):
        check_sockets()
