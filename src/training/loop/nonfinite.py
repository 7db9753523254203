"""Steps with a loss or gradient that is not finite: kept out of everything, counted, and after too many explained.

A step is taken or skipped as one: weights, optimizer, sample state, temperature's bound and running statistics.
Nothing here waits for the device, and ranks agree without a collective of its own:

* Backward is seeded with 1, or with NaN where one of this rank's loss terms or new rows of the sample state is not
  finite. NaN passes through every layer into the gradient, and DDP's average carries it to all ranks.
* A step is taken where the norm of the averaged gradient is finite: a 0-d bool on the device, the same everywhere.
* ``SkippedSteps`` counts on the device. The host reads it no more often than the limit can have been reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drrho_clip.sample_state import StateUpdate
from training.distributed.collectives import gather_object

_SHOWN = 8  # sample keys in a message


class NotFinite(ValueError):
    """``--max_skipped_steps`` steps in a row were not finite; the message says what was the first of it."""


def backward_seed(terms: Iterable[Tensor], update: StateUpdate | None) -> Tensor:
    """What backward starts from: float32 0-d, 1 where all ``terms`` and new rows are finite, else NaN."""
    values = [term.detach().float().reshape(1) for term in terms]
    if update is not None:
        values += update.values.values()
    return torch.where(torch.cat(values).isfinite().all(), 1.0, math.nan)


class SkippedSteps:
    """How many steps were skipped: in a row up to now, and in all.

    ``limit``   so many in a row are too many.
    ``device``  where steps are taken.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        self.limit = limit
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)
        self._unread = 0  # steps since the last read, and
        self._in_a_row = self._told = 0  # what it gave; the total that was last reported

    def count(self, taken: Tensor) -> None:
        """One more step; ``taken`` 0-d bool on the device."""
        skipped = ~taken
        self._counts += skipped
        self._counts[0] *= skipped
        self._unread += 1

    def read(self) -> tuple[int, int]:
        """In a row, in all. Waits for the device."""
        self._in_a_row, total = self._counts.tolist()
        self._unread = 0
        return self._in_a_row, total

    def too_many(self) -> bool:
        """Whether the limit is reached, after each step. Waits for the device where it can be: every ``limit``
        steps, sooner while steps are being skipped; at the same steps on all ranks."""
        return self._in_a_row + self._unread >= self.limit and self.read()[0] >= self.limit

    def news(self) -> str | None:
        """A line for the log where steps were skipped since the last call. Waits for the device."""
        total, before = self.read()[1], self._told
        self._told = total
        if total == before:
            return None
        steps = "1 step" if total - before == 1 else f"{total - before} steps"
        return f"skipped {steps} ({total} in all) since the last report: loss or gradient not finite"

    def state_dict(self) -> dict[str, int]:
        """Plain numbers. Waits for the device."""
        in_a_row, total = self.read()
        return {"in_a_row": in_a_row, "total": total}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from ``state_dict()``."""
        self._counts.copy_(torch.tensor([state["in_a_row"], state["total"]]))
        self._in_a_row, self._told, self._unread = state["in_a_row"], state["total"], 0


class RunningStatistics:
    """What the layers ``norms`` have averaged so far, kept over a forward pass."""

    def __init__(self, norms: Iterable[nn.Module]) -> None:
        buffers = (buffer for norm in norms if norm.training for buffer in norm.buffers(recurse=False))
        self._kept = [(buffer, buffer.clone()) for buffer in buffers]

    def restore(self, unless: Tensor | None = None) -> None:
        """Put it back; with a 0-d bool on the device only where that is False, without waiting for it."""
        for buffer, before in self._kept:
            buffer.copy_(before if unless is None else torch.where(unless, buffer, before))


@dataclass(frozen=True)
class Evidence:
    """What a step was made of on this rank, for a diagnosis. References: it costs no memory until the next step.

    ``step``      the optimizer step; ``index`` int64 [b], its samples.
    ``tensors``   name -> tensor, upstream first; those with ``b`` rows belong to the samples.
    ``tau``       0-d, the (mean) temperature.
    """

    step: int
    index: Tensor
    tensors: Mapping[str, Tensor]
    tau: Tensor

    def findings(self, model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
        """All that is looked at, upstream first; None for a gradient that is not there."""
        yield from ((f"parameter {name}", p) for name, p in model.named_parameters())
        yield from self.tensors.items()
        yield from ((f"gradient of {name}", p.grad) for name, p in model.named_parameters())

    def first_bad(self, model: nn.Module) -> tuple[int, str, list[int]] | None:
        """Place in the order, name and sample keys of the first tensor that is not finite; None: all are."""
        for place, (name, tensor) in enumerate(self.findings(model)):
            if tensor is None or not tensor.is_floating_point() or bool(tensor.isfinite().all()):
                continue
            index = self.index
            if name in self.tensors and tensor.ndim > 1 and len(tensor) == len(index):
                index = index[~tensor.isfinite().flatten(1).all(1).cpu()]
            return place, name, index.tolist()
        return None


def explain(skipped: SkippedSteps, evidence: Evidence, model: nn.Module, optimizer: Optimizer) -> NotFinite:
    """The error for too many skipped steps in a row, the same on all ranks, which call it together.

    ``evidence`` is of the last step, whose gradients are still there; ``optimizer`` from ``create_optimizer``.
    """
    in_a_row, total = skipped.read()
    found = gather_object(evidence.first_bad(model))
    ranks = [rank for rank, bad in enumerate(found) if bad is not None]
    if ranks:
        rank = min(ranks, key=lambda rank: (found[rank][0], rank))
        _, name, keys = found[rank]
        shown = ", ".join(map(str, keys[:_SHOWN])) + (f", ... ({len(keys)} in all)" if keys[_SHOWN:] else "")
        cause = f"The first tensor that is not finite: {name}, on rank {rank}; sample keys {shown}."
    else:
        cause = "Every tensor is finite, but the gradient's norm overflows."
    rates = {group["name"]: f"{group['lr']:.3g}" for group in optimizer.param_groups}
    of_tau = rates.pop("logit_scale", None)
    rate = ", ".join(sorted(set(rates.values()))) + (f" (of the temperature {of_tau})" if of_tau else "")
    return NotFinite(
        f"--max_skipped_steps {skipped.limit}: the last {in_a_row} steps up to step {evidence.step} ({total} in "
        f"all) were skipped, for a loss or gradient that is not finite. {cause} Learning rate {rate}; "
        f"tau {float(evidence.tau):.4g}. None of these steps has changed anything: mend the samples or lower "
        "--lr, and continue with --resume latest"
    )
