"""Steps whose loss or gradient is not finite are skipped and counted. Too many end the run with a diagnosis.

A step is taken or skipped as a whole: weights, optimizer, sample state, the temperature's bound and running
statistics. Nothing here waits for the device, and the ranks agree without a collective of their own:

* The backward pass starts from 1, or from NaN if one of this rank's loss terms or new rows of the sample state is
  not finite. NaN passes through every layer into the gradient, and DDP's average carries it to all ranks.
* A step is taken if the norm of the averaged gradient is finite: a 0-d bool on the device, equal on all ranks.
* ``SkippedSteps`` counts on the device. The host knows the count of some steps ago, which has arrived meanwhile,
  and waits for the present one only at log lines and saves, where it waits anyway, and while steps are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drrho_clip.sample_state import StateUpdate
from drrho_clip.state.readback import Readback
from training.distributed.collectives import gather_object

_SHOWN = 8  # the most rows in a message


class NotFinite(ValueError):
    """``--max_skipped_steps`` steps in a row were not finite. The message names the first such tensor."""


def backward_seed(terms: Iterable[Tensor], update: StateUpdate | None) -> Tensor:
    """The gradient that backward starts from, float32 0-d: 1 if ``terms`` and new rows are finite, else NaN."""
    values = [term.detach().float().reshape(1) for term in terms]
    if update is not None:
        values += update.values.values()
    return torch.where(torch.cat(values).isfinite().all(), 1.0, math.nan)


class SkippedSteps:
    """The number of skipped steps: the latest ones in a row, and the total.

    ``limit``   the number of skipped steps in a row at which the run ends.
    ``device``  the device of the training steps.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        self.limit = limit
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)
        self._in_a_row = 0  # as last known
        self._since = 0  # steps since then
        self._lag = limit // 2  # steps until a copy of the counts is looked at
        self._copy: Readback | None = None
        self._reported = 0  # the total in the last report

    def count(self, taken: Tensor) -> None:
        """Count one more step. ``taken``: 0-d bool on the device."""
        skipped = ~taken
        self._counts += skipped
        self._counts[0] *= skipped
        self._since += 1
        if self._lag and self._since % self._lag == 0:
            if self._copy is not None:
                self._in_a_row, self._since = self._copy.value().tolist()[0], self._lag
            self._copy = Readback(self._counts)

    def read(self) -> tuple[int, int]:
        """The number of skipped steps in a row up to now, and in total. Waits for the device."""
        self._in_a_row, total = self._counts.tolist()
        self._since, self._copy = 0, None
        return self._in_a_row, total

    def too_many(self) -> bool:
        """Whether the limit is reached. Call it after each step.

        It waits for the device only if the limit may be reached: with a limit of 2 or more, not unless steps were
        skipped lately. All ranks wait at the same steps if they all read the count (``news``) at the same steps.
        """
        return self._in_a_row + self._since >= self.limit and self.read()[0] >= self.limit

    def news(self) -> str | None:
        """A line for the log if steps were skipped since the last call, else None. Waits for the device."""
        total, before = self.read()[1], self._reported
        self._reported = total
        if total == before:
            return None
        steps = "1 step" if total - before == 1 else f"{total - before} steps"
        return f"skipped {steps} ({total} in all) since the last report: the loss or gradient was not finite"

    def state_dict(self) -> dict[str, int]:
        """The counts as plain numbers. Waits for the device."""
        in_a_row, total = self.read()
        return {"in_a_row": in_a_row, "total": total}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take over the counts of ``state_dict()``."""
        self._counts.copy_(torch.tensor([state["in_a_row"], state["total"]]))
        self._in_a_row, self._reported = state["in_a_row"], state["total"]
        self._since, self._copy = 0, None


class RunningStatistics:
    """A copy of the running statistics of the layers ``norms``, from before a forward pass.

    The buffers, three of each layer, are handled as one tensor per dtype, since a kernel for each of them costs
    more than what it does.
    """

    def __init__(self, norms: Iterable[nn.Module]) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for norm in norms:
            for buffer in norm.buffers(recurse=False) if norm.training else ():
                by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._kept = [(buffers, _joined(buffers)) for buffers in by_dtype.values()]

    @torch.no_grad()
    def restore(self, unless: Tensor | None = None) -> None:
        """Restore the statistics, unless ``unless`` is True, a 0-d bool on the device. It does not wait for it."""
        for buffers, before in self._kept:
            chosen = before if unless is None else torch.where(unless, _joined(buffers), before)
            pieces = chosen.split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [piece.view_as(buffer) for piece, buffer in zip(pieces, buffers)])


def _joined(buffers: Iterable[Tensor]) -> Tensor:
    return torch.cat([buffer.reshape(-1) for buffer in buffers])


@dataclass(frozen=True)
class Evidence:
    """The tensors of one step on this rank, for a diagnosis.

    It holds references, which cost no memory until the next step.

    ``step``     the optimizer step.
    ``index``    int64 [b], the step's samples.
    ``tensors``  name -> tensor, in the order of computation; a tensor with ``b`` rows has one per sample.
    ``tau``      0-d, the (mean) temperature.
    """

    step: int
    index: Tensor
    tensors: Mapping[str, Tensor]
    tau: Tensor

    def findings(self, model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
        """All tensors to examine, by name, in the order of computation; None for a missing gradient."""
        yield from ((f"parameter {name}", p) for name, p in model.named_parameters())
        yield from self.tensors.items()
        yield from ((f"gradient of {name}", p.grad) for name, p in model.named_parameters())

    def first_bad(self, model: nn.Module) -> tuple[int, str, list[int]] | None:
        """Position in the order, name and rows of the first tensor that is not finite; None if all are."""
        for position, (name, tensor) in enumerate(self.findings(model)):
            if tensor is None or not tensor.is_floating_point() or bool(tensor.isfinite().all()):
                continue
            index = self.index.cpu()
            if name in self.tensors and tensor.ndim > 1 and len(tensor) == len(index):
                index = index[~tensor.isfinite().flatten(1).all(1).cpu()]
            return position, name, index.tolist()
        return None


def explain(skipped: SkippedSteps, evidence: Evidence, model: nn.Module, optimizer: Optimizer) -> NotFinite:
    """The error for too many skipped steps in a row. All ranks call this together and get the same error.

    ``evidence``: of the last step, whose gradients must still be there. ``optimizer``: from ``create_optimizer``.
    """
    in_a_row, total = skipped.read()
    found = gather_object(evidence.first_bad(model))
    ranks = [rank for rank, bad in enumerate(found) if bad is not None]
    if ranks:
        rank = min(ranks, key=lambda rank: (found[rank][0], rank))
        _, name, rows = found[rank]
        shown = ", ".join(map(str, rows[:_SHOWN])) + (f", ... ({len(rows)} in all)" if rows[_SHOWN:] else "")
        cause = f"The first tensor that is not finite: {name}, on rank {rank}; rows of its samples: {shown}."
    else:
        cause = "Every tensor is finite, but the norm of the gradient overflows."
    rates = {group["name"]: f"{group['lr']:.3g}" for group in optimizer.param_groups}
    of_tau = rates.pop("logit_scale", None)
    rate = ", ".join(sorted(set(rates.values()))) + (f" (of the temperature {of_tau})" if of_tau else "")
    return NotFinite(
        f"--max_skipped_steps {skipped.limit}: the last {in_a_row} steps up to step {evidence.step} ({total} in "
        f"all) were skipped, because the loss or gradient was not finite. {cause} Learning rate {rate}; "
        f"tau {float(evidence.tau):.4g}. None of these steps has changed anything: correct the samples or lower "
        "--lr, and resume with --resume latest"
    )
