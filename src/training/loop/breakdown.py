"""Where the time of traced steps went: kinds of work, the largest kernels, and how long the device was idle."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile

OTHER = "other"
# Kinds of work by what is in a kernel's name on a GPU, or in an operator's on the CPU; the first that fits counts.
# torch.compile names its kernels after all that it has fused in them, so these come first.
KINDS = {
    "matrix products, compiled": r"triton_tem_",
    "compiled": r"triton_|cpp_fused",
    "communication": r"nccl|c10d::|gloo",
    "attention": r"flash|fmha|attention|sdpa|dot_do_o|convert_dq",
    "convolution": r"conv|fprop|wgrad|dgrad|implicit|nchwToNhwc|nhwcToNchw",
    "matrix products": r"gemm|gemv|cutlass|cublas|nvjet|xmma|aten::(add|b|badd)?mm",
    "copies": r"memcpy|memset|aten::(copy_|_to_copy)",
    "optimizer": r"multi_tensor_apply|fused_adam|_foreach|_fused_",
}
_STEP = "ProfilerStep"
_RANGES = (_STEP, "Optimizer.", "DistributedDataParallel.", "nccl:", "## ")  # annotations, which span kernels


@dataclass(frozen=True)
class Span:
    """A kernel, an operator or a step: from ``start`` to ``end``, in microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Breakdown:
    """``seconds`` of one step by the clock; shares are of that time.

    ``idle``     the share in which no kernel runs and nothing is copied; None: the device is the CPU.
    ``kinds``    kind of work -> share, the largest first. Kernels that run at the same time count twice.
    ``largest``  kernels, on the CPU operators, with their shares, the largest first.
    """

    seconds: float
    idle: float | None
    kinds: tuple[tuple[str, float], ...]
    largest: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        lines = [f"{1e3 * self.seconds:.1f} ms per step by the clock"]
        if self.idle is not None:
            lines.append(f"{self.idle:6.1%}  of the time the GPU has nothing to do")
        lines += ["", "share of the time by kind of work"]
        lines += [f"{share:6.1%}  {kind}" for kind, share in self.kinds]
        lines += ["", "the largest kernels" if self.idle is not None else "the largest operators"]
        lines += [f"{share:6.1%}  {name[:100]}" for name, share in self.largest]
        return "\n".join(lines) + "\n"


def breakdown(traced: profile, *, on_cuda: bool, largest: int = 15) -> Breakdown:
    """The breakdown of the steps that ``traced`` has recorded, each ended by its ``step()``."""
    events = traced.events() or ()
    steps = [_span(e) for e in events if e.name.startswith(_STEP) and _device(e) == "CPU"]
    if on_cuda:
        work = [_span(e) for e in events if _device(e) == "CUDA" and not _is_range(e)]
        return of_spans(steps, work, largest)
    total = sum(step.end - step.start for step in steps)
    own: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if not _is_range(event):
            own[event.name] += event.self_cpu_time_total
    return _shares(own, total, len(steps), None, largest)


def of_spans(steps: Sequence[Span], work: Sequence[Span], largest: int) -> Breakdown:
    """The breakdown of ``steps`` on the host and ``work`` on the device."""
    begin, end = min(s.start for s in steps), max(s.end for s in steps)
    # The device lags behind the host, which it is given its work by.
    end = max([end, *(w.end for w in work)])
    own: defaultdict[str, float] = defaultdict(float)
    for span in work:
        own[span.name] += span.end - span.start
    return _shares(own, end - begin, len(steps), max(0.0, 1 - _covered(work) / (end - begin)), largest)


def kind_of(name: str) -> str:
    """The kind of work of the kernel or operator ``name``."""
    return next((kind for kind, part in KINDS.items() if re.search(part, name, re.IGNORECASE)), OTHER)


def _shares(own: Mapping[str, float], total: float, steps: int, idle: float | None, largest: int) -> Breakdown:
    kinds: defaultdict[str, float] = defaultdict(float)
    for name, time in own.items():
        kinds[kind_of(name)] += time
    return Breakdown(
        seconds=total / steps / 1e6,
        idle=idle,
        kinds=_largest_first(kinds, total),
        largest=_largest_first(own, total)[:largest],
    )


def _largest_first(times: Mapping[str, float], total: float) -> tuple[tuple[str, float], ...]:
    return tuple((name, time / total) for name, time in sorted(times.items(), key=lambda item: -item[1]))


def _covered(spans: Iterable[Span]) -> float:
    """How long at least one of ``spans`` lasts."""
    covered, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        covered += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return covered


def _span(event: FunctionEvent) -> Span:
    return Span(event.name, event.time_range.start, event.time_range.end)


def _device(event: FunctionEvent) -> str:
    return str(event.device_type.name)


def _is_range(event: FunctionEvent) -> bool:
    return event.name.startswith(_RANGES) or getattr(event, "is_user_annotation", False)
