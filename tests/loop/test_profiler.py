"""--profile writes a trace of the steps after the warm-up, and logs a warning if a run is too short for one."""

import gzip
import json

import torch

from training.distributed.process_group import World
from training.loop.profiler import SKIPPED, TRACED, WARMUP, open_profiler

WORLD = World(0, 0, 1, 1, torch.device("cpu"))


def run_steps(profiler, steps):
    a, b = torch.randn(8, 16), torch.randn(16, 8)
    with profiler:
        for _ in range(steps):
            a @ b
            profiler.step()


def test_trace_holds_exactly_the_traced_steps(tmp_path):
    run_steps(open_profiler(True, tmp_path, WORLD), SKIPPED + WARMUP + TRACED + 5)
    with gzip.open(tmp_path / "profile" / "rank0.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    products = [event for event in events if event.get("name") == "aten::mm"]
    assert len(products) == TRACED
    assert "aten::mm" in (tmp_path / "profile" / "rank0.txt").read_text()


def test_a_run_that_is_too_short_logs_that_no_trace_was_written(tmp_path, caplog):
    run_steps(open_profiler(True, tmp_path, WORLD), SKIPPED)
    assert not (tmp_path / "profile").exists()
    assert "no trace was written" in caplog.text


def test_without_the_flag_nothing_happens(tmp_path):
    run_steps(open_profiler(False, tmp_path, WORLD), SKIPPED + WARMUP + TRACED)
    assert not list(tmp_path.iterdir())
