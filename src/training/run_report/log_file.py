"""What ``out.log`` tells: lines about training, launches, samples left out. The published code's log is read too.

A log may end anywhere and hold lines of several launches, of which a later one may take steps of an earlier one
again. Lines that are of none of the known forms are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime

_LINE = re.compile(r"(\d{4}-\d\d-\d\d,\d\d:\d\d:\d\d) \| (?:[^|]*\| )?(DEBUG|INFO|WARNING|ERROR|CRITICAL) \| (.*)")
_TRAIN = re.compile(r"Train Epoch: (\d+) \[\s*(\d+)/(\d+) ")
_NUMBER = r"([-+\d.e]+|nan|inf|-inf)"
_FIELDS = {
    "data_time": rf"Data \(t\): {_NUMBER}",
    "batch_time": rf"Batch \(t\): {_NUMBER}",
    "rate": rf"Batch \(t\): \S+,? {_NUMBER}/s",
    "lr": rf"\bLR: {_NUMBER}",
    "lr_tau": rf"LR_tau: {_NUMBER}",
    "scale": rf"Logit Scale: {_NUMBER}",
    "mean_tau": rf"Mean_tau: {_NUMBER}",
}
_LOSS = re.compile(rf"(\w+): {_NUMBER} \({_NUMBER}\)")
_EPOCH_SIZE = re.compile(r"an epoch has (\d+) samples in (\d+) steps of (\d+)")
_RESUMED = re.compile(r"resumed (.*): (\d+) epochs, (\d+) steps$")
_RANKS = re.compile(r"loss .*; (\d+) x (\w+), ")
_NO_TEMPERATURE = ", without a temperature; "
_SPEED = re.compile(r"epoch (\d+): \S+ samples/s, .*?([\d.]+)% of the cards' peak \(MFU\)")
_LEFT_OUT = re.compile(r"(?:^|, )(\d+) ([a-z][a-z ]*?) \(e\.g\. ")
_LEFT_OUT_LINE = "samples left out since the last epoch: "
_BEGINS = ("hardware: ", "target ", "training data: ", "resumed ")  # each at most once in a launch
_WORDS = re.compile(r"(?:stopped|trained) .*|the run ended with an error")


@dataclass(frozen=True)
class Point:
    """One line about training. ``x``: epochs so far, with a fraction. ``values``: its numbers by name."""

    time: datetime
    x: float
    values: Mapping[str, float]


@dataclass
class Launch:
    """One start of the program: when, from which checkpoint, how far it came and how it ended.

    ``begun``, ``reached``: epochs. ``again``: epochs of an earlier launch that it had to take again.
    """

    start: datetime
    end: datetime
    resumed: str = ""
    begun: float = 0.0
    reached: float = 0.0
    again: float = 0.0
    ranks: int = 1
    device: str = ""
    hardware: str = ""
    last_word: str = ""
    seen: set[str] = field(default_factory=set)

    @property
    def seconds(self) -> float:
        """From its first to its last line."""
        return (self.end - self.start).total_seconds()


@dataclass(frozen=True)
class Pause:
    """A time in which a launch logged no line about training, unusually long. ``x``: epochs at its beginning."""

    start: datetime
    seconds: float
    x: float


@dataclass
class LogLines:
    """All that is known from a log.

    ``points``: of steps that were taken again, the later ones. ``left_out``: after which epoch -> reason ->
    samples; ``examples``: reason -> one of them. ``mfu``: (epoch, share). ``notes``: warnings and errors with the
    number of times they came, without what differs between them. ``no_temperature``: the loss has none.
    """

    points: list[Point] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    left_out: dict[int, dict[str, int]] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    mfu: dict[float, float] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    steps_per_epoch: int = 0
    no_temperature: bool = False

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Epochs and values of ``name``, where it was logged."""
        found = [(point.x, point.values[name]) for point in self.points if name in point.values]
        return [x for x, _ in found], [y for _, y in found]

    @property
    def losses(self) -> list[str]:
        """The names of the losses, the total last."""
        names = {name: None for point in self.points for name in point.values if name not in _FIELDS}
        return sorted(names, key=lambda name: name == "loss")

    def pauses(self) -> list[Pause]:
        """Times between two lines of one launch that are ten times the usual one, and a minute at least."""
        spans = [
            (before, (after.time - before.time).total_seconds())
            for before, after in zip(self.points, self.points[1:])
            if not any(before.time < launch.start <= after.time for launch in self.launches)
        ]
        if not spans:
            return []
        usual = sorted(seconds for _, seconds in spans)[len(spans) // 2]
        return [Pause(p.time, s, p.x) for p, s in spans if s > max(60.0, 10 * usual)]


def read(lines: Iterable[str]) -> LogLines:
    """Read a log."""
    found = LogLines()
    for time, level, text in _parsed(lines):
        _read_line(found, time, level, text)
    return found


def _parsed(lines: Iterable[str]) -> Iterator[tuple[datetime, str, str]]:
    for line in lines:
        if match := _LINE.match(line):
            try:
                time = datetime.strptime(match[1], "%Y-%m-%d,%H:%M:%S")
            except ValueError:
                continue
            yield time, match[2], match[3].rstrip("\n")


def _read_line(found: LogLines, time: datetime, level: str, text: str) -> None:
    begins = next((word for word in _BEGINS if text.startswith(word)), None)
    if not found.launches or (begins is not None and begins in found.launches[-1].seen):
        reached = found.points[-1].x if found.points else 0.0
        before = found.launches[-1] if found.launches else Launch(time, time)
        found.launches.append(Launch(time, time, reached=reached, ranks=before.ranks, device=before.device))
    launch = found.launches[-1]
    launch.end = max(time, launch.end)
    if begins is not None:
        launch.seen.add(begins)
    if match := _TRAIN.match(text):
        _add_point(found, launch, time, match, text)
    elif match := _EPOCH_SIZE.search(text):
        found.steps_per_epoch = int(match[2])
    elif match := _RESUMED.match(text):
        _resume(found, launch, match[1], int(match[2]), int(match[3]))
    elif text.startswith("hardware: "):
        launch.hardware = text.removeprefix("hardware: ")
    elif match := _RANKS.match(text):
        launch.ranks, launch.device = int(match[1]), match[2]
        found.no_temperature = _NO_TEMPERATURE in text
    elif match := _SPEED.match(text):
        found.mfu[int(match[1]) + 1.0] = float(match[2]) / 100
    elif text.startswith(_LEFT_OUT_LINE):
        _add_left_out(found, text.removeprefix(_LEFT_OUT_LINE))
    elif _WORDS.fullmatch(text):
        launch.last_word = text
    if level in ("WARNING", "ERROR", "CRITICAL") and not re.match(r"skipped \d+ samples so far", text):
        note = f"{level}: {re.sub(r'[0-9]+', '…', text)[:300]}"
        found.notes[note] = found.notes.get(note, 0) + 1


def _add_point(found: LogLines, launch: Launch, time: datetime, match: re.Match[str], text: str) -> None:
    epoch, seen, total = (int(match[i]) for i in (1, 2, 3))
    values: dict[str, float] = {}
    for name, pattern in _FIELDS.items():
        if (number := re.search(pattern, text)) and (value := _number(number[1])) is not None:
            values[name] = value
    for name, now, _ in _LOSS.findall(text.partition("Logit Scale:")[2]):
        if (value := _number(now)) is not None:
            values[name.lower()] = value
    x = epoch + seen / max(total, 1)
    while found.points and found.points[-1].x >= x:  # this step is taken again
        launch.again = max(launch.again, found.points.pop().x - launch.begun)
    found.points.append(Point(time, x, values))
    launch.reached = x


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _resume(found: LogLines, launch: Launch, path: str, epochs: int, steps: int) -> None:
    x = steps / found.steps_per_epoch if found.steps_per_epoch else float(epochs)
    before = found.points[-1].x if found.points else x
    launch.resumed, launch.begun, launch.again = path, x, max(before - x, 0.0)
    launch.reached = x
    while found.points and found.points[-1].x > x + 1e-9:
        found.points.pop()


def _add_left_out(found: LogLines, text: str) -> None:
    epoch = round(found.points[-1].x) if found.points else 0
    matches = list(_LEFT_OUT.finditer(text))
    found.left_out[epoch] = {match[2]: int(match[1]) for match in matches}
    for match, following in zip(matches, [*matches[1:], None]):
        end = following.start() if following else len(text)
        found.examples.setdefault(match[2], text[match.end() : end].rstrip().removesuffix(")"))
