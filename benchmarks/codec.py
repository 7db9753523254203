"""Embeddings with a promised error, beside 16 and 8 bits per component: size, error, speed.

    python benchmarks/codec.py [--dims 256 512 768 1024 --bounds 1e-4 1e-3 2e-3 1e-2 --mean 0.6 --json]

Rows of unit norm, from a normal distribution. ``--mean M`` gives all of them a common part of that norm, as CLIP's
embeddings of one kind have it; the columns' means are then worth taking off.

limit     drrho_clip.codec, |x| <= 1 promised: fixed width
norm      the same, rows of norm 1 promised: Rice's code
measured  the same without a promise
zfp       zfpy with the bound as its tolerance, if it is installed
blosc2    integers with a step of 2 E, in 16 bits, bit-shuffled and compressed with zstd, if it is installed

int8 and fp8 (e4m3) have a float32 scale for each row. Of two further tables, "at the size of int8" has the
smallest bound for which ours takes no more bytes, "at the error of float16" the largest error of float16 as the
bound. Errors are compared with what was encoded, in float64; the cosine error is the mean of 1 - cos(x, x̂).
Speed is in GB of float32 per second of one core, by its processor time, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import report
from drrho_clip.codec import decode, encode

PROMISES: dict[str, dict[str, float]] = {"limit": {"limit": 1.0}, "norm": {"norm": 1.0}, "measured": {}}
FP8_LARGEST = 448.0  # of e4m3


@dataclass(frozen=True)
class Options:
    """``rows`` rows of each of ``dims``; each speed is the best of ``repeats``."""

    rows: int
    dims: list[int]
    bounds: list[float]
    mean: float
    repeats: int


@dataclass(frozen=True)
class Way:
    """``encode`` gives what is stored and its bytes, ``decode`` float32 of what is stored."""

    name: str
    encode: Callable[[Tensor], tuple[Any, int]]
    decode: Callable[[Any], Tensor]


@dataclass(frozen=True)
class Result:
    """``bits`` and bytes per component and row; ``bound`` None: the way has none."""

    dim: int
    bound: float | None
    way: str
    bits: float
    row_bytes: float
    max_error: float
    cosine_error: float
    encode_gb_per_second: float
    decode_gb_per_second: float


def embeddings(options: Options, dim: int) -> Tensor:
    """Unit-norm rows, float32 [rows, dim]."""
    generator = torch.Generator().manual_seed(dim)
    common, own = (F.normalize(torch.randn(n, dim, generator=generator), dim=1) for n in (1, options.rows))
    own = F.normalize(own - (own @ common.T) * common, dim=1)
    return F.normalize(options.mean * common + (1 - options.mean**2) ** 0.5 * own, dim=1)


def plain_ways() -> Iterator[Way]:
    """Types of 16 and 8 bits."""
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield Way(name, lambda x, d=dtype: (x.to(d), 2 * x.numel()), lambda held: held.float())
    for name, dtype, largest in (("int8", torch.int8, 127.0), ("fp8", torch.float8_e4m3fn, FP8_LARGEST)):

        def scaled(x: Tensor, dtype: torch.dtype = dtype, largest: float = largest) -> tuple[Any, int]:
            scale = x.abs().amax(1, keepdim=True) / largest
            codes = x / scale
            return ((codes.round() if dtype == torch.int8 else codes).to(dtype), scale), x.numel() + 4 * len(x)

        yield Way(name, scaled, lambda held: held[0].float() * held[1])


def ours(name: str, bound: float) -> Way:
    """A way of ``drrho_clip.codec``."""

    def encoded(x: Tensor) -> tuple[Any, int]:
        held = encode(x, bound, **PROMISES[name])
        return held, held.nbytes

    return Way(name, encoded, decode)


def bounded_ways(bound: float) -> Iterator[Way]:
    """Ways that keep ``bound``."""
    for name in PROMISES:
        yield ours(name, bound)
    if installed("zfpy"):
        import zfpy

        def zfp(x: Tensor) -> tuple[bytes, int]:
            held = zfpy.compress_numpy(x.numpy(), tolerance=bound)
            return held, len(held)

        yield Way("zfp", zfp, lambda held: torch.from_numpy(zfpy.decompress_numpy(held)))
    if installed("blosc2"):
        import blosc2

        step = 2 * bound * (1 - 1e-3)

        def blosc(x: Tensor) -> tuple[Any, int]:
            codes = torch.round(x / step).to(torch.int16).numpy()
            held = blosc2.compress2(codes, codec=blosc2.Codec.ZSTD, filters=[blosc2.Filter.BITSHUFFLE],
                                    typesize=2, nthreads=1)  # fmt: skip
            return (held, codes.shape), len(held)

        def unblosc(held: Any) -> Tensor:
            codes = np.frombuffer(blosc2.decompress2(held[0], nthreads=1), np.int16).reshape(held[1])
            return torch.from_numpy(codes.astype(np.float32) * np.float32(step))

        yield Way("blosc2", blosc, unblosc)


@cache
def installed(package: str) -> bool:
    """Whether there is such a package; said once where there is none."""
    if importlib.util.find_spec(package) is None:
        report.say(f"{package} is not installed: no comparison with it (pip install {package})")
        return False
    return True


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Processor seconds of the best of ``repeats`` runs, after one more."""
    best = float("inf")
    for turn in range(repeats + 1):
        started = time.thread_time()
        run()
        if turn:
            best = min(best, time.thread_time() - started)
    return best


def measure(way: Way, x: Tensor, bound: float | None, repeats: int) -> Result:
    """AssertionError: the way breaks its bound."""
    held, size = way.encode(x)
    back, exact = way.decode(held).double(), x.double()
    error = float((back - exact).abs().max())
    assert bound is None or error <= bound, f"{way.name} promised {bound}, and its error is {error}"
    cosine = 1 - F.cosine_similarity(back, exact, dim=1)
    gigabytes = 4 * x.numel() / 1e9
    return Result(
        x.shape[1],
        bound,
        way.name,
        8 * size / x.numel(),
        size / len(x),
        error,
        float(cosine.mean()),
        gigabytes / seconds(lambda: way.encode(x), repeats),
        gigabytes / seconds(lambda: way.decode(held), repeats),
    )


def smallest_bound(size_of: Callable[[float], int], size: int) -> float:
    """The smallest bound, to 0.5 %, for which no more than ``size`` bytes are taken."""
    low, high = 5e-5, 0.5
    while high / low > 1.005:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if size_of(middle) <= size else (middle, high)
    return high


def run(options: Options) -> dict[str, list[Result]]:
    """Results for the bounds, at the size of int8, and at the error of float16."""
    found: dict[str, list[Result]] = {"results": [], "size_of_int8": [], "error_of_float16": []}
    for dim in options.dims:
        x = embeddings(options, dim)
        plain = {way.name: measure(way, x, None, options.repeats) for way in plain_ways()}
        found["results"] += plain.values()
        for bound in options.bounds:
            found["results"] += [measure(way, x, bound, options.repeats) for way in bounded_ways(bound)]
        for name in ("norm", "measured"):

            def size_of(bound: float, name: str = name, x: Tensor = x) -> int:
                return ours(name, bound).encode(x)[1]

            bound = smallest_bound(size_of, (dim + 4) * len(x))
            found["size_of_int8"].append(measure(ours(name, bound), x, bound, options.repeats))
            bound = plain["float16"].max_error
            found["error_of_float16"].append(measure(ours(name, bound), x, bound, options.repeats))
    return found


def shown(results: list[Result]) -> list[tuple[str, ...]]:
    """Rows of the table."""
    return [
        (
            f"{r.dim}  {r.way}",
            "" if r.bound is None else f"{r.bound:.3g}",
            f"{r.bits:.2f}",
            f"{r.row_bytes:.0f}",
            f"{r.max_error:.1e}",
            f"{r.cosine_error:.1e}",
            f"{r.encode_gb_per_second:.2f}",
            f"{r.decode_gb_per_second:.2f}",
        )
        for r in results
    ]


def parse() -> tuple[Options, bool]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 512, 768, 1024])
    parser.add_argument("--bounds", type=float, nargs="*", default=[1e-4, 1e-3, 2e-3, 1e-2])
    parser.add_argument("--mean", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = vars(parser.parse_args())
    as_json = given.pop("json")
    return Options(**given), as_json


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    options, as_json = parse()
    found = run(options)
    header = ("", "E", "bits", "bytes/row", "max error", "1 - cos", "encode GB/s", "decode GB/s")
    machine = report.machine(torch.device("cpu"), 1)
    titles = {
        "results": f"{options.rows:,} unit-norm rows, a common part of norm {options.mean:g}, {machine}",
        "size_of_int8": "At the size of int8",
        "error_of_float16": "At the error of float16",
    }
    text = "\n\n".join(report.table(title, header, shown(found[name])) for name, title in titles.items())
    report.emit(asdict(options) | {name: [asdict(r) for r in rs] for name, rs in found.items()}, text, as_json)


if __name__ == "__main__":
    main()
