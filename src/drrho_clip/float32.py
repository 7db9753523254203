"""Exact float32 for similarities, whatever precision the towers run in.

Similarities are divided by temperatures down to 0.01: an error of 1e-3, as bfloat16 and TF32 make it, would be
one of 10 % in every weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """Autocast off, and float32 matrix products without TF32 or bfloat16 inside."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
