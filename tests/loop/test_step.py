"""Accumulation gives the full batch's gradient for every loss; what a step changes and what it must not."""

import copy
from dataclasses import replace
from functools import partial
from unittest import mock

import open_clip
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from drrho_clip import collectives
from drrho_clip.losses.distillation import Distillation
from drrho_clip.reference import CachedReference, Reference
from tests.support import tiny_models
from tests.support.ranks import ranks
from tests.support.stepping import CPU, WORDS, build, make_batch, make_loss, make_task
from training.loop.step import Stepper, gradient_norm
from training.loop.task import Selection
from training.models.precision import resolve


def gradients(name, accum, batch, *, model=None, steps=1, **extra):
    """Take steps with learning rate 0. Returns the gradients and values of the last one, and the sample state."""
    model = model or build(name)
    loss = make_loss(name)
    task = make_task(model, loss, name, **extra)
    task.model.train()
    loss.set_epoch(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    stepper = Stepper(task, optimizer, accum=accum)
    for step in range(steps):
        values = stepper(batch, step)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    state = loss.state.state_dict() if loss.state else {}
    return grads, values, state


def assert_same(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    largest = max(g.abs().max() for g in theirs.values())
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= tolerance * largest, name


NAMES = ["clip", "siglip", "coca", "distill", "fastclip", "drrho", "fastclip_individual"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("accum", [3, 4])
def test_accumulation_is_the_full_batch(name, accum):
    batch = make_batch()
    grads, values, state = gradients(name, accum, batch, steps=2)
    full_grads, full_values, full_state = gradients(name, 1, batch, steps=2)
    assert_same(grads, full_grads)
    assert values.keys() == full_values.keys()
    for key in values:
        torch.testing.assert_close(values[key], full_values[key], rtol=1e-5, atol=1e-6)
    for column in full_state:
        torch.testing.assert_close(state[column], full_state[column], rtol=1e-4, atol=1e-4, equal_nan=True)


def test_captioners_of_open_clip_4_put_out_logits_without_labels():
    """open_clip 3 can do so too; the tokens are then shifted here, to the same gradients."""
    batch, model = make_batch(), build("coca")
    expected, values, _ = gradients("coca", 3, batch)
    model.forward = partial(model.forward, output_labels=False)
    assert "labels" not in model(batch.image.float(), batch.text)
    grads, found, _ = gradients("coca", 3, batch, model=model)
    assert_same(grads, expected)
    assert found["caption_loss"].item() == pytest.approx(values["caption_loss"].item(), rel=1e-5)


def test_accumulation_with_distillation_and_selection():
    extra = {
        "distillation": Distillation(0.5, 60.0, multiply_tau=True),
        "selection": Selection(keep_ratio=0.5, n_chunks=2, topk=False),
    }
    batch = make_batch(24)
    grads, values, _ = gradients("fastclip", 3, batch, **extra)
    full_grads, full_values, _ = gradients("fastclip", 1, batch, **extra)
    assert "distill_loss" in values
    assert_same(grads, full_grads)
    torch.testing.assert_close(values["loss"], full_values["loss"])


class Sizes:
    """The numbers of images that ``tower`` is given, call by call."""

    def __init__(self, tower):
        self.seen = []
        tower.register_forward_pre_hook(lambda module, given: self.seen.append(len(given[0])))


@pytest.mark.parametrize(
    "model, accum, share, scored",
    [
        ("tiny-vit", 1, 0.25, [6] * 4),
        ("tiny-vit", 2, 0.5, [6] * 4),
        ("tiny-vit", 1, 0.75, [24]),
        ("tiny-resnet", 2, 0.25, [12] * 2),
    ],
)
def test_selection_embeds_nothing_twice_and_in_one_size(model, accum, share, scored):
    target, reference = build("drrho", model), build("reference")
    sizes, ref_sizes = Sizes(target.visual), Sizes(reference.visual)
    task = make_task(target, make_loss("drrho"), "drrho", selection=Selection(share, 1, topk=False))
    task.reference = Reference(reference, (0.5,) * 3, (0.5,) * 3)
    Stepper(task, torch.optim.SGD(target.parameters(), lr=0.0), accum=accum)(make_batch(24), 0)
    trained = [round(24 * share) // accum] * (accum if accum == 1 else 2 * accum)
    assert sizes.seen == scored + trained
    assert ref_sizes.seen == scored


def _kept_rows() -> list[float]:
    """Log u of the rows that this rank owns after two steps on its share of 32 samples, in four virtual ranks."""
    k, r = collectives.world_size(), collectives.rank()
    generator = torch.Generator().manual_seed(0)
    task = make_task(build("drrho"), make_loss("drrho"), "drrho", selection=Selection(0.5, 2, topk=False))
    task.reference, task.parts = CachedReference(), 4 // k
    stepper = Stepper(task, torch.optim.SGD(task.bare.parameters(), lr=0.0))
    task.model.train()
    for step in range(2):
        batch = replace(
            make_batch(32, seed=step),
            index=32 * step + torch.randperm(32, generator=generator),
            ref_features=torch.nn.functional.normalize(torch.randn(32, 2, 24, generator=generator), dim=-1),
        )
        stepper(batch.chunk(k)[r], step)
    return task.loss.state.values()["log_u_image"].tolist()


def test_ranks_keep_what_one_process_keeps_of_the_whole_super_batch_with_stored_reference_features():
    alone = torch.tensor(_kept_rows())
    assert (~alone.isnan()).sum() == 32
    for k in (2, 4):
        together = torch.tensor([u for own in ranks(k).run(_kept_rows) for u in own])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4, equal_nan=True)


def _order_of_exchange(name, accum):
    """What a step does with the other ranks and with the target, in order, and the gradient."""
    done, gather = [], collectives.all_gather

    def all_gather(local):
        done.append("gather")
        return gather(local)

    model = build(name)
    model.visual.register_forward_pre_hook(lambda module, given: done.append("target"))
    k, r = collectives.world_size(), collectives.rank()
    batch = make_batch(6 * k).select(torch.arange(6) + 6 * r)
    with mock.patch.object(collectives, "all_gather", all_gather):
        grads, _, _ = gradients(name, accum, batch, model=model)
    return done, grads


@pytest.mark.parametrize("accum", [1, 2])
def test_rows_and_reference_are_exchanged_before_the_targets_forward_pass(accum):
    (order, _), _ = ranks(2).run(_order_of_exchange, "drrho", accum)
    target = ["target"] * accum
    again = [] if accum == 1 else target
    # Rows, reference; the target's embeddings, log u.
    assert order == ["gather", "gather", *target, "gather", "gather", *again]


def test_a_row_that_selection_leaves_out_is_checked_too():
    task = make_task(build("drrho"), make_loss("drrho"), "drrho", selection=Selection(0.5, 1, topk=True))
    stepper = Stepper(task, torch.optim.SGD(task.bare.parameters(), lr=0.0))
    batch = make_batch(12)
    with pytest.raises(IndexError, match="sample index 12345 is outside"):
        stepper(replace(batch, index=batch.index.masked_fill(batch.index == batch.index[3], 12345)), 0)


def _with_dropout(name, model=None):
    model = model or build(name)
    model.visual.ln_post = nn.Sequential(model.visual.ln_post, nn.Dropout(0.4))
    return model


def _with_patch_dropout():
    model = tiny_models.build("tiny-vit", vision_cfg={"patch_dropout": 0.5}, text_cfg={"vocab_size": WORDS})
    return _with_dropout(None, model)


def _step_alone(step, accum, state=None):
    """The weights after step ``step`` from ``state``, and the features that the image tower computed in it."""
    model, seen = _with_patch_dropout().train(), []
    model.visual.register_forward_hook(lambda module, given, output: seen.append(output.detach().clone()))
    if state is not None:
        model.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.seed()  # the generators' state before the step must not matter
    Stepper(make_task(model, make_loss("clip"), "clip"), optimizer, accum=accum)(make_batch(), step)
    return model.state_dict(), torch.cat(seen)


@pytest.mark.parametrize("accum", [1, 3])
def test_a_step_draws_the_same_masks_whenever_it_is_taken(accum):
    first, _ = _step_alone(6, accum)
    weights, features = _step_alone(7, accum, first)
    again, same = _step_alone(7, accum, first)
    _, others = _step_alone(8, accum, first)
    assert all(torch.equal(again[n], v) for n, v in weights.items())
    assert torch.equal(features, same)
    assert (features != others).any(1).all()


def test_ranks_draw_masks_of_their_own():
    (_, first), (_, second) = ranks(2).run(_step_alone, 3, 1)
    assert (first != second).any(1).all()


def test_the_norm_of_half_precision_gradients_may_exceed_their_range():
    gradients = [torch.randn(500, generator=torch.Generator().manual_seed(i)) * 3000 for i in range(3)]
    exact = torch.cat(gradients).double().norm()
    mixed = [gradients[0].half(), gradients[1].bfloat16(), gradients[2]]
    for given in (gradients, [g.half() for g in gradients], mixed, [g.bfloat16() for g in gradients]):
        torch.testing.assert_close(gradient_norm(given).double(), exact, rtol=2e-3, atol=0)
    assert exact > torch.finfo(torch.float16).max


def test_running_statistics_are_updated_once():
    model = build("clip", "tiny-resnet")
    once = copy.deepcopy(model).train()
    batch = make_batch()
    gradients("clip", 3, batch, model=model)
    task = make_task(once, make_loss("clip"), "clip")
    for chunk in batch.chunk(3):
        task.outputs(chunk)
    counts = [(n, b) for n, b in once.named_buffers() if "running" in n or "tracked" in n]
    assert counts
    for name, buffer in counts:
        torch.testing.assert_close(model.get_buffer(name), buffer)


def _ddp_gradients(name, accum):
    """Gradients, the reducer's bucket reductions and this rank's part of the sample state after two steps."""
    model = build(name)
    reductions = []
    loss = make_loss(name)
    wrapped = model
    if collectives.world_size() > 1:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)

        def hook(state, bucket):
            reductions.append(bucket.index())
            total = torch.distributed.all_reduce(bucket.buffer() / 2, async_op=True).get_future()
            return total.then(lambda done: done.value()[0])

        wrapped.register_comm_hook(None, hook)
    task = make_task(model, loss, name, wrapped=wrapped)
    stepper = Stepper(task, torch.optim.SGD(model.parameters(), lr=0.0), accum=accum)
    loss.set_epoch(1)
    batch = make_batch()
    if collectives.world_size() > 1:
        batch = batch.select(torch.arange(6) + 6 * collectives.rank())
    for step in range(2):
        reductions.clear()
        stepper(batch, step)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, len(reductions)


@pytest.mark.parametrize("name", ["clip", "siglip", "coca", "distill", "drrho", "fastclip_individual"])
def test_ranks_with_accumulation_reduce_once_and_match_one_process(name):
    whole, _ = _ddp_gradients(name, 1)
    reductions = {}
    for accum in (1, 3):
        (grads, reductions[accum]), _ = ranks(2).run(_ddp_gradients, name, accum)
        assert_same(grads, whole, 2e-5)
    assert reductions[3] == reductions[1] > 0


@pytest.mark.parametrize("precision", ["amp_bf16", "bf16", "pure_bf16"])
def test_embeddings_have_unit_norm_in_every_precision(precision):
    model = build("clip")
    if precision == "bf16":
        open_clip.convert_weights_to_lp(model, dtype=torch.bfloat16)
    elif precision == "pure_bf16":
        model.to(torch.bfloat16)
    task = make_task(model, make_loss("clip"), "clip")
    task.precision = resolve(precision, CPU)
    outputs = task.outputs(make_batch())
    for name in ("image_features", "text_features"):
        assert outputs[name].dtype == torch.float32
        assert (outputs[name].norm(dim=1) - 1).abs().max() < 1e-6


def test_clipping_and_the_temperature_bound():
    model, loss = build("clip"), make_loss("clip")
    with torch.no_grad():
        model.logit_scale.fill_(4.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    stepper = Stepper(make_task(model, loss, "clip"), optimizer, grad_clip_norm=1e-3, logit_scale_bound=20.0)
    stepper(make_batch(), 0)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)
    assert model.logit_scale.exp().item() == pytest.approx(20.0)
