"""How the ranks of a run meet and part, and which device each one uses.

``launcher.py`` finds the rank of a process, ``rendezvous.py`` the other ranks. A single process starts no group.

On GPUs the group uses gloo for CPU tensors and NCCL for the rest, so that waiting and the exchange of Python
objects never touch a CUDA stream.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from training.config.run import DistributedConfig
from training.distributed import devices, launcher, rendezvous
from training.distributed.collectives import Group
from training.distributed.launcher import LaunchedRank
from training.distributed.rendezvous import OwnRefusal

_CPU = torch.device("cpu")
# Above all limits of the watchdog, which names the rank that the others wait for: 4 x --step_timeout, and a while.
TIMEOUT, STEP_TIMEOUTS = timedelta(hours=2), 5
_NO_CONNECTION = re.compile(r"connectFullMesh|makeDeviceFor|resolve hostname|no available network interface", re.I)


@dataclass(frozen=True)
class World:
    """This process among ``world_size`` ranks, ``local_world_size`` of them on its node."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank acts for the run: logs, checkpoints, reports."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this rank acts for its node: downloads, per-node logs."""
        return self.local_rank == 0

    @property
    def distributed(self) -> bool:
        """Whether there are other ranks."""
        return self.world_size > 1


def start(config: DistributedConfig, step_timeout: float = 0.0) -> World:
    """Find this process's rank, choose its device and, with more than one rank, start the process group.

    ``step_timeout``: seconds (``--step_timeout``); collectives wait for longer than what it allows.
    ValueError: the variables and flags contradict each other, or the device does not exist.
    """
    place = launcher.find_place(os.environ, config.world_size, by_url=config.dist_url != "env://")
    if config.world_size not in (1, place.world_size):
        raise ValueError(
            f"--world_size {config.world_size}, but {place.world_size} ranks were started: leave the flag out"
        )
    device, fault = _CPU, ""
    try:
        device = devices.choose(place, config)
    except devices.NoDevice as error:
        if place.world_size == 1:
            raise
        fault = str(error)
    if place.world_size > 1:
        _start_group(place, device, config, fault, _patience(step_timeout))
    return World(place.rank, place.local_rank, place.world_size, place.local_world_size, device)


def stop() -> None:
    """End the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def met() -> bool:
    """Whether this process has met other ranks, and has not parted from them."""
    return dist.is_initialized()


def world_size() -> int:
    """Number of ranks that have met."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_group(step_timeout: float = 0.0) -> Group:
    """A gloo group of all ranks, for a thread that communicates during training; None: one process. Collective.

    Two threads in one group could enter their collectives in different orders on different ranks.
    """
    if not dist.is_initialized():
        return None
    group = dist.new_group(backend="gloo", timeout=_patience(step_timeout))
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member of it
    return group


def hosts_store() -> bool:
    """Whether the store where the ranks met ends with this process."""
    return dist.is_initialized() and dist.get_rank() == 0 and rendezvous.ends_with_rank_0()


def _patience(step_timeout: float) -> timedelta:
    return max(TIMEOUT, timedelta(seconds=STEP_TIMEOUTS * step_timeout))


def _start_group(
    place: LaunchedRank, device: torch.device, config: DistributedConfig, fault: str, patience: timedelta
) -> None:
    backend = config.dist_backend
    if backend == "nccl" and device.type == "cpu":
        backend = "gloo"
        if place.rank == 0:
            logging.getLogger(__name__).info("--dist-backend nccl needs GPUs: using gloo on the CPU")
    elif backend == "nccl":
        backend = "cpu:gloo,cuda:nccl"
    store = rendezvous.meet(config.dist_url, config.dist_port, place)
    devices.agree(store, place, device.type, fault)
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=place.rank,
            world_size=place.world_size,
            timeout=patience,
            device_id=device if "nccl" in backend else None,
        )
    except RuntimeError as error:
        if not _NO_CONNECTION.search(str(error)):
            raise
        raise OwnRefusal(
            f"rank {place.rank} has met the others, but cannot connect to one of them "
            f"({str(error).splitlines()[0]}): let GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network "
            "interface that joins the machines, and open their ports to each other"
        ) from None
