"""The state of a run is restored from a checkpoint, bit for bit; a checkpoint that does not fit is refused."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from drrho_clip.sample_state import SampleState
from drrho_clip.state.fixed_point import FixedPoint
from tests.support.ranks import ranks
from tests.support.small_runs import COLUMNS, CPU, IN_16_BITS, ROWS, Model, Run, assert_same, save
from tests.support.stepping import OPTIM
from training.checkpoint import optimizer_state, pt_file
from training.checkpoint.run_state import RunState
from training.loop.optimizer import create_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "lion", "nesterov"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, optimizer):
    run = Run(0, optimizer).epochs(1)
    save([tmp_path / "epoch_1.pt"], run.state)
    other = Run(1, optimizer).resumed(tmp_path / "epoch_1.pt")
    assert_same(other.everything(), run.everything())
    assert_same(other.epochs(1).everything(), run.epochs(1).everything())
    assert_same(Run(2, optimizer).resumed(tmp_path / "epoch_1.pt").epochs(1).everything(), run.everything())


def test_a_state_in_16_bits_resumes_bit_for_bit(tmp_path):
    run = Run(0, codes=IN_16_BITS).epochs(1)
    save([tmp_path / "epoch_1.pt"], run.state)
    other = Run(1, codes=IN_16_BITS).resumed(tmp_path / "epoch_1.pt")
    assert run.state.sample_state.local()["log_u_text"].dtype == torch.int16
    assert_same(other.everything(), run.everything())
    assert_same(other.epochs(1).everything(), run.epochs(1).everything())


COARSER = dict.fromkeys(COLUMNS, FixedPoint.of_bound(0.02, -33, 89))
BEYOND = dict.fromkeys(COLUMNS, FixedPoint(1e-4, -17_000))
INEXACT = r"from here on 16 bits keep it, with an error of at most 0\.00(1|327)"


@pytest.mark.parametrize(
    ("then", "now", "error", "told"),
    [
        (None, IN_16_BITS, 1e-3, f"log u was saved in float32; {INEXACT}"),
        (IN_16_BITS, None, 0.0, r"saved in 16 bits with an error of at most 0\.001, and is kept in float32"),
        (COARSER, IN_16_BITS, 1e-3, rf"saved in 16 bits with an error of at most 0\.02; {INEXACT}"),
        (None, BEYOND, 9.0, r"; \d values beyond -1\.7 and 4\.853 have become these"),
    ],
)
def test_a_state_that_was_kept_in_another_way_resumes_and_the_log_says_so(
    tmp_path, caplog, then, now, error, told
):
    run = Run(0, codes=then).epochs(1)
    save([tmp_path / "epoch_1.pt"], run.state)
    with caplog.at_level(logging.INFO):
        other = Run(1, codes=now).resumed(tmp_path / "epoch_1.pt")
    was, found = run.state.sample_state.values(), other.state.sample_state.values()
    for name in COLUMNS:
        assert 0 < was[name].isnan().sum() < ROWS
        torch.testing.assert_close(found[name], was[name], rtol=0, atol=error, equal_nan=True)
    (line,) = [record.getMessage() for record in caplog.records if "log u" in record.getMessage()]
    assert re.search(told, line), line


def of_other_ranks(folder: str, codes) -> dict:
    """The rows of ``folder``'s checkpoint, read by these ranks."""
    run = Run(1, codes=codes).resumed(Path(folder, "epoch_1.pt"))
    return {n: t for n, t in run.everything().items() if n.startswith("rows.")}


def saved_by_these_ranks(folder: str, codes) -> dict:
    run = Run(0, codes=codes).epochs(1)
    save([Path(folder, "epoch_1.pt")], run.state)
    return {n: t for n, t in run.everything().items() if n.startswith("rows.")}


@pytest.mark.parametrize("then", [None, IN_16_BITS])
def test_a_state_in_16_bits_is_read_by_other_ranks(tmp_path, then):
    saved = ranks(2).run(saved_by_these_ranks, str(tmp_path), then)[0]
    for found in ranks(4).run(of_other_ranks, str(tmp_path), IN_16_BITS):
        if then is None:
            saved = {n: IN_16_BITS[n.removeprefix("rows.")].rounded(t) for n, t in saved.items()}
            saved |= {n: t for n, t in found.items() if n.endswith(".code")}
            then = IN_16_BITS
        assert_same(found, saved)


def interrupted_and_not(folder: str) -> tuple[dict, dict, list[str]]:
    run = Run(0).epochs(1)
    save([Path(folder, "epoch_1.pt")], run.state)
    other = Run(1).resumed(Path(folder, "epoch_1.pt")).epochs(1)
    names = list(pt_file.read(Path(folder, "epoch_1.pt"))["state_dict"])
    return run.epochs(1).everything(), other.everything(), names


def test_two_ranks_under_ddp_resume_bit_for_bit_and_save_plain_names(tmp_path):
    for uninterrupted, resumed, names in ranks(2).run(interrupted_and_not, str(tmp_path)):
        assert_same(resumed, uninterrupted)
        assert names == list(Model().state_dict())


def test_the_file_is_plain_and_complete(tmp_path):
    run = Run(0, scaler=True).epochs(2)
    save([tmp_path / "epoch_2.pt"], run.state)
    held = torch.load(tmp_path / "epoch_2.pt", weights_only=True)
    assert (held["epoch"], held["name"], held["step"], held["samples_seen"]) == (2, "run", 6, 72)
    assert held["sample_state"]["folder"] == "epoch_2.state" and "u_im" not in held
    assert set(held["sample_state"]["files"]) == {p.name for p in (tmp_path / "epoch_2.state").iterdir()}
    assert held["scaler"]["scale"] == run.state.scaler.get_scale() > 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch_2.pt", "epoch_2.state"]

    plain = RunState("run", run.state.model)
    save([tmp_path / "plain.pt"], plain)
    held = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert not {"scaler", "optimizer", "sample_state"} & held.keys()


def test_the_scaler_goes_on(tmp_path):
    run = Run(0, scaler=True).epochs(1)
    save([tmp_path / "epoch_1.pt"], run.state)
    other = Run(1, scaler=True).resumed(tmp_path / "epoch_1.pt")
    assert other.state.scaler.state_dict() == run.state.scaler.state_dict()
    assert other.epochs(1).state.scaler.get_scale() == run.epochs(1).state.scaler.get_scale() > 8


def test_hyperparameters_are_those_of_this_runs_flags(tmp_path):
    run = Run(0).epochs(1)
    save([tmp_path / "epoch_1.pt"], run.state)
    other = Run(1)
    other.state.optimizer = create_optimizer(other.state.model, replace(OPTIM, wd=0.05, beta2=0.9), CPU)
    other.resumed(tmp_path / "epoch_1.pt")
    decay = {g["name"]: (g["weight_decay"], g["betas"]) for g in other.state.optimizer.param_groups}
    assert decay["decay"] == (0.05, (0.9, 0.9)) and decay["logit_scale"] == (0.0, (0.9, 0.9))


def misfit(folder: Path, change) -> str:
    """The error of a resume after ``change(run)`` made the run differ from the one that was saved."""
    run = Run(1)
    change(run)
    with pytest.raises(ValueError) as refusal:
        run.resumed(folder / "epoch_1.pt")
    return str(refusal.value)


@pytest.fixture
def saved(tmp_path):
    save([tmp_path / "epoch_1.pt"], Run(0).epochs(1).state)
    return tmp_path


def test_a_checkpoint_that_does_not_fit_is_refused_in_a_sentence(saved):
    def wider(run):
        run.state.model = Model(width=8)

    def deeper(run):
        run.state.model.tower.append(nn.Linear(2, 2))

    def locked(run):
        run.state.model.tower[2].requires_grad_(False)
        run.state.optimizer = create_optimizer(run.state.model, OPTIM, CPU)

    def other_part_locked(run):
        model = run.state.model
        model.tower[0].bias.requires_grad_(False)
        model.tower.insert(1, nn.Identity())
        model.register_parameter("extra", nn.Parameter(torch.ones(4)))
        run.state.optimizer = create_optimizer(model, OPTIM, CPU)
        run.state.model = Model()

    def other_optimizer(run):
        run.state.optimizer = create_optimizer(run.state.model, replace(OPTIM, optimizer="lion"), CPU)

    def fewer_rows(run):
        run.state.sample_state = SampleState(ROWS - 1, COLUMNS)

    def more_columns(run):
        run.state.sample_state = SampleState(ROWS, (*COLUMNS, "tau_image"))

    assert "another shape of 'tower.0.weight'" in misfit(saved, wider)
    assert "lacks 'tower.3.bias' (2 in all)" in misfit(saved, deeper)
    assert "[4, 2, 1] parameters, this run" in misfit(saved, locked)
    assert "in place of" in misfit(saved, other_part_locked)
    assert "AdamW" in misfit(saved, other_optimizer) and "Lion" in misfit(saved, other_optimizer)
    assert f"--data_size {ROWS - 1}: " in misfit(saved, fewer_rows)
    assert "lacks the column 'tau_image'" in misfit(saved, more_columns)


def test_parameters_in_another_order_are_noticed_without_their_names(saved):
    held = dict(pt_file.read(saved / "epoch_1.pt"))
    state = held["optimizer"]["state"]
    # index 0 is tower.0.bias, and the last but one a matrix
    state[0], state[len(state) - 2] = state[len(state) - 2], state[0]
    for group in held["optimizer"]["param_groups"]:
        del group["param_names"]
    torch.save(held, saved / "swapped.pt")
    with pytest.raises(ValueError, match="another order"):
        Run(1).resumed(saved / "swapped.pt")


def test_a_checkpoint_moved_without_its_rows_is_refused(saved):
    (saved / "elsewhere").mkdir()
    moved = shutil.copy(saved / "epoch_1.pt", saved / "elsewhere")
    with pytest.raises(ValueError, match=r"epoch_1\.state.*copy its folder beside the file"):
        Run(1).resumed(Path(moved))


class Copies(TorchDispatchMode):
    """Counts the bytes of host memory that are allocated for copies."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default) and result.device == CPU:
            self.bytes += result.nbytes
        return result


def test_moments_for_a_device_are_not_copied_on_the_host(saved):
    file = saved / "epoch_1.pt"
    held = pt_file.read(file)
    model = Model().to("meta")
    optimizer = create_optimizer(model, OPTIM, torch.device("meta"))
    with Copies() as copies:
        optimizer_state.load(optimizer, model, held, file)
    loaded = [v for values in optimizer.state.values() for v in values.values() if v.ndim]
    assert len(loaded) > 8 and all(v.device.type == "meta" for v in loaded)
    assert copies.bytes <= 4 * len(optimizer.state)  # the steps' counts
