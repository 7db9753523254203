"""--profile writes a trace of the steps after the warm-up, and logs a warning if a run is too short for one."""

import gzip
import json
import re

import pytest
import torch

from training.distributed.process_group import World
from training.loop.breakdown import Span, kind_of, of_spans
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


@pytest.mark.parametrize(
    "kind, name",
    [
        ("compiled", "triton_poi_fused_gelu_gelu_backward_view_30"),
        ("compiled", "triton_poi_fused__scaled_dot_product_cudnn_attention__to_copy_add_clone_select_view_3"),
        ("compiled", "triton_red_fused_convolution_sum_4"),
        ("matrix products, compiled", "triton_tem_fused_addmm_gelu_7"),
        ("matrix products", "nvjet_sm90_tst_192x192_64x3_1x2_h_bz_coopB_splitK_NTN"),
        ("attention", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1"),
        ("attention", "void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*, void const*)"),
        ("attention", "void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*, unsigned int)"),
        ("convolution", "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_nhwc>"),
        ("convolution", "void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, float, false>"),
        ("copies", "Memcpy HtoD (Pinned -> Device)"),
        (
            "optimizer",
            "void at::native::multi_tensor_apply_kernel<at::native::FusedOptimizerTensorListMetadata<4>>",
        ),
    ],
)
def test_kinds_of_the_kernels_of_an_h200(kind, name):
    assert kind_of(name) == kind


def test_a_run_that_is_too_short_logs_that_no_trace_was_written(tmp_path, caplog):
    run_steps(open_profiler(True, tmp_path, WORLD), SKIPPED)
    assert not (tmp_path / "profile").exists()
    assert "no trace was written" in caplog.text


def test_without_the_flag_nothing_happens(tmp_path):
    run_steps(open_profiler(False, tmp_path, WORLD), SKIPPED + WARMUP + TRACED)
    assert not list(tmp_path.iterdir())
