"""What the flags of cached features mean together: refusals, and what a run does with a cache.

Every rule takes what was ``Given`` and either answers or raises ``Refusal``, as in ``rules``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.command_line import Given, Refusal


@dataclass(frozen=True)
class CacheConfig:
    """Reference features on disk.

    ``writes``: 'features' where the run writes them and ends, else ''. The folder is resolved: the one to write,
    or what training reads, '' where it reads none.
    """

    writes: str
    cached_ref_features_dir: str
    ref_features_offset: int
    num_samples_per_shard: int
    cache_group_size: int
    cache_rank: int


def writes(given: Given) -> str:
    """'features' where the run writes a cache and ends; else ''."""
    return "features" if given.cache_ref_model_features else ""


def resolve(given: Given, dataset_type: str, trains: bool) -> dict[str, Any]:
    """``writes``, and the folder of the cache, '' where the run has no use for one."""
    written, folder = writes(given), given.cached_ref_features_dir
    if written:
        _check_writing(given, dataset_type)
        folder = folder or os.path.join(given.logs, "ref_features")
    elif trains and folder:
        _check_reading(given, "cached_ref_features_dir", dataset_type)
    return {"writes": written, "cached_ref_features_dir": folder}


def _check_writing(given: Given, dataset_type: str) -> None:
    flag = given.say("cache_ref_model_features")
    if dataset_type == "none":
        raise Refusal(f"{flag} needs --train-data: the samples to go through")
    if dataset_type == "synthetic":
        raise Refusal(f"{flag}: synthetic data is noise that each run makes anew, give --train-data")
    _check_rows(given, flag, dataset_type)
    if given.cache_rank >= given.cache_group_size:
        raise Refusal(
            f"{given.say('cache_rank')}: jobs are numbered from 0 to --cache_group_size - 1, here "
            f"{given.cache_group_size - 1}"
        )
    if given.resume:
        raise Refusal(f"{given.say('resume')}: {flag} goes on by itself where it stopped, leave the flag out")
    if given.skip_webdataset_split_by_node:
        raise Refusal(
            f"--skip_webdataset_split_by_node: {flag} shares the shards out among the ranks; give every node a "
            "job of its own with --cache_group_size and --cache_rank"
        )
    if re.search(r"[{*?\[]|::|^[a-z0-9]+:", given.cached_ref_features_dir):
        raise Refusal(f"{given.say('cached_ref_features_dir')}: to write, give one folder, not a pattern or a URL")


def _check_reading(given: Given, key: str, dataset_type: str) -> None:
    _check_rows(given, given.say(key), dataset_type)
    value = given.values[key]
    if not re.search(r"[:{*?\[]", value) and not Path(value).exists():
        raise Refusal(f"{given.say(key)}: there is no such folder on this machine, check the path")


def _check_rows(given: Given, flag: str, dataset_type: str) -> None:
    if dataset_type == "webdataset" and given.data_size == -1:
        raise Refusal(
            f"{flag} needs --data_size: without it samples of shards have no rows, by which they are found again"
        )
