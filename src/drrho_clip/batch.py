"""A batch as the data path delivers it: one rank's share of a global batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The ``b`` samples of one rank.

    ``image``         uint8 [b, 3, H, W], to be normalized on the device, or floating point and normalized already.
    ``text``          int64 [b, L], token ids from the target's tokenizer.
    ``index``         int64 [b], rows of the sample state. It stays on the CPU, where it is checked without waiting
                      for the device, until ``select``.
    ``ref_image``     the same views for the reference model, [b, 3, H_r, W_r]; None if both models use ``image``.
    ``ref_text``      int64 [b, L_r], from the reference's tokenizer; None if both models use ``text``.
    ``ref_features``  floating point [b, 2, d_r], the reference's embeddings of image and text if they were
                      computed before and come with the data; None if the reference model runs.
    """

    image: Tensor
    text: Tensor
    index: Tensor
    ref_image: Tensor | None = None
    ref_text: Tensor | None = None
    ref_features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device) -> Batch:
        """A copy on ``device``; it does not wait for the copy to finish. ``index`` stays where it is."""
        return self._map(lambda t: t.to(device, non_blocking=True), keep=("index",))

    def clone(self) -> Batch:
        """A copy that shares no memory with this batch."""
        return self._map(Tensor.clone)

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory. ``torch.utils.data.DataLoader`` looks for a method of this name."""
        return self._map(lambda t: t.pin_memory())

    def chunk(self, k: int) -> list[Batch]:
        """The batch as ``k`` micro-batches of equal size, in order. ValueError: it has no k equal parts."""
        if k < 1 or len(self) % k:
            raise ValueError(f"a batch of {len(self)} samples has no {k} parts of equal size")
        pieces = {f.name: getattr(self, f.name) for f in fields(self)}
        chunks = {name: t.chunk(k) for name, t in pieces.items() if t is not None}
        return [Batch(**{name: c[j] for name, c in chunks.items()}) for j in range(k)]

    def select(self, keep: Tensor) -> Batch:
        """The samples at the positions ``keep``, int64 [n], of this batch, on the device of ``keep``."""
        return self._map(lambda t: t.to(keep.device, non_blocking=True)[keep])

    def _map(self, fn: Callable[[Tensor], Tensor], keep: tuple[str, ...] = ()) -> Batch:
        names = [f.name for f in fields(self) if f.name not in keep and getattr(self, f.name) is not None]
        return replace(self, **{name: fn(getattr(self, name)) for name in names})
