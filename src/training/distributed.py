"""Who am I among the ranks: launcher variables, process group, device, DDP wrapping.

A process finds its place, in this order, from

1. torchrun's variables (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``);
2. Slurm's, inside an ``srun`` step of several tasks (``SLURM_PROCID``, ``SLURM_NTASKS``, ``SLURM_LOCALID``);
3. ``RANK`` alone, with ``--world_size``, for processes started by hand;
4. else it is the only one.

The ranks then meet at ``--dist-url``: ``env://`` means ``MASTER_ADDR`` and ``MASTER_PORT`` (``--dist_port`` where
the port is unset), ``tcp://host:port`` and ``file://path`` stand for themselves. A single process starts no group.

On GPUs the group speaks gloo for CPU tensors and NCCL for the rest, so that waiting and the exchange of Python
objects never touch a CUDA stream.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from training.params import DistributedConfig

T = TypeVar("T")
Group = dist.ProcessGroup | None  # None: the group of all ranks, or a single process

_CPU = torch.device("cpu")
_TIMEOUT = timedelta(minutes=30)  # a rank may have to wait for another's download or evaluation
_PATIENCE = timedelta(seconds=5)
# The newer name of DDP's setting, where torch has it: the older one warns there.
_SYNC_BUFFERS = "forward_sync_buffers"
if _SYNC_BUFFERS not in inspect.signature(DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"
_url = "env://"  # where the ranks have met


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


@dataclass(frozen=True)
class _Place:
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def start(config: DistributedConfig) -> World:
    """Find this process's place, choose its device and, with more than one rank, start the process group.

    ValueError: the variables and flags contradict each other, or the device does not exist.
    """
    place = _find_place(os.environ, config)
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
    return dist.is_initialized() and bool(re.search(r"Connection (closed|reset) by peer|Broken pipe", str(error)))


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
    """A connection of its own to the store where the ranks met, apart from what earlier starts of them left there.

    RuntimeError or LookupError: it is gone, or nobody knows where it is. May wait for ever where it is stopped.
    """
    scheme, _, place = _url.partition("://")
    if scheme == "file":
        store = dist.FileStore(place, dist.get_world_size())
    else:
        env = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        host, port = (place if scheme == "tcp" else env).rsplit(":", 1)
        store = dist.TCPStore(host, int(port), timeout=_PATIENCE, wait_for_workers=False)
    return dist.PrefixStore(f"failures/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def hosts_store() -> bool:
    """Whether the store where the ranks met ends with this process."""
    with_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and _url == "env://"
    return dist.is_initialized() and dist.get_rank() == 0 and not with_launcher and not _url.startswith("file:")


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
    local_main = _local_rank(os.environ, dist.get_rank()) == 0
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


def _find_place(env: Mapping[str, str], config: DistributedConfig) -> _Place:
    by_url = config.dist_url != "env://"
    if "RANK" in env and "WORLD_SIZE" in env:
        world_size = int(env["WORLD_SIZE"])
    elif "SLURM_PROCID" in env and _slurm_tasks(env) > 1 and _is_srun_step(env, by_url):
        return _slurm_place(env)
    else:
        world_size = config.world_size
    if world_size == 1:
        return _Place()
    if "RANK" not in env:
        raise ValueError(
            f"--world_size {world_size}: nothing says which of the {world_size} ranks this process is; start it "
            "with torchrun or srun, or set RANK in its environment"
        )
    if not by_url and "MASTER_ADDR" not in env:
        raise ValueError(
            f"WORLD_SIZE is {world_size} but MASTER_ADDR is not set: export the host of rank 0, start with "
            "torchrun, or give --dist-url tcp://HOST:PORT"
        )
    rank = int(env["RANK"])
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK is {rank}, which is not one of the {world_size} ranks 0..{world_size - 1}")
    return _Place(rank, world_size, _local_rank(env, rank), int(env.get("LOCAL_WORLD_SIZE", world_size)))


def _local_rank(env: Mapping[str, str], rank: int) -> int:
    """torchrun's, else Slurm's; processes started by hand are taken to share one node."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if name in env:
            return int(env[name])
    return rank


def _slurm_tasks(env: Mapping[str, str]) -> int:
    """Tasks of this very step; in a shell inside an allocation the allocation's count would be the wrong one."""
    return int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)


def _is_srun_step(env: Mapping[str, str], by_url: bool) -> bool:
    """Whether the other tasks of this Slurm step run this program too.

    They do not in an interactive shell (``srun --pty``) and in a batch script that calls Python without ``srun``
    (a job, but no step), where waiting for them would hang.
    """
    alone = "SLURM_JOB_ID" in env and "SLURM_STEP_ID" not in env
    alone = alone or ("SLURM_PTY_PORT" in env and "MASTER_ADDR" not in env)
    if alone:
        logging.getLogger(__name__).warning("Slurm allocation, but not started by srun: running as one process")
        return False
    if by_url or "MASTER_ADDR" in env:
        return True
    raise ValueError(
        f"Slurm says {_slurm_tasks(env)} tasks but MASTER_ADDR is not set: export the host of the first one "
        "(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1), or set SLURM_NTASKS=1 to run one process"
    )


def _slurm_place(env: Mapping[str, str]) -> _Place:
    rank, world_size = int(env["SLURM_PROCID"]), _slurm_tasks(env)
    counts = _tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "")
    node = int(env.get("SLURM_NODEID", 0))
    local_world_size = counts[node] if node < len(counts) else world_size
    return _Place(rank, world_size, int(env.get("SLURM_LOCALID", rank)), local_world_size)


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's compressed counts: ``4(x2),3`` -> [4, 4, 3]."""
    counts = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(repeat or 1)
    return counts


def _choose_device(place: _Place, config: DistributedConfig) -> torch.device:
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


def _start_group(place: _Place, device: torch.device, config: DistributedConfig) -> None:
    global _url
    _url = config.dist_url
    if config.dist_url == "env://":
        os.environ.setdefault("MASTER_PORT", config.dist_port)
    backend = config.dist_backend
    if backend == "nccl" and device.type == "cpu":
        backend = "gloo"
        if place.rank == 0:
            logging.getLogger(__name__).info("--dist-backend nccl needs GPUs: using gloo on the CPU")
    elif backend == "nccl":
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        init_method=config.dist_url,
        rank=place.rank,
        world_size=place.world_size,
        timeout=_TIMEOUT,
        device_id=device if "nccl" in backend else None,
    )


def _any_rank(flag: bool) -> bool:
    votes = torch.tensor([float(flag)])
    dist.all_reduce(votes)
    return bool(votes.item())
