"""Saving: which files are kept, saving while training continues, and saves that fail."""

from __future__ import annotations

import errno
import io
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

from tests.support.ranks import ranks
from tests.support.small_runs import RUN, Run, assert_same, names, run_by_flags, save, save_by_flags
from training import files
from training.checkpoint import pt_file
from training.checkpoint.catalog import find_latest
from training.checkpoint.saver import SaveFailed, Saver
from training.distributed.collectives import PeerFailed

pytestmark = pytest.mark.usefixtures("one_thread")


# --- which files are kept ---------------------------------------------------------------------------------


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


def test_a_failed_write_is_reported_once_and_no_rank_hangs(tmp_path):
    main, other = ranks(2).run(fail_to_write, str(tmp_path))
    assert main.startswith("SaveFailed: ") and "disk full" in main
    assert other.startswith("PeerFailed")


# --- while training continues -----------------------------------------------------------------------------


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
        assert not (tmp_path / "epoch_1.pt").exists()  # the call does not wait for the write
        may_write.set()
        keeper.wait()
        assert_same(Run(1).resumed(tmp_path / "epoch_1.pt").everything(), at_the_call)
        keeper.save(run.state, ["epoch_2"])  # reuses the same host memory
        run.epochs(1)
    assert_same(Run(1).resumed(tmp_path / "epoch_2.pt").everything(), after)
    assert_same(Run(1).resumed(tmp_path / "epoch_1.pt").everything(), at_the_call)


def test_an_error_before_the_writing_starts_is_the_one_that_is_told(tmp_path, monkeypatch):
    run = Run(0)

    def interrupted(thread):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with pytest.raises(RuntimeError, match="DataLoader worker"), Saver(tmp_path, RUN) as saver:
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        saver.save(run.state, ["epoch_1"])


def test_a_failed_save_does_not_end_the_run_unless_it_is_the_last(tmp_path, monkeypatch, caplog):
    run = Run(0).epochs(1)
    with Saver(tmp_path, RUN) as saver:
        with monkeypatch.context() as patch:
            patch.setattr(pt_file, "write", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
            saver.save(run.state, ["step_3"])
            saver.wait()
        assert "step_3.pt could not be saved (No space left on device)" in caplog.text
        assert "the run continues" in caplog.text and names(tmp_path) == []
        saver.save(run.train(1).state, ["step_4"])
    assert names(tmp_path) == ["step_4.pt", "step_4.state"]


def test_a_file_for_which_there_is_no_space_is_reported_as_such_and_its_rows_are_removed(
    tmp_path, monkeypatch, caplog
):
    """The disk gets full in the middle of the .pt, where torch's own error is about a position in the file."""
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


def limited(folder: str) -> str:
    """Save to a file system that has room for the first checkpoint only."""
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
