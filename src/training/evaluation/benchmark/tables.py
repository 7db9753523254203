"""Retrieval sets and WinoGAViL as tables: parquet files with the pictures in them, or a csv file and a zip.

pyarrow, for parquet files alone, is imported when it is needed.
"""

from __future__ import annotations

import ast
import csv
import json
import os
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from training.evaluation.benchmark.associations import AssociationSet, Instance, instance
from training.evaluation.benchmark.classification import EvaluationSet
from training.evaluation.benchmark.retrieval_sets import CaptionedSet
from training.evaluation.benchmark.shards import probe
from training.evaluation.benchmark.tasks import BenchmarkTask
from training.predictions import Place

_PICTURE_KINDS = (".jpg", ".jpeg", ".png", ".webp")
Row = dict[str, Any]


def is_table(path: Path) -> bool:
    """Whether a folder holds a set as a table."""
    return path.is_dir() and (
        any(path.rglob("*.parquet")) or (any(path.glob("*.csv")) and any(path.glob("*.zip")))
    )


def open_table(path: Path, task: BenchmarkTask, said: str) -> EvaluationSet:
    """The set of ``task`` in the folder ``path``. ValueError: it is not valid, or pyarrow is not installed."""
    if files := sorted(path.rglob("*.parquet")):
        chosen = [file for file in files if file.name.startswith("test")] or files
        found = _open_parquet(chosen, task, said)
    else:
        found = _open_csv(sorted(path.glob("*.csv")), sorted(path.glob("*.zip")), task, said)
    probe(found.source, said)
    return found


class ZipPictures:
    """Pictures in zip files: ``members``, (file, name in it) of each."""

    def __init__(self, members: Sequence[tuple[str, str]]) -> None:
        self.members = members
        self._open: dict[str, zipfile.ZipFile] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self.members)

    def name(self, number: int) -> str:
        return ", ".join(self.members[number])

    def place(self, number: int) -> Place:
        file, member = self.members[number]
        return ("zip", os.path.abspath(file), member)

    def read(self, number: int) -> bytes:
        file, member = self.members[number]
        if self._process != os.getpid():  # a process that was forked shares the position in the file
            self._open, self._process = {}, os.getpid()
        try:
            if file not in self._open:
                self._open[file] = zipfile.ZipFile(file)
            return self._open[file].read(member)
        except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, KeyError) as error:
            raise OSError(str(error)) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "_open": {}, "_process": -1}


class ParquetPictures:
    """Pictures in a column of parquet files: ``places``, (file, row group, row in it, place in its list) of each.

    The last group of rows that was read is kept, so they should be asked for in order.
    """

    def __init__(self, column: str, places: Sequence[tuple[str, int, int, int]]) -> None:
        self.column, self.places = column, places
        self._group: tuple[str, int] | None = None
        self._rows: Any = None

    def __len__(self) -> int:
        return len(self.places)

    def name(self, number: int) -> str:
        file, group, row, place = self.places[number]
        return f"{file}, group {group}, row {row}, picture {place}"

    def place(self, number: int) -> Place:
        file, *place = self.places[number]
        return ("parquet", os.path.abspath(file), self.column, *place)

    def read(self, number: int) -> bytes:
        file, group, row, place = self.places[number]
        if self._group != (file, group):
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile

            try:
                self._rows = ParquetFile(file).read_row_group(group, columns=[self.column]).column(0)
            except ArrowException as error:
                raise OSError(str(error)) from error
            self._group = (file, group)
        value = self._rows[row].as_py()
        value = value[place] if isinstance(value, list) else value
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise OSError("the table holds a path instead of the picture")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {"column": self.column, "places": self.places, "_group": None, "_rows": None}


def _open_parquet(files: Sequence[Path], task: BenchmarkTask, said: str) -> CaptionedSet | AssociationSet:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{said}: parquet files need a package that is missing: pip install pyarrow") from None
    image = "candidate_images" if task.is_winogavil else "image"
    wanted = ["cue", "candidates", "associations"] if task.is_winogavil else ["caption"]
    rows: list[Row] = []
    where: list[tuple[str, int, int]] = []
    for file in files:
        try:
            table = ParquetFile(file)
            if lacking := [name for name in (image, *wanted) if name not in table.schema_arrow.names]:
                names = ", ".join(table.schema_arrow.names)
                raise ValueError(f"{said}: {file.name} has no column {lacking[0]}; its columns are {names}")
            for group in range(table.num_row_groups):
                some = table.read_row_group(group, columns=wanted).to_pylist()
                rows += some
                where += [(str(file), group, row) for row in range(len(some))]
        except (OSError, ArrowException) as error:
            raise ValueError(f"{said}: {file.name} cannot be read ({error}); copy it again") from error
    if task.is_winogavil:
        places = [(*place, i) for row, place in zip(rows, where) for i in range(len(row["candidates"]))]
        numbers = iter(range(len(places)))
        return AssociationSet(
            ParquetPictures(image, places),
            [_instance(row, [next(numbers) for _ in row["candidates"]]) for row in rows],
        )
    captions = [_texts(row["caption"]) for row in rows]
    _check_captions(captions, said)
    return CaptionedSet(ParquetPictures(image, [(*place, 0) for place in where]), captions)


def _open_csv(
    tables: Sequence[Path], zips: Sequence[Path], task: BenchmarkTask, said: str
) -> CaptionedSet | AssociationSet:
    if not tables or not zips:
        raise ValueError(f"{said}: it has neither parquet files nor a csv file and a zip with the pictures")
    members, rows = _members(zips, said), _rows(tables[0], said)
    where = f"{said}: {tables[0].name}"

    def find(picture: str) -> tuple[str, str]:
        name = PurePosixPath(picture).name
        for spelling in (name, *(f"{name}{kind}" for kind in _PICTURE_KINDS)):
            if spelling in members:
                return members[spelling]
        raise ValueError(f"{where} names the picture {picture}, which no zip file there has")

    if task.is_winogavil:
        _check_columns(rows, ("cue", "candidates", "associations"), where)
        for row in rows:
            row["candidates"], row["associations"] = _texts(row["candidates"]), _texts(row["associations"])
        numbers = {name: i for i, name in enumerate(dict.fromkeys(n for row in rows for n in row["candidates"]))}
        return AssociationSet(
            ZipPictures([find(name) for name in numbers]),
            [_instance(row, [numbers[name] for name in row["candidates"]]) for row in rows],
        )
    picture = next((name for name in ("filename", "image", "file_name", "image_path") if name in rows[0]), None)
    caption = next((name for name in ("caption", "raw", "captions") if name in rows[0]), None)
    if picture is None or caption is None:
        raise ValueError(f"{where} has no columns filename and caption; its columns are {', '.join(rows[0])}")
    captions = [_texts(row[caption]) for row in rows]
    _check_captions(captions, said)
    return CaptionedSet(ZipPictures([find(row[picture]) for row in rows]), captions)


def _rows(file: Path, said: str) -> list[Row]:
    """The rows of a csv file; of the split test, where the file has several."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            rows: list[Row] = list(csv.DictReader(text))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{said}: {file.name} cannot be read ({error}); copy it again") from error
    test = [row for row in rows if row.get("split") == "test"]
    if not rows:
        raise ValueError(f"{said}: {file.name} has no rows; copy it again")
    return test or rows


def _members(zips: Sequence[Path], said: str) -> dict[str, tuple[str, str]]:
    """Name of a picture, without its folders -> (zip file, name in it)."""
    found = {}
    for file in zips:
        try:
            with zipfile.ZipFile(file) as archive:
                for name in archive.namelist():
                    base = PurePosixPath(name).name
                    if base.lower().endswith(_PICTURE_KINDS) and not base.startswith("._"):
                        found[base] = (str(file), name)
        except (OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{said}: {file.name} cannot be read ({error}); copy it again") from error
    return found


def _check_columns(rows: Sequence[Row], wanted: Sequence[str], where: str) -> None:
    if lacking := [name for name in wanted if name not in rows[0]]:
        raise ValueError(f"{where} has no column {lacking[0]}; its columns are {', '.join(rows[0])}")


def _check_captions(captions: Sequence[Sequence[str]], said: str) -> None:
    if bare := [i for i, some in enumerate(captions) if not some]:
        raise ValueError(f"{said}: row {bare[0]} has no caption; remove it, or write one")


def _instance(row: Row, pictures: Sequence[int]) -> Instance:
    return instance(row["cue"], pictures, row["candidates"], row["associations"])


def _texts(held: Any) -> list[str]:
    """A list of texts, which csv files hold as JSON or as Python writes it; a text alone is a list of one."""
    if isinstance(held, str):
        for parse in _PARSERS:
            try:
                found = parse(held)
            except (ValueError, SyntaxError):
                continue
            if isinstance(found, (list, tuple)):
                return [str(text) for text in found]
        return [held] if held.strip() else []
    return [str(text) for text in held or ()]


_PARSERS: tuple[Callable[[str], Any], ...] = (json.loads, ast.literal_eval)
