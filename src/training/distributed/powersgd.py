"""PowerSGD (arXiv:1905.13727) by torch's own hook of DistributedDataParallel, with a state that is saved.

Each gradient matrix M of n x m values is sent as two thin ones, P of n x r and Q of m x r. What they leave out is
the rank's error, which is added to its next gradient. All ranks get the same sums, so the approximation depends on
the mean of their errors alone. Hence a checkpoint keeps that mean: ``average`` gives it to all ranks, which
changes nothing but the rounding, and a run that resumes on any number of ranks goes on from there.

A step that is not taken, because its gradient is not finite, forgets the errors, which are not finite either, and
keeps the Q with which it began.
"""

# Annotations are evaluated here, because DistributedDataParallel looks at those of its hook.
import logging
from collections.abc import Sequence
from typing import TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from drrho_clip import collectives

_log = logging.getLogger(__name__)

# Is added to a column's length, by which torch divides: a gradient of zeros would be NaN otherwise. It changes no
# bit of a column that is longer than 1e-12.
_SHORTEST = 1e-20


class BucketState(TypedDict):
    """What is saved of one of DDP's buckets: its parameters' names in order, their errors, P and Q.

    ``error`` is in the memory order of the gradients, which ``channels_last`` tells.
    """

    parameters: list[str]
    channels_last: bool
    rank: int
    error: Tensor
    p: Tensor
    q: Tensor


class PowerSGD:
    """The hook for the gradients of ``model``: rank ``rank`` from step ``start`` on, no compression before.

    The loop calls ``begin`` before the backward pass of each step, and ``end`` after it. Outside of that, as while
    DDP brings its buckets into their order, gradients are not compressed.
    """

    def __init__(self, model: nn.Module, *, rank: int, start: int) -> None:
        logging.getLogger(powerSGD_hook.__name__).setLevel(logging.WARNING)  # it tells each bucket's sizes
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self.rank, self.start = rank, start
        # torch's state counts backward passes, and so those before the run's first step too. Here steps count.
        self._state = powerSGD_hook.PowerSGDState(
            None, rank, start_powerSGD_iter=2, orthogonalization_epsilon=_SHORTEST
        )
        self._state.iter = self._state.start_powerSGD_iter
        self._applies = False
        self._averaged = False  # whether all ranks have the same errors since ``average``
        self._parameters: dict[int, list[str]] = {}  # of each bucket that was compressed
        self._channels_last = any(
            p.ndim == 4 and p.stride() != torch.empty(p.shape, device="meta").stride() for p in model.parameters()
        )
        self._before: dict[int, Tensor] = {}  # each bucket's Q before the step
        self._saved: list[BucketState] = []  # of a checkpoint, for buckets that were not compressed yet

    def begin(self, step: int) -> None:
        """The next backward pass is that of optimizer step ``step``."""
        self._applies = step >= self.start
        self._averaged = False

    def end(self, taken: Tensor) -> None:
        """The backward pass is over. ``taken``: whether its step was taken, a 0-d bool on the device."""
        self._applies = False
        for bucket, before in self._before.items():
            error, q = self._state.error_dict[bucket], self._state.q_memory_dict[bucket]
            self._state.error_dict[bucket] = torch.where(taken, error, 0.0)
            q.copy_(torch.where(taken, q, before))
        self._before = {}
        if self._parameters:  # every bucket has taken its part; the file need not stay open
            self._saved = []

    def hook(self, state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """For ``DistributedDataParallel.register_comm_hook``; ``state`` is not used."""
        if not self._applies:
            return default_hooks.allreduce_hook(None, bucket)  # type: ignore[arg-type]  # None: all ranks
        at, memory = bucket.index(), self._state.q_memory_dict
        if at not in self._parameters:
            self._parameters[at] = [self._names[id(parameter)] for parameter in bucket.parameters()]
            self._recall(at, bucket.buffer())
        if at in memory:
            self._before[at] = memory[at].clone()
        future = powerSGD_hook.powerSGD_hook(self._state, _AsMatrices(bucket))  # type: ignore[arg-type]
        if bucket.buffer().device.type == "cpu" or dist.get_backend() == "gloo":
            # gloo's threads start what follows whenever they can, and ranks must not mix up their buckets. NCCL's
            # collectives are queued here and now, in order.
            future.wait()
        if at not in self._before:
            self._before[at] = _drawn(memory[at], at)
        return future

    def average(self) -> None:
        """Give all ranks the mean of their errors. Collective.

        A second call without a step between changes nothing. With 6 ranks or more the mean of equal numbers is not
        always that number in float32, and a run that saves twice at a step, as at the end of an epoch, would go on
        otherwise than one that resumes there.
        """
        if self._averaged:
            return
        self._averaged = True
        for bucket in sorted(self._state.error_dict):
            error = self._state.error_dict[bucket]
            collectives.all_reduce_sum(error).div_(collectives.world_size())

    def state_dict(self) -> list[BucketState]:
        """The state, which ``average`` has made equal on all ranks; tensors are not copied."""
        state = self._state
        live = [
            BucketState(
                parameters=names,
                channels_last=self._channels_last,
                rank=self.rank,
                error=state.error_dict[at],
                p=state.p_memory_dict[at],
                q=state.q_memory_dict[at],
            )
            for at, names in sorted(self._parameters.items())
        ]
        return live or self._saved

    def load_state_dict(self, state: Sequence[BucketState]) -> None:
        """Go on from what ``state_dict`` gave. ValueError: it is of another model."""
        for one in state:
            names = one["parameters"]
            if sum(self._sizes.get(name, 0) for name in names) != one["error"].numel():
                raise ValueError(f"the errors of --grad_compression powersgd are of another model than {names[0]}")
        # Checkpoints from before both went together do not say it.
        self._saved = [one for one in state if one.get("channels_last", False) == self._channels_last]
        if len(self._saved) < len(state):
            _log.warning("--channels_last has changed: what --grad_compression powersgd still owed is dropped")

    def _recall(self, at: int, buffer: Tensor) -> None:
        """Fill the state of bucket ``at`` from the checkpoint. P and Q of other matrices are not used."""
        names, state = self._parameters[at], self._state
        errors: dict[str, Tensor] = {}
        for one in self._saved:
            sizes = [self._sizes[name] for name in one["parameters"]]
            errors |= dict(zip(one["parameters"], one["error"].split(sizes), strict=True))
            if (one["parameters"], one["rank"]) == (names, self.rank):
                # Copies, because the checkpoint's are mapped from its file.
                state.p_memory_dict[at] = one["p"].to(buffer, copy=True)
                state.q_memory_dict[at] = one["q"].to(buffer, copy=True)
        if errors:
            none = {name: buffer.new_zeros(self._sizes[name]) for name in names if name not in errors}
            state.error_dict[at] = torch.cat([(errors | none)[name].to(buffer) for name in names])


class _AsMatrices:
    """``bucket`` as torch's hook can read it.

    It fails for parameters without a dimension, such as logit_scale, and for those whose channels are last.
    """

    def __init__(self, bucket: dist.GradBucket) -> None:
        self.index, self.buffer, self.is_last, self._of = bucket.index, bucket.buffer, bucket.is_last, bucket

    def gradients(self) -> list[Tensor]:
        return [_rows(gradient) for gradient in self._of.gradients()]


def _rows(gradient: Tensor) -> Tensor:
    """The same memory with at least one dimension, and with the dimensions in its order."""
    if not gradient.ndim:
        return gradient.view(1)
    if gradient.ndim == 4 and not gradient.is_contiguous():
        return gradient.permute(0, 2, 3, 1)
    return gradient


def _drawn(q: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(q.shape, generator=generator, dtype=q.dtype).to(q.device)
