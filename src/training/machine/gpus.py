"""GPUs that are in this machine, whether or not CUDA shows them to this process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from training.machine.prepare import Unfit

_HIDDEN = ("", "-1", "NoDevFiles")  # the values of CUDA_VISIBLE_DEVICES by which users ask for the CPU

_HELP = "nvidia-smi shows whether the driver works, python -m torch.utils.collect_env whether it fits torch"


def idle_gpus(ranks: int, visible: int) -> str | None:
    """A remark where the ``ranks`` of a node leave some of its ``visible`` GPUs idle."""
    if ranks >= visible:
        return None
    return (
        f"{visible} GPUs are visible on this node and {ranks} of them {'is' if ranks == 1 else 'are'} used, one "
        f"for each rank: start {visible} ranks per node (torchrun --nproc_per_node={visible}, srun "
        f"--ntasks-per-node={visible}), or hide the others (CUDA_VISIBLE_DEVICES)"
    )


def without_gpu(
    env: Mapping[str, str] = os.environ, devices: Path = Path("/dev"), *, built_for_gpus: bool = False
) -> str | None:
    """A remark for a run that found no GPU; None: there is none in this machine.

    ``built_for_gpus``: torch is a CUDA build; with it a Slurm job without a GPU is a remark too.

    Unfit: CUDA_VISIBLE_DEVICES asks for GPUs, and names none of this machine.
    """
    present = sum(file.name.removeprefix("nvidia").isdigit() for file in devices.glob("nvidia*"))
    if not present:
        if built_for_gpus and "SLURM_JOB_ID" in env:
            return (
                f"job {env['SLURM_JOB_ID']} has no GPU on this node and runs on the CPU: ask Slurm for GPUs "
                "(--gres=gpu:N) if it should train on them"
            )
        return None
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return (
            f"this machine has {present} NVIDIA GPUs, but torch can use none of them and runs on the CPU: {_HELP}"
        )
    if visible.strip() in _HIDDEN:
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides the {present} GPUs of this machine: the run is on the CPU"
    raise Unfit(
        f"CUDA_VISIBLE_DEVICES={visible!r} names no GPU that torch can use, but this machine has {present}: "
        f"give numbers from 0 to {present - 1}, or nothing ('') to run on the CPU; {_HELP}"
    )
