"""The losses' similarities and their gradients are exact float32, whatever precision the rest of the run uses."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from drrho_clip import float32
from drrho_clip.losses.distillation import Distillation
from drrho_clip.losses.interface import LossInputs
from tests.support.stepping import make_loss


def similarity(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    logits = scale * x @ y.T
    return logits.logsumexp(1).mean(), logits.diagonal().square().mean()


def test_gradients_of_several_values():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, 3, generator=generator).unbind()
    leaves = x.clone().requires_grad_(), y.clone(), torch.tensor(3.0, requires_grad=True)
    first, second = float32.differentiable(similarity, *leaves)
    (2 * first - second).backward()
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    values = similarity(*twins)
    (2 * values[0] - values[1]).backward()
    torch.testing.assert_close((first.double(), second.double()), values, rtol=1e-6, atol=0)
    for ours, theirs in zip(leaves, twins, strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)
    assert leaves[1].grad is None


def test_gradients_have_their_inputs_type():
    x = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = float32.differentiable(lambda a, t: (t * a @ a.T).logsumexp(1).sum(), x, scale)
    value.backward()
    assert value.dtype == scale.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16


class Products(TorchDispatchMode):
    """Counts matrix products by the precision that is set and the type that they work in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.seen[torch.get_float32_matmul_precision(), args[0].dtype] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def newer_tf32():
    matmul = torch.backends.mkldnn.matmul if hasattr(torch.backends.mkldnn, "matmul") else None
    if matmul is None or not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has the older settings alone")
    backends = torch.backends.cuda.matmul, matmul
    before = [backend.fp32_precision for backend in backends]
    for backend, precision in zip(backends, ("tf32", "bf16")):
        backend.fp32_precision = precision
    yield backends
    for backend, precision in zip(backends, before):
        backend.fp32_precision = precision


@pytest.mark.parametrize("name", ["drrho", "siglip", "fastclip_individual"])
def test_a_program_may_have_chosen_tf32_by_the_newer_settings(name, newer_tf32):
    """The older call then raises an error, in place of an answer."""
    with pytest.raises(RuntimeError, match="legacy"):
        torch.get_float32_matmul_precision()
    seen = set()

    class Precisions(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                seen.add(tuple(backend.fp32_precision for backend in newer_tf32))
            return function(*args, **(kwargs or {}))

    with Precisions():
        sum(make_loss(name)(inputs()).terms.values()).backward()
    assert seen == {("ieee", "ieee")}
    assert [backend.fp32_precision for backend in newer_tf32] == ["tf32", "bf16"]


def inputs() -> LossInputs:
    generator = torch.Generator().manual_seed(0)
    image, text, ref_image, ref_text = F.normalize(torch.randn(4, 6, 8, generator=generator), dim=2)
    scale = torch.tensor(20.0, requires_grad=True)
    bias = torch.tensor(-1.0, requires_grad=True)
    given = image.requires_grad_(), text.requires_grad_(), scale, bias
    return LossInputs(*given, torch.arange(6), ref_image, ref_text)


LOSSES = ["clip", "siglip", "coca", "distill", "drrho", "fastclip_individual", "distillation"]


@pytest.mark.parametrize("name", LOSSES)
def test_every_product_of_a_loss_is_exact_in_both_passes(name, tf32):
    given = inputs()
    with Products() as forward, torch.autocast("cpu", dtype=torch.bfloat16):
        if name == "distillation":
            value = Distillation(0.5, 60.0, multiply_tau=True)(given)
        else:
            value = sum(make_loss(name)(given).terms.values())
    with Products() as backward:
        value.backward()
    assert given.image.grad is not None
    seen = forward.seen + backward.seen
    assert set(seen) == {("highest", torch.float32)} and seen.total() >= 3
    assert torch.get_float32_matmul_precision() == "high"
