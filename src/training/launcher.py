"""What torchrun or Slurm say of this process, known before torch is imported and before the ranks meet."""

from __future__ import annotations

import os
from collections.abc import Mapping


def rank(env: Mapping[str, str] = os.environ) -> int:
    """This process's number among all; 0 where nothing started it beside others."""
    return int(env.get("RANK") or env.get("SLURM_PROCID") or 0)


def slurm_job(env: Mapping[str, str] = os.environ) -> str | None:
    """The number of the Slurm job that this process belongs to."""
    return env.get("SLURM_JOB_ID")


def local_rank(env: Mapping[str, str] = os.environ) -> int:
    """Its number on its node; processes started by hand are taken to share one."""
    return int(env.get("LOCAL_RANK") or env.get("SLURM_LOCALID") or rank(env))
