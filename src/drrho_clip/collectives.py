"""Every collective of this package, on the default process group.

Without a process group, or with one rank, each function returns its input: one process and many run the same
code. Gradients never flow through these: the losses derive theirs in closed form and the backward pass needs
no exchange of embeddings (FastCLIP, arXiv:2407.01445, "gradient reduction").
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.14 renamed it.
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def world_size() -> int:
    """Number of ranks K; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, 0..K-1; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


@torch.no_grad()
def all_gather(local: Tensor) -> Tensor:
    """[b, ...] from each rank -> [K * b, ...] in rank order, detached. ``b`` is the same on all ranks."""
    k = world_size()
    if k == 1:
        return local.detach()
    gathered = local.new_empty((k * local.shape[0], *local.shape[1:]))
    _gather(gathered, local.detach().contiguous())
    return gathered


@torch.no_grad()
def all_reduce_sum(local: Tensor) -> Tensor:
    """The sum over ranks of equally shaped tensors, in place where there is more than one rank."""
    if world_size() > 1:
        dist.all_reduce(local)
    return local
