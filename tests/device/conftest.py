"""What a device decides: these tests run on the GPU if there is one, else on the CPU; ``pytest -m gpu``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from training.numerics import set_numerics

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The accelerator, set up as for a run; the CPU where there is none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_numerics(device, seed=0, deterministic=False)
    yield device
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
