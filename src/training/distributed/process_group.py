"""How the ranks of a run meet and part, and which device each one uses.

``launcher.py`` finds the rank of a process. The ranks meet at ``--dist-url``: ``env://`` means ``MASTER_ADDR`` and
``MASTER_PORT`` (``--dist_port`` where the port is unset), ``tcp://host:port`` and ``file://path`` are used
as they are. A single process starts no group.

On GPUs the group uses gloo for CPU tensors and NCCL for the rest, so that waiting and the exchange of Python
objects never touch a CUDA stream.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from training.config.run import DistributedConfig
from training.distributed import launcher
from training.distributed.collectives import Group
from training.distributed.launcher import LaunchedRank

_CPU = torch.device("cpu")
_TIMEOUT = timedelta(minutes=30)  # a rank may have to wait for another's download or evaluation
_PATIENCE = timedelta(seconds=5)


@dataclass
class _Meeting:
    """Where the ranks have met, and the name that distinguishes this start from earlier ones there."""

    url: str = "env://"
    start: str = ""


_met = _Meeting()


class OwnRefusal(ValueError):
    """An error of this rank alone, before the ranks have met."""


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


def start(config: DistributedConfig) -> World:
    """Find this process's rank, choose its device and, with more than one rank, start the process group.

    ValueError: the variables and flags contradict each other, or the device does not exist.
    """
    place = launcher.find_place(os.environ, config.world_size, by_url=config.dist_url != "env://")
    if config.world_size not in (1, place.world_size):
        raise ValueError(
            f"--world_size {config.world_size}, but {place.world_size} ranks were started: leave the flag out"
        )
    device = _choose_device(place, config)
    if place.world_size > 1:
        _start_group(place, device, config)
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


def own_group() -> Group:
    """A gloo group of all ranks, for a thread that communicates during training; None: one process. Collective.

    Two threads in one group could enter their collectives in different orders on different ranks.
    """
    if not dist.is_initialized():
        return None
    group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member of it
    return group


def meeting_store() -> dist.Store:
    """A new connection to the store where the ranks have met.

    RuntimeError, LookupError: it is gone, or its address is not known. Waits forever if its process is stopped.
    """
    scheme, _, place = _met.url.partition("://")
    store: dist.Store
    if scheme == "file":
        store = dist.FileStore(place, dist.get_world_size())
    else:
        store = _connect(_PATIENCE, *place.rsplit(":", 1)) if scheme == "tcp" else _connect(_PATIENCE)
    return dist.PrefixStore(f"{_met.start}/failures", store)


def hosts_store() -> bool:
    """Whether the store where the ranks met ends with this process."""
    elsewhere = _met.url.startswith("file:") or (_met.url == "env://" and _launcher_has_store())
    return dist.is_initialized() and dist.get_rank() == 0 and not elsewhere


def _choose_device(place: LaunchedRank, config: DistributedConfig) -> torch.device:
    if not torch.cuda.is_available():
        return _CPU
    number = 0 if config.no_set_device_rank else place.local_rank
    if number >= torch.cuda.device_count():
        raise OwnRefusal(
            f"local rank {place.local_rank} has no GPU: this process sees {torch.cuda.device_count()}. Start "
            "fewer ranks per node, or give --no-set-device-rank where each rank is shown only its own GPU"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def _start_group(place: LaunchedRank, device: torch.device, config: DistributedConfig) -> None:
    _met.url, _met.start = config.dist_url, ""
    if config.dist_url == "env://":
        os.environ.setdefault("MASTER_PORT", config.dist_port)
    backend = config.dist_backend
    if backend == "nccl" and device.type == "cpu":
        backend = "gloo"
        if place.rank == 0:
            logging.getLogger(__name__).info("--dist-backend nccl needs GPUs: using gloo on the CPU")
    elif backend == "nccl":
        backend = "cpu:gloo,cuda:nccl"
    where: dict[str, Any] = {"init_method": config.dist_url}
    if config.dist_url == "env://" and _launcher_has_store():
        store = _connect(_TIMEOUT)
        _met.start = _agree_on_start(store, place.rank, place.world_size)
        where = {"store": dist.PrefixStore(_met.start, store)}
    dist.init_process_group(
        backend,
        **where,
        rank=place.rank,
        world_size=place.world_size,
        timeout=_TIMEOUT,
        device_id=device if "nccl" in backend else None,
    )


def _launcher_has_store() -> bool:
    """Whether torchrun keeps the store of ``env://``, across restarts of the ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect(timeout: timedelta, host: str = "", port: str = "") -> dist.TCPStore:
    host, port = host or os.environ["MASTER_ADDR"], port or os.environ["MASTER_PORT"]
    return dist.TCPStore(host, int(port), timeout=timeout, wait_for_workers=False)


def _agree_on_start(store: dist.Store, rank: int, world_size: int) -> str:
    """A name for this start of the ranks, which rank 0 chooses and all other ranks receive.

    torchrun may restart ranks with the store of their predecessors, which holds addresses of dead processes
    (pytorch issue 135712), and its count of restarts is not the same on all nodes. So each rank asks under a name
    that has never been used, and rank 0 answers until all have confirmed; earlier requests are of dead processes.
    """
    if rank > 0:
        own = uuid.uuid4().hex
        store.set(f"asks/{rank}", own)
        store.wait([f"answer/{own}"], _TIMEOUT)
        start = store.get(f"answer/{own}").decode()
        store.set(f"{start}/has/{rank}", "")
        return start
    start, waiting = uuid.uuid4().hex, set(range(1, world_size))
    deadline = time.monotonic() + _TIMEOUT.total_seconds()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"{start}/has/{other}"]):
                waiting.remove(other)
            elif store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", start)
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(waiting)} did not connect within {_TIMEOUT}")
        time.sleep(0.02)
    return start
