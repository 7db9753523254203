"""Copies of a run's tensors in host memory, from which a checkpoint is written while training continues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Key = tuple[str | int, ...]


class Staging:
    """Buffers that are reused by every save, page-locked where the tensors are on a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[Key, Tensor] = {}

    def copy(self, tree: Any) -> Any:
        """``tree`` (dicts, lists, tensors, plain values) with its tensors as they are now, on the CPU.

        It waits until the copies are complete: when it returns, the tensors may change. The next call overwrites
        the copies.
        """
        live: dict[Key, Tensor] = {}
        copied = self._copy(tree, (), live)
        self._buffers = live  # frees the buffers of tensors that are no longer in the tree
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return copied

    def _copy(self, tree: Any, key: Key, live: dict[Key, Tensor]) -> Any:
        if isinstance(tree, Tensor):
            buffer = live[key] = self._buffer(key, tree)
            return buffer.copy_(tree.detach(), non_blocking=True)
        if isinstance(tree, Mapping):
            return {name: self._copy(value, (*key, name), live) for name, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return [self._copy(value, (*key, i), live) for i, value in enumerate(tree)]
        return tree

    def _buffer(self, key: Key, like: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is not None and buffer.shape == like.shape and buffer.dtype == like.dtype:
            return buffer
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
