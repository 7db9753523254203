"""What a benchmark prints: a table, or with ``--json`` one object on stdout and the table on stderr."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch


def say(message: str) -> None:
    """Progress, on stderr: stdout is for results."""
    print(message, file=sys.stderr, flush=True)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in (header, *rows)
    ]
    return "\n".join([title, *(line.rstrip() for line in lines)])


def emit(result: dict[str, Any], text: str, as_json: bool) -> None:
    """The table on stdout, or ``result`` as its only line."""
    print(text, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(result))


def machine(device: torch.device, threads: int | None = None) -> str:
    """What the numbers were measured on; ``threads`` per process (default: this one's)."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {threads or torch.get_num_threads()} thread(s), torch {torch.__version__}"


def mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
