"""Whether torch.compile can work here: it writes C++ or Triton, and compiles and loads that."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from importlib.metadata import version
from pathlib import Path

from training.machine.prepare import Unfit, temporary_folder

_COMPILERS = {"cpu": ("CXX", ("g++", "clang++", "c++")), "cuda": ("CC", ("gcc", "clang", "cc"))}

# 2.6 adds the gradients of equal tokens wrongly (relative error 0.57); 2.8 and 2.14 are right. 2.7 was not tried.
_RIGHT_ON_CPU = (2, 8)


def check_compiler(device: str) -> None:
    """Unfit: ``--torchcompile`` cannot work on ``device``, 'cpu' or 'cuda'."""
    installed = version("torch")
    if device == "cpu" and tuple(int(part) for part in installed.split(".")[:2]) < _RIGHT_ON_CPU:
        raise Unfit(
            f"--torchcompile: torch {installed} compiles the gradient of token embeddings wrongly on the CPU: "
            "install torch 2.8 or newer, or leave the flag out"
        )
    variable, names = _COMPILERS[device]
    chosen = os.environ.get(variable, "").split()
    if not any(shutil.which(name) for name in (chosen[:1] or names)):
        what = f"{variable} names {chosen[0]}, which is not there" if chosen else f"{names[0]} is not there"
        raise Unfit(
            f"--torchcompile needs a compiler, and {what}: install one (Debian: build-essential, conda: gxx), set "
            f"{variable} to one, or leave the flag out"
        )
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise Unfit("--torchcompile needs the package triton on a GPU: pip install triton, or leave the flag out")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        raise Unfit(
            f"--torchcompile needs the headers of Python, and there is no {header}: install them (Debian: "
            "python3-dev), or leave the flag out"
        )
    cache = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or temporary_folder())
    if cache.is_dir() and os.statvfs(cache).f_flag & os.ST_NOEXEC:
        raise Unfit(
            f"--torchcompile: what it compiles cannot be loaded from {cache}, which is mounted noexec: set "
            "TORCHINDUCTOR_CACHE_DIR to a folder of another disk, or leave the flag out"
        )
