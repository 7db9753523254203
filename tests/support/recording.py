"""What a run trains on, batch by batch, and what a checkpoint holds, name by name."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from training.loop.step import Stepper


def record() -> list[tuple[int, list[int], str]]:
    """From now on, the batches that this process trains on: step, sample ids, and what of their pixels."""
    seen = []
    take_step = vars(Stepper).get("original", Stepper.__call__)

    def recorded(self, batch, step):
        seen.append((step, batch.index.tolist(), hashlib.sha256(batch.image.numpy().tobytes()).hexdigest()))
        return take_step(self, batch, step)

    Stepper.original, Stepper.__call__ = take_step, recorded
    return seen


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {k: t for key, item in items for k, t in tensors(item, f"{name}.{key}").items()}
