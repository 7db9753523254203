"""What a data set contains, and whether training on it would be safe: every shard is read as training reads it.

``check_data.py`` is its command line.
"""

from __future__ import annotations

import posixpath
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from training.data.bad_samples import Skips
from training.data.decode import decode_pixels, image_size
from training.data.lanes import Part
from training.data.samples import Fault, RawSample, Unusable
from training.data.sources import reinforcement
from training.data.sources.fields import DEFAULT, INCOMPLETE, SampleFields
from training.data.sources.rows import with_rows
from training.data.sources.shards import APART, Shard
from training.data.sources.webdataset import ShardSource
from training.data.worker import decode_or_skip

ROWS = 2**62  # more than any key; used where no --data_size limits them
SHARD_REASONS = ("unreadable shard", "empty shard")
NO_SAMPLES = (*SHARD_REASONS, "duplicate member")  # reasons that do not count samples
SCATTERED = "files not side by side"  # a sample whose files are in several places of its shard
KEY_REASONS = ("missing json", "json is not valid", "json without key", "key is not an integer")
SHOWN = 20  # shards or keys that are listed one by one


@dataclass
class ShardReport:
    """One shard: its faults, and for each good sample its key, width, height and the length of its caption.

    ``largest``: the largest key, including keys for which ``--data_size`` has no row. A sample whose files are in
    several places is counted once, as ``SCATTERED``; ``rests``: how many more training would count.
    ``rests_of_good``: how many of these samples are good nevertheless, as the rest of their files is not needed.
    """

    url: str
    source: int
    skips: Skips = field(default_factory=Skips)
    good: np.ndarray = field(default_factory=lambda: np.empty((0, 4), np.int64))
    largest: int = -1
    rests: int = 0
    rests_of_good: int = 0

    @property
    def bad(self) -> int:
        """Samples that training would leave out."""
        counted = sum(n for reason, n in self.skips.counts.items() if reason not in NO_SAMPLES)
        return counted - self.rests_of_good

    @property
    def samples(self) -> int:
        """The good and the bad samples."""
        return len(self.good) + self.bad

    @property
    def unreadable(self) -> bool:
        """Whether training would miss an unknown number of its samples."""
        return any(reason in self.skips.counts for reason in SHARD_REASONS)


class Checks(Dataset[ShardReport]):
    """The report of every shard. A shard is read when its report is requested, in the loader's processes.

    ``sizes``: ``--data_size``, empty without it; ``sample_index``: 'key', 'position' or 'none'; ``fields``: where
    a sample has its parts.
    """

    def __init__(
        self, sources: Sequence[list[str]], sizes: Sequence[int], sample_index: str, fields: SampleFields = DEFAULT
    ) -> None:
        # Keys beyond --data_size are read too, since they show how large it should be.
        self.shards = list(with_rows(list(sources), (ROWS,)))
        self.source = [number for number, urls in enumerate(sources) for _ in urls]
        self.by_key, self.fields = sample_index == "key", fields
        self.sizes = tuple(sizes) * (len(sources) if len(sizes) == 1 else 1) or (ROWS,) * len(sources)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> ShardReport:
        shard = self.shards[number]
        report = ShardReport(shard.url, self.source[number])
        rows = list(self._rows(shard, report, self.sizes[self.source[number]]))
        report.good = np.array(rows, np.int64).reshape(-1, 4)
        return report

    def _rows(self, shard: Shard, report: ShardReport, size: int) -> Iterator[tuple[int, int, int, int]]:
        for raw in self._samples(shard, report):
            assert isinstance(raw.image, bytes), "shards hold encoded images"
            key = raw.row - shard.first_row
            report.largest = max(report.largest, key)
            if self.by_key and key >= size:
                report.skips.add("key out of range", raw.name)
            elif decode_or_skip(raw, report.skips, decode_pixels) is not None:
                width, height = image_size(raw.image)
                try:
                    if self.fields.extras:
                        reinforcement.check(raw, height, width)
                except Unusable as fault:
                    report.skips.add(str(fault), raw.name, fault.why)
                    continue
                yield key, width, height, len(raw.text)

    def _samples(self, shard: Shard, report: ShardReport) -> Iterator[RawSample]:
        """The usable samples of ``shard``. Faults are counted in ``report``, those of one sample only once."""
        source = ShardSource([shard], 0, sample_index="key" if self.by_key else None, fields=self.fields)
        incomplete: dict[str, list[Fault]] = {}
        good = set()
        for item in source.in_order(Part(0, 1)):
            for fault in item.faults:
                if fault.reason in INCOMPLETE:
                    incomplete.setdefault(fault.name, []).append(fault)
                else:
                    report.skips.add(*fault)
            if item.sample is not None:
                good.add(item.sample.name)
                yield item.sample
        for name, faults in _without_folders(incomplete, good).items():
            if len(faults) == 1 and name not in good:
                report.skips.add(*faults[0])
                continue
            report.skips.add(SCATTERED, name, next((fault.why for fault in faults if fault.why), APART))
            report.rests += len(faults) - (name not in good)
            report.rests_of_good += name in good


def _without_folders(incomplete: dict[str, list[Fault]], good: set[str]) -> dict[str, list[Fault]]:
    """The faults of each incomplete sample. Those in several folders are one if they complete each other."""
    alike: dict[str, list[str]] = {}
    for name in incomplete:
        if name not in good:
            alike.setdefault(posixpath.basename(name), []).append(name)
    faults = dict(incomplete)
    for names in alike.values():
        reasons = {fault.reason for name in names for fault in incomplete[name]}
        if len(names) > 1 and {"missing image", "missing text"} <= reasons:
            first, *others = sorted(names)
            faults[first] = [fault for name in (first, *others) for fault in faults.pop(name)]
    return faults


@dataclass
class Summary:
    """The reports of all shards. ``problems`` make training unsafe; ``remarks`` are worth knowing."""

    reports: list[ShardReport]
    sizes: tuple[int, ...]
    sample_index: str
    max_bad_fraction: float
    skips: Skips = field(default_factory=Skips)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for report in self.reports:
            self.skips.merge(report.skips)
        self.good = np.concatenate([report.good for report in self.reports])
        self.shard_of = np.repeat(np.arange(len(self.reports)), [len(report.good) for report in self.reports])
        self.sources = max(report.source for report in self.reports) + 1
        self.source_of = np.array([report.source for report in self.reports])[self.shard_of]
        self.duplicates = self._duplicates(apart=len(self.sizes) > 1)
        self._judge_samples()
        if self.sample_index == "key":
            self._judge_keys()
        elif self.sample_index == "position":
            self._judge_positions()

    def _duplicates(self, apart: bool) -> np.ndarray:
        """(key, shard, other shard) [n, 3] of samples with equal keys; ``apart``: each source has its own keys."""
        if self.sample_index != "key":
            return np.empty((0, 3), np.int64)
        keys, sources = self.good[:, 0], self.source_of if apart else np.zeros_like(self.source_of)
        order = np.lexsort((self.shard_of, keys, sources))
        same = (np.diff(keys[order]) == 0) & (np.diff(sources[order]) == 0)
        first, second = order[:-1][same], order[1:][same]
        return np.stack([keys[first], self.shard_of[first], self.shard_of[second]], axis=1)

    def _judge_samples(self) -> None:
        broken = [report for report in self.reports if report.unreadable]
        bad, all_samples = sum(r.bad for r in self.reports), sum(r.samples for r in self.reports)
        if not len(self.good):
            self.problems.append("there is no usable sample")
        if broken:
            share = len(broken) / len(self.reports)
            where = self.problems if share > self.max_bad_fraction else self.remarks
            where.append(f"{len(broken)} of {len(self.reports)} shards cannot be read to their end or are empty")
        if scattered := self.skips.counts[SCATTERED]:
            self.remarks.append(
                f"{scattered:,} samples have their files in the shard, but not side by side, and training reads a "
                "sample from files of one folder that follow each other: pack the samples again, each in one "
                "folder and all sorted by name (tar --sort=name -cf NEW.tar FOLDER)"
            )
        rests = sum(r.rests for r in self.reports)
        if bad or rests:
            share = (bad + rests) / (all_samples + rests)  # as training counts
            text = f"{bad:,} of {all_samples:,} samples ({bad / all_samples:.2%}) are unusable"
            if rests:
                text += f", as training counts {bad + rests:,} of {all_samples + rests:,} ({share:.2%})"
            if share > self.max_bad_fraction:
                self.problems.append(f"{text}, more than --max_bad_fraction {self.max_bad_fraction:g}")
            else:
                self.remarks.append(f"{text}: training leaves them out")
        if empty := int((self.good[:, 3] == 0).sum()):
            self.remarks.append(f"empty captions: {empty:,}; training uses them")

    def _judge_keys(self) -> None:
        if outside := self.skips.counts["key out of range"]:
            beyond = f" or not below --data_size {'::'.join(map(str, self.sizes))}" if self.sizes else ""
            self.problems.append(f"{outside:,} keys are negative{beyond}: training would leave them out")
        if keyless := sum(self.skips.counts[reason] for reason in KEY_REASONS):
            self.remarks.append(
                f"{keyless:,} samples have no usable key: --sample_index position is for data without keys, and "
                "none checks only what a loss without values per sample needs"
            )
        if len(self.duplicates) and not self.sizes and self._between_sources().all():
            self.remarks.append("sources share keys: give --data_size one size per source, as suggested")
        elif len(self.duplicates):
            self.problems.append(f"{len(self.duplicates):,} keys occur twice: two samples would share a row")
        rows, samples = sum(self._rows_by_source()), sum(self._samples_by_source())
        if rows > 2 * samples > 0:
            self.remarks.append(f"keys are sparse: {rows:,} rows of the sample state for {samples:,} samples")

    def _judge_positions(self) -> None:
        counts = self._samples_by_source()
        needed = counts if len(self.sizes) > 1 else [sum(counts)]
        for number, (size, samples) in enumerate(zip(self.sizes, needed)):
            if samples > size:
                of = f"source {number}" if len(self.sizes) > 1 else "all sources together"
                self.problems.append(f"--data_size {size} is less than the {samples:,} samples of {of}")

    def _between_sources(self) -> np.ndarray:
        """Which of the duplicates are in shards of two different sources."""
        source = np.array([report.source for report in self.reports])
        return source[self.duplicates[:, 1]] != source[self.duplicates[:, 2]]

    def _samples_by_source(self) -> list[int]:
        return [sum(r.samples for r in self.reports if r.source == s) for s in range(self.sources)]

    def _rows_by_source(self) -> list[int]:
        return [max(r.largest for r in self.reports if r.source == s) + 1 for s in range(self.sources)]

    def suggestion(self) -> str:
        """Flags that fit the data."""
        flags = f"--train-num-samples {len(self.good)}"
        if self.sample_index == "position":
            return f"{flags} --sample_index position --data_size {sum(self._samples_by_source())}"
        if self.sample_index == "none":
            return flags
        rows = self._rows_by_source()
        apart = len(self.sizes) > 1 or bool(self._between_sources().any())
        return f"{flags} --data_size {'::'.join(map(str, rows)) if apart else max(rows)}"

    def lines(self) -> Iterator[str]:
        """The lines to print."""
        samples = np.array([report.samples for report in self.reports])
        yield f"shards             {len(self.reports):,}"
        yield f"samples            {samples.sum():,}, of which {len(self.good):,} can be used"
        yield f"samples per shard  {_spread(samples)}"
        yield from self._odd_shards(samples)
        if len(self.good):
            if self.sample_index == "key":
                yield f"keys               {self.good[:, 0].min()} to {self.good[:, 0].max()}"
                yield from self._twice()
            yield f"image width        {_spread(self.good[:, 1])}"
            yield f"image height       {_spread(self.good[:, 2])}"
            yield f"caption length     {_spread(self.good[:, 3])} characters"
        for reason, n in self.skips.counts.most_common():
            yield f"left out           {n:,} {reason}, e.g. {self.skips.examples[reason]}"
        yield from (f"remark             {remark}" for remark in self.remarks)
        if len(self.good):
            yield f"suggested          {self.suggestion()}"
        yield from (f"problem            {problem}" for problem in self.problems)
        yield f"safe to train      {'no' if self.problems else 'yes'}"

    def _odd_shards(self, samples: np.ndarray) -> Iterator[str]:
        """All shards if there are few, else those with faults or far from the usual size."""
        usual = np.median(samples)
        odd = [
            r
            for r in self.reports
            if len(self.reports) <= SHOWN or r.skips.counts or not usual / 2 <= r.samples <= 2 * usual
        ]
        for report in odd[:SHOWN]:
            faults = ", ".join(f"{n} {reason}" for reason, n in report.skips.counts.most_common())
            yield f"  {report.samples:>8,}  {report.url}{f'  ({faults})' if faults else ''}"
        if len(odd) > SHOWN:
            yield f"  and {len(odd) - SHOWN:,} more shards with faults or of unusual size"

    def _twice(self) -> Iterator[str]:
        for key, first, second in self.duplicates[:SHOWN]:
            yield f"  key {key} is in {self.reports[first].url} and in {self.reports[second].url}"
        if len(self.duplicates) > SHOWN:
            yield f"  and {len(self.duplicates) - SHOWN:,} more keys that occur twice"


def check(
    sources: Sequence[list[str]],
    sizes: Sequence[int] = (),
    *,
    sample_index: str = "key",
    fields: SampleFields = DEFAULT,
    max_bad_fraction: float = 0.05,
    workers: int = 0,
) -> Summary:
    """Read all shards of ``sources`` (lists of urls) and assess them, with a progress bar on stderr."""
    checks = Checks(sources, sizes, sample_index, fields)
    loader = DataLoader(checks, batch_size=None, num_workers=min(workers, len(checks)), prefetch_factor=None)
    reports, seen = [], 0
    with tqdm(loader, total=len(checks), unit="shard", desc="reading", file=sys.stderr) as bar:
        for report in bar:
            reports.append(report)
            seen += report.samples
            bar.set_postfix_str(f"{seen:,} samples", refresh=False)
    return Summary(reports, tuple(sizes), sample_index, max_bad_fraction)


def _spread(values: np.ndarray) -> str:
    """Smallest, quartiles and largest of ``values``."""
    marks = np.percentile(values, [0, 25, 50, 75, 100]).round().astype(np.int64)
    if all(a == b for a, b in pairwise(marks)):
        return f"all {marks[0]:,}"
    return "min {:,}, quartiles {:,} {:,} {:,}, max {:,}".format(*marks)
