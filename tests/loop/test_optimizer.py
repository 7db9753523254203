"""Parameter groups, and the optimizers compared with their formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import open_clip
import pytest
import torch
from torch import nn

from tests.support.stepping import OPTIM
from training.config.optim import ScheduleConfig
from training.loop.optimizer import create_optimizer

CPU = torch.device("cpu")
SCHEDULE = ScheduleConfig(
    epochs=2,
    epochs_cooldown=None,
    warmup=4,
    skip_scheduler=False,
    lr_scheduler="cosine",
    lr_cooldown_end=0.0,
    lr_cooldown_power=1.0,
    lr_min=1e-3,
    lr_tau_scheduler="cosine",
    iters=-1,
    stop_epochs=-1,
    stop_iters=-1,
)


class Toy(nn.Module):
    """A weight, a bias, normalization, an embedding whose name has "bias" in it, and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 4)
        self.bn = nn.Linear(2, 2, bias=False)
        self.ln_post = nn.LayerNorm(4)
        self.relative_bias_table = nn.Parameter(torch.ones(5, 2))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))


def groups(optimizer) -> dict[str, dict]:
    return {g["name"]: g for g in optimizer.param_groups}


def test_groups_hold_each_trainable_parameter_once_and_decay_only_what_should():
    by_name = groups(create_optimizer(Toy(), OPTIM, CPU))
    assert list(by_name) == ["no_decay", "decay", "logit_scale"]
    assert by_name["decay"]["param_names"] == ["proj.weight"]
    assert set(by_name["no_decay"]["param_names"]) == {
        "proj.bias",
        "bn.weight",
        "ln_post.weight",
        "ln_post.bias",
        "relative_bias_table",
    }
    assert by_name["logit_scale"]["param_names"] == ["logit_scale"]
    assert [g["weight_decay"] for g in by_name.values()] == [0.0, 0.2, 0.0]
    assert [g["lr"] for g in by_name.values()] == [1e-2, 1e-2, 3e-3]


def test_groups_of_an_open_clip_model_with_locked_parts():
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }
    model = open_clip.model.CLIP(**config)
    model.lock_image_tower()
    by_name = groups(create_optimizer(model, OPTIM, CPU))
    named = [name for g in by_name.values() for name in g["param_names"]]
    assert sorted(named) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert len(named) == len(set(named))
    assert not any(n.startswith("visual.") for n in named)
    decayed = by_name["decay"]["param_names"]
    assert "text_projection" in decayed and "token_embedding.weight" in decayed
    assert all(dict(model.named_parameters())[n].ndim >= 2 for n in decayed)

    model.logit_scale.requires_grad_(False)
    assert "logit_scale" not in groups(create_optimizer(model, OPTIM, CPU))


def test_nothing_to_train_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match="locked"):
        create_optimizer(Toy().requires_grad_(False), OPTIM, CPU)
    with pytest.raises(ValueError, match=r"adagrad.*choose one of adamw, lamb, lion, sgd, nesterov"):
        create_optimizer(Toy(), replace(OPTIM, optimizer="adagrad"), CPU)
    with pytest.raises(ValueError, match="momentum"):
        create_optimizer(Toy(), replace(OPTIM, optimizer="nesterov", momentum=0.0), CPU)


def two_steps(name: str) -> tuple[float, float]:
    """A decayed weight that starts at 2, after gradients 0.5 and -0.25; and the undecayed one beside it."""
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([[2.0]]))
    model.bias = nn.Parameter(torch.tensor([2.0]))
    optimizer = create_optimizer(model, replace(OPTIM, optimizer=name), CPU)
    for gradient in (0.5, -0.25):
        model.w.grad, model.bias.grad = torch.tensor([[gradient]]), torch.tensor([gradient])
        optimizer.step()
    return model.w.item(), model.bias.item()


def adamw(decay: float) -> float:
    w, m, v = 2.0, 0.0, 0.0
    for t, g in enumerate((0.5, -0.25), start=1):
        w -= OPTIM.lr * decay * w
        m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
        w -= OPTIM.lr * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.98**t)) + OPTIM.eps)
    return w


def lion(decay: float) -> float:
    w, m = 2.0, 0.0
    for g in (0.5, -0.25):
        w -= OPTIM.lr * decay * w
        w -= OPTIM.lr * math.copysign(1.0, 0.9 * m + 0.1 * g)
        m = 0.98 * m + 0.02 * g
    return w


def sgd(decay: float, nesterov: bool = False) -> float:
    w, m = 2.0, 0.0
    for g in (0.5, -0.25):
        g += decay * w
        m = 0.9 * m + g
        w -= OPTIM.lr * (g + 0.9 * m if nesterov else m)
    return w


@pytest.mark.parametrize(
    ("name", "formula"),
    [("adamw", adamw), ("lion", lion), ("sgd", sgd), ("nesterov", lambda decay: sgd(decay, nesterov=True))],
)
def test_two_steps_follow_the_formula(name, formula):
    assert two_steps(name) == pytest.approx((formula(0.2), formula(0.0)), rel=1e-6)


def test_lamb_scales_the_step_of_a_decayed_weight_by_its_norm_and_does_not_clip():
    def first_step(start: float, gradient: float) -> float:
        model = nn.Module()
        model.w = nn.Parameter(torch.full((1, 1), start))
        optimizer = create_optimizer(model, replace(OPTIM, optimizer="lamb"), CPU)
        model.w.grad = torch.full((1, 1), gradient)
        optimizer.step()
        return start - model.w.item()

    # update = sign(g) + wd * w, rescaled to the norm of w: the step is lr * |w| whatever the gradient.
    assert first_step(2.0, 0.5) == pytest.approx(2 * OPTIM.lr, rel=1e-4)
    assert first_step(8.0, 0.5) == pytest.approx(8 * OPTIM.lr, rel=1e-4)
    clipped = replace(OPTIM, optimizer="lamb")
    assert groups(create_optimizer(Toy(), clipped, CPU))["decay"]["max_grad_norm"] is None
