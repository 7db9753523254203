"""Errors of a machine that has run out of something, as Python and torch raise them."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys

import pytest
import torch

from training.machine.shortage import shortage


def raised(act) -> BaseException:
    with pytest.raises(Exception) as caught:
        act()
    return caught.value


def test_memory():
    for act in (lambda: torch.empty(1 << 45), lambda: bytearray(1 << 62)):
        told = shortage(raised(act))
        assert told is not None and told.startswith("memory ran out") and "--batch-size" in told
    assert "(140,737,488 MB more were needed)" in str(shortage(raised(lambda: torch.empty(1 << 45))))


def test_memory_of_a_gpu():
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
        "3.00 MiB is free."
    )
    told = str(shortage(error))
    assert "(20.00 GiB more were needed)" in told and "--accum-freq" in told


def test_open_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 2, hard))
        with pytest.raises(OSError) as caught:
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        told = str(shortage(caught.value))
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "ulimit -n" in told and "--workers" in told


def test_disks_and_paths(tmp_path):
    with pytest.raises(OSError) as caught, open("/dev/full", "w") as file:
        file.write("x")
    assert "No space left on device" in str(shortage(caught.value))
    (tmp_path / "file").touch()
    told = str(shortage(raised(lambda: (tmp_path / "file" / "below").mkdir())))
    assert "file/below cannot be used (Not a directory)" in told


def test_processes():
    assert "ulimit -u" in str(shortage(OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))))
    assert "ulimit -u" in str(shortage(RuntimeError("can't start new thread")))


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), RuntimeError("mat1 and mat2"), KeyError("x"), FileNotFoundError(errno.ENOENT, "no", "f"),
     ConnectionResetError(errno.ECONNRESET, "reset")],
)  # fmt: skip
def test_other_errors_keep_their_traceback(error):
    assert shortage(error) is None


def test_a_command_ends_with_the_sentence(tmp_path):
    """Where a file of a run cannot be used, in a real process: its flag file is a folder."""
    code = (
        "import sys; from unittest import mock; from training import main; from training.config import params\n"
        "def parse(argv): raise OSError(13, 'Permission denied', '/data/x')\n"
        "main.parse = parse; sys.exit(main.main([]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: /data/x cannot be used (Permission denied): check the disk and the path\n"
