"""Loader processes that are killed, fail, or cannot hand over what they have read: real processes and signals."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import IterableDataset, get_worker_info

from training.data.loader import open_loader
from training.distributed import loader_processes
from training.distributed.failures import LoaderEnded
from training.distributed.loader_processes import Batches

CPU = torch.device("cpu")


class Numbers(IterableDataset):
    """0, 1, 2, ... from each process; ``act(n)`` is called before each."""

    def __init__(self, act=lambda n: None, stop: int = 10**9) -> None:
        self.act, self.stop = act, stop

    def __iter__(self):
        for n in range(self.stop):
            self.act(n)
            yield n


def batches(act=lambda n: None, workers: int = 2, stop: int = 10**9) -> Batches:
    return iter(open_loader(Numbers(act, stop), workers, CPU))


def test_a_process_that_is_killed_is_told_where_the_next_batch_is_wanted():
    chunks = batches()
    assert [next(chunks) for _ in range(4)] == [0, 0, 1, 1]
    victim = chunks._processes[1]
    os.kill(victim.pid, signal.SIGKILL)
    victim.join(5)
    time.sleep(0.05)  # nothing is raised here, whatever the main thread is about
    expected = rf"^loader process {victim.pid} was killed \(signal: Killed\): by a user, or because memory ran out"
    with pytest.raises(LoaderEnded, match=expected):
        for _ in range(9):
            next(chunks)
    assert not any(process.is_alive() for process in chunks._processes if process.join(2) is None)


def test_what_becomes_of_one_pass_is_not_lost_in_another():
    """Of training, while an evaluation runs."""
    training, evaluation = batches(), batches(stop=20)
    next(training)
    training._processes[0].kill()
    training._processes[0].join(5)
    assert len(list(evaluation)) == 40
    with pytest.raises(LoaderEnded, match="was killed"):
        next(training)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_it_is_told_at_once_where_the_main_thread_waits_for_it(number):
    waited_for = multiprocessing.get_context("fork").Event()

    def die(n: int) -> None:
        if n == 1 and get_worker_info().id == 1:
            waited_for.wait()
            time.sleep(0.2)
            os.kill(os.getpid(), number)
        if n == 1:
            time.sleep(60)

    chunks = batches(die)
    assert [next(chunks), next(chunks)] == [0, 0]
    waited_for.set()
    begun = time.monotonic()
    with pytest.raises(LoaderEnded, match=rf"was killed \(signal: {signal.strsignal(number)}\)"):
        next(chunks)
    assert time.monotonic() - begun < 4.5  # torch looks every 5 s


def test_a_process_that_ends_by_itself():
    with pytest.raises(LoaderEnded, match=r"has ended by itself \(code 3\)"):
        list(batches(lambda n: os._exit(3) if n == 2 else None))


def test_what_a_process_raises_is_raised_here_and_the_others_are_not_waited_for():
    def act(n: int) -> None:
        if n == 1 and get_worker_info().id == 1:
            time.sleep(60)
        if n == 1:
            raise KeyError("no such column")

    chunks, begun = batches(act), time.monotonic()
    with pytest.raises(KeyError, match="no such column"):
        list(chunks)
    chunks.end()
    del chunks
    assert time.monotonic() - begun < 20


def fails_to_share(n: int) -> None:
    if n == 1:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_7_8_9>: No space left on device (28)"
        )


def test_shared_memory_that_is_too_small_is_one_sentence():
    with pytest.raises(
        ValueError, match=r"^--workers 2: /dev/shm \([\d,]+ MB\) has too little room .*--shm-size.*--workers 0$"
    ):
        list(batches(fails_to_share))


class Unsent:
    def __reduce__(self):
        raise RuntimeError("cannot be pickled")


class Unsendable(IterableDataset):
    def __iter__(self):
        while True:
            yield Unsent()


def test_a_batch_that_cannot_be_handed_over_does_not_stall_the_run(capfd):
    with pytest.raises(LoaderEnded, match=r"has ended by itself \(code 1\): see what it has printed"):
        next(iter(open_loader(Unsendable(), 1, CPU)))
    assert "RuntimeError: cannot be pickled" in capfd.readouterr().err


def test_an_end_that_was_due_is_no_failure():
    assert sorted(batches(stop=3)) == [0, 0, 1, 1, 2, 2]
    assert list(batches(workers=0, stop=3)) == [0, 1, 2]


EXIT = """
import sys, time, torch
sys.path.insert(0, {root!r})
from tests.distributed.test_loader_processes import batches
chunks = batches(lambda n: time.sleep(3600 if n else 0), workers=2)
next(chunks)
"""


def test_a_program_that_ends_does_not_wait_for_stalled_processes():
    root = str(Path(__file__).parents[2])
    env = os.environ | {"PYTHONPATH": str(Path(loader_processes.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", EXIT.format(root=root)]
    done = subprocess.run(command, env=env, capture_output=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, b"")
