"""The benchmarks run at tiny sizes, print what they say, and notice when what they compare disagrees.

No times are checked here: ratios are for real sizes on a quiet machine.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.support import oracle, tiny_models

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MIB = 2**20


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(script, *flags):
    """Its JSON object, which must be all that stands on stdout, and what it printed for people."""
    command = [sys.executable, str(BENCHMARKS / script), *map(str, flags), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout), done.stderr


def test_loss():
    flags = ["--batch", 640, "--dim", 16, "--ref-dim", 24, "--data-size", 999, "--repeats", 1, "--threads", 1]
    result, text = run("loss.py", *flags)
    assert result["time_ratio"] == pytest.approx(result["ours_seconds"] / result["autograd_seconds"])
    assert result["limit_ratio"] == pytest.approx(result["ours_seconds"] / result["six_products_seconds"])
    assert result["autograd_extra_bytes"] > 4 * 640**2
    assert result["memory_ratio"] == pytest.approx(result["ours_extra_bytes"] / result["autograd_extra_bytes"])
    assert 0 < result["largest_difference"] < 1e-4
    assert "autograd, whole matrices" in text


def test_loss_notices_another_gradient(monkeypatch):
    import loss
    import plain

    options = loss.Options(32, 8, 8, 100, 1, "cpu", 1, False)
    loss.check_agreement(options)
    right = plain.matrix_loss

    def wrong(*args, **kwargs):
        value, log_u = right(*args, **kwargs)
        return 1.001 * value, log_u

    monkeypatch.setattr(plain, "matrix_loss", wrong)
    with pytest.raises(AssertionError, match="the variants differ"):
        loss.check_agreement(options)


def test_what_ours_is_compared_with_follows_the_formulas():
    import plain

    torch.manual_seed(0)
    n, tau, eps, rho, gamma = 12, 0.05, 1e-14, 8.0, 0.4
    image, text = (F.normalize(torch.randn(n, 6), dim=1).requires_grad_() for _ in range(2))
    ref_image, ref_text = (F.normalize(torch.randn(n, 5), dim=1) for _ in range(2))
    scale = torch.tensor(1 / tau, requires_grad=True)
    old_log_u = torch.randn(n, 2)
    old_log_u[:5] = 0.0
    loss, log_u = plain.matrix_loss(
        image, text, scale, ref_image, ref_text, old_log_u, gamma=gamma, eps=eps, rho=rho
    )
    loss.backward()
    right = oracle.step(
        image,
        text,
        torch.arange(n),
        torch.full((n, 2), tau),
        torch.where(old_log_u == 0.0, torch.nan, old_log_u.exp()),
        gamma=gamma,
        eps=eps,
        weight=torch.ones(n, 2),
        ref_image=ref_image,
        ref_text=ref_text,
    )
    for ours, theirs in ((log_u.exp(), right.u), (image.grad, right.grad_image), (text.grad, right.grad_text)):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-4, atol=1e-6)
    grad_tau = right.u.log().mean() + rho - right.mean_margin.mean()
    assert scale.grad.item() == pytest.approx(-(tau**2) * grad_tau.item(), rel=1e-4)


def test_sample_state():
    result, text = run(
        "sample_state.py", "--data-size", 3001, "--ranks", 2, "--batch", 64, "--steps", 4, "--repeats", 1
    )
    assert result["bytes_per_rank"] == 1501 * 2 * 4
    assert result["replicated_bytes_per_rank"] == 3001 * 2 * 4
    assert result["values_agree"] is True
    assert min(result["ms_per_step"], result["replicated_ms_per_step"]) > 0
    assert "replicated" in text
    waits = {place: (found["waits"], found["late"]) for place, found in result["places"].items()}
    assert waits["device"] == (0, 0) and waits["host, at once"][0] >= 4 and waits["host, at once"][1] == 0
    assert waits["host"] == (0, 2)


def test_the_stand_in_for_a_gpu_counts_what_waits_and_refuses_what_would_fail():
    from drrho_clip.state.readback import Readback
    from stand_in import StandIn

    with StandIn() as device:
        there = torch.arange(4.0).to(device.name)
        made = torch.zeros(4, device=device.name)
        assert there.device == made.device == device.name and (there + made).sum().device == device.name
        assert device.waits == 0
        assert (there + 1).tolist() == [1.0, 2.0, 3.0, 4.0] and bool(there[1] > 0) and there.cpu().sum() == 6
        assert device.waits == 3
        there[there > 1], torch.zeros(4).copy_(there), there.to("cpu", torch.int64)
        assert (device.waits, device.late) == (6, 0)
        copy = Readback(there)
        there += 5
        assert copy.value().tolist() == [0.0, 1.0, 2.0, 3.0] and (device.waits, device.late) == (6, 1)
        for mixed in (lambda: there + torch.ones(4), lambda: torch.ones(4)[there.long()]):
            with pytest.raises(RuntimeError, match="two devices"):
                mixed()


def test_replicated_table_reads_what_was_written():
    import plain

    table = plain.ReplicatedTable(10**9)
    index, values = torch.tensor([3, 999_999_999]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    table.write(index, values)
    assert torch.equal(
        table.read(torch.tensor([999_999_999, 4, 3])), torch.stack([values[1], torch.zeros(2), values[0]])
    )


def test_checkpoint(tmp_path):
    model = tiny_models.path("tiny-vit", tmp_path)
    result, text = run(
        *("checkpoint.py", "--model", model, "--data-size", 1000, "--repeats", 1, "--folder", tmp_path)
    )
    assert result["stall_ratio"] == pytest.approx(result["stall_seconds"] / result["synchronous_seconds"])
    assert result["written_seconds"] > result["stall_seconds"] > 0
    assert result["bytes"] > 3 * 4 * result["parameters"] + 2 * 4 * 1000
    assert min(result["check_seconds"], result["resume_seconds"], result["step_ratio"]) > 0
    assert "training waits for a save" in text


@pytest.fixture(scope="module")
def small_pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [tiny_models.path(name, folder) for name in ("tiny-vit", "tiny-vit-reference")]


def test_channels_last_changes_the_layout_alone(small_pair, tmp_path):
    import steps
    import train_step

    weights = train_step.write_random_weights(tmp_path / "reference.pt", small_pair[1])
    options = steps.Options(("ours",), *small_pair, 4, "fp32", False, 1, 1, 50, weights)
    other, ours = (steps.build(name, options) for name in ("ours+channels_last", "ours"))
    seen = []
    other.task.bare.visual.conv1.register_forward_hook(lambda module, given, output: seen.append(output))
    for run in (other, ours):
        run.steps(1)
    assert all(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() for x in seen)
    assert len(seen) == 1
    for a, b in zip(other.task.bare.parameters(), ours.task.bare.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["cached", "openclip"])
def test_steps_without_a_reference(small_pair, tmp_path, name):
    """They train, and need less than ours by exactly the reference's forward pass."""
    import steps
    import train_step
    from training.loop.flops import forward_flops

    weights = train_step.write_random_weights(tmp_path / "reference.pt", small_pair[1])
    options = steps.Options((name, "ours"), *small_pair, 4, "fp32", False, 1, 1, 50, weights)
    other, ours = (steps.build(n, options) for n in options.variants)
    model = (other.task if name == "cached" else other).bare
    before = model.visual.proj.detach().clone()
    other.steps(2)
    assert not torch.equal(model.visual.proj, before)
    batch = steps.prepare(options).batches[0]
    frozen = ours.task.reference.module
    ref_text = batch.text if batch.ref_text is None else batch.ref_text
    ref_image = batch.image if batch.ref_image is None else batch.ref_image
    needed = other.flops_per_sample(batch) + forward_flops(frozen, ref_image, ref_text)
    assert ours.flops_per_sample(batch) == pytest.approx(needed)


def test_steps_that_select(small_pair, tmp_path):
    """Of 8 samples they embed all and train on two."""
    import steps
    import train_step

    weights = train_step.write_random_weights(tmp_path / "reference.pt", small_pair[1])
    options = steps.Options(("select-cached", "cached"), *small_pair, 8, "fp32", False, 1, 1, 50, weights)
    selecting, cached = (steps.build(n, options) for n in options.variants)
    selecting.steps(1)
    seen = selecting.task.loss.state.values()["log_u_image"].isfinite().sum()
    assert (seen, train_step.kept_share(selecting), train_step.kept_share(cached)) == (2, 0.25, 1.0)
    batch = steps.prepare(options).batches[0]
    forward = cached.flops_per_sample(batch) / 3
    assert selecting.flops_per_sample(batch) == pytest.approx(forward + 0.25 * 3 * forward)


def test_a_rehearsal_of_the_gpu_command(tmp_path):
    """It comes to its end here, and every part of it works."""
    file = tmp_path / "gpu.json"
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "--cpu", "--minutes", "9", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout + done.stderr
    held = json.loads(file.read_text())
    assert (
        list(held["results"]) == ["environment", "tests", "waits", "headline", "fed"] and not held["not_measured"]
    )
    assert held["results"]["tests"]["failed"] == {} and held["results"]["tests"]["tests"] > 10
    assert held["results"]["waits"]["recipes"]["drrho"]["fine"]
    assert held["results"]["fed"]["samples_per_second"] > 0
    assert "passed, 0 failed" in done.stdout
    headline = held["results"]["headline"]
    for name in ("ours", "plain"):
        assert headline[name]["samples_per_second"] == pytest.approx(4 / headline[name]["seconds_per_step"])
        assert headline[name]["trained_per_second"] == headline[name]["samples_per_second"]
        assert headline[name]["peak_bytes"] > 10 * MIB
        assert headline[name]["share_of_peak"] is None
    assert 0 < headline["largest_difference"] < 1e-3
    assert headline["speedup"] > 0
    assert headline["model"] == "small-vit"
    assert headline["kernels"]["idle"] is None and len(headline["kernels"]["largest"]) == 5
    assert "headline: ours / plain" in done.stdout


def measured(tmp_path, command, limit=30, seconds=30):
    import gpu

    measurement = gpu.Measurement("it", (sys.executable, "-c", command), limit, gpu.last_line)
    return gpu.run(measurement, seconds, tmp_path / "none.xml")


def test_a_gpu_measurement_that_fails_or_takes_too_long_is_told_and_leaves_nothing_running(tmp_path):
    import gpu

    good = measured(tmp_path, "print('words'); print('{\"a\": 1}')")
    assert good["a"] == 1
    bad = measured(tmp_path, "raise SystemExit('no such card')")
    assert bad["failed"] == "exit code 1" and "no such card" in bad["output"]
    assert "FAILED: exit code 1: no such card" in gpu.describe({"it": bad}, ["that", "this"])
    assert "the time was over: that, this" in gpu.describe({}, ["that", "this"])
    late = f"""
import subprocess, time
child = subprocess.Popen(['sleep', '60'])
open({str(tmp_path / "pid")!r}, 'w').write(str(child.pid))
time.sleep(60)
"""
    slow = measured(tmp_path, late, limit=8)
    assert slow["late"] == "ended after 8 s" and slow["wall_seconds"] < 50
    assert (gpu.bad("it", bad), gpu.bad("it", slow), gpu.bad("it", good)) == (True, False, False)
    assert "too long: ended after 8 s" in gpu.describe({"it": slow}, [])
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int((tmp_path / "pid").read_text()), 0)
            time.sleep(0.1)


def test_soak():
    result, text = run("soak.py", "--epochs", 12, "--samples", 40, "--workers", 1, "--limit", 1000)
    assert set(result["bytes"]) == {"main", "worker 0"}
    assert all(len(curve) == 12 and min(curve) > MIB for curve in result["bytes"].values())
    assert "growth: main" in text and "worker 0" in text


def test_soak_sees_a_leak():
    import soak

    assert soak.growth([9 * MIB] * 10 + [5 * MIB] * 40) == 0
    assert soak.growth([5 * MIB + epoch * MIB for epoch in range(50)]) == 30 * MIB
    assert soak.private_bytes(os.getpid()) > 10 * MIB


def _take(mib):
    import measure

    with measure.PeakMemory(torch.device("cpu")) as peak:
        del_me = torch.ones(mib * MIB // 4)
        del del_me
    return peak.bytes


def test_peak_memory_counts_what_was_freed_again():
    import measure

    assert measure.in_fresh_process(_take, 96) == pytest.approx(96 * MIB, rel=0.1)


def test_turns_leave_the_warm_up_out():
    import measure

    runs = []
    variants = {name: lambda name=name: runs.append(name) for name in "ab"}
    seconds = measure.interleaved(variants, repeats=2, device=torch.device("cpu"))
    assert "".join(runs) == "ababab"
    assert {name: len(s) for name, s in seconds.items()} == {"a": 2, "b": 2}


def test_emit_puts_one_of_the_two_on_stdout(capsys):
    import report

    report.emit({"a": 1}, "table", as_json=False)
    assert capsys.readouterr().out == "table\n"
    report.emit({"a": 1}, "table", as_json=True)
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": 1}
    assert err == "table\n"


def test_data():
    sizes = ["--samples", 12, "--batch-size", 4, "--batches", 1, "--repeats", 1, "--workers", 1]
    result, text = run("data.py", *sizes)
    for name in ("ours", "plain", "decode"):
        assert result[f"{name}_per_second"] > 0 and result[f"wall_{name}_per_second"] > 0
    for prefix in ("", "wall_"):
        for other in ("plain", "decode"):  # of one block
            rates = result[f"{prefix}ours_per_second"], result[f"{prefix}{other}_per_second"]
            assert result[f"{prefix}ratio_{other}"] == pytest.approx(rates[0] / rates[1])
    stages = result["microseconds"]
    assert {"reading", "decoding", "crop and resize", "stacking", "tokens", "the rest"} == stages.keys()
    assert sum(stages.values()) == pytest.approx(1e6 / result["ours_per_second"])
    assert "Where our time goes" in text


def test_data_reads_given_shards_without_loader_processes(tmp_path):
    from tests.support import shards

    pattern = shards.write_shards(tmp_path, 8, per_shard=4, size=(60, 50))
    sizes = ["--batch-size", 4, "--batches", 1, "--repeats", 1, "--workers", 0]
    result, _ = run("data.py", "--shards", pattern, *sizes)
    assert result["ratio_plain"] > 0 and result["workers"] == 0


def test_processor_time_counts_loader_processes():
    import multiprocessing

    import data

    def burn():
        end = time.process_time() + 0.4
        while time.process_time() < end:
            pass

    before = data.cpu_seconds()
    child = multiprocessing.get_context("fork").Process(target=burn)
    child.start()
    while time.clock_gettime(data._clock_of(child.pid)) < 0.3:
        time.sleep(0.01)
    assert data.cpu_seconds() - before > 0.29
    child.join()


def test_photographs_are_the_same_every_time(tmp_path):
    import photographs

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        photographs.write_shards(tmp_path / folder, 9, shards=2)
    for name in ("00000.tar", "00001.tar"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with tarfile.open(tmp_path / "a" / "00001.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    assert len(members) == 3 * 5
    assert json.loads(members["000000008.json"])["key"] == "000000008"
    assert Image.open(io.BytesIO(members["000000008.jpg"])).size == (photographs.WIDTH, photographs.HEIGHT)
    assert not members["000000007.txt"].isascii() or b"&" in members["000000007.txt"]


def test_features():
    result, text = run("features.py", "--rows", 3000, "--dim", 8, "--batch", 64, "--repeats", 2, "--no-steps")
    assert result["rows"] == 3000
    assert result["bytes"] > 3000 * (2 * 8 * 2 + 16 + 8)
    assert all(result[f"{key}_ms"] > 0 for key in ("warm", "cold", "ahead", "one_by_one"))
    if "half_kept_ms" in result:  # else a process may not lock so much memory here
        assert result["half_kept_ms"] > 0
    assert "Lookup of 64 random rows of 3,000, 2 x 8, float16" in text


def test_features_times_training_steps_too(small_pair):
    import features

    few = ("--steps", "1", "--repeats", "1", "--batch-size", "6", "--data-size", "100")
    times = features.step_times("--model", small_pair[0], "--ref-model", small_pair[1], *few)
    assert times.keys() == {"step_none_ms", "step_store_ms", "step_live_ms"} and min(times.values()) > 0


def test_features_with_an_error_bound(tmp_path):
    import features

    options = features.Options(3000, 64, 64, 1, None, "float16", 0.01)
    result = features.run(options, tmp_path)
    assert result["bytes_per_pair"] == result["bytes"] / 3000 and result["lookups_per_second_per_core"] > 0
    assert result["bytes"] < 3000 * (2 * 64 * 0.8 + 24)
    assert result["dfn_gb"] == pytest.approx(0.192 * result["bytes_per_pair"])


def test_features_of_several_views(tmp_path):
    import features

    options = features.Options(3000, 64, 64, 1, None, "float16", 0.01, views=3)
    result = features.run(options, tmp_path)
    assert 3000 * (4 * 64 * 0.4 + 28) < result["bytes"] < 3000 * (4 * 64 * 0.8 + 28)


def test_features_notices_another_value(tmp_path, monkeypatch):
    import features

    options = features.Options(300, 16, 64, 1, None, "float16", 0.01)
    features.write(options, tmp_path)
    right = features.values
    monkeypatch.setattr(features, "values", lambda *asked: right(*asked) + np.float32(0.0201))
    with pytest.raises(AssertionError, match="the store gave other values"):
        features.measure(options, tmp_path, cold=False)


def test_codec():
    flags = ["--rows", 64, "--dims", 24, "--bounds", 1e-3, "--repeats", 1, "--mean", 0.5]
    result, text = run("codec.py", *flags)
    ways = {found["way"]: found for found in result["results"]}
    assert {"float16", "bfloat16", "int8", "fp8", "limit", "norm", "measured"} <= ways.keys()
    assert (ways["float16"]["row_bytes"], ways["int8"]["row_bytes"], ways["limit"]["row_bytes"]) == (48, 28, 30)
    assert all(found["max_error"] <= 1e-3 for found in ways.values() if found["bound"])
    assert all(found["encode_gb_per_second"] > 0 < found["decode_gb_per_second"] for found in ways.values())
    assert [same["way"] for same in result["size_of_int8"]] == ["norm", "measured"]
    assert all(same["row_bytes"] <= 28 and same["max_error"] <= same["bound"] for same in result["size_of_int8"])
    assert all(same["bound"] == ways["float16"]["max_error"] for same in result["error_of_float16"])
    assert "a common part of norm 0.5" in text


def test_network(tmp_path):
    """What the kernel counts is what each way to send should take; headers are a few percent."""
    import network

    if (why := network.missing()) is not None:
        result, text = run("network.py")
        assert result == {"skipped": why} and f"not measured: {why}" in text
        pytest.skip(why)
    model = tiny_models.path("tiny-vit", tmp_path)
    result, text = run(
        *("network.py", "--model", model, "--gbit", 1, "--batch-size", 64, "--steps", 1, "--repeats", 1)
    )
    found = {name: one["megabytes"] for name, one in result["gbit"]["1"].items()}
    parameters = sum(p.numel() for p in tiny_models.build("tiny-vit").parameters())
    whole, rows = 4 * parameters / 1e6, 4 * 64 / 1e6  # of two ranks each sends the half of it twice
    assert found["none"]["gradients"] == pytest.approx(whole, rel=0.15)
    assert found["gradients bf16"]["gradients"] == pytest.approx(whole / 2, rel=0.15)
    assert found["gradients powersgd"]["gradients"] < whole / 3
    width = json.loads(Path(model).read_text())["embed_dim"]
    assert found["none"]["embeddings"] == pytest.approx(rows * 2 * (width + 2), rel=0.25)
    assert found["embeddings 1e-3"]["embeddings"] < 0.6 * found["none"]["embeddings"]
    assert found["embeddings 1e-3"]["reference"] < 0.5 * found["none"]["reference"]
    assert "2 nodes, 1 Gbit/s, 64 samples per rank" in text
