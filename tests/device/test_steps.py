"""Steps of the trainer: close to float32's on the CPU in every precision; what they leave alone stays as it is."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from drrho_clip.reference import CachedReference
from tests.support.stepping import CPU, OPTIM, build, make_batch, make_loss, make_task
from training.data.loader import prefetch
from training.loop.optimizer import create_optimizer
from training.loop.step import Stepper
from training.loop.task import Selection
from training.numerics import set_numerics

NAMES = ["clip", "siglip", "coca", "distill", "fastclip", "drrho", "fastclip_individual"]
# How far gradients may be from float32's on the CPU, by precision: TF32 has 10 bits, bfloat16 has 7.
FAR = {"fp32": 5e-3, "amp": 1e-2, "amp_bf16": 8e-2}


def gradient(name, batch, device, *, precision="fp32", accum=1, model=None, reference=None, **extra):
    """All gradients of the second step with learning rate 0, as one vector on the CPU."""
    model, loss = (model or build(name)).to(device), make_loss(name, device)
    task = make_task(model, loss, name, device=device, precision=precision, **extra)
    if reference is not None:
        task.reference = reference
    task.model.train()
    loss.set_epoch(1)
    stepper = Stepper(task, torch.optim.SGD(model.parameters(), lr=0.0), accum=accum)
    for step, arrived in enumerate(prefetch(itertools.repeat(batch, 2), device)):
        stepper(arrived, step)
    return torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])


def distance(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("precision", FAR)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_float32_on_the_cpu(device, name, precision):
    expected = gradient(name, make_batch(), CPU)
    accum = 3 if precision == "fp32" else 1
    assert (
        distance(gradient(name, make_batch(), device, precision=precision, accum=accum), expected) < FAR[precision]
    )


@pytest.mark.parametrize("accum", [1, 3])
def test_selection_keeps_the_same_samples(device, accum):
    chosen = Selection(keep_ratio=0.5, n_chunks=2, topk=True)
    expected = gradient("drrho", make_batch(24), CPU, selection=chosen)
    assert (
        distance(gradient("drrho", make_batch(24), device, accum=accum, selection=chosen), expected) < FAR["fp32"]
    )


def test_stored_features_come_with_the_batch(device):
    batch = make_batch()
    frozen = make_task(build("drrho"), make_loss("drrho"), "drrho").reference
    batch = replace(batch, ref_features=torch.stack(frozen.features(batch), 1).half())
    if device.type == "cuda":
        batch = batch.pin_memory()
    found = gradient("drrho", batch, device, reference=CachedReference())
    assert distance(found, gradient("drrho", batch, CPU)) < FAR["fp32"]


def test_micro_batches_see_the_same_dropout_masks_twice(device):
    def with_dropout():
        model = build("clip")
        model.visual.ln_post = nn.Sequential(model.visual.ln_post, nn.Dropout(0.4))
        return model

    batch = make_batch()
    found = gradient("clip", batch, device, accum=3, model=with_dropout())
    model = with_dropout().to(device).train()
    task = make_task(model, make_loss("clip"), "clip", device=device)
    task.seed_generators(1)
    outputs = [task.outputs(chunk.to(device)) for chunk in batch.chunk(3)]
    image, text = (torch.cat([o[k] for o in outputs]) for k in ("image_features", "text_features"))
    logits = model.logit_scale.exp() * image @ text.T
    target = torch.arange(12, device=device)
    (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)).div(2).backward()
    expected = torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
    assert distance(found, expected) < FAR["fp32"]


def trained(device, optimizer, kind, left_out=None, broken=None):
    """Everything that four steps leave behind; ``broken`` is a step whose pixels are not finite."""
    set_numerics(device, seed=0, deterministic=True)
    model, loss = build("drrho", kind).to(device), make_loss("drrho", device)
    loss.set_epoch(1)
    task = make_task(model, loss, "drrho", device=device)
    task.model.train()
    stepper = Stepper(
        task, create_optimizer(model, replace(OPTIM, optimizer=optimizer), device), grad_clip_norm=1.0
    )
    start = copy.deepcopy(model.state_dict())
    for step in range(4):
        if step == left_out:
            continue
        batch = make_batch(seed=step)
        image = batch.image.float() / 255
        if step == broken:
            image[1, 0, 3, 3] = math.nan
        stepper(replace(batch, image=image).to(device), step)
    assert any((start[n] != v).any() for n, v in model.state_dict().items())
    state = stepper.optimizer.state_dict()["state"]
    moments = {f"{i} {n}": torch.as_tensor(v).cpu() for i, values in state.items() for n, v in values.items()}
    rows = {n: v.cpu() for n, v in loss.state.state_dict().items()}
    return {n: v.cpu() for n, v in model.state_dict().items()} | moments | rows, stepper.skipped.state_dict()


@pytest.mark.parametrize("kind", [None, "tiny-resnet"], ids=["transformer", "batchnorm"])
@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "lion", "sgd"])
def test_a_step_that_is_not_finite_leaves_every_bit_alone(device, optimizer, kind):
    broken, counts = trained(device, optimizer, kind, broken=2)
    expected, _ = trained(device, optimizer, kind, left_out=2)
    assert counts == {"in_a_row": 0, "total": 1}
    assert broken.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(broken[name].nan_to_num(7.0), value.nan_to_num(7.0)), name


@pytest.mark.parametrize("accum", [1, 3])
def test_the_scaler_finds_its_scale(device, accum):
    """Steps with infinite gradients change only the scale; the first finite one moves as without a scaler."""

    def moved(scaler):
        model, loss = build("drrho").to(device), make_loss("drrho", device)
        with torch.no_grad():  # for gradients that are large: whatever its kernels, a device finds infinite ones
            model.text_projection.mul_(2.0**-16)
            model.visual.proj.mul_(2.0**-16)
        loss.set_epoch(1)
        task = make_task(model, loss, "drrho", device=device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        stepper = Stepper(task, optimizer, accum=accum, scaler=scaler, grad_clip_norm=0.5, max_skipped_steps=50)
        start = torch.cat([p.detach().flatten() for p in model.parameters()])
        for attempt in range(1, 40):
            stepper(make_batch().to(device), 0)
            step = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
            seen = not loss.state.state_dict()["log_u_image"].isnan().all()
            assert seen == bool(step.any())
            if seen:
                assert stepper.skipped.state_dict() == {"in_a_row": 0, "total": attempt - 1}
                return step.cpu(), attempt
        raise AssertionError("no step was taken")

    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**127, growth_interval=1000)
    step, attempts = moved(scaler)
    expected, _ = moved(None)
    assert attempts > 1 and scaler.get_scale() == 2.0 ** (128 - attempts)
    assert distance(step, expected) < FAR["fp32"]
