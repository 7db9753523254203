"""Copying a run's folder away, to a local fsspec target."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fsspec.core import url_to_fs

from tests.support import tiny_models
from tests.support.small_runs import RUN, Run, assert_same, flip, save
from training.checkpoint import pt_file
from training.checkpoint.catalog import FETCHED, find_latest
from training.checkpoint.remote_sync import RemoteSync, _names, fetch, fetch_newest, remote_sync
from training.main import main


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "logs" / "run" / "checkpoints").mkdir(parents=True)
    return tmp_path / "logs" / "run"


def relative(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def config(target: Path, **flags):
    return replace(RUN, remote_sync=f"file://{target}", **flags)


def test_only_complete_checkpoints_are_copied_and_only_once(folder, tmp_path):
    run = Run(0).epochs(1)
    save([folder / "checkpoints" / "epoch_1.pt"], run.state)
    (folder / "out.log").write_text("line\n")
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / "events").write_text("1")
    copy = RemoteSync(folder, f"file://{tmp_path}/remote/run")
    shutil.copytree(
        folder / "checkpoints" / "epoch_1.state", folder / "checkpoints" / "epoch_2.state"
    )  # no file yet
    (folder / "checkpoints" / ".epoch_2.pt.tmp").write_bytes(b"half a file")

    assert copy() == len(relative(tmp_path / "remote" / "run"))
    rows = [f"checkpoints/epoch_1.state/{f}" for f in relative(folder / "checkpoints" / "epoch_1.state")]
    expected = ["checkpoints/epoch_1.pt", *rows, "out.log", "tensorboard/events"]
    assert relative(tmp_path / "remote" / "run") == sorted(expected)
    assert copy() == 0
    (folder / "out.log").write_text("line\nline\n")
    assert copy() == 1
    assert (tmp_path / "remote" / "run" / "out.log").read_text() == "line\nline\n"
    resumed = Run(1).resumed(find_latest(tmp_path / "remote" / "run" / "checkpoints"))
    assert_same(resumed.everything(), run.everything())


def test_of_several_checkpoints_the_newest_is_copied_last(folder, tmp_path):
    """So it is the newest there too, whatever the names are."""
    run = Run(0).epochs(1)
    for name in ("step_2900", "epoch_9", "step_10000", "epoch_10"):
        save([folder / "checkpoints" / f"{name}.pt"], run.state)
    assert RemoteSync(folder, f"file://{tmp_path}/remote")() > 0
    names = _names(*url_to_fs(f"file://{tmp_path}/remote/checkpoints"))
    assert names == ["epoch_10.pt", "step_10000.pt", "epoch_9.pt", "step_2900.pt"]


def test_a_copy_that_is_cut_off_leaves_the_earlier_one(folder, tmp_path, monkeypatch):
    (folder / "out.log").write_text("old")
    copy = RemoteSync(folder, f"file://{tmp_path}/remote/run")
    copy()
    (folder / "out.log").write_text("new and longer")

    def cut_off(source: str, target: str, **kwargs) -> None:
        Path(target).write_text("new")
        raise OSError("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(copy._files, "put_file", cut_off)
        with pytest.raises(OSError, match="connection lost"):
            copy()
    assert (tmp_path / "remote" / "run" / "out.log").read_text() == "old"
    assert copy() == 1
    assert relative(tmp_path / "remote" / "run") == ["out.log"]


def appears(file: Path) -> None:
    deadline = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_folder_is_copied_in_the_background_and_at_the_end(folder, tmp_path):
    remote = tmp_path / "remote" / "run"
    (folder / "params.txt").write_text("a: 1\n")
    with remote_sync(config(tmp_path / "remote", remote_sync_frequency=0.05), folder):
        appears(remote / "params.txt")
        (folder / "out.log").write_text("1")
        appears(remote / "out.log")
    (folder / "launch.json").write_text("{}")
    with remote_sync(config(tmp_path / "remote", remote_sync_frequency=1000), folder):
        appears(remote / "launch.json")  # copied at the start; it is not changed again for a while
        (folder / "job.done").write_text("")
        assert not (remote / "job.done").exists()
    assert (remote / "job.done").exists()


def test_a_checkpoint_replaced_while_it_is_copied_waits(folder, tmp_path, monkeypatch):
    run = Run(0).epochs(1)
    latest = folder / "checkpoints" / "epoch_latest.pt"
    save([latest], run.state)
    copy = RemoteSync(folder, f"file://{tmp_path}/remote/run")
    put_file, remote = copy._files.put_file, tmp_path / "remote" / "run" / "checkpoints"

    def slow(source: str, target: str, **kwargs) -> None:
        if source == str(latest):
            save([latest], run.epochs(1).state)
        put_file(source, target, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(copy._files, "put_file", slow)
        copy()
    assert not (remote / "epoch_latest.pt").exists()  # it would name a sample state that is not there
    copy()
    assert_same(Run(1).resumed(find_latest(remote)).everything(), run.everything())


def test_a_target_that_fails_later_does_not_end_the_run(folder, tmp_path, caplog):
    with remote_sync(config(tmp_path / "remote", remote_sync_frequency=0.05), folder):
        shutil.rmtree(tmp_path / "remote")
        (tmp_path / "remote").write_text("in the way")
        (folder / "out.log").write_text("1")
        deadline = time.monotonic() + 20
        while "--remote-sync failed" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
        assert "--remote-sync failed, will try again later" in caplog.text
        (tmp_path / "remote").unlink()
    assert relative(tmp_path / "remote" / "run") == ["out.log"]


def test_a_file_that_is_no_checkpoint_is_left_out(folder, tmp_path, caplog):
    (folder / "checkpoints" / "notes.pt").write_text("mine")
    (folder / "out.log").write_text("1")
    assert RemoteSync(folder, f"file://{tmp_path}/remote/run")() == 1
    assert "notes.pt cannot be read" in caplog.text


def test_targets_that_cannot_work_are_refused_at_the_start(folder, tmp_path, monkeypatch):
    (folder / "out.log").write_text("1")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if s3fs were not installed
    for target, protocol, sentence in [
        (f"file://{tmp_path}/file", "fsspec", "cannot be written to"),
        ("nosuch://bucket", "fsspec", "nosuch"),
        ("bucket/prefix", "s3", "s3fs"),
    ]:
        flags = replace(RUN, remote_sync=target, remote_sync_protocol=protocol)
        with pytest.raises(ValueError, match=sentence), remote_sync(flags, folder):
            pass


def test_without_the_flag_nothing_happens(folder):
    with remote_sync(RUN, folder):
        pass


@pytest.fixture
def copied(folder, tmp_path) -> tuple[Run, Path]:
    """A run that copied two checkpoints before its machine was lost, and the address of the copies."""
    run = Run(0)
    copy = RemoteSync(folder, f"file://{tmp_path}/remote/run")
    for epoch in (1, 2):
        save([folder / "checkpoints" / f"epoch_{epoch}.pt"], run.epochs(1).state)
        copy()
    shutil.rmtree(folder)
    return run, tmp_path / "remote" / "run" / "checkpoints"


def newest(folder: Path, target: Path) -> Path | None:
    return fetch_newest(config(target), "run", folder, folder / "checkpoints" / FETCHED)


def test_a_run_goes_on_elsewhere_from_what_was_copied(copied, folder, tmp_path):
    run, remote = copied
    (remote.parent / "eval_results.jsonl").write_text("what was measured before\n")
    path = newest(folder, tmp_path / "remote")
    assert path == folder / "checkpoints" / FETCHED / "epoch_2.pt"
    assert_same(Run(1).resumed(path).everything(), run.everything())
    assert (folder / "eval_results.jsonl").read_text() == "what was measured before\n"
    assert newest(folder, tmp_path / "nothing") is None


def test_a_damaged_copy_is_skipped_for_the_one_before(copied, folder, tmp_path, caplog):
    _, remote = copied
    flip(next((remote / "epoch_2.state").glob("*.distcp")), 100)
    assert newest(folder, tmp_path / "remote").name == "epoch_1.pt"
    assert "skipped" in caplog.text and "checksum" in caplog.text
    with pytest.raises(ValueError, match=r"--resume file://.*epoch_2\.pt: .*checksum"):
        fetch(f"file://{remote}/epoch_2.pt", folder / "checkpoints" / FETCHED)
    assert not (folder / "checkpoints" / FETCHED).exists()


def test_fetching_leaves_the_runs_own_checkpoints_alone_until_there_is_a_newer_one(copied, folder):
    _, remote = copied
    own = Run(5).epochs(1)
    save([folder / "checkpoints" / "epoch_1.pt"], own.state)
    next((remote / "epoch_1.state").glob("*.distcp")).unlink()
    with pytest.raises(ValueError, match=r"epoch_1\.pt cannot be read"):
        fetch(f"file://{remote}/epoch_1.pt", folder / "checkpoints" / FETCHED)
    fetch(f"file://{remote}/epoch_2.pt", folder / "checkpoints" / FETCHED)
    assert find_latest(folder / "checkpoints") == folder / "checkpoints" / "epoch_1.pt"
    assert_same(Run(1).resumed(find_latest(folder / "checkpoints")).everything(), own.everything())
    save([folder / "checkpoints" / "epoch_2.pt"], own.epochs(1).state)
    assert not (folder / "checkpoints" / FETCHED).exists()


def test_a_later_launch_copies_only_what_is_not_there(folder, tmp_path):
    save([folder / "checkpoints" / "epoch_1.pt"], Run(0).epochs(1).state)
    (folder / "out.log").write_text("1")
    assert RemoteSync(folder, f"file://{tmp_path}/remote/run")() == 4
    (folder / "out.log").write_text("2")
    assert RemoteSync(folder, f"file://{tmp_path}/remote/run")() == 1
    assert (tmp_path / "remote" / "run" / "out.log").read_text() == "2"


def test_a_particular_one_is_fetched_by_its_address(copied, folder):
    _, remote = copied
    path = fetch(f"file://{remote}/epoch_1.pt", folder / "checkpoints")
    assert Run(1).resumed(path).state.epoch == 1
    with pytest.raises(ValueError, match=r"epoch_9\.pt cannot be read"):
        fetch(f"file://{remote}/epoch_9.pt", folder / "checkpoints")


def test_the_program_resumes_from_a_copy(tmp_path):
    """On a machine that has only the address; the run ends like the undisturbed one."""
    words = (
        "--dataset-type synthetic --train-num-samples 24 --batch-size 8 --workers 0 --precision fp32 --fastclip"
    )
    words += f" --epochs 2 --model {tiny_models.path('tiny-vit', tmp_path)} --name run --lr 1e-3 --warmup 0"
    words += f" --data_size 24 --remote-sync file://{tmp_path}/remote --remote-sync-protocol fsspec"
    assert main([*words.split(), "--logs", f"{tmp_path}/one", "--stop_iters", "4"]) == 0
    for logs in ("other", "one"):
        assert main([*words.split(), "--logs", f"{tmp_path}/{logs}", "--resume", "latest"]) == 0
        log = (tmp_path / logs / "run/out.log").read_text()
        assert "step_4.pt: 1 epochs, 4 steps" in log and "trained 6 steps" in log
    one, other = (pt_file.read(tmp_path / logs / "run/checkpoints/epoch_2.pt") for logs in ("one", "other"))
    assert all(torch.equal(one["state_dict"][name], other["state_dict"][name]) for name in one["state_dict"])
