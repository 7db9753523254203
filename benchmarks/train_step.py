"""One training step: ours beside one that does what the published loop does, from batch to new weights.

    python benchmarks/train_step.py [--model ViT-B-16 --ref-model ViT-B-32 --batch-size 640 --precision amp_bf16
                                     --torchcompile --steps 20 --repeats 5 --json]

ours    uint8 pixels, copied beside the step before and normalized on the device; reference under the run's
        precision, compiled with ``--torchcompile``; float32 loss over tiles; sample state on the device; AdamW,
        fused on a GPU
plain   float32 pixels; reference outside autocast, in the type of its weights; loss over whole matrices in
        autocast's type; sample state as a full table on the CPU with copies that wait; the temperature read by the
        host in every step, as ``step_thresh`` does there; AdamW as torch chooses

DRRho-CLIP with a learnable temperature, one process, random data and weights. Both train a model of their own from
the same start and take turns; the best block counts. Before that, one step of both in float32 must give the same
gradients and u. Without flags: the published recipe's models and batch on a GPU, small ones on the CPU.

``samples_per_second``, ``peak_bytes`` of device memory (on the CPU of resident memory), and ``share_of_peak``: the
floating point operations that the models need (counted on an eager step), per second, of what the GPU can do.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "src"))

import open_clip
import torch
from torch.utils.flop_counter import FlopCounterMode

import measure
import report
from steps import VARIANTS, Options, Ours, Plain, prepare
from training.models import pretrained

TOLERANCE = 1e-3
FEW = 16  # samples that the check and the count of operations do with

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

# Dense bfloat16 and float16 operations per second by the vendor's data sheet; TF32, which float32 uses, has half.
PEAK_FLOPS = {
    r"B200": 2250e12,
    r"H200|GH200|H100(?! (PCIe|NVL))": 989e12,
    r"H100 NVL": 835e12,
    r"H100 PCIe": 756e12,
    r"A100": 312e12,
    r"L40S": 362e12,
    r"L4$": 121e12,
    r"A10$": 125e12,
    r"RTX 4090": 165e12,
    r"RTX 3090": 71e12,
}


def check_agreement(options: Options) -> float | None:
    """Relative difference of gradients and u after one float32 step; None where the weights are of another type.

    AssertionError: it is above tolerance.
    """
    if options.precision not in ("amp", "amp_bf16", "amp_bfloat16", "fp32"):
        return None
    few = replace(options, precision="fp32", torchcompile=False, batch_size=min(FEW, options.batch_size))
    results = []
    for variant in VARIANTS.values():
        setting = prepare(few)
        torch.set_float32_matmul_precision("highest")
        run = variant(setting)
        run.step()
        gradients = [p.grad.flatten() for p in setting.target.module.parameters() if p.grad is not None]
        results.append((torch.cat(gradients), run.log_u(setting.batches[0].index).flatten()))
    differences = [((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True)]
    assert max(differences) < TOLERANCE, f"gradients and log u differ by {differences}"
    return max(differences)


def count_flops(options: Options) -> float:
    """Floating point operations per sample of a step, reference included, counted on a few samples."""
    setting = prepare(replace(options, torchcompile=False, batch_size=min(FEW, options.batch_size)))
    run = Ours(setting)
    with no_fused_attention_block(), FlopCounterMode(display=False) as counter:
        run.step()
    return counter.get_total_flops() / len(setting.batches[0])


@contextmanager
def no_fused_attention_block() -> Iterator[None]:
    """The counter does not know the fused attention layer that torch takes without gradients."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def peak_memory(options: Options, name: str) -> int:
    """Bytes of device memory that a variant takes from its models to its second step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with measure.PeakMemory(device) as peak:
        run = VARIANTS[name](prepare(options))
        for _ in range(2):
            run.step()
    return peak.bytes


def time_variants(options: Options) -> dict[str, list[float]]:
    """Seconds per step of each block; the first blocks compile and are not counted."""
    settings = {name: prepare(options) for name in VARIANTS}
    runs = {name: variant(settings[name]) for name, variant in VARIANTS.items()}

    def block(run: Ours | Plain) -> Callable[[], None]:
        def steps() -> None:
            for _ in range(options.steps):
                run.step()

        return steps

    blocks = {name: block(run) for name, run in runs.items()}
    seconds = measure.interleaved(blocks, options.repeats, settings["ours"].world.device)
    return {name: [s / options.steps for s in blocks] for name, blocks in seconds.items()}


def peak_flops(device: torch.device, name: str) -> float | None:
    """What the card can do in the precision ``name``; None for a CPU or an unknown card."""
    if device.type != "cuda":
        return None
    card = torch.cuda.get_device_name(device)
    known = [flops for pattern, flops in PEAK_FLOPS.items() if re.search(pattern, card)]
    if not known:
        return None
    return known[0] / 2 if name == "fp32" else known[0]


def main() -> None:
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of random weights, which are meant here
    with tempfile.TemporaryDirectory() as folder:
        options, as_json = parse(Path(folder))
        report.say("checking that both give the same gradients")
        difference = check_agreement(options)
        flops = count_flops(options)
        report.say("measuring memory, each variant in a process of its own")
        memory = {name: measure.in_fresh_process(peak_memory, options, name) for name in VARIANTS}
        report.say(f"timing {options.repeats} x {options.steps} steps of each, in turns")
        seconds = time_variants(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = peak_flops(device, options.precision)
    result: dict = {}
    for name in VARIANTS:
        rate = options.batch_size / min(seconds[name])
        result[name] = {
            "samples_per_second": rate,
            "seconds_per_step": min(seconds[name]),
            "share_of_peak": None if peak is None else rate * flops / peak,
            "peak_bytes": memory[name],
        }
    result |= {
        "speedup": result["ours"]["samples_per_second"] / result["plain"]["samples_per_second"],
        "memory_ratio": memory["ours"] / memory["plain"],
        "flops_per_sample": flops,
        "peak_flops": peak,
        "largest_difference": difference,
        **{name: value for name, value in asdict(options).items() if name != "ref_checkpoint"},
        "model": Path(options.model).stem,
        "ref_model": Path(options.ref_model).stem,
        "machine": report.machine(device),
    }
    report.emit(result, describe(result, seconds), as_json)


def describe(r: dict, seconds: dict[str, list[float]]) -> str:
    rows = []
    for name in VARIANTS:
        v, runs = r[name], sorted(seconds[name])
        share = "-" if v["share_of_peak"] is None else f"{v['share_of_peak']:.1%}"
        best, median = f"{v['samples_per_second']:.1f}", f"{r['batch_size'] / runs[len(runs) // 2]:.1f}"
        rows.append((name, best, median, share, report.mib(v["peak_bytes"])))
    rows.append(("ours / plain", f"{r['speedup']:.2f}", "", "", f"{r['memory_ratio']:.2f}"))
    compiled = ", compiled" if r["torchcompile"] else ""
    title = (
        f"Training step: {r['model']} under {r['ref_model']}, batch {r['batch_size']}, {r['precision']}{compiled} "
        f"({r['flops_per_sample'] / 1e9:.3g} GFLOP per sample); {r['machine']}"
    )
    text = report.table(title, ("", "samples/s", "median", "of peak", "peak memory"), rows)
    if r["largest_difference"] is not None:
        text += f"\ngradients and u of a float32 step agree to {r['largest_difference']:.1e}"
    return text


def parse(folder: Path) -> tuple[Options, bool]:
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
    add("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    given = vars(parser.parse_args())
    as_json = given.pop("json")
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
    return Options(**given, ref_checkpoint=checkpoint), as_json


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
