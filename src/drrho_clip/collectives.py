"""All collectives of this package; they use the default process group.

Without a process group, or with a single rank, each function returns its input, so that one process and many
processes run the same code. No gradient flows through these functions: the losses compute their gradients in
closed form, and the backward pass needs no exchange of embeddings (FastCLIP, arXiv:2407.01445, "gradient
reduction").
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.14 renamed this function.
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def world_size() -> int:
    """The number of ranks K; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, 0..K-1; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


@torch.no_grad()
def all_gather(local: Tensor) -> Tensor:
    """[b, ...] from each rank -> [K * b, ...] in rank order, detached. ``b`` must be the same on all ranks."""
    k = world_size()
    if k == 1:
        return local.detach()
    gathered = local.new_empty((k * local.shape[0], *local.shape[1:]))
    _gather(gathered, local.detach().contiguous())
    return gathered


@torch.no_grad()
def all_reduce_sum(local: Tensor) -> Tensor:
    """The sum over ranks of tensors of equal shape. With more than one rank it is computed in place."""
    if world_size() > 1:
        dist.all_reduce(local)
    return local
