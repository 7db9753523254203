"""Exact float32 for similarities, whatever precision the towers run in.

Similarities are divided by temperatures as low as 0.01. An error of 1e-3, as bfloat16 and TF32 make it, would
therefore become an error of 10 % in every weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_Values = TypeVar("_Values", Tensor, tuple[Tensor, ...])


@contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """A context without autocast, in which float32 matrix products use neither TF32 nor bfloat16."""
    restore = _highest_precision()
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        restore()


def _highest_precision() -> Callable[[], None]:
    """Let matrix products be exact; what is returned sets them to what they were before.

    What a backend had from ``torch.backends.fp32_precision`` is then its own: torch does not tell the two apart.
    """
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # the program has used torch's newer settings, which the older calls refuse to read
        backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = [backend.fp32_precision for backend in backends]
        _set_precisions(backends, ["ieee"] * len(backends))
        return partial(_set_precisions, backends, before)
    torch.set_float32_matmul_precision("highest")
    return partial(torch.set_float32_matmul_precision, precision)


def _set_precisions(backends: Sequence[Any], precisions: Sequence[str]) -> None:
    for backend, precision in zip(backends, precisions, strict=True):
        backend.fp32_precision = precision


def differentiable(function: Callable[..., _Values], *inputs: Tensor) -> _Values:
    """``function`` applied to float32 copies of ``inputs``, in ``exact_float32`` both forward and backward.

    The backward pass needs a context of its own, because it runs after the caller has left its context.
    ``function`` may use further tensors, but no gradient flows through them.
    """
    return _Exact.apply(function, *inputs)


class _Exact(torch.autograd.Function):
    """Keeps the graph of a function and differentiates it in ``exact_float32``. Backward can run only once."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        ctx.device_type, ctx.dtypes = inputs[0].device.type, [x.dtype for x in inputs]
        with exact_float32(ctx.device_type), torch.enable_grad():
            ctx.leaves = [
                x.detach().float().requires_grad_(wanted)
                for x, wanted in zip(inputs, ctx.needs_input_grad[1:], strict=True)
            ]
            ctx.outputs = function(*ctx.leaves)
        if isinstance(ctx.outputs, Tensor):
            return ctx.outputs.detach()
        return tuple(output.detach() for output in ctx.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.outputs is not None, "backward has already run through this loss"
        outputs, ctx.outputs = ctx.outputs, None
        wanted = [leaf for leaf in ctx.leaves if leaf.requires_grad]
        with exact_float32(ctx.device_type):
            found = iter(torch.autograd.grad(outputs, wanted, grads))
        by_input = zip(ctx.leaves, ctx.dtypes, strict=True)
        return (None, *(next(found).to(dtype) if leaf.requires_grad else None for leaf, dtype in by_input))
