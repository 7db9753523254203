"""Gradients as products of thin matrices: what is sent, what is kept, and that a saved state goes on."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from drrho_clip import collectives
from tests.distributed.test_ddp import cpu_world
from tests.support.ranks import ranks
from training.distributed import ddp
from training.distributed.powersgd import PowerSGD

RANK, START = 2, 2
TAKEN = torch.tensor(True)


class Model(nn.Sequential):
    """Two matrices that are worth compressing, one that is not, vectors, and a scalar as ``logit_scale`` is."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 1))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


def made(state=None):
    """A model behind DDP whose gradients are compressed."""
    torch.manual_seed(0)
    model = Model()
    compression = PowerSGD(model, rank=RANK, start=START)
    if state is not None:
        compression.load_state_dict(state)
    return (
        model,
        ddp.wrap(model, cpu_world(), static_graph=False, sync_bn=False, compression=compression),
        compression,
    )


def data(step: int) -> Tensor:
    """The pictures of all ranks, [12, 30]."""
    return torch.randn(12, 30, generator=torch.Generator().manual_seed(100 + step))


def backward(wrapped: nn.Module, x: Tensor) -> None:
    own = x.chunk(collectives.world_size())[collectives.rank()]
    wrapped.zero_grad(set_to_none=True)
    wrapped(own).square().mean().backward()


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def train(steps: range, state=None, average_after=None, spoiled=None) -> dict:
    """The gradients of ``steps``, the exact ones, the state at the end, and a copy of it after a step."""
    model, wrapped, compression = made(state)
    backward(wrapped, data(0))  # as the loop does: DDP brings its buckets into order
    found = {"sent": [], "exact": [], "state": None}
    for step in steps:
        x = data(step)
        alone = copy.deepcopy(model)
        alone.zero_grad()
        alone(x).square().mean().backward()
        found["exact"].append(gradients(alone))
        if step == spoiled:
            x = x * torch.nan
        compression.begin(step)
        backward(wrapped, x)
        sent = gradients(model)
        compression.end(torch.stack([g.isfinite().all() for g in sent]).all())
        found["sent"].append(sent)
        if step == average_after:
            compression.average()
            found["state"] = copy.deepcopy(compression.state_dict())
    compression.average()
    found["end"] = copy.deepcopy(compression.state_dict())
    return found


def errors(state, model) -> dict[str, Tensor]:
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return {
        name: part
        for one in state
        for name, part in zip(one["parameters"], one["error"].split([sizes[n] for n in one["parameters"]]))
    }


def test_thin_products_are_sent_and_nothing_is_lost():
    """What was sent and what is left add up to the exact gradients. Vectors and small matrices are sent whole."""
    first, second = ranks(2).run(train, range(6))
    for a, b in zip(first["sent"], second["sent"], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), "ranks get the same"
    for step, (sent, exact) in enumerate(zip(first["sent"], first["exact"], strict=True)):
        for got, whole in zip(sent, exact, strict=True):
            compressed = step >= START and whole.ndim == 2 and whole.numel() > 16
            if not compressed:
                torch.testing.assert_close(got, whole)
            else:
                assert (
                    torch.linalg.matrix_rank(got, rtol=1e-4) <= RANK < torch.linalg.matrix_rank(whole, rtol=1e-4)
                )
    model = made()[0]
    left = errors(first["end"], model)
    for i, (name, parameter) in enumerate(model.named_parameters()):
        owed = sum(exact[i] - sent[i] for sent, exact in zip(first["sent"], first["exact"], strict=True))
        torch.testing.assert_close(left[name].view(parameter.shape), owed, rtol=1e-4, atol=1e-6)
    assert max(part.abs().max() for part in left.values()) > 1e-3


def test_errors_come_back():
    """A constant gradient arrives as a whole over the steps, although each step sends a part of it."""
    once, often = ([(g - w).norm() / w.norm() for g, w in ranks(2).run(constant, n)[0]] for n in (1, 24))
    for first, mean in zip(once, often, strict=True):
        assert first > 0.1 and mean < first / 5


def constant(steps: int) -> list[tuple[Tensor, Tensor]]:
    """The mean of what arrived of one gradient that stays the same, and that gradient."""
    model, wrapped, compression = made()
    backward(wrapped, data(0))
    total = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(steps):
        compression.begin(START)
        backward(wrapped, data(1))
        compression.end(TAKEN)
        total = [t + g for t, g in zip(total, gradients(model), strict=True)]
    backward(wrapped, data(1))
    return [
        (t / steps, whole)
        for t, whole in zip(total, gradients(model), strict=True)
        if whole.ndim == 2 and whole.numel() > 16
    ]


@pytest.mark.parametrize("stop", [3, 5])
def test_a_saved_state_goes_on_bit_for_bit(stop):
    whole = ranks(2).run(train, range(8), average_after=stop)[0]
    rest = ranks(2).run(train, range(stop + 1, 8), state=whole["state"])[0]
    for ours, theirs in zip(rest["sent"], whole["sent"][stop + 1 :], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    for ours, theirs in zip(rest["end"], whole["end"], strict=True):
        assert torch.equal(ours["error"], theirs["error"])


def test_a_saved_state_goes_on_with_another_number_of_ranks():
    whole = ranks(2).run(train, range(8), average_after=4)[0]
    rest = ranks(3).run(train, range(5, 8), state=whole["state"])[0]
    for ours, theirs in zip(rest["sent"], whole["sent"][5:], strict=True):
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


def test_averaging_changes_nothing_but_the_rounding():
    with_saves, without = (ranks(2).run(train, range(8), average_after=after)[0] for after in (4, None))
    for ours, theirs in zip(with_saves["sent"], without["sent"], strict=True):
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


def of_nothing(step: int) -> list[Tensor]:
    """Gradients where that of the first matrix is zero on all ranks, as behind a layer that begins with zeros."""
    model, wrapped, compression = made()
    backward(wrapped, data(0))
    for _ in range(2):
        compression.begin(step)
        backward(wrapped, torch.zeros(12, 30))
        compression.end(TAKEN)
    return gradients(model)


def test_a_gradient_of_zeros_stays_one():
    """Its thin matrix has no direction; a division by its length would make it NaN, in every step that follows."""
    found = ranks(2).run(of_nothing, START)[0]
    assert all(gradient.isfinite().all() for gradient in found)
    assert any(gradient.ndim == 2 and not gradient.any() for gradient in found)


def test_saving_twice_at_a_step_averages_once(monkeypatch):
    """In a ring of 8 ranks (e + ... + e) / 8 is not always e."""

    def in_a_ring(mine: Tensor) -> Tensor:
        own = mine.clone()
        for _ in range(7):
            mine.add_(own)
        return mine

    monkeypatch.setattr(collectives, "world_size", lambda: 8)
    monkeypatch.setattr(collectives, "all_reduce_sum", in_a_ring)
    compression = PowerSGD(Model(), rank=RANK, start=START)
    errors = compression._state.error_dict
    errors[0] = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    compression.average()
    once = errors[0].clone()
    compression.average()
    assert torch.equal(errors[0], once)
    compression.begin(START)
    compression.average()
    assert not torch.equal(errors[0], once), "after a step they are averaged again"


@pytest.mark.parametrize("spoiled", [START, 4])
def test_a_step_that_is_not_taken_leaves_no_trace(spoiled):
    """Its NaN would otherwise stay in the errors for ever."""
    found = ranks(2).run(train, range(7), spoiled=spoiled)[0]
    assert not all(g.isfinite().all() for g in found["sent"][spoiled])
    for sent in found["sent"][spoiled + 1 :]:
        assert all(g.isfinite().all() for g in sent)
    assert all(one[key].isfinite().all() for one in found["end"] for key in ("error", "q"))


def test_a_state_of_another_model_is_refused():
    state = [
        {
            "parameters": ["0.weight"],
            "channels_last": False,
            "rank": RANK,
            "error": torch.zeros(3),
            "p": torch.zeros(1),
            "q": torch.zeros(1),
        }
    ]
    with pytest.raises(ValueError, match=r"of another model than 0\.weight"):
        made()[2].load_state_dict(state)


def sent_bytes(steps: int) -> list[int]:
    """Values that this rank hands to all-reduce in each backward pass."""
    _, wrapped, compression = made()
    backward(wrapped, data(0))
    found, original = [], dist.all_reduce
    for step in range(steps):
        sizes: list[int] = []
        dist.all_reduce = lambda tensor, *args, sizes=sizes, **more: (
            sizes.append(tensor.numel()),
            original(tensor, *args, **more),
        )[1]
        try:
            compression.begin(step + START)
            backward(wrapped, data(step))
            compression.end(TAKEN)
        finally:
            dist.all_reduce = original
        found.append(sum(sizes))
    return found


def test_what_travels_is_small():
    whole = 20 + 16 + 16 + 1 + 1  # the vectors, the small matrix, the scalar
    thin = RANK * (30 + 20) + RANK * (20 + 16)
    assert ranks(2).run(sent_bytes, 3)[0] == [whole + thin] * 3


def convolved(channels_last: bool) -> tuple[list[Tensor], Tensor, list]:
    """What arrived of the gradient of a convolution over steps that are all alike, that gradient, the state."""
    torch.manual_seed(0)
    model = nn.Conv2d(12, 16, 3, bias=False)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    compression = PowerSGD(model, rank=RANK, start=0)
    wrapped = ddp.wrap(model, cpu_world(), static_graph=False, sync_bn=False, compression=compression)
    x = torch.randn(4, 12, 6, 6, generator=torch.Generator().manual_seed(1))
    backward(wrapped, x)
    whole, sent = model.weight.grad.clone(), []
    for _ in range(24):
        compression.begin(0)
        backward(wrapped, x)
        compression.end(TAKEN)
        sent.append(model.weight.grad.clone())
    return sent, whole, copy.deepcopy(compression.state_dict())


@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions_in_either_order_of_memory(channels_last, caplog):
    sent, whole, state = ranks(2).run(convolved, channels_last)[0]
    for got in sent:
        rows = got.permute(0, 2, 3, 1) if channels_last else got
        assert torch.linalg.matrix_rank(rows.reshape(16, -1), rtol=1e-4) <= RANK
    assert (torch.stack(sent).mean(0) - whole).norm() < (sent[0] - whole).norm() / 2
    other = nn.Conv2d(12, 16, 3, bias=False)
    compression = PowerSGD(other, rank=RANK, start=0)
    compression.load_state_dict([one | {"parameters": ["weight"]} for one in state])
    assert bool(compression.state_dict()) is not channels_last
    for one in state:
        del one["channels_last"]  # as it was once saved
    compression.load_state_dict([one | {"parameters": ["weight"]} for one in state])
    assert compression.state_dict()
    assert ("still owed is dropped" in caplog.text) is channels_last
