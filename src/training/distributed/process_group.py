"""The ranks: how they meet, what they say to each other, device, DDP wrapping.

``launcher.py`` says who a process is. The ranks meet at ``--dist-url``: ``env://`` means ``MASTER_ADDR`` and
``MASTER_PORT`` (``--dist_port`` where the port is unset), ``tcp://host:port`` and ``file://path`` stand for
themselves. A single process starts no group.

On GPUs the group speaks gloo for CPU tensors and NCCL for the rest, so that waiting and the exchange of Python
objects never touch a CUDA stream.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from training.config.params import DistributedConfig
from training.distributed import launcher
from training.distributed.launcher import Place

T = TypeVar("T")
Group = dist.ProcessGroup | None  # None: the group of all ranks, or a single process

_CPU = torch.device("cpu")
_TIMEOUT = timedelta(minutes=30)  # a rank may have to wait for another's download or evaluation
_PATIENCE = timedelta(seconds=5)
# What gloo and NCCL say.
_LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|pair closure|remote process exited|ncclRemoteError"
)
# The newer name of DDP's setting, where torch has it: the older one warns there.
_SYNC_BUFFERS = "forward_sync_buffers"
if _SYNC_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"


@dataclass
class _Meeting:
    """Where the ranks have met, and what tells this start of theirs from earlier ones there."""

    url: str = "env://"
    start: str = ""


_met = _Meeting()


class OwnRefusal(ValueError):
    """What is wrong with this rank alone, before the ranks have met."""


class PeerFailed(RuntimeError):
    """Another rank raised; its own message says why. Worth an exit code, not a traceback."""


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
        """Whether this rank speaks for the run: logs, checkpoints, reports."""
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
    """Find this process's place, choose its device and, with more than one rank, start the process group.

    ValueError: the variables and flags contradict each other, or the device does not exist.
    """
    place = launcher.find_place(os.environ, config.world_size, by_url=config.dist_url != "env://")
    if config.world_size not in (1, place.world_size):
        raise ValueError(
            f"--world_size {config.world_size}, but {place.world_size} were started: leave the flag out"
        )
    device = _choose_device(place, config)
    if place.world_size > 1:
        _start_group(place, device, config)
    return World(place.rank, place.local_rank, place.world_size, place.local_world_size, device)


def lost_peer(error: RuntimeError) -> bool:
    """Whether ``error`` is a collective's, and says that another process has ended."""
    return dist.is_initialized() and bool(_LOST_PEER.search(str(error)))


def stop() -> None:
    """End the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def met() -> bool:
    """Whether this process has met other ranks, and not parted from them."""
    return dist.is_initialized()


def world_size() -> int:
    """Number of ranks that have met."""
    return dist.get_world_size() if dist.is_initialized() else 1


def meeting_store() -> dist.Store:
    """A connection of its own to the store where the ranks have met.

    RuntimeError or LookupError: it is gone, or nobody knows where it is. May wait for ever where it is stopped.
    """
    scheme, _, place = _met.url.partition("://")
    if scheme == "file":
        store = dist.FileStore(place, dist.get_world_size())
    else:
        store = _connect(_PATIENCE, *place.rsplit(":", 1)) if scheme == "tcp" else _connect(_PATIENCE)
    return dist.PrefixStore(f"{_met.start}/failures", store)


def hosts_store() -> bool:
    """Whether the store where the ranks met ends with this process."""
    elsewhere = _met.url.startswith("file:") or (_met.url == "env://" and _launcher_has_store())
    return dist.is_initialized() and dist.get_rank() == 0 and not elsewhere


def barrier() -> None:
    """Wait for all ranks, on the CPU: CUDA work in flight is left alone."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


def broadcast_object(obj: Any, src: int = 0, group: Group = None) -> Any:
    """Rank ``src``'s picklable ``obj``, on every rank."""
    if not dist.is_initialized():
        return obj
    box = [obj if dist.get_rank() == src else None]
    dist.broadcast_object_list(box, src=src, group=group, device=_CPU)
    return box[0]


def gather_object(obj: Any, group: Group = None) -> list[Any]:
    """Every rank's picklable ``obj``, in rank order, on every rank."""
    if not dist.is_initialized():
        return [obj]
    box = [None] * dist.get_world_size()
    dist.all_gather_object(box, obj, group)
    return box


def own_group() -> Group:
    """A gloo group of all ranks for a thread that talks beside training; None for a single process. Collective.

    Two threads in one group could enter their collectives in different orders on different ranks.
    """
    return dist.new_group(backend="gloo", timeout=_TIMEOUT) if dist.is_initialized() else None


def rank_in(group: Group = None) -> int:
    """This process's number in ``group``, by default among all ranks."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` over the ranks, as a new tensor on its device."""
    total = tensor.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def start_all_reduce_max(tensor: Tensor) -> dist.Work | None:
    """Start on the maximum over the ranks of ``tensor``, on the CPU; it is there after ``wait()`` on the answer.

    None: this process is alone, and there is nothing to wait for.
    """
    return dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True) if dist.is_initialized() else None


def on_main(function: Callable[[], T], group: Group = None) -> T:
    """``function()`` run by rank 0 alone; its picklable result on every rank.

    Where it raises, rank 0 has that error and the others have ``PeerFailed``.
    """
    if not dist.is_initialized():
        return function()
    if dist.get_rank() == 0:
        try:
            result = function()
        except Exception:
            broadcast_object((False, None), group=group)
            raise
        return broadcast_object((True, result), group=group)[1]
    succeeded, result = broadcast_object(None, group=group)
    if not succeeded:
        raise PeerFailed("rank 0 failed; its message says why")
    return result


@contextmanager
def node_main_first() -> Iterator[None]:
    """Local rank 0 of each node goes through the body first, the node's other ranks after it.

    Whatever local rank 0 leaves on the node's disk (a download) is then there for the others. Where one of them
    raises, every rank leaves: that one with its own error, the others with ``PeerFailed``.
    """
    if not dist.is_initialized():
        yield
        return
    local_main = launcher.local_rank() == 0
    if local_main:
        try:
            yield
        except Exception:
            _any_rank(True)
            raise
    if _any_rank(False):
        raise PeerFailed("local rank 0 of a node failed; its message says why")
    if not local_main:
        yield


def wrap(model: nn.Module, world: World, *, static_graph: bool, sync_bn: bool) -> nn.Module:
    """``model`` in DistributedDataParallel; unchanged in a single process and where nothing is to be trained.

    ``sync_bn`` turns BatchNorm layers into ones with statistics over all ranks, in place of the old ones, before
    wrapping; torch has them for GPUs only, elsewhere it is a ValueError.
    """
    if not world.distributed:
        return model
    on_cuda = world.device.type == "cuda"
    if sync_bn:
        check_sync_bn(world)
        from timm.layers import convert_sync_batchnorm  # seconds to import, for a rare flag

        model = convert_sync_batchnorm(model)  # unlike torch's it keeps the activation of timm's BatchNormAct
    if not any(p.requires_grad for p in model.parameters()):
        return model
    settings = {
        "device_ids": [world.device] if on_cuda else None,
        "gradient_as_bucket_view": True,
        "static_graph": static_graph,
        # Only running statistics differ between ranks; open_clip's attention masks need no broadcast per forward.
        _SYNC_BUFFERS: any(isinstance(module, _BatchNorm) for module in model.modules()),
    }
    return DistributedDataParallel(model, **settings)


def check_sync_bn(world: World) -> None:
    """ValueError: ``world`` cannot have BatchNorm with statistics over all ranks."""
    if world.distributed and world.device.type != "cuda":
        raise ValueError(
            "--use-bn-sync needs GPUs: torch synchronizes no BatchNorm on the CPU; leave the flag out"
        )


def _choose_device(place: Place, config: DistributedConfig) -> torch.device:
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


def _start_group(place: Place, device: torch.device, config: DistributedConfig) -> None:
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
    """A name for this start of the ranks, which rank 0 makes up and all the others learn.

    torchrun may start ranks again with the store of the ones before, addresses of dead processes included
    (pytorch issue 135712), and its count of restarts is not the same on all nodes. So each rank asks under a name
    that nobody has used, and rank 0 answers until all have the answer; those who asked before them are dead.
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
            raise RuntimeError(f"ranks {sorted(waiting)} have not come within {_TIMEOUT}")
        time.sleep(0.02)
    return start


def _any_rank(flag: bool) -> bool:
    votes = torch.tensor([float(flag)])
    dist.all_reduce(votes)
    return bool(votes.item())
