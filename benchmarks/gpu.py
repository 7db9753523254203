"""Is this GPU machine sound, and what will it do? All checks and measurements that need a GPU, in order of use.

    bash benchmarks/gpu.sh [--minutes 15] [--json FILE] [--only NAME,NAME] [--cpu]

environment  the card, driver, versions, cores
tests        ``tests/device``: losses, steps and runs are right on this card
headline     ``train_step.py``: ViT-B/16 under a ViT-B/32 reference, 640 samples per step, ours beside the
             published loop's way; kinds of kernels, and the GPU's idle time
waits        ``waits.py``: the training loop makes the host wait for nothing
places       ``sample_state.py``: steps with the sample state on the card, and in host memory in two ways
fed          ``fed.py``: the same from JPEG shards through the whole program, and a checkpoint on the way
other ways   the headline eager, with the channels innermost, with stored features, and beside OpenCLIP's own loop
the rest     further models, runs that are killed, and the loss alone at large batches

Each is a process of its own with a limit in time. Results are written to FILE after each, so that an end at any
time leaves what was measured; what the minutes did not suffice for is named. It needs no network, and nothing but
the requirements and pytest. ``--cpu`` is a rehearsal with small sizes without a GPU: its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LEAST = 20  # seconds that must be left for a measurement to be started
GOALS = {"samples_per_second": 2800, "speedup": 3.0, "share": 0.95}


@dataclass(frozen=True)
class Measurement:
    """A command whose last line on stdout is a JSON object, or whatever ``read`` makes of its output.

    ``limit``  seconds after which it is ended.
    """

    name: str
    command: tuple[str, ...]
    limit: int
    read: Callable[[str, Path], dict[str, Any]]


def script(name: str, *flags: str) -> tuple[str, ...]:
    return sys.executable, str(HERE / name), *flags, "--json"


def last_line(output: str, _: Path) -> dict[str, Any]:
    return json.loads(output.strip().splitlines()[-1])


def tested(_: str, report: Path) -> dict[str, Any]:
    """Counts of pytest's report, and of each test that failed its name and the end of its traceback."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    failed = {
        f"{case.get('classname')}::{case.get('name')}": (found.text or "")[-3000:]
        for case in suite.iter("testcase")
        for found in (*case.findall("failure"), *case.findall("error"))
    }
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    return counts | {"seconds": float(suite.get("time")), "failed": failed}


BOTH = "ours,ours+compile,plain"


def plan(report: Path, cpu: bool) -> list[Measurement]:
    """The measurements in order of value."""
    pytest = (sys.executable, "-m", "pytest", "-q", "--junitxml", str(report), str(ROOT / "tests/device"))
    steps = ("--steps", "10", "--repeats", "3")

    def model(name: str, batch: int, variants: str, limit: int, *more: str) -> Measurement:
        flags = ("--model", name, "--batch-size", str(batch), "--variants", variants, *steps, *more)
        return Measurement(f"{name}, batch {batch}", script("train_step.py", *flags), limit, last_line)

    environment = Measurement(
        "environment", (sys.executable, str(HERE / "gpu.py"), "--environment"), 60, last_line
    )
    if cpu:
        few = ("--batch-size", "4")
        small = ("--steps", "1", "--repeats", "1", *few)
        flags = ("--variants", "ours,plain", "--kernels")
        return [
            environment,
            Measurement("tests", (*pytest, "-k", "published"), 180, tested),
            Measurement(
                "waits",
                script("waits.py", "--recipes", "drrho", "--steps", "12", *few),
                120,
                last_line,
            ),
            Measurement("headline", script("train_step.py", *flags, *small), 180, last_line),
            Measurement("fed", script("fed.py", "--pictures", "32", *few), 180, last_line),
        ]

    def headline(name: str, variants: str, limit: int, *more: str) -> Measurement:
        return Measurement(name, script("train_step.py", "--variants", variants, *steps, *more), limit, last_line)

    return [
        environment,
        Measurement("tests", pytest, 240, tested),
        headline("headline", "ours+compile,plain", 180, "--kernels"),
        Measurement("waits", script("waits.py"), 180, last_line),
        Measurement("places", script("sample_state.py", "--ranks", "1", "--data-size", "50000000"), 90, last_line),
        Measurement("fed", script("fed.py", "--torchcompile", "--pictures", "1024"), 320, last_line),
        headline("other ways", "ours,ours+compile+channels_last,cached+compile,openclip+compile", 340),
        Measurement("loss, batch 5120", script("loss.py", "--device", "cuda", "--batch", "5120"), 60, last_line),
        model("RN50", 256, f"{BOTH},ours+channels_last,ours+compile+channels_last", 150, "--kernels"),
        model("ViT-B-32", 1024, BOTH, 120),
        model("ViT-L-14", 128, BOTH, 150),
        Measurement("kills", script("kill.py", "--kills", "5", "--ranks", "1"), 180, last_line),
        Measurement("loss, batch 32768", script("loss.py", "--device", "cuda", "--batch", "32768"), 60, last_line),
    ]


def run(measurement: Measurement, seconds: float, report: Path) -> dict[str, Any]:
    """Its result, or {'failed' or 'late': why, 'output': the end of what it printed}."""
    started = time.monotonic()
    limit = min(measurement.limit, seconds)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            measurement.command,
            cwd=ROOT,
            # Variants of other sizes must not make each other's memory be given back and asked for again.
            env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ},
            stdout=out,
            stderr=err,
            text=True,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill(process)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    result: dict[str, Any]
    try:
        result = measurement.read(texts[0], report)
    except (ValueError, IndexError, OSError, ElementTree.ParseError):
        why = {"late": f"ended after {limit:.0f} s"} if code is None else {"failed": f"exit code {code}"}
        result = {**why, "output": "".join(texts)[-4000:]}
    return result | {"wall_seconds": time.monotonic() - started}


def _kill(process: subprocess.Popen) -> None:
    """End the process and all that it has started: the program itself answers gentler signals by saving."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment() -> dict[str, Any]:
    """What this machine is."""
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "card": None,
    }
    for package in ("open_clip", "timm", "webdataset", "torchvision"):
        try:
            found[package] = getattr(__import__(package), "__version__", "?")
        except ImportError as error:
            found[package] = f"missing: {error}"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {
            "card": torch.cuda.get_device_name(),
            "cards": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "cudnn": torch.backends.cudnn.version(),
            "free_gib": free / 2**30,
            "total_gib": total / 2**30,
            "driver": _driver(),
        }
    return found


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split("\n")[0] or None
    except (OSError, subprocess.SubprocessError):
        return None


# ------------------------------------------------------------------------------------------ what is printed


def describe(results: dict[str, Any], dropped: list[str]) -> str:
    """One table of everything, and what is wrong."""
    rows = [row for name, result in results.items() for row in lines(name, result)]
    width = max((len(row[0]) for row in rows), default=0)
    text = [f"{name:{width}}  {value}" for name, value in rows]
    if dropped:
        text.append(f"not measured, the time was over: {', '.join(dropped)}")
    return "\n".join(text)


def lines(name: str, r: dict[str, Any]) -> list[tuple[str, str]]:
    """What the table says about one result."""
    if "late" in r or isinstance(r.get("failed"), str):
        last = re.sub(r"\s+", " ", r["output"].strip().splitlines()[-1] if r["output"].strip() else "")
        why = f"too long: {r['late']}" if "late" in r else f"FAILED: {r['failed']}"
        return [(name, f"{why}: {last[:200]}")]
    if name == "environment":
        card = r["card"] or "no GPU"
        return [(name, f"{card}, torch {r['torch']}, open_clip {r['open_clip']}, {r['cores']} cores")]
    if name == "tests":
        failed = "".join(f"\n    {test}" for test in r["failed"])
        passed = r["tests"] - r["failures"] - r["errors"] - r["skipped"]
        return [(name, f"{passed} passed, {len(r['failed'])} failed, {r['skipped']} skipped{failed}")]
    if name == "waits":
        wrong = [recipe for recipe, found in r["recipes"].items() if not found["fine"]]
        return [(name, f"{len(r['recipes'])} recipes; more waits than are meant: {', '.join(wrong) or 'none'}")]
    if name == "fed":
        goal = _goal("share", r["share"])
        return [
            (name, f"{r['samples_per_second']:.0f} samples/s from shards, {r['share']:.1%} of synthetic{goal}"),
            ("", f"waits for data {r['data_wait']:.1%}, a checkpoint costs {r['save_seconds']:.2f} s"),
        ]
    if name == "kills":
        return [
            (
                name,
                f"{sum(r['killed'].values())} kills, {len(r['differing'])} differences from the undisturbed run",
            )
        ]
    if name == "places":
        return [
            (f"{name}: {place}", f"{p['milliseconds']:.2f} ms and {p['waits']:g} waits per step")
            for place, p in r["places"].items()
        ]
    if name.startswith("loss"):
        return [(name, f"{1e3 * r['ours_seconds']:.1f} ms, {r['time_ratio']:.2f} of autograd's time")]
    return _step_lines(name, r)


def _step_lines(name: str, r: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for variant in r["variants"]:
        v = r[variant]
        share = "" if v["share_of_peak"] is None else f", {v['share_of_peak']:.1%} of peak"
        memory = f"{v['peak_bytes'] / 2**30:.1f} GiB"
        best = variant == "ours+compile" and name == "headline"
        goal = _goal("samples_per_second", v["samples_per_second"]) if best else ""
        rows.append((f"{name}: {variant}", f"{v['samples_per_second']:.0f} samples/s{share}, {memory}{goal}"))
    if r["speedup"] is not None:
        goal = _goal("speedup", r["speedup"]) if name == "headline" else ""
        rows.append((f"{name}: ours / plain", f"{r['speedup']:.2f}{goal}"))
    if "kernels" in r:
        k = r["kernels"]
        idle = "" if k["idle"] is None else f"idle {k['idle']:.1%}; "
        rows.append(
            (f"{name}: kernels", idle + ", ".join(f"{kind} {share:.0%}" for kind, share in k["kinds"][:5]))
        )
    return rows


def _goal(field: str, value: float) -> str:
    goal = GOALS[field]
    return f" (goal {goal:g}: {'met' if value >= goal else 'missed'})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0, help="after these, nothing more is started or kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results here, after each measurement")
    parser.add_argument("--only", help="these measurements, separated by commas")
    parser.add_argument("--cpu", action="store_true", help="a rehearsal with small sizes, without a GPU")
    parser.add_argument("--environment", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.environment:
        print(json.dumps(environment()))
        return 0
    ends = time.monotonic() + 60 * options.minutes
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "tests.xml")
        todo = plan(report, options.cpu)
        if options.only:
            todo = [m for m in todo if m.name.split(",")[0] in options.only.split(",")]
        dropped = [m.name for m in todo]
        for measurement in todo:
            left = ends - time.monotonic()
            if left < LEAST:
                break
            print(f"[{left:4.0f} s left] {measurement.name}", file=sys.stderr, flush=True)
            results[measurement.name] = run(measurement, left, report)
            dropped.remove(measurement.name)
            for row in lines(measurement.name, results[measurement.name]):
                print("    " + ": ".join(filter(None, row)), file=sys.stderr, flush=True)
            if options.json:
                _write(options.json, {"results": results, "not_measured": dropped})
            if measurement.name == "environment" and not options.cpu and not results["environment"].get("card"):
                print("error: torch finds no GPU here; --cpu rehearses without one", file=sys.stderr)
                return 1
    print(describe(results, dropped))
    return 1 if any(bad(name, result) for name, result in results.items()) else 0


def bad(name: str, result: dict[str, Any]) -> bool:
    """Whether a check has failed; measurements that took too long have not."""
    return bool(result.get("failed") or result.get("differing")) or result.get("fine") is False


def _write(path: Path, held: dict[str, Any]) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(held, indent=1))
    new.replace(path)


if __name__ == "__main__":
    sys.exit(main())
