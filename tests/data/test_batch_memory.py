"""Batches have the memory order of their views, and stay valid until they have been received."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from training.data.batch_memory import PREFETCH, BatchMemory, ReceivedMemory

BATCHES = 12


def views(batch: int, n: int) -> list[torch.Tensor]:
    """Views of random pixels, channels last."""
    generator = torch.Generator().manual_seed(batch)
    return [
        torch.randint(256, (6, 5, 3), dtype=torch.uint8, generator=generator).permute(2, 0, 1) for _ in range(n)
    ]


def size(batch: int) -> int:
    return 2 + batch % 3


class Stream(IterableDataset):
    def __init__(self) -> None:
        self.memory = BatchMemory()

    def __iter__(self):
        for batch in range(BATCHES):
            yield batch, self.memory.stack(views(batch, size(batch)))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_a_batch_holds_until_the_next_is_asked_for(workers, seconds):
    prefetch = PREFETCH if workers else None
    received = DataLoader(Stream(), batch_size=None, num_workers=workers, prefetch_factor=prefetch)
    seen = []
    for batch, images in received:
        time.sleep(seconds)  # for the processes to run as far ahead as they ever will
        assert torch.equal(images, torch.stack(views(batch, size(batch))))
        seen.append(batch)
    assert sorted(seen) == sorted([*range(BATCHES)] * max(workers, 1))


def test_batches_keep_the_order_of_their_views():
    memory = BatchMemory()
    assert memory.stack(views(0, 4)).stride() == (6 * 5 * 3, 1, 5 * 3, 3)
    planar = [view.contiguous() / 255 for view in views(1, 4)]
    batch = memory.stack(planar)
    assert batch.is_contiguous() and batch.dtype == torch.float32 and torch.equal(batch, torch.stack(planar))


def test_in_the_own_process_batches_hold_for_ever():
    kept = list(Stream())
    assert all(torch.equal(images, torch.stack(views(batch, size(batch)))) for batch, images in kept)


def test_a_loader_process_uses_few_blocks():
    memory = BatchMemory(shared=True)
    batches = [memory.stack(views(batch, 3)) for batch in range(BATCHES)]
    assert len({batch.data_ptr() for batch in batches}) == PREFETCH + 1
    assert all(batch.is_shared() for batch in batches)
    assert memory.stack(views(0, 50)).shape == (50, 3, 6, 5)  # outgrows its block


def test_received_batches_hold_as_long_as_someone_holds_them():
    memory, kept = ReceivedMemory(), []
    for batch in range(BATCHES):
        source = BatchMemory().stack(views(batch, 4))
        kept.append(memory.copy(source))
        assert kept[-1].stride() == source.stride()
        source.zero_()
    assert all(torch.equal(copy, torch.stack(views(batch, 4))) for batch, copy in enumerate(kept))


def test_memory_that_nobody_holds_is_used_again():
    memory, seen, part = ReceivedMemory(), set(), None
    for batch in range(BATCHES):
        copy = memory.copy(torch.stack(views(batch, 3)) / 2)
        seen.add(copy.data_ptr())
        if batch == 0:
            part, expected = copy[1:2, :, ::2], copy[1:2, :, ::2].clone()  # a view keeps it, too
    assert len(seen) == 3 and torch.equal(part, expected)
    assert memory.copy(torch.stack(views(0, 5))).shape == (5, 3, 6, 5)
