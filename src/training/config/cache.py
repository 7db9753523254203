"""Cached reference features and synthetic captions: what a run writes, or reads, and where."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from training.config.flags import ALL
from training.config.given import Given, Refusal
from training.config.inputs.weights import check_weights
from training.config.model import brings_weights, check_model, is_coca
from training.config.remarks import Idle, Pitfall, Setting

FEATURES, CAPTIONS = "features", "captions"
_WRITES = {"cache_ref_model_features": FEATURES, "cache_syn_texts": CAPTIONS}
_FOLDERS = {FEATURES: ("cached_ref_features_dir", "ref_features"), CAPTIONS: ("cached_syn_texts_dir", "syn_texts")}
_SAME_ROWS = "; rows keep their numbers"


@dataclass(frozen=True)
class CacheConfig:
    """Reference features and synthetic captions on disk.

    ``writes``: 'features' or 'captions' where the run writes a cache and ends, else ''. Folders are resolved: the
    one to write, or those that are read, '' where none is. ``num_syn_texts`` None: all that are there.
    ``ref_features_dtype`` None: as the reference's precision or ``ref_features_error_bound`` says.
    ``ref_features_views`` 0: one fixed view. ``ref_features_cache_mb`` 0: the kernel decides what stays in memory.
    """

    writes: str
    cached_ref_features_dir: str
    ref_features_dtype: str | None
    ref_features_error_bound: float | None
    ref_features_views: int
    ref_features_cache_mb: int
    ref_features_offset: int
    num_samples_per_shard: int
    cached_syn_texts_dir: str
    syn_texts_offset: int
    num_syn_texts: int | None
    cap_model: str
    cap_model_pretrained: str
    cache_group_size: int
    cache_rank: int
    syn_texts_ratio: float | None = None


def _writes_with(key: str, unless: str | None) -> Callable[[Setting], bool]:
    """Whether a run writes a cache and has ``key`` at another value than 0, and not the flag ``unless``."""
    return lambda s: s.writes_cache and bool(s.given.values[key]) and not (unless and s.given.values[unless])


IDLE = (
    Idle(
        ("ref_features_offset", "num_samples_per_shard", "ref_features_cache_mb"),
        lambda s: not s.given.cached_ref_features_dir,
        "without --cached_ref_features_dir",
    ),
    Idle(
        ("syn_texts_offset",),
        lambda s: not s.given.cached_syn_texts_dir,
        "without --cached_syn_texts_dir",
    ),
    Idle(
        ("num_syn_texts", "syn_texts_ratio"),
        lambda s: not s.given.cached_syn_texts_dir and not s.given.dataset_reinforcement,
        "without synthetic captions",
    ),
    Idle(("cap_model_pretrained",), lambda s: True, "without --cache_syn_texts"),
    Idle(
        ("ref_features_dtype", "ref_features_error_bound", "ref_features_views"),
        lambda s: True,
        "when features are read: they are as they were written",
    ),
    Idle(("cache_group_size", "cache_rank"), lambda s: True, "in a run that writes no cache"),
)
PITFALLS = (
    Pitfall(
        lambda s: not s.trains and not s.writes_cache and s.given.epochs > 0,
        "no --train-data: this run only evaluates",
    ),
    *(
        Pitfall(
            _writes_with(key, unless),
            f"{ALL[key].name}: no effect when a cache is written{more}",
        )
        for key, unless, more in (
            ("ref_features_offset", None, _SAME_ROWS),
            ("ref_features_cache_mb", None, ""),
            ("syn_texts_offset", "cache_ref_model_features", _SAME_ROWS),  # read: see ``--cached_syn_texts_dir``
        )
    ),
)


def writes(given: Given) -> str:
    """'features' or 'captions' where the run writes a cache and ends; else ''."""
    asked = [key for key in _WRITES if given.values[key]]
    if len(asked) == 2:
        raise Refusal(
            f"{given.say(asked[0])} and {given.say(asked[1])} need two runs, each of which reads all images "
            "once: leave one of them out"
        )
    return _WRITES[asked[0]] if asked else ""


def resolve_cache(given: Given, dataset_type: str, trains: bool) -> CacheConfig:
    """The ``CacheConfig`` of the flags. A folder is '' where the run does not use it."""
    written = writes(given)
    folders = {key: given.values[key] for key, _ in _FOLDERS.values()}
    if written:
        _check_writing(given, written, dataset_type)
        key, default = _FOLDERS[written]
        read = folders["cached_syn_texts_dir"] if written == FEATURES else ""
        folders = {"cached_syn_texts_dir": read, "cached_ref_features_dir": ""} | {
            key: folders[key] or os.path.join(given.logs, default)
        }
    elif trains:
        _check_reading(given, dataset_type)
        _check_reinforcement(given, dataset_type)
    count = given.num_syn_texts if written == CAPTIONS or given.chose("num_syn_texts") else None
    return given.group(CacheConfig, writes=written, num_syn_texts=count, **folders)


def _check_writing(given: Given, written: str, dataset_type: str) -> None:
    flag = given.say(next(key for key, what in _WRITES.items() if what == written))
    if dataset_type == "none":
        raise Refusal(f"{flag} needs --train-data: give the samples to process")
    if dataset_type == "synthetic":
        raise Refusal(f"{flag}: synthetic data is noise that every run generates again; give --train-data")
    _check_rows(given, flag, dataset_type)
    if given.dataset_reinforcement:
        raise Refusal(f"--dataset_reinforcement with {flag}: it is for training; leave it out")
    if given.cache_rank >= given.cache_group_size:
        raise Refusal(
            f"{given.say('cache_rank')}: jobs are numbered from 0 to --cache_group_size - 1, which is "
            f"{given.cache_group_size - 1}"
        )
    if given.resume:
        raise Refusal(f"{given.say('resume')}: {flag} continues by itself where it stopped; leave --resume out")
    if given.skip_webdataset_split_by_node:
        raise Refusal(
            f"--skip_webdataset_split_by_node: {flag} divides the shards among the ranks itself; start one job "
            "per node instead, with --cache_group_size and --cache_rank"
        )
    key = _FOLDERS[written][0]
    if re.search(r"[{*?\[]|::|^[a-z0-9]+:", given.values[key]):
        raise Refusal(
            f"{given.say(key)}: a cache is written into one local folder; give its path, not a pattern or a URL"
        )
    about = ("ref_features_dtype", "ref_features_error_bound", "ref_features_views")
    form = next((key for key in about if given.values[key]), None)
    if form and written == CAPTIONS:
        raise Refusal(f"{given.say(form)}: {flag} writes captions, and it is about features; leave it out")
    if given.ref_features_dtype and given.ref_features_error_bound:
        raise Refusal(
            f"{given.say('ref_features_error_bound')} decides how features are stored, and so does "
            f"{given.say('ref_features_dtype')}: leave one of them out"
        )
    if written == CAPTIONS:
        _check_captioner(given)
    else:
        _check_folder(given, "cached_syn_texts_dir")


def _check_reading(given: Given, dataset_type: str) -> None:
    for key in (key for key, _ in _FOLDERS.values() if given.values[key]):
        _check_rows(given, given.say(key), dataset_type)
        _check_folder(given, key)
    if given.cap_model:
        raise Refusal(
            f"{given.say('cap_model')}: training generates no captions; run once with --cache_syn_texts, then "
            "train with --cached_syn_texts_dir and without --cap_model"
        )


def _check_reinforcement(given: Given, dataset_type: str) -> None:
    if not given.dataset_reinforcement:
        return
    if dataset_type != "webdataset":
        raise Refusal(
            "--dataset_reinforcement: only shards hold features beside samples; give --train-data shards"
        )
    other = next((key for key, _ in _FOLDERS.values() if given.values[key]), None)
    if other:
        raise Refusal(
            f"{given.say(other)} with --dataset_reinforcement: the shards hold such values themselves; leave one "
            "of the two out"
        )
    if given.aug_cfg.get("use_timm"):
        raise Refusal(
            "--aug-cfg use_timm=True with --dataset_reinforcement: timm's transforms cannot show the views that "
            "the shards name; leave it out"
        )


def _check_folder(given: Given, key: str) -> None:
    value = given.values[key]
    if value and not re.search(r"[:{*?\[]", value) and not Path(value).exists():
        raise Refusal(f"{given.say(key)}: there is no such folder on this machine; check the path")


def _check_rows(given: Given, flag: str, dataset_type: str) -> None:
    if dataset_type == "webdataset" and given.data_size == -1:
        raise Refusal(
            f"{flag} needs --data_size: cached values are found by row, and without it samples of shards have none"
        )


def _check_captioner(given: Given) -> None:
    if not given.cap_model:
        raise Refusal("--cache_syn_texts needs --cap_model: give the model that writes the captions")
    check_model(given, "cap_model")
    check_weights(given, "cap_model_pretrained")
    if not is_coca(given.cap_model):
        raise Refusal(f"{given.say('cap_model')}: it has no caption decoder; choose a CoCa model")
    if given.precision in ("bf16", "fp16"):
        raise Refusal(
            f"{given.say('precision')}: open_clip casts only a part of CoCa's decoder; use amp_bf16 or pure_bf16"
        )
    if not given.cap_model_pretrained and not brings_weights(given.cap_model):
        raise Refusal(f"{given.say('cap_model')} has no weights: give --cap_model_pretrained TAG or FILE")
