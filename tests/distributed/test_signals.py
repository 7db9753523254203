"""Real signals to real processes; what ranks agree on; how a job is queued again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support.ranks import ranks
from training.distributed import signals
from training.distributed.signals import SIGNALS, Agreement, end_with_trainer, listen, requeue
from training.loop.checkpointer import how_to_resume


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_process_lives(number):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which these tests may run, ignores it
    before = [signal.getsignal(n) for n in SIGNALS]
    with listen() as heard:
        assert heard.wanted is None
        os.kill(os.getpid(), number)
        assert heard.wanted == signal.Signals(number).name
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard.wanted == signal.Signals(number).name  # the first one
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_a_signal_is_answered_at_once(caplog):
    """And not only when the step ends, which may take long."""
    with listen(), caplog.at_level("WARNING"):
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 20
        word = "SIGINT: the run saves and stops as soon as the current step, save or evaluation is over; a second"
        while not any(line.startswith(word) for line in caplog.messages):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_under_nohup_a_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listen() as heard:
            os.kill(os.getpid(), signal.SIGHUP)
            assert heard.wanted is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_ends_at_once_and_one_delivered_twice_does_not(monkeypatch):
    clock = [7.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    with listen() as heard:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 1.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert heard.wanted == "SIGINT"


def test_handlers_are_restored_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(OSError), listen():
        raise OSError
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_change_no_handler():
    seen = []

    def run() -> None:
        with listen() as heard:
            seen.append((heard.wanted, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(None, signal.getsignal(signal.SIGTERM))]


# --- several ranks ---------------------------------------------------------------------------------------------


def wishes(stops: dict[int, int], saves: dict[int, int], steps: int) -> tuple[list, tuple]:
    """The answers to each exchange. Rank r asks to stop from step ``stops[r]`` on, and to save at ``saves[r]``."""
    rank = dist.get_rank()
    agreement = Agreement()
    answers = []
    for step in range(steps):
        answers.append(agreement.exchange(step >= stops.get(rank, steps), step == saves.get(rank)))
    return answers, agreement.close()


def test_all_ranks_hear_of_any_wish_at_the_next_step():
    for answers, last in ranks(2).run(wishes, {1: 3}, {0: 1, 1: 4}, 5):
        assert [stop for stop, _ in answers] == [False, False, False, False, True]
        assert [save for _, save in answers] == [False, False, True, False, False]
        assert last == (True, True)


def one_after_the_other(folder: str) -> bool:
    """Rank 1 takes part in the exchange of a step only after rank 0 has finished its call."""
    through = True
    dist.barrier()
    with Agreement() as agreement:
        for step in range(3):
            past = Path(folder, f"past_{step}")
            if dist.get_rank() == 1:
                deadline = time.monotonic() + 60
                while not past.exists() and time.monotonic() < deadline:
                    time.sleep(0.01)
                through &= past.exists()
            agreement.exchange(False, False)
            past.touch()
    return through


def test_an_exchange_does_not_wait_for_itself(tmp_path):
    assert ranks(2).run(one_after_the_other, str(tmp_path)) == [True, True]


def test_alone_a_wish_is_known_at_once():
    with Agreement() as agreement:
        assert agreement.exchange(False, True) == (False, True)
        assert agreement.exchange(True, False) == (True, False)
    assert agreement.close() == (False, False)


class Failed(Exception):
    pass


def leave_by_error() -> str:
    """Rank 0 fails while rank 1 has not yet taken part in the last exchange."""
    agreement = Agreement()
    try:
        with agreement:
            if dist.get_rank() == 0:
                agreement.exchange(True, True)
                raise Failed
    except Failed:
        outcome = "failed"
    else:
        outcome = "went on"
        agreement.exchange(False, False)
    dist.barrier()
    return outcome


def test_an_error_is_not_kept_waiting_for_the_other_ranks():
    assert ranks(2).run(leave_by_error) == ["failed", "went on"]


# --- loader processes ------------------------------------------------------------------------------------------

LOADER = """
import multiprocessing, os, signal, sys, time
import torch
from training.data.loader import open_loader
from training.distributed.signals import SIGNALS, listen

class Slow(torch.utils.data.IterableDataset):
    def __iter__(self):
        for i in range(5):
            time.sleep(0.1)
            yield i

multiprocessing.set_start_method(sys.argv[1])
with listen() as heard:
    signals = [*SIGNALS, signal.SIGTERM]
    for n, batch in enumerate(open_loader(Slow(), 2, torch.device("cpu"))):
        if n and signals:  # both loader processes are at work
            os.killpg(0, signals.pop(0))
    print(heard.wanted, n + 1, flush=True)
"""


@pytest.mark.parametrize("default", ["fork", "forkserver"])  # Python's, of which the second dies of these signals
def test_signals_to_all_processes_of_a_rank_leave_its_loader_at_work(default):
    done = subprocess.run(
        [sys.executable, "-c", LOADER, default],
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(signals.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stdout) == (0, "SIGTERM 10\n"), done.stderr


def be_a_loader(pipe) -> None:
    end_with_trainer()
    pipe.send(os.getpid())
    time.sleep(600)


def wait_beside_a_loader(pipe) -> None:
    multiprocessing.get_context("fork").Process(target=be_a_loader, args=(pipe,)).start()
    time.sleep(600)


def test_a_loader_ends_with_a_trainer_that_is_killed():
    ours, theirs = multiprocessing.Pipe()
    trainer = multiprocessing.get_context("forkserver").Process(target=wait_beside_a_loader, args=(theirs,))
    trainer.start()
    loader = ours.recv()
    trainer.kill()
    trainer.join()
    deadline = time.monotonic() + 60
    with suppress(FileNotFoundError, ProcessLookupError):
        while "(zombie)" not in Path(f"/proc/{loader}/status").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def be_a_late_loader(pipe) -> None:
    while os.getppid() == multiprocessing.parent_process().pid:
        time.sleep(0.01)
    end_with_trainer()
    pipe.send("goes on")


def start_a_late_loader(pipe) -> None:
    multiprocessing.get_context("fork").Process(target=be_a_late_loader, args=(pipe,)).start()
    os._exit(0)


def test_a_loader_that_starts_when_its_trainer_has_gone_ends_too():
    ours, theirs = multiprocessing.Pipe()
    trainer = multiprocessing.get_context("forkserver").Process(target=start_a_late_loader, args=(theirs,))
    trainer.start()
    theirs.close()
    trainer.join()
    with pytest.raises(EOFError):
        ours.recv()


# --- queued again ------------------------------------------------------------------------------------------------


class Slurm:
    """Stand-ins for Slurm's commands. ``called``: what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.put("squeue", "echo RUNNING")
        self.put("scontrol", "exit 0")

    def put(self, name: str, body: str) -> None:
        (self.folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{self.folder}/called\n{body}\n')
        (self.folder / name).chmod(0o755)

    @property
    def called(self) -> list[str]:
        file = self.folder / "called"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Iterator[Slurm]:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    yield Slurm(tmp_path)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_job_is_queued_again_and_its_end_is_awaited(slurm, caplog):
    with caplog.at_level("INFO"):
        assert requeue({"SLURM_JOB_ID": "71"})
    assert slurm.called[-1] == "scontrol requeue 71"
    assert "job 71" in caplog.text
    os.kill(os.getpid(), signal.SIGTERM)  # Slurm's, while this process is about to end


def test_of_an_array_one_job_is_queued_again(slurm):
    """Its last job has the number of the array, of which squeue would tell all jobs."""
    assert requeue({"SLURM_JOB_ID": "70", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"})
    assert [call.split()[-1] for call in slurm.called if call.startswith("scontrol")] == ["70_3"]
    assert any("--jobs 70_3 " in call for call in slurm.called)


def test_a_job_that_its_user_has_cancelled_stays_cancelled(slurm, caplog):
    slurm.put("squeue", "echo COMPLETING")
    with caplog.at_level("INFO"):
        assert not requeue({"SLURM_JOB_ID": "71"})
    assert not any("requeue" in call for call in slurm.called)
    assert "COMPLETING" in caplog.text


@pytest.mark.parametrize("why", ["Job may only be requeued once", "No such file"])
def test_a_job_that_cannot_be_queued_again_says_why(slurm, monkeypatch, caplog, why):
    slurm.put("scontrol", f"echo slurm_requeue error: {why} >&2; exit 1")
    if why == "No such file":
        monkeypatch.setenv("PATH", str(slurm.folder / "empty"))
    assert not requeue({"SLURM_JOB_ID": "71"})
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "job 71" in record.getMessage() and "--resume latest" in record.getMessage()
    assert why in record.getMessage()


def test_outside_slurm_nothing_is_asked(slurm):
    assert not requeue({}) and slurm.called == []


def test_how_to_continue():
    line = how_to_resume("SIGUSR1", 120, "mine", Path("logs/mine/checkpoints/step_120.pt"))
    assert "SIGUSR1 after 120 steps" in line and "logs/mine/checkpoints/step_120.pt" in line
    assert line.endswith("--name mine --resume latest")
    assert "nothing was saved" in how_to_resume("", 0, "mine", None)
    late = how_to_resume("SIGTERM", 120, "mine", Path("logs/mine/checkpoints/step_80.pt"), saved=False)
    assert "could not be saved; resume from the newest checkpoint, logs/mine/checkpoints/step_80.pt" in late
