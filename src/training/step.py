"""One optimizer step: forward, loss, backward, update, commit.

With ``accum`` micro-batches the gradient is that of the full batch, for every loss:

1. Embed all micro-batches without a graph, remembering the random state before each.
2. Evaluate the loss once on the embeddings of the whole batch and differentiate it with respect to them.
3. Embed each micro-batch again under its random state, so that dropout draws the same masks, and feed its slice
   of that gradient back. Gradients are reduced over ranks with the last micro-batch only.

BatchNorm sees micro-batches, so such models are exempt from the equality; its running statistics move in 3 alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from drrho_clip import collectives
from drrho_clip.batch import Batch
from drrho_clip.losses import LossOutput
from training.task import Task

_PARAMETERS = ("logit_scale", "logit_bias")


@dataclass
class Stepper:
    """Takes optimizer steps on ``task``. ``scaler`` is given for float16 autocast only."""

    task: Task
    optimizer: torch.optim.Optimizer
    accum: int = 1
    scaler: torch.amp.GradScaler | None = None
    grad_clip_norm: float | None = None
    logit_scale_bound: float = 100.0

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Train on ``batch`` (on the device). Returns 0-d tensors: every term, the total as ``loss``, metrics."""
        self.optimizer.zero_grad(set_to_none=True)
        batch = self.task.select(batch, step, self._embed_without_graph)
        backward = self._backward_whole if self.accum == 1 else self._backward_accumulated
        result = backward(batch)
        taken = self._update()
        if result.update is not None:
            self.task.loss.state.commit(result.update, taken)
        with torch.no_grad():
            self.task.bare.logit_scale.clamp_(0, math.log(self.logit_scale_bound))
        terms = {name: term.detach() for name, term in result.terms.items()}
        return {**terms, "loss": sum(terms.values()), **result.metrics}

    def _backward_whole(self, batch: Batch) -> LossOutput:
        reference = self.task.reference_features(batch)  # first: the target's graph is not in memory yet
        outputs = self.task.outputs(batch)
        result = self.task.objective(self.task.inputs(outputs, batch.index, reference))
        local = {name: s / _per_rank(n) for name, (s, n) in self.task.loss.local_terms(outputs).items()}
        result = replace(result, terms={**result.terms, **local})
        self._scaled(sum(result.terms.values())).backward()
        return result

    def _backward_accumulated(self, batch: Batch) -> LossOutput:
        task, chunks = self.task, batch.chunk(self.accum)
        device = batch.image.device
        embedded, references, states = [], [], []
        with torch.no_grad(), running_statistics_kept(task.bare):
            for chunk in chunks:
                states.append(_random_state(device))
                outputs = task.outputs(chunk)
                local = task.loss.local_terms(outputs)
                embedded.append(({k: outputs[k] for k in _embeddings_of(outputs)}, local))
                references.append(task.reference_features(chunk))

        leaves = {
            name: torch.cat([e[name] for e, _ in embedded]) if value.ndim > 1 else value.detach().clone()
            for name, value in embedded[0][0].items()
        }
        wants_grad = {"image_features", "text_features"} | {
            name for name in _PARAMETERS if name in leaves and getattr(task.bare, name).requires_grad
        }
        for name in wants_grad:
            leaves[name].requires_grad_()
        reference = None if references[0] is None else tuple(torch.cat(r) for r in zip(*references, strict=True))
        result = task.objective(task.inputs(leaves, batch.index, reference))
        self._scaled(sum(result.terms.values())).backward()

        counts = {name: _per_rank(sum(local[name][1] for _, local in embedded)) for name in embedded[0][1]}
        for j, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
            _set_random_state(device, state)
            last = j == self.accum - 1
            with nullcontext() if last else _no_reduction(task.model):
                outputs = task.outputs(chunk)
                pairs = []
                for name in sorted(wants_grad):
                    if name in _PARAMETERS:
                        grad = leaves[name].grad if last else None
                    else:
                        grad = leaves[name].grad.chunk(self.accum)[j]
                    if grad is not None and outputs[name].requires_grad:
                        pairs.append((outputs[name], grad.to(outputs[name].dtype)))
                for name, (s, _) in task.loss.local_terms(outputs).items():
                    pairs.append((self._scaled(s / counts[name]), None))
                torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        local = {name: sum(terms[name][0] for _, terms in embedded) / counts[name] for name in counts}
        return replace(result, terms={**result.terms, **local})

    def _embed_without_graph(self, batch: Batch) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """Outputs and reference features of the whole batch, a micro-batch at a time."""
        outputs, references = [], []
        with torch.no_grad(), running_statistics_kept(self.task.bare):
            for chunk in batch.chunk(self.accum):
                out = self.task.outputs(chunk)
                outputs.append({k: out[k] for k in _embeddings_of(out)})
                references.append(self.task.reference_features(chunk))
        joined = {k: torch.cat([o[k] for o in outputs]) if v.ndim > 1 else v for k, v in outputs[0].items()}
        return joined, tuple(torch.cat(r) for r in zip(*references, strict=True))

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def _update(self) -> Tensor | None:
        """Clip and step. None: taken. Else whether the scaler took the step, a 0-d bool."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.task.bare.parameters(), self.grad_clip_norm)
        if self.scaler is None:
            self.optimizer.step()
            return None
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # The scaler lowers its scale exactly when it found a non-finite gradient and skipped the step.
        return torch.tensor(self.scaler.get_scale() >= scale)


def _per_rank(count: Tensor) -> Tensor:
    """What a rank divides its sum by, so that DDP's average over ranks is the mean over all that was counted."""
    return collectives.all_reduce_sum(count.clone()) / collectives.world_size()


def _embeddings_of(outputs: dict[str, Tensor]) -> list[str]:
    wanted = ("image_features", "text_features", *_PARAMETERS)
    return [name for name in wanted if name in outputs]


def _no_reduction(model: nn.Module):
    inner = getattr(model, "_orig_mod", model)
    return inner.no_sync() if isinstance(inner, DistributedDataParallel) else nullcontext()


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalizes by the batch as in training, but leaves its running statistics alone."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
