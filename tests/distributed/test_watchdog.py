"""Real ranks that hang, are stopped, or fail: who is named, and how all of them end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.support.ranks import free_port
from training.config.run import DistributedConfig
from training.distributed import board, collectives, failures, process_group, watchdog
from training.distributed.process_group import World
from training.distributed.watchdog import HUNG, Status, Watchdog, describe

ALONE = World(0, 0, 1, 1, torch.device("cpu"))
CONFIG = DistributedConfig("env://", "gloo", "29500", 1, False, False)
TIMEOUT = 1.0


def enter(rank: int, size: int, port: int, folder: str, body, argument) -> None:
    """The process of a rank: runs ``body(world, argument)`` in a group, with stderr in a file."""
    with open(Path(folder, f"stderr-{rank}"), "wb") as file:
        os.dup2(file.fileno(), 2)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    board.PATIENCE, failures._A_MOMENT = 1.5, 0.5
    watchdog._POLL, watchdog._GRACE = 0.1, 1.0
    world = process_group.start(CONFIG)
    Path(folder, f"pid-{rank}").write_text(str(os.getpid()))
    code = 1
    try:
        body(world, argument)
        code = 0
    except Exception as error:
        failures.report(error)
    finally:
        failures.leave(code)
    sys.exit(code)


class Group:
    """``size`` processes that run ``body``."""

    def __init__(self, folder: Path, size: int, body, argument=None) -> None:
        context, port = mp.get_context("forkserver"), free_port()
        context.set_forkserver_preload(["drrho_clip.losses.individual", "drrho_clip.losses.baselines"])
        self.folder = folder
        self.processes = [
            context.Process(target=enter, args=(r, size, port, str(folder), body, argument)) for r in range(size)
        ]
        for process in self.processes:
            process.start()

    def wait(self, *ranks: int, seconds: float = 300) -> list[int | None]:
        """Exit codes of ``ranks``; None: still running."""
        deadline = time.monotonic() + seconds
        for rank in ranks:
            self.processes[rank].join(max(deadline - time.monotonic(), 0))
        return [self.processes[rank].exitcode for rank in ranks]

    def stderr(self, rank: int) -> str:
        return (self.folder / f"stderr-{rank}").read_text()

    def until(self, name: str) -> str:
        """What the file ``name`` holds, when it is there."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                if text := (self.folder / name).read_text():
                    return text
            time.sleep(0.02)
        raise AssertionError(f"{name} is not there")

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()  # also one that is stopped
            process.join()


def sleeps_for_ever() -> None:
    time.sleep(1000)


def holds_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(1000)


def step_by_step(world: World, hang) -> None:
    """The last rank hangs in step 3, the others wait for it."""
    with Watchdog(world, TIMEOUT) as dog:
        for step in range(5):
            dog.beat(step)
            if step == 3 and world.rank == world.world_size - 1:
                hang()
            collectives.all_reduce_sum(torch.ones(1))


def test_a_rank_that_hangs_is_named_with_the_line_that_it_hangs_in(tmp_path):
    with Group(tmp_path, 3, step_by_step, sleeps_for_ever) as group:
        assert group.wait(0, 1, 2) == [HUNG] * 3
        report = group.stderr(0)
        assert re.search(
            r"no step for \d+ s; rank 2 hangs in sleeps_for_ever \(test_watchdog.py:\d+\); ranks 0, 1 wait", report
        )
        assert re.search(r"rank 2, step 3, .*\n(?s:.*)in sleeps_for_ever\n\s+time.sleep\(1000\)", report)
        assert "hangs" not in group.stderr(1) + group.stderr(2)


def test_a_rank_whose_threads_do_not_run_is_named(tmp_path):
    with Group(tmp_path, 2, step_by_step, holds_the_interpreter) as group:
        assert group.wait(0) == [HUNG]
        assert "rank 1 does not answer" in group.stderr(0)


def steps_until_stopped(world: World, folder: str) -> None:
    with Watchdog(world, TIMEOUT) as dog:
        for step in range(10**6):
            dog.beat(step)
            collectives.all_reduce_sum(torch.ones(1))
            time.sleep(0.01)
            if step == 10:
                Path(folder, f"at-work-{world.rank}").write_text("yes")


def test_a_job_that_is_suspended_goes_on_and_a_process_that_is_stopped_is_named(tmp_path):
    with Group(tmp_path, 2, steps_until_stopped, str(tmp_path)) as group:
        for rank in range(2):
            group.until(f"at-work-{rank}")
        pids = [int(group.until(f"pid-{rank}")) for rank in range(2)]
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in pids:
                os.kill(pid, number)
            time.sleep(1.5 * TIMEOUT if number == signal.SIGSTOP else 0.7 * TIMEOUT)
        assert group.wait(0, 1, seconds=0) == [None, None]
        os.kill(pids[1], signal.SIGSTOP)
        assert group.wait(0) == [HUNG]
        assert "rank 1 does not answer" in group.stderr(0)
        assert "in all_reduce_sum" in group.stderr(0)  # the stack of the one that waits


def test_a_stopped_process_that_holds_the_store(tmp_path):
    with Group(tmp_path, 2, steps_until_stopped, str(tmp_path)) as group:
        group.until("at-work-0")
        os.kill(int(group.until("pid-0")), signal.SIGSTOP)
        assert group.wait(1) == [HUNG]
        assert "the store belongs to rank 0 or its launcher" in group.stderr(1)


class Boom(RuntimeError):
    pass


def one_raises(world: World, how: str) -> None:
    """Rank 1 of 3 raises while rank 0 is in a collective, and rank 2 in a call that only its watchdog can end."""
    with Watchdog(world, 0) as dog:
        dog.beat(0)
        collectives.barrier()
        if world.rank == 1 or how == "all":
            raise Boom("tensor 7 is odd")
        if world.rank == 2:
            sleeps_for_ever()
        collectives.barrier()


def words(group: Group) -> str:
    return "".join(group.stderr(rank) for rank in range(3))


def test_a_rank_that_raises_ends_all_with_one_traceback(tmp_path):
    with Group(tmp_path, 3, one_raises, "one") as group:
        assert group.wait(0, 1, 2) == [1, 1, 1]
        assert words(group).count("Traceback") == 1
        assert "Boom: tensor 7 is odd" in group.stderr(1) and "in one_raises" in group.stderr(1)
        # Rank 0 writes the run's log.
        assert "the run ends: rank 1 failed: Boom: tensor 7 is odd" in group.stderr(0)
        assert "Boom" not in group.stderr(2)


def test_what_all_ranks_raise_is_one_traceback(tmp_path):
    with Group(tmp_path, 3, one_raises, "all") as group:
        assert group.wait(0, 1, 2) == [1, 1, 1]
        assert words(group).count("Traceback") == 1


def test_a_rank_that_is_killed_ends_the_others_with_one_line(tmp_path):
    with Group(tmp_path, 3, steps_until_stopped, str(tmp_path)) as group:
        group.until("at-work-1")
        os.kill(int(group.until("pid-1")), signal.SIGKILL)
        assert group.wait(0, 2) == [1, 1]
        # One rank reports it. Rank 0's watchdog adds that the run ends, if its main thread takes long.
        assert words(group).count("error: a rank has ended without a report") == 1
        assert "Traceback" not in words(group)


# --- alone -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ended(monkeypatch) -> list[int]:
    """The codes with which the process would have ended."""
    codes: list[int] = []
    monkeypatch.setattr(failures, "end", codes.append)
    return codes


def watch(seconds: dict[str, float], ended: list[int], timeout: float = 0.2) -> None:
    """The first step, a step, a save, a pause and another step, that take ``seconds``, or until the run ends."""

    def work(what: str) -> None:
        until = time.monotonic() + seconds.get(what, 0)
        while not ended and time.monotonic() < until:
            time.sleep(0.01)

    with Watchdog(ALONE, timeout) as dog:
        work("start")
        for step in ("first", "second"):
            dog.beat(0)
            work(step)
        with dog.paused(3):
            work("save")
        with dog.paused():
            work("pause")
        dog.beat(1)
        work("last")


@pytest.mark.parametrize("slow", [{"start": 0.5}, {"first": 0.5}, {"save": 0.4}, {"pause": 0.9}])
def test_what_may_take_longer(ended, slow):
    watch(slow, ended)
    assert ended == []


@pytest.mark.parametrize("slow", ["first", "second", "save", "last"])
def test_what_may_not(ended, caplog, slow):
    watch({slow: 60}, ended)
    assert ended == [HUNG]
    assert "no step for" in caplog.text and "in work\n" in caplog.text and "in watch\n" in caplog.text


def test_no_limit(ended):
    watch({"second": 0.5}, ended, timeout=0)
    assert ended == []


def test_the_thread_ends_with_the_context():
    before = threading.active_count()
    with pytest.raises(Boom), Watchdog(ALONE, 1.0):
        raise Boom
    assert threading.active_count() == before


def status(step: int, waits: bool, function: str = "work") -> Status:
    return Status(step, 9.0, "node", 1, waits, (("a.py", 3, function, "x = 1"),))


def test_who_is_named():
    named = lambda ranks: describe(ranks).splitlines()[0]  # noqa: E731
    assert "rank 2 does not answer: " in named({0: status(1, True), 1: status(1, True), 2: None})
    assert "rank 1 hangs in load (a.py:3); ranks 0, 2 wait in work" in named(
        {0: status(4, True), 1: status(4, False, "load"), 2: status(4, True)}
    )
    # All wait, at different steps: the rank at the earliest step is the one that hangs.
    assert "rank 1 hangs" in named({0: status(5, True), 1: status(4, True)})
    assert "hang" not in named({0: status(5, True), 1: status(5, True)})
    many = describe(dict.fromkeys(range(100), status(5, False)) | {7: None})
    assert "rank 7 does not answer" in many and "ranks 0, 1, 2, 3 and 95 more hang" in many
    assert many.count("step 5") == 4


def test_a_rank_that_reads_from_its_gpu_waits_for_the_others_there():
    inner = ("/site-packages/torch/_tensor.py", 9, "__float__", "return self.item()")
    for code, on_gpu, waits in [
        ("taken = flag.item()", True, True),
        ("values = torch.stack(cells).tolist()", True, True),
        ("self._done.synchronize()", True, True),
        ("taken = flag.item()", False, False),
        ("batch = next(self.batches)", True, False),
    ]:
        stack = [(str(watchdog._SRC / "training/loop/optimizer.py"), 7, "step", code), inner]
        assert watchdog._waits(stack, on_gpu) == waits, code
