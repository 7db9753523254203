"""The DRRho-CLIP loss: ours beside autograd over whole matrices, and beside the products that it cannot avoid.

    python benchmarks/loss.py [--batch 4096 --dim 512 --ref-dim 512 --repeats 5 --device cpu|cuda --json]

``time_ratio``    ours / autograd, forward and backward with reading and writing u, best of ``--repeats`` in turns.
``memory_ratio``  ours / autograd, extra peak memory of one step: what it needs above its inputs.
``limit_ratio``   ours / six B x B x d float32 products: two similarity matrices and two gradients, without storing
                  a matrix of pairs, take that many (docs/objective.md).

Before anything is timed both must give the same gradients and u.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "src"))

import torch
import torch.nn.functional as F
from torch import Tensor

import measure
import plain
import report
from drrho_clip.losses.fastclip import COLUMNS, FastCLIP
from drrho_clip.losses.interface import LossInputs
from drrho_clip.losses.pair_kernels import Kernels
from drrho_clip.sample_state import SampleState, StateUpdate

GAMMA, EPS, RHO, SCALE = 0.5, 1e-14, 8.0, 100.0
TOLERANCE = 1e-4
PRODUCTS = 6
SMALL = 64  # a batch that loads every kernel and needs no memory to speak of


@dataclass(frozen=True)
class Options:
    """What is measured: ``batch`` pairs of width ``dim`` under a reference of width ``ref_dim``."""

    batch: int
    dim: int
    ref_dim: int
    data_size: int
    repeats: int
    device: str
    threads: int
    torchcompile: bool


@dataclass(frozen=True)
class Problem:
    """Inputs of one step; ``leaves`` are image, text and scale, which want a gradient."""

    image: Tensor
    text: Tensor
    scale: Tensor
    ref_image: Tensor
    ref_text: Tensor
    index: Tensor
    old_log_u: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.image, self.text, self.scale


Step = Callable[[], Tensor]


def make_problem(options: Options, batch: int) -> Problem:
    """Random pairs that agree a little, half of them seen before."""
    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(0)

    def pairs(width: int) -> tuple[Tensor, Tensor]:
        image, noise = (F.normalize(torch.randn(batch, width, generator=generator), dim=1) for _ in range(2))
        return image.to(device), F.normalize(0.4 * image + noise, dim=1).to(device)

    image, text = pairs(options.dim)
    ref_image, ref_text = pairs(options.ref_dim)
    old = torch.randn(batch, 2, generator=generator) - 2
    old[: batch // 2] = torch.nan
    return Problem(
        image.requires_grad_(),
        text.requires_grad_(),
        torch.tensor(SCALE, device=device, requires_grad=True),
        ref_image,
        ref_text,
        torch.randperm(options.data_size, generator=generator)[:batch],
        old,
    )


def make_ours(options: Options, p: Problem) -> Step:
    """A step of the framework's loss with its sample state on the device; it returns log u."""
    state = SampleState(options.data_size, COLUMNS, options.device)
    state.commit(StateUpdate(p.index, dict(zip(COLUMNS, p.old_log_u.unbind(1), strict=True))))
    kernels = Kernels.compiled() if options.torchcompile else Kernels()
    loss = FastCLIP(state=state, gamma=lambda epoch: GAMMA, eps=EPS, rho=RHO, multiply_tau=True, kernels=kernels)

    def step() -> Tensor:
        inputs = LossInputs(p.image, p.text, p.scale, index=p.index, ref_image=p.ref_image, ref_text=p.ref_text)
        output = loss(inputs)
        output.terms["contrastive_loss"].backward()
        state.commit(output.update)
        return torch.stack([output.update.values[name] for name in COLUMNS], 1)

    return step


def make_autograd(options: Options, p: Problem) -> Step:
    """The same step with whole matrices and a table on the CPU."""
    table = plain.ReplicatedTable(options.data_size, options.device)
    table.write(p.index, p.old_log_u.nan_to_num(0.0))

    def step() -> Tensor:
        loss, log_u = plain.matrix_loss(
            *p.leaves, p.ref_image, p.ref_text, table.read(p.index), gamma=GAMMA, eps=EPS, rho=RHO
        )
        loss.backward()
        table.write(p.index, log_u)
        return log_u

    return step


def make_products(options: Options, p: Problem) -> Step:
    """As many B x B x d products as a step that keeps no matrix of pairs needs."""
    image, text_columns = p.image.detach(), p.text.detach().T
    out = torch.empty(len(image), len(image), device=image.device)

    def step() -> Tensor:
        for _ in range(PRODUCTS):
            torch.mm(image, text_columns, out=out)
        return out

    return step


MAKERS = {"ours": make_ours, "autograd": make_autograd}


def check_agreement(options: Options) -> float:
    """Largest relative difference between the variants' gradients and log u; AssertionError above tolerance."""
    p = make_problem(options, options.batch)
    results = []
    for make in MAKERS.values():
        log_u = make(options, p)()
        results.append([log_u, *(leaf.grad.clone() for leaf in p.leaves)])
        clear_gradients(p)
    differences = {
        name: ((ours - theirs).abs().max() / theirs.abs().max()).item()
        for name, ours, theirs in zip(("log u", "image", "text", "scale"), *results, strict=True)
    }
    assert max(differences.values()) < TOLERANCE, f"the variants differ: {differences}"
    return max(differences.values())


def clear_gradients(p: Problem) -> None:
    for leaf in p.leaves:
        leaf.grad = None


def time_variants(options: Options) -> dict[str, list[float]]:
    """Seconds of each run of each variant."""
    p = make_problem(options, options.batch)

    def run(step: Step) -> Callable[[], None]:
        def once() -> None:
            step()
            clear_gradients(p)

        return once

    steps = {name: run(make(options, p)) for name, make in (MAKERS | {"products": make_products}).items()}
    return measure.interleaved(steps, options.repeats, torch.device(options.device))


def extra_memory(options: Options, name: str) -> int:
    """Bytes that one step of a variant needs at its peak, above its inputs and its state."""
    torch.set_num_threads(options.threads)
    # Kernels are loaded, or compiled for their sizes, before the measurement.
    MAKERS[name](options, make_problem(options, options.batch if options.torchcompile else SMALL))()
    step = MAKERS[name](options, make_problem(options, options.batch))
    with measure.PeakMemory(torch.device(options.device)) as peak:
        step()
    return peak.bytes


def main() -> None:
    options, as_json = parse()
    torch.set_num_threads(options.threads)
    report.say(f"checking that both give the same gradients (batch {options.batch})")
    difference = check_agreement(options)
    report.say(f"timing {options.repeats} runs of each, in turns")
    seconds = time_variants(options)
    report.say("measuring memory, each variant in a process of its own")
    memory = {name: measure.in_fresh_process(extra_memory, options, name) for name in MAKERS}
    result = summarize(options, seconds, memory, difference)
    report.emit(result, describe(result, seconds), as_json)


def summarize(
    options: Options, seconds: dict[str, list[float]], memory: dict[str, int], difference: float
) -> dict:
    best = {name: min(runs) for name, runs in seconds.items()}
    return {
        "time_ratio": best["ours"] / best["autograd"],
        "memory_ratio": memory["ours"] / memory["autograd"],
        "limit_ratio": best["ours"] / best["products"],
        "ours_seconds": best["ours"],
        "autograd_seconds": best["autograd"],
        "six_products_seconds": best["products"],
        "ours_extra_bytes": memory["ours"],
        "autograd_extra_bytes": memory["autograd"],
        "largest_difference": difference,
        **asdict(options),
        "machine": report.machine(torch.device(options.device)),
    }


def describe(r: dict, seconds: dict[str, list[float]]) -> str:
    def spread(name: str) -> str:
        return f"{sorted(seconds[name])[len(seconds[name]) // 2] * 1e3:.0f} ms"

    rows = [
        ("ours", f"{r['ours_seconds'] * 1e3:.0f} ms", spread("ours"), report.mib(r["ours_extra_bytes"])),
        (
            "autograd, whole matrices",
            f"{r['autograd_seconds'] * 1e3:.0f} ms",
            spread("autograd"),
            report.mib(r["autograd_extra_bytes"]),
        ),
        ("six B x B x d products", f"{r['six_products_seconds'] * 1e3:.0f} ms", spread("products"), ""),
        ("ours / autograd", f"{r['time_ratio']:.2f}", "", f"{r['memory_ratio']:.3f}"),
        ("ours / six products", f"{r['limit_ratio']:.2f}", "", ""),
    ]
    title = (
        f"DRRho-CLIP loss, forward and backward: B {r['batch']}, d {r['dim']}, d_r {r['ref_dim']}; {r['machine']}"
    )
    agreement = f"gradients and log u agree to {r['largest_difference']:.1e} of the largest"
    return report.table(title, ("", "best", "median", "extra memory"), rows) + f"\n{agreement}"


def parse() -> tuple[Options, bool]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096, help="pairs in the (global) batch")
    parser.add_argument("--dim", type=int, default=512, help="embedding width of the target")
    parser.add_argument("--ref-dim", type=int, default=512, help="embedding width of the reference")
    parser.add_argument("--data-size", type=int, default=1_000_000, help="rows of the sample state")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each variant; the best counts")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument(
        "--torchcompile", action="store_true", help="compile our passes, as the trainer's flag does"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    given = vars(parser.parse_args())
    as_json = given.pop("json")
    if given["batch"] > given["data_size"]:
        parser.error(f"--batch {given['batch']}: more than the {given['data_size']} samples of --data-size")
    return Options(**given), as_json


if __name__ == "__main__":
    main()
