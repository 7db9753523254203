"""What a run can resume from: other numbers of ranks and rows, published files, bare weights."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.ranks import ranks
from tests.support.small_runs import (
    COLUMNS,
    CPU,
    OPTIM,
    ROWS,
    RUN,
    Model,
    Run,
    assert_same,
    save,
    save_by_flags,
    save_run,
)
from training.checkpoint.resume import resume
from training.checkpoint.run_state import RunState
from training.loop.optimizer import create_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")


def resume_run(folder: str) -> dict[str, Tensor]:
    return Run(1).resumed(Path(folder, "epoch_2.pt")).everything()


def test_another_number_of_ranks_reads_what_three_wrote(tmp_path):
    written = ranks(3).run(save_run, str(tmp_path))
    expected = written[0]
    for resumed in [*ranks(2).run(resume_run, str(tmp_path)), resume_run(str(tmp_path))]:
        assert_same(resumed, expected)


def save_published(folder: str) -> None:
    run = Run(0).epochs(1)
    save_by_flags(Path(folder), run.state, replace(RUN, save_published_state=True), final=False)


def test_published_columns_are_whole_whatever_the_ranks_and_suffice_to_resume(tmp_path, caplog):
    ranks(3).run(save_published, str(tmp_path))
    alone = Run(0).epochs(1).everything()  # which rows are written does not depend on the ranks
    held = torch.load(tmp_path / "epoch_1.pt", weights_only=True)
    assert held["u_format"] == "log"
    for short, column in (("im", "log_u_image"), ("tt", "log_u_text")):
        expected = alone[f"rows.{column}"]
        assert 0 < expected.isnan().sum() < ROWS
        assert torch.equal(held[f"u_{short}"], expected.nan_to_num(0.0)[:, None])
    shutil.rmtree(tmp_path / "epoch_1.state")
    resumed = Run(1).resumed(tmp_path / "epoch_1.pt").everything()["rows.log_u_image"]
    assert "the columns in the file are used instead" in caplog.text
    expected = alone["rows.log_u_image"]
    torch.testing.assert_close(resumed, expected.masked_fill(expected == 0, torch.nan), equal_nan=True)


def grow(folder: str, rows: int, name: str) -> dict[str, Tensor]:
    return Run(1, rows=rows).resumed(Path(folder, name)).everything()


@pytest.mark.parametrize("more", [1, 2, 9, 40])
def test_more_rows_start_as_never_seen(tmp_path, more):
    written = ranks(3).run(save_run, str(tmp_path))[0]
    for grown in [
        *ranks(2).run(grow, str(tmp_path), ROWS + more, "epoch_2.pt"),
        grow(tmp_path, ROWS + more, "epoch_2.pt"),
    ]:
        for name in COLUMNS:
            column = grown[f"rows.{name}"]
            assert len(column) == ROWS + more and column[ROWS:].isnan().all()
            torch.testing.assert_close(column[:ROWS], written[f"rows.{name}"], rtol=0, atol=0, equal_nan=True)


def test_a_published_table_grows_too(tmp_path):
    run = Run(0).epochs(1)
    u = {
        name: run.everything()[f"rows.{column}"].nan_to_num(0.0)[:, None]
        for name, column in zip(("u_im", "u_tt"), COLUMNS)
    }
    grown = Run(1, rows=ROWS + 4).resumed(foreign(tmp_path, run, **u)).everything()["rows.log_u_image"]
    assert len(grown) == ROWS + 4 and grown[ROWS:].isnan().all() and not grown[:ROWS].isnan().all()


def test_only_the_last_source_may_grow(tmp_path):
    run = Run(0)
    run.state.data_sizes = (5, 6)
    save([tmp_path / "epoch_0.pt"], run.state)

    def resumed(*sizes: int) -> Run:
        other = Run(1, rows=sum(sizes))
        other.state.data_sizes = sizes
        return other.resumed(tmp_path / "epoch_0.pt")

    assert resumed(5, 6, 3) and resumed(5, 8)
    for sizes in ((6, 6), (11,), (5,)):
        with pytest.raises(ValueError, match="--data_size"):
            resumed(*sizes)


def foreign(tmp_path: Path, run: Run, **extra) -> Path:
    """A file as the published code writes it under DDP: prefixes, numpy scalars, no names, no step."""
    optimizer = run.state.optimizer.state_dict()
    for group in optimizer["param_groups"]:
        group["lr"] = np.float64(group["lr"])
        del group["name"], group["param_names"]
    weights = {f"module.{n}": t for n, t in run.state.model.state_dict().items()}
    torch.save(
        {"epoch": 2, "name": "theirs", "state_dict": weights, "optimizer": optimizer, **extra}, tmp_path / "f.pt"
    )
    return tmp_path / "f.pt"


def test_a_published_checkpoint_resumes_weights_optimizer_and_u(tmp_path):
    run = Run(0).epochs(2)
    rows = run.everything()
    u = {
        "u_im": rows["rows.log_u_image"].nan_to_num(0.0)[:, None],
        "u_tt": rows["rows.log_u_text"].nan_to_num(0.0)[:, None],
    }
    other = Run(1).resumed(foreign(tmp_path, run, **u))
    for name, value in other.everything().items():
        if name.startswith(("model", "optimizer", "counters")):
            assert torch.equal(value, rows[name]), name
    for name in ("rows.log_u_image", "rows.log_u_text"):
        # There a stored 0.0 means never seen.
        expected = rows[name].masked_fill(rows[name] == 0, float("nan"))
        torch.testing.assert_close(other.everything()[name], expected, rtol=0, atol=0, equal_nan=True)
    assert other.state.optimizer.param_groups[-1]["name"] == "logit_scale"


@pytest.mark.parametrize("temperature", ["constant", "learnable"])
def test_the_three_groups_of_a_published_optimizer(tmp_path, temperature):
    """The layout of the published code's file; with a constant temperature the last group is empty."""
    shapes = {"tower.0.weight": (4, 3), "tower.0.bias": (4,), "tower.1.weight": (4,), "tower.1.bias": (4,)}
    shapes |= {"tower.2.weight": (2, 4), "tower.2.bias": (2,), "logit_scale": ()}
    weights = {f"module.{name}": torch.full(shape, 0.5) for name, shape in shapes.items()}
    weights |= {"module.tower.1.running_mean": torch.zeros(4), "module.tower.1.running_var": torch.ones(4)}
    weights["module.tower.1.num_batches_tracked"] = torch.tensor(8)
    learned = temperature == "learnable"
    # Vectors first, then matrices, then the temperature, each in the model's order; numbered in this order.
    order = ["tower.0.bias", "tower.1.weight", "tower.1.bias", "tower.2.bias", "tower.0.weight", "tower.2.weight"]
    order += ["logit_scale"] if learned else []
    state = {
        number: {
            "step": torch.tensor(8.0),
            "exp_avg": torch.full(shapes[name], 0.25 + number),
            "exp_avg_sq": torch.full(shapes[name], 4.0 + number),
        }
        for number, name in enumerate(order)
    }
    shared = {"lr": np.float64(1e-4), "betas": (0.9, 0.98), "eps": 1e-6, "amsgrad": False, "foreach": None}
    shared |= {"maximize": False, "capturable": False, "differentiable": False, "fused": None}
    groups = [
        {"weight_decay": 0.0, **shared, "params": [0, 1, 2, 3]},
        {"weight_decay": 0.2, **shared, "params": [4, 5]},
        {"weight_decay": 0.0, **shared, "params": [6] if learned else []},
    ]
    optimizer = {"state": state, "param_groups": groups}
    torch.save({"epoch": 2, "name": "x", "state_dict": weights, "optimizer": optimizer}, tmp_path / "epoch_2.pt")

    model = Model()
    model.logit_scale.requires_grad_(learned)
    run = RunState("run", model, create_optimizer(model, OPTIM, CPU))
    resume(tmp_path / "epoch_2.pt", run, steps_per_epoch=4, global_batch=12)
    parameters = dict(model.named_parameters())
    for number, name in enumerate(order):
        values = run.optimizer.state[parameters[name]]
        assert values["step"] == 8, name
        assert (values["exp_avg"] == 0.25 + number).all() and (values["exp_avg_sq"] == 4.0 + number).all(), name
    assert len(run.optimizer.state) == len(order)
    assert (model.tower[0].weight == 0.5).all() and run.step == 8
    run.optimizer.zero_grad()
    model(torch.randn(4, 3)).backward()
    run.optimizer.step()
    assert run.optimizer.state[model.tower[0].weight]["step"] == 9


def test_a_file_without_sample_state_leaves_the_rows_unseen_and_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        other = Run(1).resumed(foreign(tmp_path, Run(0).epochs(1)))
    assert other.everything()["rows.log_u_image"].isnan().all() and "never seen" in caplog.text


def test_u_in_doubt_needs_the_flag(tmp_path):
    file = foreign(tmp_path, Run(0).epochs(1), u_im=torch.ones(ROWS, 1), u_tt=torch.ones(ROWS, 1))
    with pytest.raises(ValueError, match="--u_format"):
        Run(1).resumed(file)
    run = Run(1)
    resume(file, run.state, steps_per_epoch=3, global_batch=12, u_format="linear")
    assert run.everything()["rows.log_u_image"].count_nonzero() == 0


def test_bare_weights_fill_the_model_alone(tmp_path):
    run = Run(0).epochs(1)
    torch.save({f"_orig_mod.{n}": t for n, t in run.state.model.state_dict().items()}, tmp_path / "w.pt")
    other = Run(1).resumed(tmp_path / "w.pt")
    assert all(torch.equal(t, run.everything()[f"model.{n}"]) for n, t in other.state.model.state_dict().items())
    assert other.state.step == other.state.epoch == 0 and not other.state.optimizer.state_dict()["state"]


def test_evaluation_needs_only_the_model(tmp_path):
    run = Run(0).epochs(1)
    save([tmp_path / "epoch_1.pt"], run.state)
    state = RunState("evaluation", Model())
    resume(tmp_path / "epoch_1.pt", state, steps_per_epoch=0, global_batch=0)
    assert state.epoch == 1 and torch.equal(state.model.logit_scale, run.state.model.logit_scale)
