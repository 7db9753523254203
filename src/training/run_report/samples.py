"""The samples with the largest u: those whose own pair is worst among all that they are compared with.

A caption of another picture, a placeholder ("image not available") and a broken picture look like that. The values
are those of the newest complete checkpoint; names, captions and pictures are looked up in the training data.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drrho_clip.losses.registry import LOG_U
from training.checkpoint import catalog, pt_file, published, sample_state_io
from training.checkpoint.catalog import Found
from training.config.flags import ALL
from training.config.inputs.csv_files import csv_files
from training.config.parser import parse_sizes
from training.data.lanes import Part
from training.data.samples import RawSample
from training.data.sources.csv_file import CsvFormat, read_pairs
from training.data.sources.fields import SampleFields, sample_fields
from training.data.sources.paths import expand_shards, look_for_shards
from training.data.sources.rows import with_rows
from training.data.sources.shards import UNREADABLE, Shard, count_samples
from training.data.sources.strings import Strings
from training.data.sources.webdataset import ShardSource
from training.run_report.pictures import data_url, thumbnail

_PICTURE = 176  # pixels of the longer side
_CAPTION = 400  # characters
_BINS = 64
_BLOCK = 1 << 20  # rows that are in memory at a time
_CSV = re.compile(r"\.(csv|tsv)(\.\w+)?(::|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Hard:
    """One sample: its row, log u of both directions, and what is known from the data."""

    row: int
    log_u: Mapping[str, float]
    name: str = ""
    caption: str = ""
    picture: str = ""


@dataclass(frozen=True)
class LargestU:
    """What the newest checkpoint says about u. ``checkpoint``: its file, '' where there is none that keeps u.

    ``rows`` of the sample state, of which ``seen`` have a value. ``remark``: what could not be found, and why.
    ``spread``: column -> (edges [n + 1], counts [n]).
    """

    checkpoint: str = ""
    rows: int = 0
    seen: int = 0
    samples: tuple[Hard, ...] = ()
    remark: str = ""
    spread: Mapping[str, tuple[list[float], list[float]]] = field(default_factory=dict)


def largest_u(folder: Path, flags: Mapping[str, str], count: int, seconds: float) -> LargestU:
    """The ``count`` samples with the largest u of the run in ``folder``, looked up for ``seconds`` at most."""
    try:
        found, unreadable = catalog.contents(folder / "checkpoints")
        checkpoint, table = _newest(found, flags.get("u_format"))
        scan = _scanned(table, count)
    except (ValueError, OSError) as error:
        return LargestU(remark=f"u cannot be read: {error}")
    if not scan.rows:
        bad = f"; {len(unreadable)} cannot be read, such as {unreadable[0]}" if unreadable else ""
        return LargestU(
            remark=f"no checkpoint here keeps u (with OpenCLIP's loss, and with --gamma 1, there is none){bad}"
        )
    hard = scan.hard
    try:
        samples, remark = _look_up(hard, flags, seconds)
    except (ValueError, OSError, *UNREADABLE) as error:
        samples = hard
        remark = (
            f"names and pictures are missing, as the training data cannot be opened ({error}); run the report in "
            "the folder in which the run was started, or give --train-data"
        )
    return LargestU(str(checkpoint), scan.rows, scan.seen, tuple(samples), remark, scan.spread)


# The blocks of a table of log u, from its first row on, as often as it is called.
_Table = Callable[[], Iterator[Mapping[str, Tensor]]]


def _newest(found: Sequence[Found], u_format: str | None) -> tuple[Path, _Table]:
    """The newest checkpoint that keeps log u, and its table; an empty one where there is none."""
    for each in sorted(found, key=lambda each: each.order, reverse=True):
        if each.state is not None and sample_state_io.missing(each.state.folder, each.state.files) is None:
            table: _Table = partial(sample_state_io.blocks, each.state.folder, LOG_U, _BLOCK)
        else:
            known = u_format if u_format in ("log", "linear") else None
            table = partial(published.blocks, pt_file.read(each.path), known, _BLOCK)
        if next(table(), None):
            return each.path, table
    return Path(), lambda: iter(())


@dataclass
class _Scan:
    """What is known of a table: as in ``LargestU``, and the samples with the largest u."""

    rows: int = 0
    seen: int = 0
    hard: list[Hard] = field(default_factory=list)
    spread: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)


def _scanned(table: _Table, count: int) -> _Scan:
    """Read the table twice, a block at a time: its extent and the ``count`` largest, then how it is spread."""
    scan = _Scan()
    limits: dict[str, tuple[float, float]] = {}
    best: list[tuple[float, Hard]] = []
    for block in table():
        mean = torch.stack([*block.values()]).double().mean(0)
        seen = mean.isfinite()
        order = torch.where(seen, mean, -torch.inf).topk(min(count, int(seen.sum()))).indices.tolist()
        best += [
            (mean[i].item(), Hard(scan.rows + i, {name: column[i].item() for name, column in block.items()}))
            for i in order
        ]
        best = sorted(best, key=lambda each: -each[0])[:count]
        for name, column in block.items():
            values = column[column.isfinite()]
            if len(values):
                low, high = limits.get(name, (math.inf, -math.inf))
                limits[name] = min(low, values.min().item()), max(high, values.max().item())
        scan.rows, scan.seen = scan.rows + len(mean), scan.seen + int(seen.sum())
    scan.hard = [hard for _, hard in best]
    counts: dict[str, NDArray[np.int64]] = {}
    for block in table():
        for name in limits:
            finite = block[name][block[name].isfinite()].numpy()
            found, edges = np.histogram(finite, bins=_BINS, range=limits[name])
            counts[name] = counts.get(name, 0) + found
            scan.spread[name] = edges.tolist(), counts[name].astype(float).tolist()
    return scan


def _look_up(hard: list[Hard], flags: Mapping[str, str], seconds: float) -> tuple[list[Hard], str]:
    """``hard`` with what the training data says of them, and a remark. ValueError: it cannot be opened."""
    data, kind = _flag(flags, "train_data"), _flag(flags, "dataset_type")
    if kind == "synthetic" or data == "None":
        return hard, "the data are synthetic, so there are no names" if kind == "synthetic" else "there is no data"
    if kind == "csv" or (kind == "auto" and _CSV.search(data)):
        return _in_tables(hard, data, flags), ""
    rows = {each.row for each in hard}
    if not seconds:
        return hard, "--seconds 0: names and pictures were not looked for"
    look_for_shards(data, "--train-data")
    deadline = time.monotonic() + seconds
    found = dict(_in_shards(rows, data, flags, deadline))
    remark = ""
    if len(found) < len(rows):
        late = time.monotonic() > deadline
        why = f"the search ended after --seconds {seconds:g}" if late else "they are not there, or cannot be read"
        remark = f"{len(rows) - len(found)} of {len(rows)} samples were not found in {data}: {why}"
    return [_with(each, found.get(each.row)) for each in hard], remark


def _flag(flags: Mapping[str, str], key: str) -> str:
    """The value of a flag as text; its default for a run that did not know it."""
    return flags.get(key, str(ALL[key].default))


def _in_tables(hard: list[Hard], data: str, flags: Mapping[str, str]) -> list[Hard]:
    form = CsvFormat(*(_flag(flags, f"csv_{part}") for part in ("separator", "quoting", "encoding")))
    keys = _flag(flags, "csv_img_key"), _flag(flags, "csv_caption_key")
    images, texts = Strings(), Strings()
    for file in csv_files(data, "--train-data"):
        more_images, more_texts = read_pairs(file, keys, form, f"--train-data {file}")
        images.extend(more_images)
        texts.extend(more_texts)
    return [
        _with(each, RawSample(images[each.row], texts[each.row], each.row, 0, images[each.row]))
        if each.row < len(images)
        else each
        for each in hard
    ]


def _in_shards(
    rows: set[int], data: str, flags: Mapping[str, str], deadline: float
) -> Iterator[tuple[int, RawSample]]:
    """(row, sample) of those of ``rows`` that are found before ``deadline``."""
    sizes = parse_sizes(_flag(flags, "data_size").strip("[]()").replace(", ", "::"))
    shards = list(with_rows(expand_shards(data), sizes if isinstance(sizes, list) else [sizes]))
    fields = sample_fields(*(_flag(flags, key) for key in ("image_key", "text_key", "json_key")))
    by_position = _flag(flags, "sample_index") == "position"
    left = set(rows)
    order = _counted(shards, left, fields) if by_position else _guessed(shards, left)
    told: Callable[[int, int], None] | None = None
    for number, shard, told in order:
        source = ShardSource([shard], 0, sample_index="position" if by_position else "key", fields=fields)
        met: list[int] = []
        for item in source.in_order(Part(0, 1)):
            if item.sample is not None:
                met.append(item.sample.row)
                if item.sample.row in left:
                    left.discard(item.sample.row)
                    yield item.sample.row, item.sample
            if not left or time.monotonic() > deadline:
                return
        if met and told is not None:
            told(number, sorted(met)[len(met) // 2])


_Order = Iterator[tuple[int, Shard, Callable[[int, int], None] | None]]


def _counted(shards: list[Shard], left: set[int], fields: SampleFields) -> _Order:
    """The shards that have one of the rows ``left``, where a row is a position; all before them are counted."""
    seen: dict[int, int] = {}
    for number, shard in enumerate(shards):
        first = shard.first_row + seen.get(shard.first_row, 0)
        n = count_samples(shard.url, fields.known)
        seen[shard.first_row] = seen.get(shard.first_row, 0) + n
        if any(first <= row < first + n for row in left):
            yield number, replace(shard, first_row=first), None


def _guessed(shards: list[Shard], left: set[int]) -> _Order:
    """All shards, each time the one in which a row of ``left`` is likeliest: keys mostly rise with the shards.

    A guess is made from the numbers of shards and the middles of their rows, which the caller tells.
    """
    middles: dict[int, int] = {}
    unread = set(range(len(shards)))

    def tell(number: int, middle: int) -> None:
        middles[number] = middle

    while unread:
        ends = {0: shards[0].first_row, len(shards) - 1: max(shard.stop_row for shard in shards)}
        known = sorted((middle, number) for number, middle in {**ends, **middles}.items())
        row = min(left)
        guess = float(np.interp(row, [middle for middle, _ in known], [number for _, number in known]))
        number = min(unread, key=lambda each: abs(each - guess))
        unread.discard(number)
        yield number, shards[number], tell


def _with(hard: Hard, found: RawSample | None) -> Hard:
    if found is None:
        return hard
    picture = data_url(thumbnail(found.image, _PICTURE))
    return replace(hard, name=found.name, caption=found.text[:_CAPTION], picture=picture)
