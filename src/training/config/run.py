"""The run itself: its step, its folder, checkpoints and reports, and how its ranks find each other."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from training.config.given import Given, Refusal
from training.config.inputs.weights import check_checkpoint
from training.config.remarks import Idle, Pitfall

_NOT_SCALED = ("fp32", "amp_bf16", "amp_bfloat16")  # precisions with float32 gradients as they are
_LONGEST_NAME = 255  # bytes, on all file systems in use


@dataclass(frozen=True)
class RunConfig:
    """The step, the run's folder, checkpoints and reports.

    ``batch_size`` is what one rank contributes to one step; ``accum_freq`` splits it into micro-batches. With a
    ``global_batch_size`` both follow from it and the number of ranks (``Config.on_ranks``).
    ``precision`` has one spelling (``amp_bf16``). ``report_to`` is a subset of {'tensorboard', 'wandb'}.
    """

    batch_size: int
    global_batch_size: int | None
    accum_freq: int
    precision: str
    seed: int
    logs: str
    name: str | None
    log_local: bool
    log_every_n_steps: int
    report_to: frozenset[str]
    wandb_notes: str
    wandb_project_name: str
    save_frequency: int
    save_every_n_steps: int | None
    save_every_minutes: float | None
    keep_last: int
    save_most_recent: bool
    save_published_state: bool
    delete_previous_checkpoint: bool
    resume: str | None
    requeue_on_preempt: bool
    step_timeout: float
    remote_sync: str | None
    remote_sync_frequency: int
    remote_sync_protocol: str
    copy_codebase: bool
    debug: bool
    profile: bool
    dry_run: bool
    deterministic: bool = False
    u_format: str | None = None


@dataclass(frozen=True)
class DistributedConfig:
    """How ranks find each other, and what they exchange."""

    dist_url: str
    dist_backend: str
    dist_port: str
    world_size: int
    ddp_static_graph: bool
    no_set_device_rank: bool
    grad_compression: str = "none"
    powersgd_rank: int = 4


IDLE = (
    Idle(
        ("requeue_on_preempt",),
        lambda _: "SLURM_JOB_ID" not in os.environ,
        "outside of a Slurm job",
    ),
    Idle(("wandb_notes", "wandb_project_name"), lambda s: "wandb" not in s.report_to, "without --report-to wandb"),
    Idle(
        ("grad_compression",),
        lambda s: s.given.grad_compression == s.given.precision.removeprefix("pure_"),
        "with this --precision, whose gradients have this type",
    ),
    Idle(
        ("powersgd_rank",),
        lambda s: s.given.grad_compression != "powersgd",
        "without --grad_compression powersgd",
    ),
    Idle(("u_format",), lambda s: not s.given.resume, "without --resume"),
    Idle(
        ("remote_sync_frequency", "remote_sync_protocol"),
        lambda s: not s.given.remote_sync,
        "without --remote-sync",
    ),
)
PITFALLS = (
    Pitfall(
        lambda s: s.trains and s.given.grad_compression == "fp16" and s.given.precision in _NOT_SCALED,
        "--grad_compression fp16: gradients below 6e-8 become 0, as --precision amp alone scales them; bf16 keeps "
        "them",
    ),
)


def resolve_run(given: Given) -> RunConfig:
    """The ``RunConfig`` of the flags. Refusal: no name, an unknown report, a checkpoint that is not there."""
    _check_name(given)
    if given.resume not in (None, "", "latest"):
        check_checkpoint(given, "resume")
    precision = {"amp_bfloat16": "amp_bf16"}.get(given.precision, given.precision)
    own = precision.removeprefix("pure_")
    if {own, given.grad_compression} == {"bf16", "fp16"}:
        raise Refusal(
            f"{given.say('grad_compression')}: the gradients of {given.say('precision')} have 16 bits already; "
            "leave it out"
        )
    _check_powersgd(given, precision)
    return given.group(RunConfig, report_to=_report_to(given), precision=precision)


def _check_powersgd(given: Given, precision: str) -> None:
    """Refusal: what the hook keeps between steps would be wrong or too coarse."""
    if given.grad_compression != "powersgd":
        return
    said = given.say("grad_compression")
    if precision not in ("fp32", "amp_bf16"):
        why = "whose scale of the gradients changes" if precision == "amp" else "and it needs float32 gradients"
        raise Refusal(f"{said} does not go with {given.say('precision')}, {why}: use fp32 or amp_bf16")


def _check_name(given: Given) -> None:
    """Refusal: ``--name`` cannot be that of a folder inside ``--logs``. With slashes it names nested folders."""
    name = given.name
    if name is None:
        return
    if not name.strip():
        raise Refusal(f"--name {name!r}: the name is empty; give one or leave the flag out")
    # In an ASCII locale, other characters arrive as bytes.
    text = os.fsencode(name).decode(errors="surrogateescape")
    # Long names are shortened in messages, and what is not printable is escaped.
    shown = f"--name {text if text.isprintable() and len(text) <= 80 else repr(text[:80])}"
    if not text.isprintable():
        raise Refusal(f"{shown}: it contains characters that cannot be printed; give the run a plain name")
    parts = name.split("/")
    if ".." in parts or name.startswith(("/", "~/")):
        raise Refusal(
            f"{shown}: the run's folder would be outside of --logs; give a name, and the place as --logs"
        )
    if set(parts) & {"", "."}:
        raise Refusal(f"{shown}: a folder between its slashes has no name; leave out the slash or the dot")
    longest = max(len(os.fsencode(part)) for part in parts)
    if longest > _LONGEST_NAME:
        raise Refusal(
            f"{shown}: it has {longest} bytes, and names of folders may have {_LONGEST_NAME}; give a shorter one, "
            "and notes as --wandb-notes"
        )


def check_batch(given: Given, usage: frozenset[str]) -> None:
    """Refusal: ``--accum-freq`` does not divide the batch, or what selection keeps of it."""
    if given.global_batch_size is not None and given.chose("accum_freq"):
        raise Refusal(
            f"{given.say('accum_freq')} contradicts {given.say('global_batch_size')}, which splits a rank's share "
            "into micro-batches of at most --batch-size samples: leave one of them out"
        )
    batch, ratio, draws = given.batch_size, given.ref_filter_ratio, given.ref_filter_n_chunks
    sizes = {given.say("batch_size"): batch}
    if "select" in usage and given.global_batch_size is None:  # else the number of ranks decides
        kept = round(batch * (1 - ratio))
        if kept < 1 or not math.isclose(kept, batch * (1 - ratio), abs_tol=1e-6):
            raise Refusal(
                f"{given.say('ref_filter_ratio')} would keep {batch * (1 - ratio):g} samples of "
                f"{given.say('batch_size')}: choose values that keep a whole number, at least 1"
            )
        what = f"the {kept} samples that selection keeps of {given.say('batch_size')}"
        if kept % draws:
            raise Refusal(f"{given.say('ref_filter_n_chunks')} does not divide {what}: choose a divisor of {kept}")
        sizes[what] = kept
    for what, size in sizes.items():
        if size % given.accum_freq:
            raise Refusal(f"{given.say('accum_freq')} does not divide {what}: choose a divisor of {size}")
    if given.ddp_static_graph and given.accum_freq > 1:
        raise Refusal(
            f"--ddp-static-graph does not work with {given.say('accum_freq')}: with a static graph, DDP cannot "
            "skip the reduction of gradients between micro-batches; leave one of the two out"
        )


def _report_to(given: Given) -> frozenset[str]:
    """The reports in ``--report-to``. Refusal: it names another one."""
    words = {word.strip() for word in given.report_to.split(",")} - {""}
    if words == {"all"}:
        return frozenset({"tensorboard", "wandb"})
    if not words <= {"tensorboard", "wandb"}:
        raise Refusal(f"{given.say('report_to')}: expected tensorboard, wandb, both separated by a comma, or all")
    return frozenset(words)
