"""Memory for batches of images: that of a loader process, shared with the receiver, and the receiver's own.

Allocating new pages of memory for every batch takes longer than filling them. So both sides reuse their memory.

A loader process keeps a few blocks of shared memory and uses them in turn. The receiver copies a batch out (to
page-locked memory on the way to a GPU) before its block is used again: a process is never asked for more than
``PREFETCH`` batches (``prefetch_factor`` of ``DataLoader``) beyond the last one received, so one additional block
is enough. A block of the receiver is used again when nothing refers to the batch that was in it.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

PREFETCH = 2  # batches that each loader process prepares ahead
BLOCKS = PREFETCH + 1  # of shared memory, of each loader process
_KEPT = 4  # blocks of a receiver: one being filled, one in use, and some whose batches are still referred to


class BatchMemory:
    """Blocks of shared memory, used in turn, in a loader process; elsewhere every batch has its own memory.

    ``shared``: use shared blocks outside a loader process too.
    """

    def __init__(self, shared: bool = False) -> None:
        self._shared = shared
        self._blocks: list[Tensor | None] = [None] * BLOCKS
        self._turn = 0

    def stack(self, views: list[Tensor]) -> Tensor:
        """``views`` [3, H, W] of one shape as [n, 3, H, W], in the memory order of the first, which is packed.

        In a loader process the result is valid until ``PREFETCH`` more have been made.
        """
        channels_last = not views[0].is_contiguous()
        packed = [view.permute(1, 2, 0) for view in views] if channels_last else views
        out = self._take(len(views) * views[0].numel(), views[0].dtype).view(len(views), *packed[0].shape)
        torch.stack(packed, out=out)
        return out.permute(0, 3, 1, 2) if channels_last else out

    def _take(self, size: int, dtype: torch.dtype) -> Tensor:
        if not self._shared and get_worker_info() is None:
            return torch.empty(size, dtype=dtype)
        block = self._blocks[self._turn]
        if block is None or len(block) < size:
            block = self._blocks[self._turn] = torch.empty(size, dtype=dtype).share_memory_()
        self._turn = (self._turn + 1) % len(self._blocks)
        return block[:size]


@dataclass
class _Block:
    memory: np.ndarray
    user: weakref.ref[np.ndarray]  # kept alive by the tensors in the block


class ReceivedMemory:
    """Copies of batches that stay valid while something refers to them; the memory of others is reused."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` in the same memory order. The elements of ``tensor`` have to fill its memory."""
        blocks = [block for block in self._blocks if len(block.memory) == tensor.nbytes]
        block = next((block for block in blocks if block.user() is None), None)
        if block is None and len(blocks) == _KEPT:
            return tensor.clone()
        memory = np.empty(tensor.nbytes, np.uint8) if block is None else block.memory
        user = memory[:]
        self._blocks = [b for b in blocks if b is not block] + [_Block(memory, weakref.ref(user))]
        copy = torch.from_numpy(user).view(tensor.dtype).as_strided(tensor.size(), tensor.stride())
        return copy.copy_(tensor)
