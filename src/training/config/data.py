"""Training data: where it comes from, what one epoch takes of it, and which row a sample has."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
    image_key: str
    text_key: str
    json_key: str
    max_bad_fraction: float
    skip_webdataset_split_by_node: bool
    aug_cfg: Mapping[str, Any]
    rand_augment: bool
    data_sizes: tuple[int, ...] = ()
    csv_quoting: str = "auto"
    csv_encoding: str = "utf-8"
    dataset_reinforcement: bool = False


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
    Idle(("image_key", "text_key"), lambda s: "webdataset" not in s.kinds, "without shards"),
    Idle(
        ("json_key",),
        lambda s: "webdataset" not in s.kinds or s.given.data_size == -1 or s.given.sample_index != "key",
        "where rows do not go by key",
    ),
    Idle(("skip_webdataset_split_by_node",), lambda s: "webdataset" not in s.kinds, "without shards to split"),
)

SHARD_NAME = re.compile(r"\.tar(\.(gz|bz2|xz|lzma|zst|lz4))?$|\.t(gz|bz2?|xz|zst)$", re.IGNORECASE)


class Field(NamedTuple):
    """Where a sample has a value: the file with this ``extension`` or, with a ``path``, a field of that json.

    A path such as 'meta.key' leads through objects inside objects.
    """

    extension: str
    path: str = ""


def parse_fields(text: str, key: str) -> tuple[Field, ...]:
    """The alternatives in ``text``, the value of the flag ``key``: image_key, text_key or json_key.

    ValueError: it is of another form.
    """
    said, fields = f"{ALL[key].name} {text!r}", []
    for word in text.split(";"):
        extension, colon, path = (part.strip() for part in word.partition(":"))
        extension = extension.removeprefix("*").removeprefix(".").lower()
        if not extension or (colon and "" in path.split(".")):
            raise ValueError(f"{said}: a name is missing; {_FORMS[key]}")
        if re.search(r"[,/\s]", extension):
            raise ValueError(f"{said}: {extension!r} is no extension; {_FORMS[key]}")
        if colon and key == "image_key":
            raise ValueError(f"{said}: an image cannot be a field of a json; {_FORMS[key]}")
        if key == "text_key" and not path and extension.rpartition(".")[2] == "json":
            raise ValueError(f"{said}: name the field of the json that is the caption, as in {extension}:caption")
        fields.append(Field(extension, path))
    return tuple(fields)


_FORMS = {
    "image_key": "expected extensions joined with ;, such as 'jpg;png'",
    "text_key": "expected extensions or fields of a json joined with ;, such as 'txt;json:caption'",
    "json_key": "expected jsons and the fields of their keys joined with ;, such as json:key or json:meta.id",
}


def sources_of(paths: str) -> list[str]:
    """The sources that ``paths`` joins with ``::``, with the home directory for ~ (shells leave it inside a word).

    A path that exists is itself.
    """
    if os.path.exists(os.path.expanduser(paths)):
        return [os.path.expanduser(paths)]
    return [os.path.expanduser(path) for path in paths.split("::")]


def with_home(paths: str | None) -> str | None:
    """``paths``, joined with ``::``, with the home directory for ~."""
    return paths and "::".join(sources_of(paths))


def resolve_data(given: Given, dataset_type: str, trains: bool) -> DataConfig:
    """The ``DataConfig`` of the flags, for data of ``dataset_type`` (``kind_of_data``).

    Refusal: the flags contradict each other or the data, or the number of samples is missing.
    """
    sizes = _data_sizes(given, dataset_type)
    if trains:
        _check_training_data(given, dataset_type)
    try:
        for key in _FORMS:
            parse_fields(given.values[key], key)
    except ValueError as error:
        raise Refusal(str(error)) from None
    return given.group(
        DataConfig,
        train_data=with_home(given.train_data),
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
    kinds = {source: _kind_of_source(source) for source in sources_of(data)}
    if None in kinds.values():
        unknown = next(source for source, kind in kinds.items() if kind is None)
        what = f"{unknown!r}" if len(kinds) > 1 else "it"
        if os.path.isdir(unknown):
            raise Refusal(f"{given.say(key)}: {what} is a folder without shards (.tar); check the path")
        if not re.search(r"[:{*?\[]", unknown) and not os.path.lexists(unknown):
            raise Refusal(f"{given.say(key)}: {what} is not on this machine; {advice(unknown)}")
        raise Refusal(
            f"{given.say(key)}: {what} is neither .tar nor .csv or .tsv; give --dataset-type webdataset or "
            "--dataset-type csv"
        )
    if len(set(kinds.values())) > 1:
        raise Refusal(
            f"{given.say(key)}: it mixes shards and csv files; give --dataset-type webdataset or --dataset-type "
            "csv"
        )
    return str(kinds.popitem()[1])


def advice(source: str) -> str:
    """What to do about a ``source`` that leads nowhere."""
    if not source:
        return "take out the :: that has nothing beside it"
    if source != source.strip():
        return "take out the space before or behind it"
    if source[0] in "\"'" or source[-1] in "\"'":
        return "take off the quotes, which have reached the program"
    if re.search(r"\$\w", source):
        return "write the variable out, as no shell has replaced it"
    if re.search(r"\.tar[,; ]+\S", source):
        return "join several with ::"
    if re.search(r"\{\d+(-|:|\.|\.{3,})\d+\}|(?<!\{)\b\d+\.{2,3}\d+\b", source):
        return "write a range as {00000..00099}"
    return "check the path"


def check_file(given: Given, key: str) -> None:
    """Refusal: there is no such local file. Other patterns than those of csv files, and URLs, are opened later."""
    value = given.values[key]
    if key in ("train_data", "val_data") and kind_of_data(given, key) == "csv":
        csv_files(value, ALL[key].name)
        return
    if not value or re.search(r"[:{*?\[]", value) or (key == "train_data" and given.dataset_type == "synthetic"):
        return
    path = with_home(value) if key in _MAY_BE_AT_HOME else str(value)
    try:
        Path(path or ".").exists()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise Refusal(f"{given.say(key)}: it cannot be used ({error.strerror}); check the path") from None
    if path and not os.path.exists(path):
        link = f": it is a link to {os.readlink(path)}, which is not there" if os.path.islink(path) else ""
        raise Refusal(f"{given.say(key)}: there is no such file on this machine{link}; {advice(path)}")


_MAY_BE_AT_HOME = ("train_data", "val_data", "imagenet_val", "imagenet_v2", "eval_data_dir")


def shards_in(folder: str) -> list[str]:
    """The paths of the shards that lie in ``folder`` itself, sorted. OSError: it cannot be listed."""
    names = sorted(name for name in os.listdir(folder) if SHARD_NAME.search(name) and not name.startswith("."))
    return [os.path.join(folder, name) for name in names]


def folders_with_shards(folder: str) -> list[str]:
    """The names of the folders in ``folder`` that have shards, sorted. OSError: it cannot be listed."""
    found = []
    for entry in os.scandir(folder):
        with suppress(OSError):
            if entry.is_dir() and shards_in(entry.path):
                found.append(entry.name)
    return sorted(found)


def _kind_of_source(source: str) -> str | None:
    if re.search(r"\.(csv|tsv)(\.(gz|bz2|xz|zip|zst))?$", source, re.IGNORECASE):
        return "csv"
    if re.search(r"\.tar\b|\.t(gz|bz2?|xz|zst)\b", source, re.IGNORECASE):
        return "webdataset"
    with suppress(OSError):
        if os.path.isdir(source) and (shards_in(source) or folders_with_shards(source)):
            return "webdataset"
    return None


def _data_sizes(given: Given, dataset_type: str) -> tuple[int, ...]:
    """``--data_size`` for each source; empty where it was not given."""
    sizes = given.data_size if isinstance(given.data_size, list) else [given.data_size]
    if sizes == [-1]:
        return ()
    if min(sizes) < 1:
        raise Refusal(f"{given.say('data_size')}: each size must be at least 1")
    sources = len(sources_of(given.train_data)) if given.train_data else 1
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
    sources = len(sources_of(given.train_data))
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
