"""Wrapping in DDP."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.test_collectives import raised
from tests.support.ranks import ranks
from training.distributed import ddp
from training.distributed.process_group import World


def cpu_world() -> World:
    rank = dist.get_rank() if dist.is_initialized() else 0
    size = dist.get_world_size() if dist.is_initialized() else 1
    return World(rank, rank, size, size, torch.device("cpu"))


def wrapped_gradient(static_graph: bool) -> tuple[bool, bool, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    wrapped = ddp.wrap(model, cpu_world(), static_graph=static_graph, sync_bn=False)
    data = torch.arange(12.0).reshape(4, 3)[2 * dist.get_rank() :][:2]
    wrapped(data).square().mean().backward()
    is_view = model.weight.grad._is_view()
    return (
        isinstance(wrapped, DistributedDataParallel) and wrapped.module is model,
        is_view,
        model.weight.grad.clone(),
    )


@pytest.mark.parametrize("static_graph", [False, True])
def test_wrapped_gradients_are_those_of_the_whole_batch_in_bucket_views(static_graph):
    torch.manual_seed(0)
    alone = nn.Linear(3, 1)
    alone(torch.arange(12.0).reshape(4, 3)).square().mean().backward()
    for is_ddp, is_view, gradient in ranks(2).run(wrapped_gradient, static_graph):
        assert is_ddp and is_view
        torch.testing.assert_close(gradient, alone.weight.grad)


def compressed_gradient(compression: str, accum: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What DDP leaves of several passes' gradients, and this rank's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 1))
    parameters = list(model.parameters())
    wrapped = ddp.wrap(model, cpu_world(), static_graph=False, sync_bn=False, compression=compression)
    data = torch.randn(2, accum, 8, 30)[dist.get_rank()]
    own = sum(
        torch.cat([g.flatten() for g in torch.autograd.grad(model(part).square().mean(), parameters)])
        for part in data
    )
    for part in data[:-1]:
        with wrapped.no_sync():
            wrapped(part).square().mean().backward()
    wrapped(data[-1]).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in parameters]), own


@pytest.mark.parametrize("accum", [1, 3])
@pytest.mark.parametrize("compression, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_compressed_gradients_are_the_mean_of_rounded_ones(compression, dtype, accum):
    """On all ranks the same: once rounded on each, and once more in their sum."""
    (first, own), (second, other) = ranks(2).run(compressed_gradient, compression, accum)
    assert torch.equal(first, second) and first.dtype == torch.float32
    assert torch.equal(first, (own.to(dtype) / 2 + other.to(dtype) / 2).float())
    unit = torch.finfo(dtype).eps / 2
    exact = (own.double() + other.double()) / 2
    allowed = unit * (own.abs() + other.abs()) / 2 + unit * first.abs() + torch.finfo(dtype).smallest_normal
    assert ((first - exact).abs() <= 1.001 * allowed).all() and not torch.equal(first, exact.float())


def test_without_compression_they_are_those_of_float32():
    (first, own), (_, other) = ranks(2).run(compressed_gradient, "none", 1)
    assert torch.equal(first, (own + other) / 2)


def wrap_special_cases() -> tuple[bool, str, bool]:
    locked = nn.Linear(2, 2).requires_grad_(False)
    unchanged = ddp.wrap(locked, cpu_world(), static_graph=False, sync_bn=False) is locked
    normed = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    refusal = raised(lambda: ddp.wrap(normed, cpu_world(), static_graph=False, sync_bn=True))
    static = ddp.wrap(nn.Linear(2, 2), cpu_world(), static_graph=True, sync_bn=False).static_graph
    return unchanged, refusal, static


def test_locked_models_sync_bn_on_the_cpu_and_static_graph():
    for unchanged, refusal, static in ranks(2).run(wrap_special_cases):
        assert unchanged and static
        assert refusal.startswith("ValueError: --use-bn-sync needs GPUs")


def test_a_single_process_is_not_wrapped():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert ddp.wrap(model, cpu_world(), static_graph=True, sync_bn=True) is model
