"""The rank of a process, by launcher variables and flags; and what ranks do together, on real gloo groups."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.support.ranks import free_port, ranks
from training.config.run import DistributedConfig
from training.distributed import collectives, devices, process_group, rendezvous
from training.distributed.launcher import LaunchedRank
from training.distributed.process_group import World

DEFAULTS = DistributedConfig(
    dist_url="env://",
    dist_backend="nccl",
    dist_port="29500",
    world_size=1,
    ddp_static_graph=False,
    no_set_device_rank=False,
)
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def launch(monkeypatch):
    """``launch(flags, VARIABLE=value...)``: the World and the arguments with which the group would start."""
    for name in [*LAUNCHER, *(n for n in os.environ if n.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def start(config: DistributedConfig = DEFAULTS, **variables: str) -> tuple[World, dict | None]:
        started: list[dict] = []

        def meet(url: str, port: str, place: LaunchedRank) -> None:
            started.append({"url": url, "host": place.host})

        def agree(store: None, place: LaunchedRank, kind: str, fault: str) -> None:
            if fault:
                raise ValueError(fault)

        monkeypatch.setattr(rendezvous, "meet", meet)
        monkeypatch.setattr(devices, "agree", agree)
        monkeypatch.setattr(
            dist, "init_process_group", lambda backend, **kw: started[0].update(kw, backend=backend)
        )
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return process_group.start(config), started[0] if started else None

    return start


def place(world: World) -> tuple[int, int, int, int]:
    return world.rank, world.world_size, world.local_rank, world.local_world_size


def test_alone_without_a_launcher(launch):
    world, group = launch()
    assert place(world) == (0, 1, 0, 1) and group is None
    assert world.is_main and world.is_local_main and not world.distributed
    assert world.device == torch.device("cpu")


def test_torchruns_variables_win_over_slurms(launch):
    torchrun = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    }
    world, group = launch(**torchrun, SLURM_PROCID="1", SLURM_NTASKS="2", SLURM_LOCALID="0")
    assert place(world) == (5, 8, 1, 4)
    assert not world.is_main and not world.is_local_main
    assert (group["rank"], group["world_size"], group["url"], group["host"]) == (5, 8, "env://", "h")
    assert group["backend"] == "gloo"  # --dist-backend nccl without GPUs


def test_torchrun_with_one_process_starts_no_group(launch):
    world, group = launch(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="h", MASTER_PORT="1")
    assert place(world) == (0, 1, 0, 1) and group is None


def test_slurm_step(launch):
    step = {"SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
    world, group = launch(**step, SLURM_STEP_TASKS_PER_NODE="4,3", MASTER_ADDR="h", MASTER_PORT="1")
    assert place(world) == (5, 7, 1, 3)
    assert (group["rank"], group["world_size"]) == (5, 7)


def test_slurm_writes_repeated_task_counts_short(launch):
    step = {
        "SLURM_PROCID": "9",
        "SLURM_NTASKS": "10",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "2",
        "MASTER_ADDR": "h",
    }
    world, _ = launch(**step, SLURM_TASKS_PER_NODE="4(x2),2")
    assert world.local_world_size == 2


@pytest.mark.parametrize(
    "variables",
    [
        # an allocation of one task; MASTER_ADDR may be exported in somebody's profile
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "MASTER_ADDR": "h"},
        # srun -n 4 --pty bash, then python in that shell
        {
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "4",
            "SLURM_LOCALID": "0",
            "SLURM_PTY_PORT": "40000",
            "SLURM_STEP_ID": "0",
        },
        # the batch script itself, or a shell step: the allocation has 4 tasks, this step has one
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "MASTER_ADDR": "h"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "MASTER_ADDR": "h"},
        # an allocation without any step
        {"SLURM_NTASKS": "4", "MASTER_ADDR": "h"},
    ],
)
def test_a_single_process_inside_slurm_waits_for_nobody(launch, variables):
    world, group = launch(**variables)
    assert not world.distributed and group is None


def test_several_slurm_tasks_without_a_meeting_point_are_refused(launch):
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        launch(SLURM_PROCID="0", SLURM_NTASKS="4", SLURM_LOCALID="0", SLURM_STEP_ID="0")


def test_processes_started_by_hand_take_world_size_and_url_from_the_flags(launch):
    by_hand = replace(DEFAULTS, dist_url="tcp://h:999", world_size=3)
    world, group = launch(by_hand, RANK="2")
    assert place(world) == (2, 3, 2, 3)
    assert (group["url"], group["rank"], group["world_size"]) == ("tcp://h:999", 2, 3)


def test_slurm_can_meet_at_a_url(launch):
    world, group = launch(
        replace(DEFAULTS, dist_url="tcp://h:999"), SLURM_PROCID="1", SLURM_NTASKS="2", SLURM_LOCALID="1"
    )
    assert place(world) == (1, 2, 1, 2) and group["url"] == "tcp://h:999"


@pytest.mark.parametrize(
    ("flags", "variables", "sentence"),
    [
        ({"world_size": 2, "dist_url": "tcp://h:1"}, {}, "--world_size 2: it is not known which"),
        ({"world_size": 2}, {"RANK": "0"}, "MASTER_ADDR is not set"),
        ({}, {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "RANK is 2"),
        ({"world_size": 4}, {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "--world_size 4"),
    ],
)
def test_contradictions_are_refused(launch, flags, variables, sentence):
    with pytest.raises(ValueError, match=sentence):
        launch(replace(DEFAULTS, **flags), **variables)


def test_device_by_local_rank_or_the_first(launch, monkeypatch):
    chosen = []
    rank3 = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "h"}

    def with_gpus(count: int, **flags):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return launch(replace(DEFAULTS, **flags), **rank3)

    world, group = with_gpus(4)
    assert world.device == torch.device("cuda:3") == group["device_id"]
    assert group["backend"] == "cpu:gloo,cuda:nccl"
    world, _ = with_gpus(1, no_set_device_rank=True)
    assert world.device == torch.device("cuda:0")
    assert chosen == [torch.device("cuda:3"), torch.device("cuda:0")]
    with pytest.raises(ValueError, match="--no-set-device-rank"):
        with_gpus(1)


# --- real groups -------------------------------------------------------------------------------------------


def start_in_three_ways(rank: int, ports: tuple[int, int], store: str, folder: str) -> None:
    torch.set_num_threads(1)
    slurm = {
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": str(rank),
        "MASTER_ADDR": "127.0.0.1",
    }
    torchrun = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    by_hand = {"RANK": str(rank)}
    for name, variables, config in [
        ("slurm", slurm, replace(DEFAULTS, dist_port=str(ports[0]))),
        ("file", torchrun, replace(DEFAULTS, dist_url=f"file://{store}", dist_backend="gloo")),
        ("hand", by_hand, replace(DEFAULTS, dist_url=f"tcp://127.0.0.1:{ports[1]}", world_size=2)),
    ]:
        for variable in [n for n in os.environ if n in LAUNCHER or n.startswith("SLURM_")]:
            del os.environ[variable]
        os.environ.update(variables)
        world = process_group.start(config)
        total = collectives.all_reduce_sum(torch.tensor(rank + 1.0))
        process_group.stop()
        assert not dist.is_initialized()
        Path(folder, f"{name}-{rank}").write_text(f"{world.rank} {world.world_size} {total.item()}")


def test_two_processes_meet_as_under_slurm_at_a_file_and_by_hand(tmp_path):
    ports = free_port(), free_port()
    mp.spawn(start_in_three_ways, (ports, str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for name in ("slurm", "file", "hand"):
        assert (tmp_path / f"{name}-0").read_text() == "0 2 3.0"
        assert (tmp_path / f"{name}-1").read_text() == "1 2 3.0"


def start_under_torchrun(port: int, late: int) -> list[int]:
    """Rank ``late`` comes after the other rank, which has read its old entries in the store by then."""
    rank = int(os.environ["RANK"])
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    try:
        time.sleep(0.5 * (rank == late))
        process_group.start(DEFAULTS)
        own = process_group.own_group()  # a second group meets at the same store
        return collectives.gather_object(rank, own)
    finally:
        process_group.stop()
        del os.environ["TORCHELASTIC_USE_AGENT_STORE"]


def test_ranks_that_torchrun_starts_again_do_not_look_for_those_before():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for late in (0, 1, 0):
        assert ranks(2, joined=False).run(start_under_torchrun, store.port, late) == [[0, 1]] * 2
