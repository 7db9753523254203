"""--profile writes a trace of the steps after the warm-up, and logs a warning if a run is too short for one."""

import gzip
import json
import re

import pytest
import torch

from training.distributed.process_group import World
from training.loop.breakdown import Span, of_spans
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
    assert "aten::mm" in (tmp_path / "profile" / "rank0_operators.txt").read_text()
    page = (tmp_path / "profile" / "rank0.txt").read_text()
    assert re.search(r"^ *\d+\.\d%  matrix products$", page, re.MULTILINE) and "ms per step by the clock" in page
    assert re.search(r"^ *\d+\.\d%  aten::mm$", page, re.MULTILINE)


def test_what_the_device_does_at_the_same_time_is_not_idle_time():
    steps = [Span("ProfilerStep#10", 0, 50), Span("ProfilerStep#11", 50, 90)]
    work = [
        Span("ampere_gemm_128", 10, 40),
        Span("ncclDevKernel_AllReduce", 30, 60),
        Span("ampere_gemm_128", 70, 80),
        Span("some_kernel", 72, 75),
        Span("ampere_gemm_128", 90, 100),
    ]
    found = of_spans(steps, work, largest=2)
    assert found.seconds == pytest.approx(50e-6)
    assert found.idle == pytest.approx(0.3)
    assert dict(found.kinds) == pytest.approx({"matrix products": 0.5, "communication": 0.3, "other": 0.03})
    assert [name for name, _ in found.largest] == ["ampere_gemm_128", "ncclDevKernel_AllReduce"]
    assert "30.0%  of the time the GPU has nothing to do" in str(found)


def test_a_run_that_is_too_short_logs_that_no_trace_was_written(tmp_path, caplog):
    run_steps(open_profiler(True, tmp_path, WORLD), SKIPPED)
    assert not (tmp_path / "profile").exists()
    assert "no trace was written" in caplog.text


def test_without_the_flag_nothing_happens(tmp_path):
    run_steps(open_profiler(False, tmp_path, WORLD), SKIPPED + WARMUP + TRACED)
    assert not list(tmp_path.iterdir())
