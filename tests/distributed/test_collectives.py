"""Communication between ranks, and how the failure of one ends all."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tests.support.ranks import ranks
from training.distributed import collectives, process_group
from training.distributed.collectives import PeerFailed


def exchange() -> list:
    rank = dist.get_rank()
    collectives.barrier()
    own = torch.tensor([rank, 10.0])
    total = collectives.all_reduce_sum(own)
    return [
        collectives.broadcast_object({"from": rank}, src=1),
        collectives.gather_object(rank * "x"),
        total.tolist(),
        own.tolist(),
        collectives.on_main(lambda: f"by {rank}"),
    ]


def test_objects_and_sums_reach_every_rank():
    for rank, answer in enumerate(ranks(2).run(exchange)):
        assert answer == [{"from": 1}, ["", "x"], [1.0, 20.0], [rank, 10.0], "by 0"]


def test_alone_everything_is_the_identity():
    collectives.barrier()
    assert collectives.broadcast_object("a") == "a" and collectives.gather_object("a") == ["a"]
    assert collectives.all_reduce_sum(torch.ones(2)).tolist() == [1.0, 1.0]
    assert collectives.on_main(lambda: 3) == 3
    with collectives.node_main_first():
        pass
    process_group.stop()


def raised(function) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fail_on_main() -> str:
    def disk_full() -> None:
        raise OSError("disk full")

    outcome = raised(lambda: collectives.on_main(disk_full))
    collectives.barrier()  # the group still works
    return outcome


def test_what_fails_on_rank_0_ends_all_ranks_with_one_message():
    main, other = ranks(2).run(fail_on_main)
    assert main == "OSError: disk full"
    assert other.startswith(PeerFailed.__name__) and "disk full" not in other


def download(folder: str) -> tuple[bool, bool]:
    file = Path(folder, "weights")
    with collectives.node_main_first():
        found = file.exists()
        if not found:
            time.sleep(0.2)
            file.write_text("weights")
    return found, file.exists()


def test_the_first_rank_of_a_node_downloads_and_the_others_find_it(tmp_path):
    assert ranks(2).run(download, str(tmp_path)) == [(False, True), (True, True)]


def fail_in_node_main_first(failing_rank: int, local_ranks: tuple[int, int]) -> str:
    rank, own = dist.get_rank(), os.environ["LOCAL_RANK"]
    os.environ["LOCAL_RANK"] = str(local_ranks[rank])

    def body() -> None:
        with collectives.node_main_first():
            if rank == failing_rank:
                raise ValueError("no network")

    try:
        outcome = raised(body)
        collectives.barrier()
    finally:
        os.environ["LOCAL_RANK"] = own
    return outcome


def test_a_failed_download_ends_all_ranks_of_all_nodes():
    one_node = ranks(2).run(fail_in_node_main_first, 0, (0, 1))
    assert one_node[0] == "ValueError: no network" and one_node[1].startswith("PeerFailed")
    two_nodes = ranks(2).run(fail_in_node_main_first, 1, (0, 0))
    assert two_nodes[1] == "ValueError: no network" and two_nodes[0].startswith("PeerFailed")
