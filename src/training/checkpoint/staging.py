"""Copies of a run's tensors in host memory, from which a checkpoint is written while training continues."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# torch rounds page-locked memory up to a power of two. Tensors share blocks of this size, so that no more than a
# block is wasted; for a tensor that is larger a block is made, which can waste as much as the tensor takes.
BLOCK = 1 << 28
_ALIGNMENT = 64  # bytes

_Layout = tuple[tuple[torch.Size, torch.dtype, bool], ...]


class Staging:
    """Buffers that are reused by every save, page-locked where the tensors are on a GPU."""

    def __init__(self) -> None:
        self._layout: _Layout = ()
        self._buffers: list[Tensor] = []

    def copy(self, tree: Any) -> Any:
        """``tree`` (dicts, lists, tensors, plain values) with its tensors as they are now, on the CPU.

        It waits until the copies are complete: when it returns, the tensors may change. The next call overwrites
        the copies.
        """
        live = list(_tensors(tree))
        layout = tuple((t.shape, t.dtype, t.is_cuda) for t in live)
        if layout != self._layout:
            self._buffers = []  # frees the old ones before there are new ones
            self._layout, self._buffers = layout, _allocate(live)
        for buffer, tensor in zip(self._buffers, live, strict=True):
            buffer.copy_(tensor.detach(), non_blocking=True)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        copies = iter(self._buffers)
        return _mapped(tree, lambda _: next(copies))


def pack(sizes: Sequence[int], block: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Where to put pieces of ``sizes`` bytes: (number of the block, offset in it) of each, and the blocks' sizes.

    The pieces fill blocks of at most ``block`` bytes in turn; one that is larger has a block to itself.
    """
    places: list[tuple[int, int]] = []
    blocks: list[int] = []
    for size in sizes:
        if not blocks or (blocks[-1] and blocks[-1] + size > block):
            blocks.append(0)
        places.append((len(blocks) - 1, blocks[-1]))
        blocks[-1] += -(-size // _ALIGNMENT) * _ALIGNMENT
    return places, blocks


def _allocate(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A buffer for each of ``tensors``."""
    buffers: dict[int, Tensor] = {}
    for pinned in (False, True):
        chosen = [i for i, t in enumerate(tensors) if t.is_cuda == pinned]
        places, sizes = pack([tensors[i].nbytes for i in chosen], BLOCK)
        blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]
        for i, (number, offset) in zip(chosen, places, strict=True):
            like = tensors[i]
            buffers[i] = _piece(blocks[number], offset, like)
    return [buffers[i] for i in range(len(tensors))]


def _piece(block: Tensor, offset: int, like: Tensor) -> Tensor:
    """A tensor like ``like`` in the memory of ``block``; torch.save takes it for one of its own."""
    if not like.numel():
        return torch.empty(like.shape, dtype=like.dtype)
    flat = torch.frombuffer(block.numpy(), dtype=like.dtype, count=like.numel(), offset=offset)
    return flat.view(like.shape)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of ``tree`` in the order of ``_mapped``."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)


def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``tree`` with every tensor replaced by what ``change`` makes of it, in order."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {name: _mapped(value, change) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_mapped(value, change) for value in tree]
    return tree
