"""Communication between the ranks of the trainer, on the CPU: objects, votes, sums. A single rank sends nothing.

(The method has collectives of its own, for tensors on the device: ``drrho_clip.collectives``.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from training.distributed import launcher

T = TypeVar("T")
Group = dist.ProcessGroup | None  # None: the group of all ranks, or a single process

_CPU = torch.device("cpu")
# Error messages of gloo and NCCL.
_LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|pair closure|remote process exited|ncclRemoteError"
)


class PeerFailed(RuntimeError):
    """Another rank raised an error and reports it. This rank ends with an exit code and without a traceback."""


def lost_peer(error: BaseException) -> bool:
    """Whether ``error`` was raised by a collective because another process has ended."""
    # Collectives raise RuntimeError; a BrokenPipeError is of something else that this process writes to.
    return isinstance(error, RuntimeError) and dist.is_initialized() and bool(_LOST_PEER.search(str(error)))


def barrier() -> None:
    """Wait for all ranks, on the CPU, and not for CUDA work in flight."""
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
    """Start to replace ``tensor``, on the CPU, by its maximum over the ranks; ``wait()`` on the result ends it.

    None: this process is alone, and there is nothing to wait for.
    """
    return dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True) if dist.is_initialized() else None


def on_main(function: Callable[[], T], group: Group = None) -> T:
    """``function()`` run by rank 0 alone; its picklable result on every rank.

    If it raises, rank 0 raises the same error and the others raise ``PeerFailed``.
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
    """Local rank 0 of each node runs the body first, then the other ranks of the node.

    What local rank 0 leaves on the node's disk (a download) is then available to the others. If a local rank 0
    raises, every rank stops: that one with its own error, the others with ``PeerFailed``.
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


def _any_rank(flag: bool) -> bool:
    votes = torch.tensor([float(flag)])
    dist.all_reduce(votes)
    return bool(votes.item())
