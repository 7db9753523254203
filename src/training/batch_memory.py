"""Where a loader process lays out the images of its batches.

What a loader process sends goes through shared memory. To have pages of it made for every batch takes longer than
to fill them: a tenth of a sample's whole time. So a process keeps a few blocks and uses them in turns, and the
receiver copies a batch out (to page-locked memory on the way to a GPU) before its block comes round again: a
process is never asked for more than ``PREFETCH`` batches (``prefetch_factor`` of ``DataLoader``) beyond the last
one received, so one block more is enough.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

PREFETCH = 2  # batches that each loader process works ahead


class BatchMemory:
    """Blocks of shared memory, used in turns, in a loader process; elsewhere every batch has its own memory."""

    def __init__(self) -> None:
        self._blocks: list[Tensor | None] = [None] * (PREFETCH + 1)
        self._turn = 0

    def stack(self, views: list[Tensor]) -> Tensor:
        """``views`` [3, H, W] of one shape as [n, 3, H, W], in the memory order of the first, which is packed.

        In a loader process it holds until ``PREFETCH`` more have been made.
        """
        channels_last = not views[0].is_contiguous()
        packed = [view.permute(1, 2, 0) for view in views] if channels_last else views
        out = self._take(len(views) * views[0].numel(), views[0].dtype).view(len(views), *packed[0].shape)
        torch.stack(packed, out=out)
        return out.permute(0, 3, 1, 2) if channels_last else out

    def _take(self, size: int, dtype: torch.dtype) -> Tensor:
        if get_worker_info() is None:
            return torch.empty(size, dtype=dtype)
        block = self._blocks[self._turn]
        if block is None or len(block) < size:
            block = self._blocks[self._turn] = torch.empty(size, dtype=dtype).share_memory_()
        self._turn = (self._turn + 1) % len(self._blocks)
        return block[:size]
