"""One optimizer step: forward, loss, backward, update, commit.

With ``accum`` micro-batches the gradient equals that of the full batch, for every loss:

1. Embed all micro-batches without a graph, by the reference first, and keep the random state from before each of
   the target's.
2. Evaluate the loss once on the embeddings of the whole batch and differentiate it with respect to them.
3. Embed each micro-batch again with its random state, so that dropout draws the same masks, and backpropagate its
   slice of that gradient. Gradients are reduced over the ranks only with the last micro-batch.

For models with BatchNorm the gradients differ, because BatchNorm sees micro-batches. Its running statistics change
in part 3 only.

The random numbers of a step depend only on the seed, the number of the step and the rank, so that a run can resume
at any step. A step whose loss or gradient is not finite changes nothing and is counted (``nonfinite.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from drrho_clip import collectives
from drrho_clip.batch import Batch
from drrho_clip.collectives import Exchange
from drrho_clip.losses.interface import LossOutput
from training.loop.nonfinite import Evidence, RunningStatistics, SkippedSteps, backward_seed, explain
from training.loop.optimizer import step_where
from training.loop.task import Task
from training.rng import random_state, restore_random_state

_PARAMETERS = ("logit_scale", "logit_bias")


@dataclass(frozen=True)
class _Computed:
    """The whole batch's embeddings by name, without a graph, the reference's embeddings, and the loss."""

    embeddings: dict[str, Tensor]
    reference: tuple[Tensor, Tensor] | None
    result: LossOutput


@dataclass
class Stepper:
    """Takes optimizer steps on ``task``. ``scaler`` is given for float16 autocast only.

    ``skipped`` counts the steps that were not finite, including those in which the scaler searches for its scale.
    The ``max_skipped_steps``-th of them in a row raises NotFinite on all ranks.
    """

    task: Task
    optimizer: torch.optim.Optimizer
    accum: int = 1
    scaler: torch.amp.GradScaler | None = None
    grad_clip_norm: float | None = None
    logit_scale_bound: float = 100.0
    max_skipped_steps: int = 20
    skipped: SkippedSteps = field(init=False)

    def __post_init__(self) -> None:
        self.skipped = SkippedSteps(self.max_skipped_steps, self.task.logit_scale.device)
        self._norms = _batch_norms(self.task.bare)
        self._evidence: Evidence | None = None

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Train on ``batch``, which is on the device. Returns 0-d tensors: terms, their sum ``loss``, metrics."""
        self._evidence = None  # releases the last batch's pixels
        self.optimizer.zero_grad(set_to_none=True)
        self.task.seed_generators(step)
        statistics = RunningStatistics(self._norms)
        if self.task.compression is not None:
            self.task.compression.begin(step)
        batch, computed = self._backward(batch, step)
        result = computed.result
        taken = self._update()
        if self.task.compression is not None:
            self.task.compression.end(taken)
        statistics.restore(unless=taken)
        if result.update is not None:
            state = self.task.loss.state
            assert state is not None, "a loss that updates rows has a sample state"
            state.commit(result.update, taken)
        self._bound_temperature(taken)
        self.skipped.count(taken)
        self._evidence = self._evidence_of(batch, step, computed)
        if self.skipped.too_many():
            raise explain(self.skipped, self._evidence, self.task.bare, self.optimizer)
        terms = {name: term.detach() for name, term in result.terms.items()}
        return {**terms, "loss": _sum(terms.values()), **result.metrics}

    def settle(self, batch: Batch, step: int) -> None:
        """Bring DDP's gradient buckets into their final order, using ``batch`` and the number of the next step.

        DDP rearranges the buckets after its first backward pass (with a static graph, after the second), in the
        order in which the gradients arrived. The place of a gradient decides in which order the ranks sum it. So
        with three or more ranks, a resumed run would round differently from an uninterrupted one.
        Therefore every process does these passes and drops their results. All ranks call this in training mode
        before their first step; a single process need not.
        """
        wrapped = _unwrapped(self.task.model)
        if not isinstance(wrapped, DistributedDataParallel):
            return
        statistics = RunningStatistics(self._norms)
        for _ in range(2 if wrapped.static_graph else 1):
            self.task.seed_generators(step)
            self._backward(batch, step)
            statistics.restore()
            self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, batch: Batch, step: int) -> tuple[Batch, _Computed]:
        """The gradients of a step; the samples that it trains on, and what was computed of them."""
        task = self.task
        if task.selection is None:
            reference = self._reference_features(batch.chunk(self.accum))
        else:
            outputs, scored = self._score(batch)
            batch, reference = task.select(batch, step, outputs, scored)
        prepared = task.prepare(batch.index, reference)
        if self.accum == 1:
            return batch, self._backward_whole(batch, reference, prepared)
        return batch, self._backward_accumulated(batch, reference, prepared)

    def _backward_whole(
        self, batch: Batch, reference: tuple[Tensor, Tensor] | None, prepared: Exchange | None
    ) -> _Computed:
        outputs = self.task.outputs(batch)
        result = self.task.objective(self.task.inputs(outputs, batch.index, reference, prepared))
        local = {name: s / _per_rank(n) for name, (s, n) in self.task.loss.local_terms(outputs).items()}
        result = replace(result, terms={**result.terms, **local})
        seed = backward_seed(result.terms.values(), result.update)
        self._scaled(_sum(result.terms.values())).backward(seed)
        return _Computed({name: outputs[name].detach() for name in _embeddings_of(outputs)}, reference, result)

    def _backward_accumulated(
        self, batch: Batch, reference: tuple[Tensor, Tensor] | None, prepared: Exchange | None
    ) -> _Computed:
        task, chunks = self.task, batch.chunk(self.accum)
        device = batch.image.device
        embedded, partial_terms, states = [], [], []
        with torch.no_grad(), running_statistics_kept(task.bare):
            for chunk in chunks:
                states.append(random_state(device))
                outputs = task.outputs(chunk)
                embedded.append({k: outputs[k] for k in _embeddings_of(outputs)})
                partial_terms.append(task.loss.local_terms(outputs))

        leaves = {
            name: torch.cat([e[name] for e in embedded]) if value.ndim > 1 else value.detach().clone()
            for name, value in embedded[0].items()
        }
        wants_grad = {"image_features", "text_features"} | {
            name for name in _PARAMETERS if name in leaves and getattr(task.bare, name).requires_grad
        }
        for name in wants_grad:
            leaves[name].requires_grad_()
        result = task.objective(task.inputs(leaves, batch.index, reference, prepared))
        counts = {name: _per_rank(_sum(terms[name][1] for terms in partial_terms)) for name in partial_terms[0]}
        local = {name: _sum(terms[name][0] for terms in partial_terms) / count for name, count in counts.items()}
        seed = backward_seed([*result.terms.values(), *local.values()], result.update)
        self._scaled(_sum(result.terms.values())).backward(seed)

        for j, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
            restore_random_state(device, state)
            last = j == self.accum - 1
            with nullcontext() if last else _no_reduction(task.model):
                outputs = task.outputs(chunk)
                pairs = []
                for name in sorted(wants_grad):
                    grad = leaves[name].grad
                    if grad is None or not outputs[name].requires_grad or (name in _PARAMETERS and not last):
                        continue
                    own = grad if name in _PARAMETERS else grad.chunk(self.accum)[j]
                    pairs.append((outputs[name], own.to(outputs[name].dtype)))
                for name, (s, _) in task.loss.local_terms(outputs).items():
                    pairs.append((self._scaled(s / counts[name]), seed))
                torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        result = replace(result, terms={**result.terms, **local})
        return _Computed({name: leaf.detach() for name, leaf in leaves.items()}, reference, result)

    def _score(self, batch: Batch) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """Outputs and reference features of all samples to select from, computed by micro-batch without a graph.

        The micro-batches have the size of those that are trained on, if that is possible, so that a compiled model
        meets one shape. What BatchNorm does depends on the size, so models that have it get ``accum`` parts.
        """
        kept = self.task.kept(len(batch)) // self.accum
        chunks = batch.chunk(self.accum if self._norms or len(batch) % kept else len(batch) // kept)
        reference = self._reference_features(chunks)
        assert reference is not None, "selection ranks samples by a reference"
        outputs = []
        with torch.no_grad(), running_statistics_kept(self.task.bare):
            for chunk in chunks:
                out = self.task.outputs(chunk)
                outputs.append({k: out[k] for k in _embeddings_of(out)})
        joined = {k: torch.cat([o[k] for o in outputs]) if v.ndim > 1 else v for k, v in outputs[0].items()}
        return joined, reference

    def _reference_features(self, chunks: Sequence[Batch]) -> tuple[Tensor, Tensor] | None:
        """The reference's embeddings of all micro-batches; None without a reference."""
        parts = [part for chunk in chunks if (part := self.task.reference_features(chunk)) is not None]
        if not parts:
            return None
        images, texts = zip(*parts, strict=True)
        return (images[0], texts[0]) if len(parts) == 1 else (torch.cat(images), torch.cat(texts))

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def _update(self) -> Tensor:
        """Clip and step if the gradient is finite. Returns whether it is, as a 0-d bool on the device."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.task.bare.parameters() if p.grad is not None]
        norm = gradient_norm([p.grad for p in parameters if p.grad is not None])
        taken = norm.isfinite()
        if self.grad_clip_norm is not None:
            # A norm of 0 clips nothing, so that gradients that are not finite stay unchanged for the diagnosis.
            nn.utils.clip_grads_with_norm_(parameters, self.grad_clip_norm, torch.where(taken, norm, 0.0))
        step_where(self.optimizer, taken)
        if self.scaler is not None:
            self.scaler.update()  # uses what unscale_ found; the scaler's own step() would make the host wait
        return taken

    @torch.no_grad()
    def _bound_temperature(self, taken: Tensor) -> None:
        scale = self.task.logit_scale
        scale.copy_(torch.where(taken, scale.clamp(0, math.log(self.logit_scale_bound)), scale))

    def _evidence_of(self, batch: Batch, step: int, computed: _Computed) -> Evidence:
        tensors = {"pixels": batch.image}
        if computed.reference is not None:
            tensors["reference image_features"], tensors["reference text_features"] = computed.reference
        tensors |= computed.embeddings
        tensors |= {name: term.detach() for name, term in computed.result.terms.items()}
        if computed.result.update is not None:
            tensors |= {f"new {name}": value for name, value in computed.result.update.values.items()}
        tau = computed.result.metrics.get("mean_tau", 1 / computed.embeddings["logit_scale"])
        return Evidence(step, batch.index, tensors, tau)


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients, 0-d; that of 16-bit ones in float32, as it may exceed what their type holds."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    parts: list[Tensor] = []
    for dtype, same in by_dtype.items():
        if dtype in (torch.float16, torch.bfloat16):
            parts.extend(torch._foreach_norm(same, 2, dtype=torch.float32))
        else:
            parts.append(nn.utils.get_total_norm(same))
    return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts))


def _per_rank(count: Tensor) -> Tensor:
    """The number by which a rank divides its sum, so that DDP's average over ranks is the mean over all items."""
    return collectives.all_reduce_sum(count.clone()) / collectives.world_size()


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """The sum of at least one term."""
    return reduce(torch.add, terms)


def _embeddings_of(outputs: dict[str, Tensor]) -> list[str]:
    wanted = ("image_features", "text_features", *_PARAMETERS)
    return [name for name in wanted if name in outputs]


def _unwrapped(model: nn.Module) -> nn.Module:
    """``model`` without the wrapper of torch.compile."""
    return getattr(model, "_orig_mod", model)


def _no_reduction(model: nn.Module) -> AbstractContextManager[None]:
    inner = _unwrapped(model)
    return inner.no_sync() if isinstance(inner, DistributedDataParallel) else nullcontext()


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """A context in which BatchNorm normalizes by the batch as in training, but keeps its running statistics."""
    norms = [norm for norm in _batch_norms(model) if norm.training]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
