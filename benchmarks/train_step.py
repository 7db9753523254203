"""Training steps side by side, from a batch to new weights: ours, what the published loop does, and OpenCLIP's.

    python benchmarks/train_step.py [--model ViT-B-16 --ref-model ViT-B-32 --batch-size 640 --precision amp_bf16
                                     --torchcompile --steps 20 --repeats 5 --variants ours,plain --kernels --json]

ours      uint8 pixels, copied beside the step before and normalized on the device; reference under the run's
          precision, compiled with ``--torchcompile``; float32 loss over tiles; sample state on the device; AdamW,
          fused on a GPU
cached    ours with the reference's embeddings stored: no reference runs
none      ours without a reference: FastCLIP itself
select    ours with batch selection (JEST): a quarter of the samples is trained on, taken in two draws;
          select-cached: the same with the reference's embeddings stored
plain     float32 pixels; reference outside autocast, in the type of its weights; loss over whole matrices in
          autocast's type; sample state as a full table on the CPU with copies that wait; the temperature read by
          the host in every step, as ``step_thresh`` does there; AdamW as torch chooses
openclip  OpenCLIP's own loop and loss (``open_clip_train``): no reference, no sample state

``NAME+compile`` is the same through ``torch.compile`` (``--torchcompile``: all of them), ``NAME+channels_last``
has the channels of the image towers innermost, which convolutions prefer.

DRRho-CLIP with a learnable temperature, one process, random data and weights. All train a model of their own from
the same start and take turns; the best block counts. Before that, one step of ours and plain in float32 must give
the same gradients and u. Without flags: the published recipe's models and batch on a GPU, small ones on the CPU.

``samples_per_second``, with selection those that are embedded and scored, and ``trained_per_second`` of them;
``peak_bytes`` of device memory (on the CPU of resident memory), and ``share_of_peak``: the floating point
operations that the models need, per second, of what the GPU can do (MFU).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "src"))

import open_clip
import torch
from torch.profiler import ProfilerActivity, profile, schedule

import measure
import report
from steps import CHANNELS_LAST, COMPILED, VARIANTS, Options, Ours, Plain, Variant, build, is_known, prepare
from training.loop.breakdown import Breakdown, breakdown
from training.loop.flops import peak_flops
from training.models import pretrained

TOLERANCE = 1e-3
FEW = 16  # samples that the check does with

SMALL_TARGET = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 48, "patch_size": 8, "width": 192, "head_width": 64, "layers": 3},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 3},
}
SMALL_REFERENCE = {
    "embed_dim": 96,
    "vision_cfg": {"image_size": 48, "patch_size": 12, "width": 192, "head_width": 64, "layers": 3},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3},
}


def check_agreement(options: Options) -> float | None:
    """Relative difference of gradients and u after one float32 step; None where the weights are of another type.

    AssertionError: it is above tolerance.
    """
    if options.precision not in ("amp", "amp_bf16", "amp_bfloat16", "fp32"):
        return None
    few = replace(options, precision="fp32", torchcompile=False, batch_size=min(FEW, options.batch_size))
    results = []
    for variant in (Ours, Plain):
        setting = prepare(few)
        torch.set_float32_matmul_precision("highest")
        run = variant(setting)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            run.step()
        gradients = [p.grad.flatten() for p in setting.target.module.parameters() if p.grad is not None]
        results.append((torch.cat(gradients), run.log_u(setting.batches[0].index).flatten()))
    differences = [((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True)]
    assert max(differences) < TOLERANCE, f"gradients and log u differ by {differences}"
    return max(differences)


def peak_memory(options: Options, name: str) -> int:
    """Bytes of memory that a variant takes from its models to its second step, in this process."""
    return built(options, name, torch.device("cpu"))[1]


def built(options: Options, name: str, device: torch.device) -> tuple[Variant, int]:
    """The variant after two steps, and the peak of memory on ``device`` on the way there."""
    with measure.PeakMemory(device) as peak:
        run = build(name, options)
        run.steps(2)
    return run, peak.bytes


def measure_all(options: Options, device: torch.device) -> tuple[dict[str, Variant], dict[str, int]]:
    """All variants, ready to be timed, and their memory; on the CPU that is measured in processes of their own."""
    report.say("building the variants and measuring their memory")
    runs, memory = {}, {}
    for name in options.variants:
        if device.type == "cuda":
            runs[name], memory[name] = built(options, name, device)
        else:
            memory[name] = measure.in_fresh_process(peak_memory, options, name)
            runs[name] = build(name, options)
    return runs, memory


def time_variants(options: Options, runs: dict[str, Variant], device: torch.device) -> dict[str, list[float]]:
    """Seconds per step of each block."""
    report.say(f"timing {options.repeats} x {options.steps} steps of each, in turns")

    def block(run: Variant) -> Callable[[], None]:
        return lambda: run.steps(options.steps)

    blocks = {name: block(run) for name, run in runs.items()}
    seconds = measure.interleaved(blocks, options.repeats, device, warm_up=0)  # each has taken two steps
    return {name: [s / options.steps for s in times] for name, times in seconds.items()}


def kernels(run: Variant, device: torch.device) -> Breakdown:
    """Where the time of three steps goes."""
    on_cuda = device.type == "cuda"
    found: list[Breakdown] = []
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    plan = schedule(wait=0, warmup=2, active=3, repeat=1)
    ready = lambda traced: found.append(breakdown(traced, on_cuda=on_cuda, largest=5))  # noqa: E731
    with profile(activities=activities, schedule=plan, on_trace_ready=ready) as traced:
        for number in range(5):
            if on_cuda and number == 2:
                torch.cuda.synchronize()  # else work of the steps before would count as that of the traced ones
            run.steps(1)
            traced.step()
    return found[0]


def main() -> None:
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of random weights, which are meant here
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        options, with_kernels, as_json = parse(Path(folder))
        report.say("checking that ours and the published way give the same gradients")
        difference = check_agreement(options)
        runs, memory = measure_all(options, device)
        seconds = time_variants(options, runs, device)
        batch = prepare(replace(options, batch_size=1, torchcompile=False)).batches[0]
    peak = peak_flops(device, options.precision)
    result: dict = {}
    for name, run in runs.items():
        rate, flops = options.batch_size / min(seconds[name]), run.flops_per_sample(batch)
        result[name] = {
            "samples_per_second": rate,
            "trained_per_second": rate * kept_share(run),
            "seconds_per_step": min(seconds[name]),
            "share_of_peak": None if peak is None else rate * flops / peak,
            "flops_per_sample": flops,
            "peak_bytes": memory[name],
        }
    result |= {
        "speedup": ratio(result, "samples_per_second", max),
        "memory_ratio": ratio(result, "peak_bytes", min),
        "peak_flops": peak,
        "largest_difference": difference,
        **{name: value for name, value in asdict(options).items() if name != "ref_checkpoint"},
        "model": Path(options.model).stem,
        "ref_model": Path(options.ref_model).stem,
        "machine": report.machine(device),
    }
    if with_kernels:
        found = kernels(runs[options.variants[0]], device)
        result["kernels"] = asdict(found)
    report.emit(result, describe(result, seconds) + (f"\n\n{found}" if with_kernels else ""), as_json)


def kept_share(run: Variant) -> float:
    """Of the samples, those that are trained on."""
    return run.selection.keep_ratio if isinstance(run, Ours) and run.selection else 1.0


def ratio(result: dict, field: str, best: Callable[[list[float]], float]) -> float | None:
    """Ours over plain, the better one of eager and compiled of both; None where one of them was not asked for."""
    sides = []
    for kind in ("ours", "plain"):
        values = [result[name][field] for name in (kind, kind + COMPILED) if name in result]
        if not values:
            return None
        sides.append(best(values))
    return sides[0] / sides[1]


def describe(r: dict, seconds: dict[str, list[float]]) -> str:
    rows = []
    for name in r["variants"]:
        v, runs = r[name], sorted(seconds[name])
        share = "-" if v["share_of_peak"] is None else f"{v['share_of_peak']:.1%}"
        best, median = f"{v['samples_per_second']:.1f}", f"{r['batch_size'] / runs[len(runs) // 2]:.1f}"
        rows.append((name, best, f"{v['trained_per_second']:.1f}", median, share, report.mib(v["peak_bytes"])))
    if r["speedup"] is not None:
        rows.append(("ours / plain", f"{r['speedup']:.2f}", "", "", "", f"{r['memory_ratio']:.2f}"))
    compiled = ", compiled" if r["torchcompile"] else ""
    title = (
        f"Training step: {r['model']} under {r['ref_model']}, batch {r['batch_size']}, {r['precision']}{compiled} "
        f"({r[r['variants'][0]]['flops_per_sample'] / 1e9:.3g} GFLOP per sample); {r['machine']}"
    )
    text = report.table(title, ("", "samples/s", "trained", "median", "of peak", "peak memory"), rows)
    if r["largest_difference"] is not None:
        text += f"\ngradients and u of a float32 step agree to {r['largest_difference']:.1e}"
    return text


def parse(folder: Path) -> tuple[Options, bool, bool]:
    """Options with defaults for this machine; model configs and weights of the reference go to ``folder``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="target: open_clip name or config file (ViT-B-16; on the CPU a small one)")
    add("--ref-model", help="reference, likewise (ViT-B-32)")
    add("--batch-size", type=int, help="samples of a step (640; on the CPU 64)")
    add("--precision", default="amp_bf16", help="as the trainer's flag")
    add("--torchcompile", action="store_true", help="as the trainer's flag")
    add("--steps", type=int, help="steps of one timed block (20; on the CPU 3)")
    add("--repeats", type=int, default=5, help="timed blocks of each variant; the best counts")
    add("--data-size", type=int, default=1_000_000, help="rows of the sample state")
    add("--variants", type=variants, default="ours,plain", help="which to measure, separated by commas")
    add("--kernels", action="store_true", help="also trace the first variant: kinds of work, largest kernels")
    add("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    given = vars(parser.parse_args())
    as_json, with_kernels = given.pop("json"), given.pop("kernels")
    defaults = {"model": "ViT-B-16", "ref_model": "ViT-B-32", "batch_size": 640, "steps": 20}
    if not torch.cuda.is_available():
        defaults = {
            "model": write_config(folder / "small-vit.json", SMALL_TARGET),
            "ref_model": write_config(folder / "small-vit-reference.json", SMALL_REFERENCE),
            "batch_size": 64,
            "steps": 3,
        }
    given |= {name: value for name, value in defaults.items() if given[name] is None}
    checkpoint = write_random_weights(folder / "reference.pt", given["ref_model"])
    return Options(**given, ref_checkpoint=checkpoint), with_kernels, as_json


def variants(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if not is_known(name)]
    if unknown:
        known = ", ".join(VARIANTS)
        raise argparse.ArgumentTypeError(
            f"{unknown[0]} is unknown; there are {known}, each also with {COMPILED} and {CHANNELS_LAST}"
        )
    return names


def write_config(path: Path, config: dict) -> str:
    path.write_text(json.dumps(config))
    return str(path)


def write_random_weights(path: Path, model: str) -> str:
    """The trainer takes no reference without weights; what they are makes no difference to the time."""
    torch.manual_seed(1)
    module = open_clip.create_model(pretrained.open_clip_name(model, "--ref-model"), load_weights=False)
    torch.save(module.state_dict(), path)
    return str(path)


if __name__ == "__main__":
    main()
