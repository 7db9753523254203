"""Ranks without a GPU among ranks that have one, and ranks without any device: all ranks hear of it and refuse."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from tests.support.ranks import free_port
from training.distributed import devices
from training.distributed.devices import Report, judge
from training.distributed.launcher import LaunchedRank


def told(kinds: list[str], faults: dict[int, str]) -> list[str | None]:
    """What each rank refuses to train with, on a real store that rank 0 keeps."""
    n, port = len(kinds), free_port()
    found: list[str | None] = ["never heard"] * n
    stores = []  # rank 0's process keeps it

    def run(rank: int) -> None:
        store = dist.TCPStore("127.0.0.1", port, n, rank == 0, wait_for_workers=False)
        stores.append(store)
        try:
            devices.agree(store, LaunchedRank(rank, n, rank, n, "127.0.0.1"), kinds[rank], faults.get(rank, ""))
            found[rank] = None
        except ValueError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_ranks_of_one_kind_train(kind):
    assert told([kind] * 3, {}) == [None] * 3


def test_a_rank_without_a_gpu_is_named_on_all_ranks():
    first, *others = told(["cuda", "cpu", "cuda"], {})
    assert others == [first, first]
    assert "1 of 3 ranks find no GPU (ranks 1 on " in first and "--gres=gpu:N" in first


def test_a_refusal_of_one_rank_reaches_all():
    """As of the published script's six tasks on four GPUs."""
    found = told(["cuda"] * 4 + ["cpu"] * 2, {4: "local rank 4 has no GPU", 5: "local rank 5 has no GPU"})
    assert len(set(found)) == 1
    assert "rank 4 on " in found[0] and "local rank 4 has no GPU" in found[0]


def test_many_ranks_are_not_all_listed():
    text = judge([Report("a", "cuda")] * 16 + [Report("b", "cpu")] * 8 + [Report("c", "cpu")] * 8)
    assert "16 of 32 ranks find no GPU (ranks 16, 17, 18, 19, 20, 21, 22, 23 … on b, c)" in text
