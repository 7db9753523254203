"""Checkpoints of other trainers: OpenCLIP's go on where they were, others say what takes their weights."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from drrho_clip.sample_state import SampleState
from tests.support import tiny_models
from tests.support.small_runs import COLUMNS, CPU, assert_same
from tests.support.stepping import OPTIM
from training.checkpoint.resume import resume
from training.checkpoint.run_state import RunState
from training.loop.optimizer import create_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")
SAME_RATE = replace(OPTIM, lr_tau=OPTIM.lr)  # OpenCLIP has one rate for all


def build(seed: int = 0, **changes: Any) -> nn.Module:
    return tiny_models.build("tiny-vit", seed, text_cfg={"vocab_size": 64}, **changes)


def open_clips(model: nn.Module) -> Optimizer:
    """The optimizer of open_clip_train.main, of versions 2 and 3."""
    spared, decayed = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            excluded = parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
            (spared if excluded else decayed).append(parameter)
    groups = [{"params": spared, "weight_decay": 0.0}, {"params": decayed, "weight_decay": OPTIM.wd}]
    return AdamW(groups, lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps)


def step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    """One step on gradients that depend on the number and on the weights' places alone."""
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient if parameter.requires_grad else None
    optimizer.step()


def checkpoint(model: nn.Module, optimizer: Optimizer, **more: Any) -> dict[str, Any]:
    """As open_clip_train writes it."""
    state_dict = {f"module.{name}": value for name, value in model.state_dict().items()}
    return {"epoch": 2, "name": "x", "state_dict": state_dict, "optimizer": optimizer.state_dict(), **more}


def resumed(file: Path, model: nn.Module, *, lr_tau: float = OPTIM.lr, rows: int = 0) -> RunState:
    optimizer = create_optimizer(model, replace(OPTIM, lr_tau=lr_tau), CPU)
    state = RunState("run", model, optimizer, sample_state=SampleState(rows, COLUMNS) if rows else None)
    resume(file, state, steps_per_epoch=5, global_batch=8)
    return state


@pytest.mark.parametrize("locked", ["nothing", "the image tower", "the temperature"])
def test_a_run_of_openclip_goes_on_as_there(tmp_path, locked):
    """The next steps are those of OpenCLIP's own optimizer, and so every moment has its own parameter."""

    def locking(model: nn.Module) -> nn.Module:
        if locked == "the image tower":
            model.visual.requires_grad_(False)
        elif locked == "the temperature":
            model.logit_scale.requires_grad_(False)
        return model

    model = locking(build(seed=3))
    optimizer = open_clips(model)
    for number in range(3):
        step(model, optimizer, number)
    torch.save(checkpoint(model, optimizer), tmp_path / "epoch_2.pt")
    state = resumed(tmp_path / "epoch_2.pt", locking(build(seed=4)))
    assert (state.epoch, state.step, state.samples_seen) == (2, 10, 80)
    for number in range(3, 6):
        step(model, optimizer, number)
        step(state.model, state.optimizer, number)
    for name, value in state.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-6, atol=1e-7, msg=name)


def test_a_temperature_that_was_trained_there_may_be_constant_here(tmp_path):
    model = build(seed=3)
    optimizer = open_clips(model)
    step(model, optimizer, 0)
    torch.save(checkpoint(model, optimizer), tmp_path / "epoch_2.pt")
    other = build(seed=4)
    other.logit_scale.requires_grad_(False)
    state = resumed(tmp_path / "epoch_2.pt", other)
    model.logit_scale.requires_grad_(False)
    step(model, optimizer, 1)
    step(state.model, state.optimizer, 1)
    for name, value in state.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-6, atol=1e-7, msg=name)


def test_the_log_says_what_such_a_checkpoint_has_not(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    model = build()
    optimizer = open_clips(model)
    step(model, optimizer, 0)
    torch.save(checkpoint(model, optimizer, state_dict_ema=model.state_dict()), tmp_path / "epoch_2.pt")
    resumed(tmp_path / "epoch_2.pt", build(), rows=9)
    assert "its optimizer is OpenCLIP's, whose state is taken by the parameters' names" in caplog.text
    assert "an average over the steps too, 'state_dict_ema', which is not used" in caplog.text
    assert "holds no sample state: every sample counts as never seen" in caplog.text
    held = checkpoint(model, optimizer)
    del held["optimizer"]
    torch.save(held, tmp_path / "epoch_2.pt")
    resumed(tmp_path / "epoch_2.pt", build())
    assert "holds no state of the optimizer, whose moments start anew" in caplog.text


def refusal(file: Path, model: nn.Module | None = None) -> str:
    with pytest.raises(ValueError) as refused:
        resumed(file, build() if model is None else model)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_other_trainers_and_optimizers_say_what_takes_the_weights(tmp_path):
    file = tmp_path / "x.pt"
    model = build()
    optimizer = open_clips(model)
    step(model, optimizer, 0)
    weights = model.state_dict()
    lightning = {"epoch": 2, "state_dict": weights, "pytorch-lightning_version": "2.1", "optimizer_states": []}
    for held in (lightning, {"epoch": 2, "model": weights, "optimizer": optimizer.state_dict()}):
        torch.save(held, file)
        assert (
            f"of another trainer, whose epochs and optimizer cannot be continued exactly: --pretrained {file}"
            in (refusal(file))
        )
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, momentum, 0)
    torch.save(checkpoint(model, momentum), file)
    assert f"by another trainer; --pretrained {file} takes its weights alone" in refusal(file)
    for group in (held := checkpoint(model, optimizer))["optimizer"]["param_groups"]:
        group["params"].reverse()
    torch.save(held, file)
    assert "parameters" in refusal(file) and f"--pretrained {file}" in refusal(file)


def test_an_optimizer_of_another_kind_with_the_same_groups(tmp_path):
    model = build()
    sgd = create_optimizer(model, replace(OPTIM, optimizer="sgd"), CPU)
    step(model, sgd, 0)
    torch.save(checkpoint(model, sgd), tmp_path / "x.pt")
    found = refusal(tmp_path / "x.pt")
    assert "keeps momentum_buffer of a parameter, so it is not --optimizer adamw" in found
    assert f"the weights alone with --pretrained {tmp_path}/x.pt" in found


@pytest.mark.parametrize(
    "entry, value",
    [
        ("epoch", "two"),
        ("epoch", None),
        ("optimizer", {"param_groups": []}),
        ("optimizer", [1]),
        ("optimizer", {"state": {}, "param_groups": [{"lr": 1}]}),
        ("scaler", 3),
        ("meters", 3),
        ("best", "x"),
        ("flags", 7),
        ("sample_state", 5),
        ("sample_state", {"folder": "x"}),
        ("u_im", "x"),
    ],
)
def test_entries_that_a_run_does_not_write_are_a_sentence(tmp_path, entry, value):
    model = build()
    optimizer = create_optimizer(model, SAME_RATE, CPU)
    step(model, optimizer, 0)
    held = checkpoint(model, optimizer)
    torch.save({**held, entry: value}, tmp_path / "x.pt")
    state = RunState("run", build(), create_optimizer(build(), SAME_RATE, CPU), torch.amp.GradScaler("cpu"))
    state.optimizer = create_optimizer(state.model, SAME_RATE, CPU)
    state.sample_state = SampleState(9, COLUMNS)
    with pytest.raises(ValueError, match=r"x\.pt"):
        resume(tmp_path / "x.pt", state, steps_per_epoch=5, global_batch=8)


def test_another_size_names_the_flag_that_resizes(tmp_path):
    model = build()
    optimizer = open_clips(model)
    step(model, optimizer, 0)
    torch.save(checkpoint(model, optimizer), tmp_path / "x.pt")
    found = refusal(tmp_path / "x.pt", build(vision_cfg={"image_size": 48}))
    assert "has another shape of 'visual.positional_embedding' ([17, 64] there, [37, 64] here; 1 in all)" in found
    assert f"--pretrained {tmp_path}/x.pt takes weights of other kinds and image sizes" in found


def test_weights_of_all_forms_begin_a_run(tmp_path):
    """--resume of a file without a run in it takes the weights, and starts at the beginning."""
    model = build(seed=3)
    torch.save({"model": model.state_dict()}, tmp_path / "x.pt")
    state = resumed(tmp_path / "x.pt", build(seed=4))
    assert (state.epoch, state.step) == (0, 0)
    assert_same(dict(state.model.state_dict()), dict(model.state_dict()))
