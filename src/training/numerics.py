"""How exactly and how repeatably the device computes, and where its random numbers begin."""

from __future__ import annotations

import os

import torch

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def set_numerics(device: torch.device, *, seed: int, deterministic: bool) -> None:
    """Settings of this process for the whole run; to be called before anything is computed on ``device``.

    ``deterministic``: the same inputs give the same bits. An operation that cannot do so on ``device`` raises
    RuntimeError. Without it cuDNN takes the fastest convolutions of this launch, and kernels may add in any order.
    """
    torch.manual_seed(seed)
    if device.type == "cuda":
        # TF32 for the towers' float32 products; the losses ask for exact ones themselves.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault(_CUBLAS, ":4096:8")  # cuBLAS reads it when its first product runs
    torch.use_deterministic_algorithms(deterministic)
    # Only the values of memory that nothing has written depend on it, and nothing here reads such memory.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010, unknown to type checkers
