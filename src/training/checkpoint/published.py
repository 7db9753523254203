"""The published checkpoint format: what a file holds, and the sample state in it.

A file is a dict ``epoch, name, state_dict, optimizer[, scaler]``. Files of runs with a sample state may carry it
in full, float32 [N, 1] per column:

    u_im, u_tt                      log u ("u_format": "log", zero for samples never seen), or u itself
    tau_im, tau_tt                  individual temperatures
    m_grad_tau_*, v_grad_tau_*      their Adam moments
    bound_*                         what is missing from log u: u = stored * exp(bound)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# published column -> column of the sample state
_COLUMNS = {
    f"{published}_{short}": f"{ours}_{long}"
    for published, ours in (("u", "log_u"), ("tau", "tau"), ("m_grad_tau", "tau_m"), ("v_grad_tau", "tau_v"))
    for short, long in (("im", "image"), ("tt", "text"))
}


def to_published(columns: Mapping[str, Tensor], initial_tau: float) -> dict[str, Any]:
    """The sample state's ``columns``, [N] with NaN for samples never seen, as entries of a published file.

    A sample never seen gets u = 0, the temperature ``initial_tau`` and moments 0.
    """
    entries: dict[str, Any] = {"u_format": "log"}
    for name, ours in _COLUMNS.items():
        if ours in columns:
            unseen = initial_tau if name.startswith("tau_") else 0.0
            column = columns[ours].float()
            entries[name] = column.masked_fill(column.isnan(), unseen)[:, None]
    if "tau_im" in entries:
        entries |= {f"bound_{d}": torch.zeros_like(entries[f"tau_{d}"]) for d in ("im", "tt")}
    return entries


def has_columns(held: Mapping[str, Any]) -> bool:
    """Whether the file itself contains the sample state."""
    return any(f"{name}_im" in held for name in ("u", "tau"))


def from_published(held: Mapping[str, Any], u_format: str | None = None) -> dict[str, Tensor]:
    """The sample state in a published file: column -> float32 [N], NaN for samples never seen; empty: none.

    ``u_format``  'log' or 'linear' for a file that does not show it; one with a negative u can only be 'log'.
    ValueError: neither the file nor ``u_format`` shows it.
    """
    found = {ours: held[name].reshape(-1).float() for name, ours in _COLUMNS.items() if name in held}
    stored = {d: held[f"u_{d}"].reshape(-1).float() for d in ("im", "tt") if f"u_{d}" in held}
    if not stored:
        return found
    kind = held.get("u_format") or ("log" if any((u < 0).any() for u in stored.values()) else u_format)
    if kind not in ("log", "linear"):
        raise ValueError(
            "the checkpoint does not show whether its u columns hold u or log u: give --u_format log (DRRho-CLIP "
            "code) or --u_format linear (FastCLIP code)"
        )
    for short, long in (("im", "image"), ("tt", "text")):
        u = stored[short]
        never = u == 0
        log_u = u if kind == "log" else u.log()
        if f"bound_{short}" in held:
            log_u = log_u + held[f"bound_{short}"].reshape(-1).float()
        found[f"log_u_{long}"] = log_u.masked_fill(never, torch.nan)
        for name in (f"tau_{long}", f"tau_m_{long}", f"tau_v_{long}"):
            if name in found:
                found[name] = found[name].masked_fill(never, torch.nan)
    return found


def blocks(held: Mapping[str, Any], u_format: str | None, rows: int) -> Iterator[dict[str, Tensor]]:
    """Log u of both directions as ``from_published`` gives it, in blocks of at most ``rows`` rows, in their order.

    Nothing where the file has none. The tensors may be mapped from the file: each block is read when it comes.
    """
    names = [f"{kind}_{d}" for kind in ("u", "bound") for d in ("im", "tt")]
    entries = {name: held[name].reshape(-1) for name in names if name in held}
    stored = [entry for name, entry in entries.items() if name.startswith("u_")]
    starts = range(0, max(map(len, stored), default=0), rows)
    kind = held.get("u_format")
    if kind is None:  # a negative value anywhere tells it
        negative = any(bool((entry[start : start + rows] < 0).any()) for start in starts for entry in stored)
        kind = "log" if negative else u_format
    for start in starts:
        part = {name: entry[start : start + rows] for name, entry in entries.items()}
        yield from_published({**part, "u_format": kind} if kind else part)
