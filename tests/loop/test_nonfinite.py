"""A step that is not finite on one rank changes nothing on any rank; too many of them end with a diagnosis."""

import copy
import math
import random
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from drrho_clip import collectives
from drrho_clip.losses.distillation import Distillation
from drrho_clip.sample_state import StateUpdate
from tests.support.ranks import ranks
from tests.support.stepping import CPU, OPTIM, build, make_batch, make_loss, make_task
from training.distributed import ddp
from training.distributed.process_group import World
from training.loop.nonfinite import NotFinite, RunningStatistics, SkippedSteps, backward_seed
from training.loop.optimizer import create_optimizer
from training.loop.step import Stepper

PER_RANK = 6
PARAMETER = "visual.ln_pre.weight"


def spoil_reference(features):
    features[0][2, 0] = math.nan
    return features


def spoil_loss(result):
    return replace(result, terms={**result.terms, "broken_loss": torch.tensor(math.inf)})


def spoil_rows(result):
    values = {name: value.clone() for name, value in result.update.values.items()}
    next(iter(values.values()))[0] = -math.inf
    return replace(result, update=StateUpdate(result.update.index, values))


@contextmanager
def planted(kind, task):
    """Make a step of ``task`` go wrong; for 'pixels' the batch does that (``rank_batch``)."""
    if kind in ("gradient", "nan gradient"):
        factor = math.inf if kind == "gradient" else math.nan
        handle = task.bare.get_parameter(PARAMETER).register_hook(lambda gradient: gradient * factor)
        yield
        handle.remove()
        return
    if kind in (None, "pixels"):
        yield
        return
    method = "reference_features" if kind == "reference" else "objective"
    spoil = {"reference": spoil_reference, "loss": spoil_loss, "rows": spoil_rows}[kind]
    original = getattr(task, method)
    with mock.patch.object(task, method, lambda *args: spoil(original(*args))):
        yield


def make_stepper(name, model, optimizer, **settings):
    k, r = collectives.world_size(), collectives.rank()
    loss = make_loss(name)
    loss.set_epoch(1)
    wrapped = ddp.wrap(model, World(r, r, k, k, CPU), static_graph=False, sync_bn=False)
    extra = {"distillation": Distillation(0.5, 60.0, multiply_tau=True)} if settings.pop("distills", False) else {}
    task = make_task(model, loss, name, wrapped=wrapped, **extra)
    config = replace(OPTIM, optimizer=optimizer)
    return Stepper(task, create_optimizer(model, config, CPU), **settings)


def rank_batch(step, kind):
    batch = make_batch(PER_RANK * collectives.world_size(), seed=step)
    batch = batch.select(torch.arange(PER_RANK) + PER_RANK * collectives.rank())
    image = batch.image.float() / 255
    if kind == "pixels":
        image[1, 0, 3, 3] = math.nan
    return replace(batch, image=image)


def run(name, kind, bad, left_out, *, model=None, optimizer="adamw", steps=4, **settings):
    """This rank's state after ``steps`` steps without ``left_out``. Step ``bad`` goes wrong on the last rank."""
    model = build(name, model)
    stepper = make_stepper(name, model, optimizer, **settings)
    stepper.task.model.train()
    for step in range(steps):
        if step == left_out:
            continue
        for group in stepper.optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1)
        hit = kind if step == bad and collectives.rank() == collectives.world_size() - 1 else None
        with planted(hit, stepper.task):
            stepper(rank_batch(step, hit), step)
    state = stepper.optimizer.state_dict()["state"]
    rows = stepper.task.loss.state
    result = {
        **{n: v.clone() for n, v in model.state_dict().items()},
        **{f"{i} {n}": torch.as_tensor(v) for i, values in state.items() for n, v in values.items()},
        **({} if rows is None else {n: rows._table[n][: rows._rows].clone() for n in rows.columns}),
    }
    return {n: v.numpy() for n, v in result.items()}, stepper.skipped.state_dict()


CASES = {
    "pixels": ("drrho", "pixels", {}),
    "reference": ("drrho", "reference", {"grad_clip_norm": 0.5}),
    "gradient": ("drrho", "gradient", {"grad_clip_norm": 0.5}),
    "rows": ("drrho", "rows", {}),
    "loss": ("clip", "loss", {}),
    "accumulation": ("drrho", "rows", {"accum": 3}),
    "accumulation-pixels": ("coca", "pixels", {"accum": 2}),
    "individual": ("fastclip_individual", "pixels", {}),
    "distillation": ("drrho", "reference", {"distills": True}),
    "batchnorm": ("clip", "pixels", {"model": "tiny-resnet"}),
    "lamb": ("clip", "loss", {"optimizer": "lamb"}),
    "sgd": ("clip", "loss", {"optimizer": "sgd"}),
}


@pytest.mark.parametrize("name, kind, settings", CASES.values(), ids=CASES)
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing(name, kind, settings):
    bad = 0 if settings.get("optimizer") else 2  # the first step creates the optimizer's state
    spoiled = ranks(2).run(run, name, kind, bad, None, **settings)
    expected = ranks(2).run(run, name, None, None, bad, **settings)
    whole = ranks(2).run(run, name, None, None, None, **settings)
    assert any((spoiled[0][0][n] != v).any() for n, v in whole[0][0].items()), "the step changes nothing anyway"
    for (ours, counts), (theirs, _) in zip(spoiled, expected, strict=True):
        assert counts == {"in_a_row": 0, "total": 1}
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key].tobytes() == value.tobytes(), key


def _stopped(kind):
    model = build("drrho")
    stepper = make_stepper("drrho", model, "adamw", max_skipped_steps=3, grad_clip_norm=0.5)
    before, keys = None, None
    for step in range(9):
        hit = kind if step >= 2 and collectives.rank() == 1 else None
        batch = rank_batch(step, hit)
        keys = batch.index.tolist()
        try:
            with planted(hit, stepper.task):
                stepper(batch, step)
        except NotFinite as error:
            unchanged = all(torch.equal(before[n], v) for n, v in model.state_dict().items())
            return (
                str(error),
                step,
                unchanged,
                keys,
                stepper.skipped.state_dict(),
                (1 / model.logit_scale.exp()).item(),
            )
        if step == 1:
            before = {n: v.clone() for n, v in model.state_dict().items()}
    return None


@pytest.mark.parametrize("kind", ["pixels", "reference", "gradient", "nan gradient"])
def test_the_limit_stops_all_ranks_with_one_diagnosis(kind):
    first, second = ranks(2).run(_stopped, kind)
    message, step, unchanged, keys, counts, tau = second
    assert first[0] == message and first[1] == step == 4
    assert unchanged and first[2]
    assert counts == first[4] == {"in_a_row": 3, "total": 3}
    assert "--max_skipped_steps 3" in message and "up to step 4" in message
    assert f"Learning rate {OPTIM.lr:.3g} (of the temperature {OPTIM.lr_tau:.3g}); tau {tau:.4g}." in message
    if kind == "pixels":
        assert f"not finite: pixels, on rank 1; rows of its samples: {keys[1]}." in message
    elif kind == "reference":
        assert f"not finite: reference image_features, on rank 1; rows of its samples: {keys[2]}." in message
    else:
        assert f"not finite: gradient of {PARAMETER}, on rank 0" in message


def test_weights_that_were_broken_before_are_named_first():
    model = build("clip")
    with torch.no_grad():
        model.get_parameter(PARAMETER)[0] = math.nan
    stepper = make_stepper("clip", model, "adamw", max_skipped_steps=1)
    with pytest.raises(NotFinite, match=f"the last 1 steps up to step 7 .* parameter {PARAMETER}, on rank 0"):
        stepper(rank_batch(0, None), 7)


def test_the_temperature_is_bounded_by_steps_that_are_taken():
    model = build("clip")
    with torch.no_grad():
        model.logit_scale.fill_(4.0)
    stepper = make_stepper("clip", model, "adamw", logit_scale_bound=20.0)
    stepper(rank_batch(0, "pixels"), 0)
    assert model.logit_scale.item() == 4.0
    stepper(rank_batch(0, None), 0)
    assert model.logit_scale.exp().item() <= 20.001


def test_the_seed_is_one_unless_something_is_not_finite():
    good = [torch.tensor(3e38), torch.tensor(-3e38), torch.tensor(3e38, dtype=torch.float64)]
    rows = StateUpdate(torch.arange(2), {"u": torch.tensor([3e38, 3e38])})
    assert backward_seed(good, rows).item() == backward_seed(good, None).item() == 1.0
    assert backward_seed([*good, torch.tensor(math.inf)], rows).isnan()
    assert backward_seed(good, StateUpdate(rows.index, {"u": torch.tensor([0.0, math.nan])})).isnan()


class Reads(TorchDispatchMode):
    """Counts how often the host asks for a tensor's value."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


class Kernels(TorchDispatchMode):
    """Counts the operations that compute something: those that do not only make a view."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("taken", [True, False])
def test_running_statistics_of_many_layers_take_few_operations(taken):
    model = nn.Sequential(*(nn.BatchNorm1d(width) for width in range(1, 51))).train()
    before = copy.deepcopy(model.state_dict())
    with Kernels() as kernels:
        statistics = RunningStatistics(model)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.add_(1)
    with kernels:
        statistics.restore(unless=torch.tensor(taken))
    assert kernels.count <= 10  # two dtypes: two copies before, two after, two choices, two copies back
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name] + 1 if taken else before[name]), name


@pytest.mark.parametrize("optimizer, per_step", [("adamw", 0), ("sgd", 0), ("nesterov", 0), ("lion", 1)])
def test_the_host_waits_for_the_device_only_after_skipped_steps(optimizer, per_step):
    stepper = make_stepper("clip", build("clip"), optimizer, grad_clip_norm=1.0, max_skipped_steps=4)
    batch = rank_batch(0, None)
    counted = mock.patch.object(stepper.skipped, "read", wraps=stepper.skipped.read)
    with Reads() as reads, counted as read:
        for step in range(11):
            stepper(batch, step)
        assert reads.count == 11 * per_step
        assert not read.called
        for step in range(11, 14):
            stepper(rank_batch(step, "pixels"), step)
        stepper(batch, 14)
        assert read.called


def test_the_limit_is_met_exactly_whenever_the_host_reads():
    draw = random.Random(0)
    for _ in range(60):
        limit, probability = draw.randint(1, 6), draw.random()
        skipped, in_a_row, total = SkippedSteps(limit, CPU), 0, 0
        for _ in range(80):
            taken = draw.random() > probability
            in_a_row, total = (0 if taken else in_a_row + 1), total + (not taken)
            skipped.count(torch.tensor(taken))
            assert skipped.too_many() == (in_a_row >= limit)
            if in_a_row >= limit:
                break
            if draw.random() < 0.2:
                state = skipped.state_dict()
                assert state == {"in_a_row": in_a_row, "total": total}
                skipped = SkippedSteps(limit, CPU)
                skipped.load_state_dict(state)


def test_skipped_steps_are_reported_once():
    skipped = SkippedSteps(9, CPU)
    assert skipped.news() is None
    for taken in (False, True, False):
        skipped.count(torch.tensor(taken))
    assert "skipped 2 steps (2 in all)" in skipped.news()
    assert skipped.news() is None
    skipped.count(torch.tensor(False))
    assert "skipped 1 step (3 in all)" in skipped.news()
