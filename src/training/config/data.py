"""Training data: where it comes from, what one epoch takes of it, and which row a sample has."""

from __future__ import annotations

import math
import os.path
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.config.flags import ALL
from training.config.given import Given, Refusal
from training.config.inputs.csv_files import csv_files, resolve_encoding, resolve_separator
from training.config.remarks import Idle


@dataclass(frozen=True)
class DataConfig:
    """Where training samples come from.

    ``dataset_type`` is resolved: 'webdataset', 'csv', 'synthetic', or 'none' where there is nothing to train on.
    ``data_size`` is the number of rows of the sample state, -1 where none was given; ``data_sizes`` its parts,
    several where each ``::`` source has its own. ``train_num_samples`` None: all rows of the csv file.
    ``epoch_policy`` is resolved: 'resample' with ``--dataset-resampled`` too. ``lanes``: (virtual ranks, virtual
    workers), None where the launch decides.
    """

    train_data: str | None
    train_data_upsampling_factors: tuple[float, ...] | None
    train_num_samples: int | None
    dataset_type: str
    epoch_policy: str
    lanes: tuple[int, int] | None
    csv_separator: str
    csv_img_key: str
    csv_caption_key: str
    workers: int
    data_size: int
    sample_index: str
    max_bad_fraction: float
    skip_webdataset_split_by_node: bool
    aug_cfg: Mapping[str, Any]
    rand_augment: bool
    data_sizes: tuple[int, ...] = ()
    csv_quoting: str = "auto"
    csv_encoding: str = "utf-8"


IDLE = (
    Idle(
        ("csv_separator", "csv_img_key", "csv_caption_key", "csv_quoting", "csv_encoding"),
        lambda s: "csv" not in s.kinds,
        "without csv data",
    ),
    Idle(
        ("sample_index",),
        lambda s: "webdataset" not in s.kinds or s.given.data_size == -1,
        "without shards and --data_size",
    ),
    Idle(("skip_webdataset_split_by_node",), lambda s: "webdataset" not in s.kinds, "without shards to split"),
)


def resolve_data(given: Given, dataset_type: str, trains: bool) -> DataConfig:
    """The ``DataConfig`` of the flags, for data of ``dataset_type`` (``kind_of_data``).

    Refusal: the flags contradict each other or the data, or the number of samples is missing.
    """
    sizes = _data_sizes(given, dataset_type)
    if trains:
        _check_training_data(given, dataset_type)
    return given.group(
        DataConfig,
        dataset_type=dataset_type,
        epoch_policy=_epoch_policy(given),
        lanes=_lanes(given),
        train_data_upsampling_factors=_upsampling_factors(given, dataset_type) if trains else None,
        data_size=sum(sizes) if sizes else -1,
        data_sizes=sizes,
        csv_separator=resolve_separator(given),
        csv_encoding=resolve_encoding(given),
    )


def kind_of_data(given: Given, key: str) -> str:
    """'webdataset', 'csv' or 'synthetic' for ``--train-data`` or ``--val-data``; 'none' where it is not given."""
    if key == "train_data" and given.dataset_type == "synthetic":
        return "synthetic"
    data = given.values[key]
    if not data:
        return "none"
    if given.dataset_type in ("webdataset", "csv"):
        return given.dataset_type
    kinds = {_kind_of_source(source) for source in ([data] if os.path.exists(data) else data.split("::"))}
    if len(kinds) > 1 or None in kinds:
        what = "mixes shards and csv files" if None not in kinds else "is neither .tar nor .csv or .tsv"
        raise Refusal(f"{given.say(key)}: it {what}; give --dataset-type webdataset or --dataset-type csv")
    return str(kinds.pop())


def check_file(given: Given, key: str) -> None:
    """Refusal: there is no such local file. Other patterns than those of csv files, and URLs, are opened later."""
    value = given.values[key]
    if key in ("train_data", "val_data") and kind_of_data(given, key) == "csv":
        csv_files(value, ALL[key].name)
        return
    if not value or re.search(r"[:{*?\[]", value) or (key == "train_data" and given.dataset_type == "synthetic"):
        return
    if not Path(value).exists():
        raise Refusal(f"{given.say(key)}: there is no such file on this machine; check the path")


def _kind_of_source(source: str) -> str | None:
    if re.search(r"\.(csv|tsv)(\.(gz|bz2|xz|zip|zst))?$", source, re.IGNORECASE):
        return "csv"
    return "webdataset" if re.search(r"\.tar\b|\.tgz\b", source) else None


def _data_sizes(given: Given, dataset_type: str) -> tuple[int, ...]:
    """``--data_size`` for each source; empty where it was not given."""
    sizes = given.data_size if isinstance(given.data_size, list) else [given.data_size]
    if sizes == [-1]:
        return ()
    if min(sizes) < 1:
        raise Refusal(f"{given.say('data_size')}: each size must be at least 1")
    sources = given.train_data.count("::") + 1 if given.train_data else 1
    if len(sizes) > 1 and (dataset_type != "webdataset" or len(sizes) != sources):
        raise Refusal(
            f"{given.say('data_size')}: {len(sizes)} sizes for {sources} --train-data sources; give one size "
            "per :: source of shards, or a single size if no two sources share a key"
        )
    return tuple(sizes)


def _upsampling_factors(given: Given, dataset_type: str) -> tuple[float, ...] | None:
    """One positive weight per ``::`` source."""
    text = given.train_data_upsampling_factors
    if text is None:
        return None
    say = given.say("train_data_upsampling_factors")
    try:
        factors = tuple(float(part) for part in text.split("::"))
    except ValueError:
        raise Refusal(f"{say}: expected numbers joined with ::, e.g. 1::2.5") from None
    if not all(0 < factor < math.inf for factor in factors):
        raise Refusal(f"{say}: every weight must be above 0; to leave a source out, remove it from --train-data")
    if dataset_type != "webdataset" or _epoch_policy(given) != "resample":
        cure = "add that flag" if dataset_type == "webdataset" else "leave it out"
        raise Refusal(f"{say}: weights have an effect only on shards drawn with --dataset-resampled; {cure}")
    sources = given.train_data.count("::") + 1
    if len(factors) != sources:
        raise Refusal(f"{say}: {len(factors)} weights for {sources} --train-data sources; give one per source")
    return factors


def _epoch_policy(given: Given) -> str:
    """'wrap', 'exact' or 'resample', which the published ``--dataset-resampled`` asks for too."""
    policy = given.epoch_policy or ("resample" if given.dataset_resampled else "wrap")
    if given.dataset_resampled and policy != "resample":
        raise Refusal(
            f"{given.say('epoch_policy')} contradicts --dataset-resampled, which means --epoch_policy resample: "
            "leave one of them out"
        )
    if policy == "exact" and given.skip_webdataset_split_by_node:
        raise Refusal(
            "--epoch_policy exact divides the samples of one shard list among all ranks, which contradicts "
            "--skip_webdataset_split_by_node: leave one of them out"
        )
    return policy


def _lanes(given: Given) -> tuple[int, int] | None:
    """``--lanes P,Q`` as numbers; None: the launch decides."""
    if given.lanes is None:
        return None
    if not re.fullmatch(r"[1-9]\d{0,5},[1-9]\d{0,5}", given.lanes):
        raise Refusal(
            f"{given.say('lanes')}: expected two numbers P,Q (virtual ranks, virtual workers), such as 8,4"
        )
    ranks, workers = given.lanes.split(",")
    return int(ranks), int(workers)


def _check_training_data(given: Given, dataset_type: str) -> None:
    if given.train_num_samples is None and dataset_type in ("webdataset", "synthetic"):
        raise Refusal(
            f"--train-num-samples is missing: {dataset_type} data has no known length; give the number of samples "
            "in one epoch"
        )
