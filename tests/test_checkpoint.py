"""Checkpoints: a resumed run goes on as if nothing had happened; what is on disk is complete or skipped."""

from __future__ import annotations

import errno
import io
import logging
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from drrho_clip.sample_state import SampleState, StateUpdate
from ranks import ranks
from training import files
from training.checkpoint import pt_file, sample_state_io
from training.checkpoint import saver as saving
from training.checkpoint.catalog import find_latest
from training.checkpoint.resume import resume
from training.checkpoint.run_state import RunState
from training.checkpoint.saver import SaveFailed, Saver
from training.config.optim import OptimConfig
from training.config.run import RunConfig
from training.distributed import collectives, ddp
from training.distributed.collectives import PeerFailed
from training.distributed.process_group import World
from training.loop.optimizer import create_optimizer

CPU = torch.device("cpu")
ROWS = 11
COLUMNS = ("log_u_image", "log_u_text")
OPTIM = OptimConfig(
    optimizer="adamw",
    lr=1e-2,
    beta1=0.9,
    beta2=0.98,
    eps=1e-6,
    wd=0.2,
    momentum=0.9,
    lr_tau=3e-3,
    grad_clip_norm=None,
)
RUN = RunConfig(
    batch_size=4,
    global_batch_size=None,
    accum_freq=1,
    precision="fp32",
    seed=0,
    logs="logs",
    name=None,
    log_local=False,
    log_every_n_steps=1,
    report_to=frozenset(),
    wandb_notes="",
    wandb_project_name="",
    save_frequency=1,
    save_every_n_steps=None,
    save_every_minutes=None,
    keep_last=2,
    save_most_recent=False,
    save_published_state=False,
    delete_previous_checkpoint=False,
    resume=None,
    requeue_on_preempt=False,
    step_timeout=0.0,
    remote_sync=None,
    remote_sync_frequency=300,
    remote_sync_protocol="fsspec",
    copy_codebase=False,
    debug=False,
    profile=False,
    dry_run=False,
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save(paths: list[Path], state: RunState) -> None:
    """Save ``state`` under each of ``paths``, and wait until it is done."""
    with Saver(paths[0].parent, RUN) as saver:
        saver.save(state, [path.stem for path in paths])


def save_by_flags(folder: Path, state: RunState, config: RunConfig, *, final: bool) -> None:
    with Saver(folder, config) as saver:
        saver.save_epoch(state, final=final)


class Model(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(x).square().mean() * self.logit_scale.exp()


class Run:
    """A run in miniature: each step trains on data that the step number decides, and writes rows."""

    def __init__(self, seed: int, optimizer: str = "adamw", rows: int = ROWS, scaler: bool = False) -> None:
        torch.manual_seed(seed)
        model = Model()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        world = World(self.rank, self.rank, self.size, self.size, CPU)
        self.wrapped = ddp.wrap(model, world, static_graph=False, sync_bn=False)
        self.state = RunState(
            name="run",
            model=model,
            optimizer=create_optimizer(model, replace(OPTIM, optimizer=optimizer), CPU),
            scaler=torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) if scaler else None,
            sample_state=SampleState(rows, COLUMNS),
        )

    def train(self, steps: int) -> Run:
        s = self.state
        for _ in range(steps):
            generator = torch.Generator().manual_seed(s.step)
            index = torch.randperm(ROWS, generator=generator)[:4]
            data = torch.randn(4 * self.size, 3, generator=generator)[4 * self.rank :][:4]
            s.optimizer.zero_grad()
            loss = self.wrapped(data)
            if s.scaler is None:
                loss.backward()
                s.optimizer.step()
            else:
                s.scaler.scale(loss).backward()
                s.scaler.step(s.optimizer)
                s.scaler.update()
            values = {name: index * 0.5 - s.step + k for k, name in enumerate(COLUMNS)}
            s.sample_state.commit(StateUpdate(index, values))
            s.step += 1
        return self

    def epochs(self, n: int) -> Run:
        """Complete ``n`` epochs of 3 steps."""
        self.train(3 * n)
        self.state.epoch += n
        self.state.samples_seen = 12 * self.state.step
        return self

    def resumed(self, path: Path) -> Run:
        resume(path, self.state, steps_per_epoch=3, global_batch=12)
        return self

    def everything(self) -> dict[str, Tensor]:
        """All tensors of the run, the sample state whole."""
        s = self.state
        found = {f"model.{n}": t.clone() for n, t in s.model.state_dict().items()}
        for index, values in s.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{k}": torch.as_tensor(v).clone() for k, v in values.items()}
        for n, t in s.sample_state.state_dict().items():
            found[f"rows.{n}"] = (t.full_tensor() if dist.is_initialized() else t).clone()
        found["counters"] = torch.tensor([s.epoch, s.epoch_step, s.step, s.samples_seen])
        return found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "lion", "nesterov"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, optimizer):
    run = Run(0, optimizer).epochs(1)
    save([tmp_path / "epoch_1.pt"], run.state)
    other = Run(1, optimizer).resumed(tmp_path / "epoch_1.pt")
    assert_same(other.everything(), run.everything())
    assert_same(other.epochs(1).everything(), run.epochs(1).everything())
    assert_same(Run(2, optimizer).resumed(tmp_path / "epoch_1.pt").epochs(1).everything(), run.everything())


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


def save_run(folder: str) -> dict[str, Tensor]:
    run = Run(0).epochs(2)
    save([Path(folder, "epoch_2.pt")], run.state)
    return run.everything()


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
    assert "the columns in the file stand in for it" in caplog.text
    expected = alone["rows.log_u_image"]
    torch.testing.assert_close(resumed, expected.masked_fill(expected == 0, torch.nan), equal_nan=True)


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


# --- which files are kept ---------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def run_by_flags(folder: Path, epochs: int, *, last_steps: int = 0, **flags) -> Run:
    run = Run(0)
    for epoch in range(1, epochs + 1):
        run.epochs(1)
        save_by_flags(folder, run.state, replace(RUN, **flags), final=epoch == epochs and not last_steps)
    if last_steps:
        run.train(last_steps)
        run.state.epoch_step = last_steps
        save_by_flags(folder, run.state, replace(RUN, **flags), final=True)
    return run


@pytest.mark.parametrize(
    ("flags", "files"),
    [
        ({"save_frequency": 2}, ["epoch_2", "epoch_4", "epoch_5"]),
        ({"save_frequency": 0}, ["epoch_5"]),
        ({"save_frequency": 2, "delete_previous_checkpoint": True}, ["epoch_5"]),
    ],
)
def test_save_frequency_and_deletion(tmp_path, flags, files):
    run_by_flags(tmp_path, 5, **flags)
    assert names(tmp_path) == sorted(f"{f}.{kind}" for f in files for kind in ("pt", "state"))


def test_most_recent_shares_the_sample_state_of_its_epoch(tmp_path):
    run = run_by_flags(tmp_path, 3, save_frequency=2, save_most_recent=True)
    assert names(tmp_path) == ["epoch_2.pt", "epoch_2.state", "epoch_3.pt", "epoch_3.state", "epoch_latest.pt"]
    assert_same(Run(1).resumed(tmp_path / "epoch_latest.pt").everything(), run.everything())


def test_most_recent_alone_leaves_one_sample_state(tmp_path):
    run = Run(0)
    for _ in range(3):
        run.epochs(1)
        save_by_flags(tmp_path, run.state, replace(RUN, save_frequency=0, save_most_recent=True), final=False)
        assert names(tmp_path) == [f"epoch_{run.state.epoch}.state", "epoch_latest.pt"]
    assert_same(Run(1).resumed(tmp_path / "epoch_latest.pt").everything(), run.everything())


def test_an_end_inside_an_epoch_is_saved_as_what_it_is(tmp_path):
    run = run_by_flags(tmp_path, 1, last_steps=2)
    assert names(tmp_path) == ["epoch_1.pt", "epoch_1.state", "step_5.pt", "step_5.state"]
    assert find_latest(tmp_path) == tmp_path / "step_5.pt"
    state = Run(1).resumed(tmp_path / "step_5.pt").state
    assert (state.epoch, state.epoch_step, state.step) == (1, 2, 5) == (1, run.state.epoch_step, run.state.step)


@pytest.mark.parametrize("fails", ["rows", "file"])
def test_a_save_that_is_cut_off_leaves_the_last_one_whole(tmp_path, monkeypatch, fails):
    flags = replace(RUN, save_frequency=0, save_most_recent=True)
    run = Run(0).epochs(1)
    save_by_flags(tmp_path, run.state, flags, final=False)
    before = run.everything()
    run.epochs(1)

    def cut_off(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        if fails == "rows":
            patch.setattr(dcp.FileSystemWriter, "write_data", cut_off)
        else:
            patch.setattr(files.os, "replace", cut_off)
        with pytest.raises(SaveFailed, match=r"epoch_latest\.pt could not be saved .*No space left"):
            save_by_flags(tmp_path, run.state, flags, final=False)
    assert not list(tmp_path.glob(".*"))
    assert_same(Run(1).resumed(find_latest(tmp_path)).everything(), before)

    run.epochs(1)
    save_by_flags(tmp_path, run.state, flags, final=False)
    assert names(tmp_path) == ["epoch_3.state", "epoch_latest.pt"]
    assert_same(Run(1).resumed(find_latest(tmp_path)).everything(), run.everything())


def test_an_epoch_saved_again_does_not_touch_the_rows_that_a_file_still_names(tmp_path):
    run = Run(0).epochs(1)
    save([tmp_path / "epoch_1.pt"], run.state)
    first = run.everything()
    run.train(3)
    shutil.copy(tmp_path / "epoch_1.pt", tmp_path / "kept.pt")
    save([tmp_path / "epoch_1.pt"], run.state)
    assert_same(Run(1).resumed(tmp_path / "kept.pt").everything(), first)
    assert_same(Run(1).resumed(tmp_path / "epoch_1.pt").everything(), run.everything())


def fail_to_write(folder: str) -> str:
    run = Run(0)
    original, files.os.replace = files.os.replace, lambda *a: (_ for _ in ()).throw(OSError("disk full"))
    try:
        save([Path(folder, "epoch_0.pt")], run.state)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        files.os.replace = original
    return "saved"


def test_a_failed_write_is_told_once_and_hangs_nobody(tmp_path):
    main, other = ranks(2).run(fail_to_write, str(tmp_path))
    assert main.startswith("SaveFailed: ") and "disk full" in main
    assert other.startswith("PeerFailed")


# --- which one is the newest ------------------------------------------------------------------------------


def test_latest_goes_by_content_and_skips_what_is_not_complete(tmp_path, caplog):
    assert find_latest(tmp_path) is find_latest(tmp_path / "nowhere") is None
    run = Run(0)
    for epoch in range(1, 13):
        run.epochs(1)
        if epoch in (9, 10, 11, 12):
            save([tmp_path / f"epoch_{epoch}.pt"], run.state)
    assert find_latest(tmp_path) == tmp_path / "epoch_12.pt"  # by name, epoch_9 would come last
    (tmp_path / "epoch_12.pt").rename(tmp_path / "a_copy.pt")
    assert find_latest(tmp_path) == tmp_path / "a_copy.pt"

    whole = (tmp_path / "a_copy.pt").read_bytes()
    (tmp_path / "a_copy.pt").write_bytes(whole[: len(whole) // 2])
    shard = next((tmp_path / "epoch_11.state").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (tmp_path / "epoch_99.pt").write_bytes(b"")
    torch.save({"w": torch.ones(1)}, tmp_path / "weights.pt")
    with caplog.at_level(logging.WARNING):
        assert find_latest(tmp_path) == tmp_path / "epoch_10.pt"
    assert all(
        name in caplog.text for name in ("a_copy.pt", "epoch_11.pt", shard.name, "epoch_99.pt", "weights.pt")
    )

    (tmp_path / "epoch_10.state" / ".metadata").unlink()
    assert find_latest(tmp_path) == tmp_path / "epoch_9.pt"


def test_nothing_is_deleted_while_a_file_cannot_be_read(tmp_path, caplog):
    run_by_flags(tmp_path, 1)
    (tmp_path / "broken.pt").write_bytes(b"?")
    shutil.copytree(tmp_path / "epoch_1.state", tmp_path / "epoch_7.state")
    run_by_flags(tmp_path, 1)
    assert "epoch_7.state" in names(tmp_path)
    (tmp_path / "broken.pt").unlink()
    run_by_flags(tmp_path, 1)
    assert "epoch_7.state" not in names(tmp_path)


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 16
    file.write_bytes(content)


def damage_and_find(folder: str) -> list[tuple[str, str]]:
    """Flip a bit of the newest checkpoint, in each of its parts in turn: which one is then the latest."""
    found = []
    newest = Path(folder, "epoch_2.pt")
    weights = pt_file.read(newest)["state_dict"]["tower.0.weight"].numpy().tobytes()
    rank = dist.get_rank() if dist.is_initialized() else 0
    collectives.barrier()
    for file in [newest, *sorted(Path(folder, "epoch_2.state").iterdir())]:
        if rank == 0:
            content = file.read_bytes()
            flip(file, content.index(weights) + 3 if file == newest else len(content) // 2)
        collectives.barrier()
        found.append((file.name, find_latest(Path(folder)).name))
        collectives.barrier()
        if rank == 0:
            file.write_bytes(content)
        collectives.barrier()
    return [*found, ("nothing", find_latest(Path(folder)).name)]


@pytest.mark.parametrize("size", [1, 2])
def test_a_flipped_bit_anywhere_is_noticed_and_the_one_before_is_taken(tmp_path, size):
    def all_ranks(function, *args):
        return ranks(size).run(function, *args) if size > 1 else [function(*args)]

    all_ranks(save_two, str(tmp_path))
    for found in all_ranks(damage_and_find, str(tmp_path)):
        assert len(found) == 1 + 1 + size + 1  # the file, the metadata, each rank's rows, and none
        assert dict(found) == {name: "epoch_1.pt" for name, _ in found[:-1]} | {"nothing": "epoch_2.pt"}


def save_two(folder: str) -> None:
    run = Run(0)
    for epoch in (1, 2):
        save([Path(folder, f"epoch_{epoch}.pt")], run.epochs(1).state)


def test_newest_is_what_was_saved_last_even_if_an_earlier_save_was_further(tmp_path):
    """After a resume from an older checkpoint the run's steps before count for nothing."""
    save([tmp_path / "epoch_2.pt"], Run(0).epochs(2).state)
    save([tmp_path / "epoch_1.pt"], Run(0).epochs(1).state)
    assert find_latest(tmp_path) == tmp_path / "epoch_1.pt"


# --- while training goes on -------------------------------------------------------------------------------


def test_what_is_saved_is_the_state_at_the_call_whatever_comes_after(tmp_path, monkeypatch):
    run, may_write = Run(0).epochs(1), threading.Event()
    at_the_call, write = run.everything(), pt_file.write

    def late(path, held):
        assert may_write.wait(20)
        write(path, held)

    monkeypatch.setattr(pt_file, "write", late)
    with Saver(tmp_path, RUN) as keeper:
        keeper.save(run.state, ["epoch_1"])
        after = run.epochs(1).everything()
        assert not (tmp_path / "epoch_1.pt").exists()  # it has not been waited for
        may_write.set()
        keeper.wait()
        assert_same(Run(1).resumed(tmp_path / "epoch_1.pt").everything(), at_the_call)
        keeper.save(run.state, ["epoch_2"])  # into the same host memory
        run.epochs(1)
    assert_same(Run(1).resumed(tmp_path / "epoch_2.pt").everything(), after)
    assert_same(Run(1).resumed(tmp_path / "epoch_1.pt").everything(), at_the_call)


def test_a_failed_save_does_not_end_the_run_unless_it_is_the_last(tmp_path, monkeypatch, caplog):
    run = Run(0).epochs(1)
    with Saver(tmp_path, RUN) as saver:
        with monkeypatch.context() as patch:
            patch.setattr(pt_file, "write", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
            saver.save(run.state, ["step_3"])
            saver.wait()
        assert "step_3.pt could not be saved (No space left on device)" in caplog.text
        assert "the run goes on" in caplog.text and names(tmp_path) == []
        saver.save(run.train(1).state, ["step_4"])
    assert names(tmp_path) == ["step_4.pt", "step_4.state"]


def test_a_file_for_which_there_is_no_space_is_told_as_that_and_takes_its_rows_along(
    tmp_path, monkeypatch, caplog
):
    """The disk is full in the middle of the .pt, where torch would speak of a position in the file."""
    run = Run(0).epochs(1)

    class Full(io.FileIO):
        def write(self, data) -> int:
            if self.tell() + len(data) > 3000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    opened = Path.open
    with Saver(tmp_path, RUN) as saver:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", lambda p, mode: Full(p, mode) if p.suffix == ".tmp" else opened(p, mode))
            saver.save(run.state, ["step_3"])
            saver.wait()
        assert "could not be saved ([Errno 28] No space left on device)" in caplog.text
        assert names(tmp_path) == []
        saver.save(run.state, ["step_4"])


def test_a_clock_that_goes_back_does_not_make_a_new_checkpoint_an_old_one(tmp_path, monkeypatch):
    run = Run(0)
    save([tmp_path / "step_1.pt"], run.train(1).state)
    save([tmp_path / "step_2.pt"], run.train(1).state)
    monkeypatch.setattr(saving.time, "time", lambda: 1000.0)
    save([tmp_path / "step_3.pt"], run.train(1).state)
    with Saver(tmp_path, RUN) as other:
        other.save(run.train(1).state, ["step_4"])
    assert find_latest(tmp_path) == tmp_path / "step_4.pt"
    assert names(tmp_path) == ["step_3.pt", "step_3.state", "step_4.pt", "step_4.state"]


def test_a_damaged_file_keeps_its_own_rows_and_no_others(tmp_path):
    run = Run(0)
    for step in (1, 2, 3, 4):
        save([tmp_path / f"step_{step}.pt"], run.train(1).state)
        if step == 1:
            (tmp_path / "step_1.pt").write_bytes(b"?")
            torch.save({"w": torch.ones(1)}, tmp_path / "bare.pt")
    kept = [f"step_{step}.{kind}" for step in (1, 3, 4) for kind in ("pt", "state")]
    assert names(tmp_path) == ["bare.pt", *kept]


def test_a_state_that_cannot_be_read_is_a_reason_to_take_the_one_before(tmp_path, monkeypatch, caplog):
    save_two(str(tmp_path))
    checksum = files.checksum

    def broken(file: Path) -> int:
        if "epoch_2" in str(file):
            raise OSError(errno.EIO, "Input/output error")
        return checksum(file)

    monkeypatch.setattr(sample_state_io, "checksum", broken)
    assert find_latest(tmp_path) == tmp_path / "epoch_1.pt"
    assert "Input/output error" in caplog.text


def limited(folder: str) -> str:
    """Save into a file system that is full for all but the first checkpoint."""
    import resource

    run = Run(0).epochs(1)
    save([Path(folder, "step_1.pt")], run.state)
    before = run.everything()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        save([Path(folder, "step_2.pt")], run.epochs(1).state)
    except (SaveFailed, PeerFailed) as error:
        outcome = f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = Run(1).resumed(find_latest(Path(folder))).everything()
    if run.rank == 0:  # BatchNorm's statistics are those of rank 0
        assert_same(after, before)
    return outcome


def test_a_full_disk_leaves_what_is_complete(tmp_path):
    main, other = ranks(2).run(limited, str(tmp_path))
    assert "step_2.pt could not be saved" in main and "too large" in main and other.startswith("PeerFailed")
    assert names(tmp_path) == ["step_1.pt", "step_1.state"]


@pytest.mark.parametrize("keep_last", [1, 3])
def test_the_newest_steps_are_kept_and_all_epochs(tmp_path, keep_last):
    run = Run(0)
    with Saver(tmp_path, replace(RUN, keep_last=keep_last)) as saver:
        saver.save(run.epochs(1).state, ["epoch_1"])
        for _ in range(4):
            saver.save(run.train(1).state, [f"step_{run.state.step}"])
    kept = [f"step_{step}" for step in (4, 5, 6, 7)[-keep_last:]]
    assert names(tmp_path) == sorted(f"{f}.{kind}" for f in ["epoch_1", *kept] for kind in ("pt", "state"))


# --- more samples than before -----------------------------------------------------------------------------


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


# --- files of others, and files that do not fit -----------------------------------------------------------


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
    """Written out as the published code lays its file out; with a constant temperature the last group is empty."""
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


def misfit(folder: Path, change) -> str:
    """What a resume says where ``change(run)`` made the run differ from the one that was saved."""
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
    with pytest.raises(ValueError, match=r"epoch_1\.state.*copy that folder beside the file"):
        Run(1).resumed(Path(moved))
