"""The lock of a run's folder: processes that hold it, that are killed, stopped, or started in the same instant."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support import shards, tiny_models
from tests.support.ranks import ranks
from training import main as program
from training.checkpoint import run_lock
from training.checkpoint.remote_sync import RemoteSync
from training.checkpoint.run_lock import NAME, Held, Holder, RunLock

FORK = multiprocessing.get_context("fork")  # a process in a few milliseconds
SLURM = ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Seconds in place of the better part of a minute."""
    for name, seconds in {"BEAT": 0.1, "_FIRST_BEAT": 0.1, "PATIENCE": 0.6, "_POLL": 0.02}.items():
        monkeypatch.setattr(run_lock, name, seconds)
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)


def hold(folder: Path, boot: str, ready, env: dict[str, str]) -> None:
    os.environ.update(env)
    if boot:
        run_lock._boot = lambda: boot
    with RunLock.take(folder):
        ready.set()
        time.sleep(600)


@contextmanager
def holder(folder: Path, boot: str = "", **env: str) -> Iterator[multiprocessing.Process]:
    """A process that holds the lock; ``boot``: as on another machine."""
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(folder, boot, ready, env), daemon=True)
    process.start()
    assert ready.wait(20)
    yield process
    process.kill()
    process.join()


def taken(folder: Path) -> bool:
    try:
        with RunLock.take(folder):
            return True
    except Held:
        return False


def test_a_second_run_is_refused_with_who_holds_it_and_the_lock_goes_with_its_holder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 60.0)
    with holder(tmp_path / "run") as process:
        begun = time.monotonic()
        with pytest.raises(Held) as refused:
            RunLock.take(tmp_path / "run")
        assert time.monotonic() - begun < 30
        who = rf"process {process.pid} on host {socket.gethostname()}, since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
        assert re.fullmatch(who, str(refused.value.holder))
    with RunLock.take(tmp_path / "logs/other"):
        assert (tmp_path / "logs/other" / NAME).exists()
    assert not (tmp_path / "logs").exists()  # nothing else was written there


def test_a_killed_holder_is_succeeded_at_once_even_before_it_is_buried(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 60.0)
    with holder(tmp_path) as process:
        process.kill()
        while (state := Path(f"/proc/{process.pid}/stat").read_text().split()[2]) != "Z":
            assert state in "RSD"
        begun = time.monotonic()
        assert taken(tmp_path) and time.monotonic() - begun < 30
    with holder(tmp_path) as process:
        process.kill()
        process.join()
        assert taken(tmp_path)


def test_a_process_that_was_given_the_same_number_is_not_the_holder(tmp_path):
    started = run_lock._started(os.getppid())
    alive = replace(Holder.this_process(), token="other", process=os.getppid(), started=started)
    assert write(tmp_path, replace(alive, started=started - 1)) and taken(tmp_path)
    assert write(tmp_path, alive) and not taken(tmp_path)


def write(folder: Path, holder: Holder) -> int:
    return (folder / NAME).write_text(json.dumps(vars(holder)))


@pytest.mark.parametrize("elsewhere", [{"boot": "another machine"}, {"pids": "pid:[1]"}, {"boot": "", "pids": ""}])
def test_a_process_of_another_machine_or_container_is_not_looked_for_here(tmp_path, elsewhere):
    """Its number may be that of any process here."""
    for number in (os.getpid(), 1, 2**22 + 1):
        there = replace(Holder.this_process(), token="other", process=number, **elsewhere)
        assert there.lives() is None
    write(tmp_path, there)
    begun = time.monotonic()
    assert taken(tmp_path)  # nothing beats there
    assert time.monotonic() - begun > run_lock.PATIENCE


def test_a_holder_on_another_machine_is_known_by_its_beats(tmp_path, monkeypatch, capfd):
    with holder(tmp_path, boot="another machine") as process:
        with monkeypatch.context() as patch:
            patch.setattr(run_lock, "PATIENCE", 60.0)
            begun = time.monotonic()
            assert not taken(tmp_path) and time.monotonic() - begun < 30
        assert f"run.lock: held by process {process.pid} on host" in capfd.readouterr().err
        process.kill()
        process.join()
        assert taken(tmp_path)


def test_a_holder_that_ends_while_another_run_looks_is_succeeded(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 60.0)
    monkeypatch.setattr(run_lock, "PATIENCE", 30.0)
    there = replace(Holder.this_process(), token="other", boot="another machine")
    write(tmp_path, there)
    remove = FORK.Process(target=lambda: (time.sleep(0.3), (tmp_path / NAME).unlink()))
    remove.start()
    begun = time.monotonic()
    assert taken(tmp_path) and time.monotonic() - begun < 20
    remove.join()


def test_a_job_that_slurm_requeued_succeeds_itself_at_once_on_any_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 60.0)
    job = {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "a", "SLURM_RESTART_COUNT": "1"}
    first = {**job, "SLURM_RESTART_COUNT": "0"}
    for now, there in (
        ({**job, "SLURM_CLUSTER_NAME": "b"}, first),
        (job, job),
        (job, {**job, "SLURM_JOB_ID": "8"}),
    ):
        with holder(tmp_path, boot="another machine", **there), monkeypatch.context() as patch:
            for name, value in now.items():
                patch.setenv(name, value)
            assert not taken(tmp_path)  # another job, or another step of this one
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    with holder(tmp_path, boot="another machine", **first) as process:
        process.kill()
        process.join()
        begun = time.monotonic()
        assert taken(tmp_path) and time.monotonic() - begun < 30


def race(folder: Path, barrier, answers) -> None:
    barrier.wait(20)
    with ExitStack() as stack:
        try:
            stack.enter_context(RunLock.take(folder))
            answers.put(True)
        except Held:
            answers.put(False)
        barrier.wait(20)


@pytest.mark.parametrize("before", ["nothing", "a dead holder", "half a lock", "nothing, without locks of files"])
def test_of_runs_that_start_in_the_same_instant_exactly_one_has_the_folder(tmp_path, monkeypatch, before):
    if "without" in before:

        def none(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "lockf", none)
    for turn in range(1 if before == "half a lock" else 4):
        folder = tmp_path / str(turn) / "run"
        if before in ("a dead holder", "half a lock"):
            folder.mkdir(parents=True)
            write(folder, replace(Holder.this_process(), token="other", started=1))
            if before == "half a lock":
                (folder / NAME).write_text('{"token": "ab')
        barrier, answers = FORK.Barrier(4), FORK.Queue()
        racers = [FORK.Process(target=race, args=(folder, barrier, answers)) for _ in range(4)]
        for racer in racers:
            racer.start()
        assert sorted(answers.get(timeout=20) for _ in racers) == [False] * 3 + [True]
        for racer in racers:
            racer.join()
        assert not (folder / NAME).exists()


def test_a_holder_that_was_stopped_and_lost_its_folder_ends_when_it_goes_on(tmp_path, capfd):
    with holder(tmp_path, boot="another machine") as process:
        os.kill(process.pid, signal.SIGSTOP)
        with RunLock.take(tmp_path):
            os.kill(process.pid, signal.SIGCONT)
            process.join(20)
            assert process.exitcode == 1
            time.sleep(3 * run_lock.BEAT)
            assert Holder.named_in((tmp_path / NAME).read_bytes()).process == os.getpid()
    assert not (tmp_path / NAME).exists()


def test_a_lock_that_is_removed_by_hand_comes_back(tmp_path):
    with holder(tmp_path) as process:
        (tmp_path / NAME).unlink()
        wait_for((tmp_path / NAME).exists)
        assert Holder.named_in(run_lock._read(tmp_path / NAME)).process == process.pid


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_where_files_cannot_be_written_there_is_a_warning_and_no_lock(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_lock.os, "open", full)
    with RunLock.take(tmp_path):
        pass
    assert "run.lock: the run's folder cannot be locked" in caplog.text and "No space left" in caplog.text


def test_the_lock_is_not_copied_elsewhere(tmp_path):
    (tmp_path / "run").mkdir()
    with RunLock.take(tmp_path / "run"):
        (tmp_path / "run/out.log").write_text("a")
        assert RemoteSync(tmp_path / "run", str(tmp_path / "there"))() == 1
    assert not (tmp_path / "there" / NAME).exists()


def look_from_two_machines(folder: str) -> bool:
    """Rank 0 is on another machine than the process that holds the lock, rank 1 on the same."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            patch.setattr(run_lock, "_boot", lambda: "another machine")
        return taken(Path(folder))


def test_any_rank_may_know_that_the_holder_is_dead(tmp_path):
    with holder(tmp_path) as process:
        assert ranks(2).run(look_from_two_machines, str(tmp_path)) == [False, False]
        process.kill()
        process.join()
        begun = time.monotonic()
        assert ranks(2).run(look_from_two_machines, str(tmp_path)) == [True, True]
        assert time.monotonic() - begun < 30  # the pool's processes have the patience of real runs, 45 s


# ------------------------------------------------------------------------------------------------ the program


@pytest.fixture
def words(tmp_path) -> list[str]:
    model = tiny_models.path("tiny-vit", tmp_path)
    line = (
        f"--model {model} --logs {tmp_path}/logs --batch-size 8 --workers 0 --precision fp32 --epochs 1 --warmup 0"
    )
    return f"{line} --dataset-type synthetic --train-num-samples 8".split()


def test_the_program_refuses_a_folder_in_use_and_goes_on_after_a_kill(words, tmp_path, capfd):
    folder = tmp_path / "logs/a"
    evaluates = ["--epochs", "0", "--val-data", shards.write_csv(tmp_path / "csv", 4)]
    with holder(folder) as process:
        for more in ([], ["--resume", "latest"], evaluates):
            assert program.main([*words, "--name", "a", *more]) == 2
            error = capfd.readouterr().err
            assert f"error: --name a: another run writes into {folder} (process {process.pid} on host" in error
            assert "another --name, wait until that one has ended, or stop it" in error
        assert [file.name for file in folder.iterdir()] == [NAME]
        assert program.main([*words, "--name", "a", "--dry_run"]) == 0  # which changes nothing
        process.kill()
        process.join()
        assert program.main([*words, "--name", "a"]) == 0
    assert (folder / "job.done").exists() and not (folder / NAME).exists()
    with holder(folder) as process:  # not: resume it, which would be refused next
        assert program.main([*words, "--name", "a"]) == 2
        assert f"another run writes into {folder} (process {process.pid}" in capfd.readouterr().err


def test_unnamed_runs_of_one_instant_have_folders_of_their_own(words, tmp_path, monkeypatch):
    from training.checkpoint import run_folder

    choose, others = run_folder.choose_folder, []

    def and_another_is_faster(config, world):
        folder = choose(config, world)
        if not others:
            others.append(RunLock.take(folder.path))
        return folder

    monkeypatch.setattr(run_folder, "choose_folder", and_another_is_faster)
    assert program.main(words) == 0
    first, second = sorted((tmp_path / "logs").iterdir())
    assert second.name == f"{first.name}-2" and (second / "job.done").exists()
