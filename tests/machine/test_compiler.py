"""Whether torch.compile is refused where it could not work, and only there."""

from __future__ import annotations

import os
import sysconfig
from types import SimpleNamespace

import pytest

from training.machine.compiler import check_compiler
from training.machine.prepare import Unfit


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A folder with compilers, the only one in PATH, beside Python's headers."""
    for name in ("g++", "gcc"):
        (tmp_path / name).touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    return tmp_path


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_is_there(compiler, device):
    check_compiler(device)


@pytest.mark.parametrize(("device", "missing"), [("cpu", "g++"), ("cuda", "gcc")])
def test_without_a_compiler(compiler, device, missing):
    (compiler / missing).unlink()
    with pytest.raises(Unfit, match="--torchcompile needs a compiler"):
        check_compiler(device)


def test_a_compiler_that_is_not_there(compiler, monkeypatch):
    monkeypatch.setenv("CXX", "icpx -O2")
    with pytest.raises(Unfit, match="CXX names icpx, which is not there"):
        check_compiler("cpu")
    (compiler / "icpx").touch(mode=0o755)
    check_compiler("cpu")


def test_without_triton(compiler, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    check_compiler("cpu")
    with pytest.raises(Unfit, match="pip install triton"):
        check_compiler("cuda")


def test_without_the_headers_of_python(compiler):
    (compiler / "Python.h").unlink()
    with pytest.raises(Unfit, match="python3-dev"):
        check_compiler("cpu")


def test_a_cache_from_which_nothing_can_be_loaded(compiler, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiler))
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC * (path == compiler)))
    with pytest.raises(Unfit, match="which is mounted noexec: set TORCHINDUCTOR_CACHE_DIR"):
        check_compiler("cpu")


@pytest.mark.parametrize(("device", "refused"), [("cpu", True), ("cuda", False)])
def test_a_torch_that_compiles_wrongly_on_the_cpu(compiler, monkeypatch, device, refused):
    monkeypatch.setattr("training.machine.compiler.version", lambda _: "2.6.0+cu124")
    if refused:
        with pytest.raises(Unfit, match=r"--torchcompile: torch 2\.6\.0\+cu124 compiles .* wrongly on the CPU"):
            check_compiler(device)
    else:
        check_compiler(device)
