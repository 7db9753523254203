"""Which device a rank computes on, and that all ranks compute on the same kind, before they form a group.

A rank whose GPU is missing would otherwise end alone, while the others wait for it, or join on the CPU, where the
first exchange with the others' GPUs hangs.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from datetime import timedelta

import torch
from torch.distributed import Store

from training.config.run import DistributedConfig
from training.distributed.launcher import LaunchedRank

_CPU = torch.device("cpu")
_PATIENCE = timedelta(seconds=5)
_SHOWN = 8


class NoDevice(ValueError):
    """This rank has no device."""


def choose(place: LaunchedRank, config: DistributedConfig) -> torch.device:
    """The GPU with the number of the local rank, or the first one by flag; the CPU where there is none.

    NoDevice: there are GPUs, but fewer than ranks on this node.
    """
    if not torch.cuda.is_available():
        return _CPU
    number = 0 if config.no_set_device_rank else place.local_rank
    if number >= torch.cuda.device_count():
        raise NoDevice(
            f"local rank {place.local_rank} has no GPU: this process sees {torch.cuda.device_count()}. Start "
            "fewer ranks per node, or give --no-set-device-rank where each rank is shown only its own GPU"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


@dataclass(frozen=True)
class Report:
    """What a rank says of its device: its host, 'cuda' or 'cpu', and what is wrong ('': nothing)."""

    host: str
    kind: str
    fault: str = ""


def agree(store: Store, place: LaunchedRank, kind: str, fault: str = "") -> None:
    """Tell the other ranks this one's device, and hear theirs. Collective.

    ValueError, the same on all ranks: one has a ``fault``, or some compute on GPUs and some on the CPU.
    """
    report = Report(socket.gethostname(), kind, fault)
    store.set(f"device/{place.rank}", json.dumps(astuple(report)))
    if place.rank == 0:
        reports = [Report(*json.loads(store.get(f"device/{rank}"))) for rank in range(place.world_size)]
        verdict = judge(reports)
        store.set("devices", verdict)
    else:
        verdict = store.get("devices").decode()
    if not verdict:
        return
    store.set(f"device/{place.rank}/heard", "")
    if place.rank == 0:  # the store may end with this process
        with suppress(RuntimeError):
            store.wait([f"device/{rank}/heard" for rank in range(place.world_size)], _PATIENCE)
    raise ValueError(verdict)


def judge(reports: Sequence[Report]) -> str:
    """Why ranks with these devices cannot train together; '': they can."""
    for rank, report in enumerate(reports):
        if report.fault:
            return f"rank {rank} on {report.host}: {report.fault}"
    without = [rank for rank, report in enumerate(reports) if report.kind == "cpu"]
    if not without or len(without) == len(reports):
        return ""
    hosts = ", ".join(dict.fromkeys(reports[rank].host for rank in without))
    shown = ", ".join(map(str, without[:_SHOWN])) + (" …" if len(without) > _SHOWN else "")
    return (
        f"{len(without)} of {len(reports)} ranks find no GPU (ranks {shown} on {hosts}), and the others have one: "
        "nvidia-smi shows whether the driver works there; under Slurm ask for GPUs on every node (--gres=gpu:N); "
        "CUDA_VISIBLE_DEVICES= for all ranks trains on CPUs"
    )
