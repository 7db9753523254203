"""All collectives of this package; they use the default process group.

Without a process group, or with a single rank, each function returns its input, so that one process and many
processes run the same code. No gradient flows through these functions but ``gather_with_grad``: the losses of this
package compute their gradients in closed form, and the backward pass needs no exchange of embeddings (FastCLIP,
arXiv:2407.01445, "gradient reduction").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.14 renamed these functions.
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


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


def start_all_gather(local: Tensor) -> Callable[[], Tensor]:
    """``all_gather`` beside what the host does meanwhile: a function that waits for it and returns its result.

    Until then ``local`` must stay as it is. All ranks start their collectives in the same order.
    """
    k = world_size()
    if k == 1:
        return local.detach
    gathered = local.new_empty((k * local.shape[0], *local.shape[1:]))
    work = _gather(gathered, local.detach().contiguous(), async_op=True)

    def wait() -> Tensor:
        assert work is not None, "an asynchronous collective of a group that this rank is in"
        work.wait()
        return gathered

    return wait


def gather_with_grad(local: Tensor) -> Tensor:
    """As ``all_gather``, with the gradient of every rank's use of ``local``. Its backward pass is collective."""
    gathered: Tensor = _GatherWithGrad.apply(local)
    return gathered


class _GatherWithGrad(torch.autograd.Function):
    """torch's own gather with a gradient exchanges all of it with all ranks, unless the backend is NCCL alone."""

    @staticmethod
    def forward(ctx: object, local: Tensor) -> Tensor:
        return all_gather(local)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        (whole,) = gradients
        k = world_size()
        if k == 1:
            return whole
        own = whole.new_empty((whole.shape[0] // k, *whole.shape[1:]))
        _reduce_scatter(own, whole.contiguous())
        return own


@torch.no_grad()
def all_reduce_sum(local: Tensor) -> Tensor:
    """The sum over ranks of tensors of equal shape. With more than one rank it is computed in place."""
    if world_size() > 1:
        dist.all_reduce(local)
    return local


class Exchange:
    """Tensors by name that ``function`` gathers from other ranks, beside what a GPU does meanwhile.

    With several ranks and a GPU, ``function`` runs on a stream of its own, as soon as the current stream has done
    what it has been given up to now. Otherwise its results are there at once. The tensors that it reads must not
    be freed before ``wait``.
    """

    def __init__(self, function: Callable[[], Mapping[str, Tensor]], device: torch.device) -> None:
        self._stream = _side_stream(device) if device.type == "cuda" and world_size() > 1 else None
        if self._stream is None:
            self._results = function()
            return
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            self._results = function()

    def wait(self) -> Mapping[str, Tensor]:
        """The results. What the device is given from now on waits for them; the host does not."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            for tensor in self._results.values():
                tensor.record_stream(current)
        return self._results


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
