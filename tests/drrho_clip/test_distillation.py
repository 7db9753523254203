"""The distillation term against autograd on the whole batch in float64, on one process and on several ranks."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from drrho_clip import collectives
from drrho_clip.losses import baselines, pair_kernels
from drrho_clip.losses.distillation import Distillation
from drrho_clip.losses.interface import LossInputs
from tests.support.ranks import ranks

BATCH, WIDTH, REFERENCE_WIDTH = 12, 10, 7
SETTINGS = {
    "plain": {"multiply_tau": False},
    "tau": {"multiply_tau": True},
    "logits": {"multiply_tau": True, "teacher_dimensions": (3, 4)},
    "softmax": {"multiply_tau": False, "teacher_dimensions": (3, 4), "average_after_softmax": True},
}


def embeddings(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    widths = {"image": WIDTH, "text": WIDTH, "ref_image": REFERENCE_WIDTH, "ref_text": REFERENCE_WIDTH}
    return {
        name: F.normalize(torch.randn(BATCH, width, generator=generator, dtype=torch.float64), dim=1)
        for name, width in widths.items()
    }


def build(setting: str, scale: float = 20.0) -> Distillation:
    return Distillation(weight=0.7, teacher_scale=scale, **SETTINGS[setting])


def oracle(setting: str, scale: float = 15.0, teacher_scale: float = 20.0) -> tuple[torch.Tensor, ...]:
    """Value and gradients (image, text, 1/tau), written from the definition with whole matrices in float64."""
    options = SETTINGS[setting]
    e = embeddings()
    image, text = e["image"].requires_grad_(), e["text"].requires_grad_()
    inverse_tau = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    widths = options.get("teacher_dimensions", (REFERENCE_WIDTH,))
    logits = [
        teacher_scale * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
        for a, b in zip(e["ref_image"].split(widths, 1), e["ref_text"].split(widths, 1), strict=True)
    ]
    student = inverse_tau * image @ text.T
    total = 0.0
    for direction in (lambda m: m, lambda m: m.T):
        rows = [direction(r) for r in logits]
        if options.get("average_after_softmax"):
            target = sum(r.softmax(1) for r in rows) / len(rows)
        else:
            target = (sum(rows) / len(rows)).softmax(1)
        total = total - (target * direction(student).log_softmax(1)).sum(1).mean() / 2
    total = 0.7 * total
    if options["multiply_tau"]:
        total = total / inverse_tau.detach()
    return total.detach(), *torch.autograd.grad(total, (image, text, inverse_tau))


def on_this_rank(setting: str, rank: int, size: int) -> tuple[torch.Tensor, ...]:
    """Value, this rank's gradients of its embeddings and of 1/tau as DDP would see them, before averaging."""
    share = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    mine = {name: e[share].float() for name, e in embeddings().items()}
    mine["image"].requires_grad_()
    mine["text"].requires_grad_()
    inverse_tau = torch.tensor(15.0, requires_grad=True)
    value = build(setting)(LossInputs(logit_scale=inverse_tau, **mine))
    assert value.shape == ()
    return value.detach(), *torch.autograd.grad(value, (mine["image"], mine["text"], inverse_tau))


def serve(setting: str) -> tuple[torch.Tensor, ...]:
    return on_this_rank(setting, dist.get_rank(), dist.get_world_size())


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_autograd_on_the_whole_batch(setting):
    for ours, theirs in zip(on_this_rank(setting, 0, 1), oracle(setting), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("setting", SETTINGS)
def test_ranks_together_equal_one_process(setting, size):
    value, image, text, inverse_tau = oracle(setting)
    results = ranks(size).run(serve, setting)
    for result in results:
        close(result[0], value)
    # DDP divides the sum over ranks by their number.
    close(torch.cat([r[1] for r in results]) / size, image)
    close(torch.cat([r[2] for r in results]) / size, text)
    close(torch.stack([r[3] for r in results]).mean(), inverse_tau)


def beside_the_contrastive_loss(setting: str, local_loss: bool) -> tuple[torch.Tensor, ...]:
    """As ``on_this_rank``, of the teachers' term of the loss that distills by itself."""
    rank, size = collectives.rank(), collectives.world_size()
    share = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    mine = {name: e[share].float() for name, e in embeddings().items()}
    mine["image"].requires_grad_()
    mine["text"].requires_grad_()
    inverse_tau = torch.tensor(15.0, requires_grad=True)
    options = {name: value for name, value in SETTINGS[setting].items() if name != "multiply_tau"}
    loss = baselines.Distill(
        weight=0.7, teacher_scale=20.0, local_loss=local_loss, gather_with_grad=True, **options
    )
    terms = loss(LossInputs(logit_scale=inverse_tau, **mine)).terms
    value, contrastive = terms["distill_loss"], terms["contrastive_loss"].detach()
    gradients = torch.autograd.grad(value, (mine["image"], mine["text"], inverse_tau))
    return value.detach(), *gradients, contrastive


@pytest.mark.parametrize("local_loss", [False, True], ids=["whole", "local"])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("setting", ["plain", "logits", "softmax"])
def test_the_loss_that_distills_by_itself_has_the_same_teachers(setting, size, local_loss):
    arguments = (setting, local_loss)
    if size == 1:
        results = [beside_the_contrastive_loss(*arguments)]
    else:
        results = ranks(size).run(beside_the_contrastive_loss, *arguments)
    value, image, text, inverse_tau = oracle(setting)
    # The oracle multiplies by tau where the objective beside it is multiplied by tau, which this one never is.
    scale = 15.0 if SETTINGS[setting]["multiply_tau"] else 1.0
    close(torch.stack([r[0] for r in results]).mean(), scale * value)
    close(torch.cat([r[1] for r in results]) / size, scale * image)
    close(torch.cat([r[2] for r in results]) / size, scale * text)
    close(torch.stack([r[3] for r in results]).mean(), scale * inverse_tau)
    e = embeddings()
    student = 15.0 * e["image"] @ e["text"].T
    plain = (F.cross_entropy(student, torch.arange(BATCH)) + F.cross_entropy(student.T, torch.arange(BATCH))) / 2
    close(torch.stack([r[4] for r in results]).mean(), 0.3 * plain)


def test_tiles_change_nothing(monkeypatch):
    whole = on_this_rank("softmax", 0, 1)
    small = pair_kernels.Budget(tile_bytes=5 * 4 * BATCH, keep_bytes=0)  # five rows: the last tile is cut
    monkeypatch.setattr(pair_kernels.Budget, "default", classmethod(lambda cls, device: small))
    for ours, theirs in zip(on_this_rank("softmax", 0, 1), whole, strict=True):
        close(ours, theirs.double())


def test_a_student_that_equals_its_teacher_has_no_gradient():
    e = embeddings()
    image, text = e["image"].float().requires_grad_(), e["text"].float().requires_grad_()
    inverse_tau = torch.tensor(20.0, requires_grad=True)
    same = LossInputs(image, text, inverse_tau, ref_image=image.detach(), ref_text=text.detach())
    grads = torch.autograd.grad(build("plain")(same), (image, text, inverse_tau))
    for grad in grads:
        torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-6, rtol=0)


def test_extreme_scales_stay_finite_and_exact():
    e = {name: tensor.float() for name, tensor in embeddings().items()}
    image, text = e["image"].requires_grad_(), e["text"].requires_grad_()
    inverse_tau = torch.tensor(400.0, requires_grad=True)
    value = build("plain", scale=400.0)(
        LossInputs(image, text, inverse_tau, ref_image=e["ref_image"], ref_text=e["ref_text"])
    )
    grads = torch.autograd.grad(value, (image, text, inverse_tau))
    theirs = oracle("plain", scale=400.0, teacher_scale=400.0)
    for ours, expected in zip((value.detach(), *grads), theirs, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_float32_inside_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = on_this_rank("plain", 0, 1)
    for ours, theirs in zip(inside, on_this_rank("plain", 0, 1), strict=True):
        assert torch.equal(ours, theirs)


def test_low_precision_embeddings_get_gradients_of_their_type():
    e = {name: tensor.bfloat16() for name, tensor in embeddings().items()}
    image, text = e["image"].requires_grad_(), e["text"].requires_grad_()
    value = build("tau")(
        LossInputs(image, text, torch.tensor(15.0), ref_image=e["ref_image"], ref_text=e["ref_text"])
    )
    value.backward()
    assert value.dtype == torch.float32
    assert image.grad.dtype == text.grad.dtype == torch.bfloat16


def test_widths_that_do_not_add_up_are_named():
    loss = Distillation(1.0, 100.0, False, teacher_dimensions=(3, 5))
    e = {name: tensor.float() for name, tensor in embeddings().items()}
    own = baselines.Distill(weight=1.0, teacher_scale=100.0, teacher_dimensions=(3, 5))
    for either in (loss, own):
        with pytest.raises(ValueError, match=r"3, 5 add up to 8.* 7 wide"):
            either(LossInputs(logit_scale=torch.tensor(1.0), **e))


def count_collectives(setting: str) -> tuple[list[int], list[int]]:
    """Bytes gathered from this rank in forward, and in backward."""
    seen, gather = [], collectives.all_gather

    def counted(local: torch.Tensor) -> torch.Tensor:
        seen.append(local.numel() * local.element_size())
        return gather(local)

    mine = {name: e[:6].float().requires_grad_() for name, e in embeddings().items()}
    with patch.object(collectives, "all_gather", counted), patch.object(collectives, "all_reduce_sum") as reduce:
        value = build(setting)(LossInputs(logit_scale=torch.tensor(15.0), **mine))
        forward = list(seen)
        value.backward()
        assert not reduce.called
    return forward, seen[len(forward) :]


def test_one_gather_of_embeddings_one_of_scalars_and_none_in_backward():
    embedding_bytes = 6 * 4 * 2 * (WIDTH + REFERENCE_WIDTH)
    scalar_bytes = 6 * 4 * (2 * 3 + 1)  # normalizers of a student and two teachers, both ways, and the loss
    for forward, backward in ranks(2).run(count_collectives, "softmax"):
        assert forward == [embedding_bytes, scalar_bytes]
        assert backward == []
