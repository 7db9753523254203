"""Exact float32 for similarities, whatever precision the towers run in.

Similarities are divided by temperatures down to 0.01: an error of 1e-3, as bfloat16 and TF32 make it, would be
one of 10 % in every weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_Values = TypeVar("_Values", Tensor, tuple[Tensor, ...])


@contextmanager
def exact_float32(device_type: str) -> Iterator[None]:
    """Autocast off, and float32 matrix products without TF32 or bfloat16 inside."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def differentiable(function: Callable[..., _Values], *inputs: Tensor) -> _Values:
    """``function(*inputs)`` of float32 copies of ``inputs``, in ``exact_float32`` forward and backward.

    Backward needs care of its own, since it runs when the caller's context has long been left. ``function`` may
    hold further tensors, through which no gradient flows.
    """
    return _Exact.apply(function, *inputs)


class _Exact(torch.autograd.Function):
    """Keeps the graph of a function to itself and walks it in ``exact_float32``; backward runs once."""

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
        assert ctx.outputs is not None, "this loss was differentiated already"
        outputs, ctx.outputs = ctx.outputs, None
        wanted = [leaf for leaf in ctx.leaves if leaf.requires_grad]
        with exact_float32(ctx.device_type):
            found = iter(torch.autograd.grad(outputs, wanted, grads))
        by_input = zip(ctx.leaves, ctx.dtypes, strict=True)
        return (None, *(next(found).to(dtype) if leaf.requires_grad else None for leaf, dtype in by_input))
