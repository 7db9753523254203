"""Values that the host reads some steps after the device has computed them, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """A copy of ``tensor`` as it is now, on its way into page-locked host memory; on the CPU it is there at once.

    Work that the device gets after this copy does not delay it.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor.detach(), non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        else:
            self._copy = tensor.detach().clone()

    def value(self) -> Tensor:
        """The copy, on the CPU. It waits only until this copy is complete."""
        if self._done is not None:
            self._done.synchronize()
        return self._copy
