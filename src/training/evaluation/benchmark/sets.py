"""Which sets are below a folder: the benchmark's, and further ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from training.evaluation.benchmark.classification import EvaluationSet
from training.evaluation.benchmark.shards import captioned, open_folders, open_shards
from training.evaluation.benchmark.sources import FilePictures, FileSpan, PictureSource
from training.evaluation.benchmark.tables import ParquetPictures, ZipPictures, is_table, open_table
from training.evaluation.benchmark.tasks import TASKS, BenchmarkTask, chosen, near
from training.evaluation.shard_index import index_shard
from training.predictions import Place


@dataclass(frozen=True)
class FoundSet:
    """A set in ``path``, not opened yet. ``task``: None where it is none of the benchmark's.

    ``sure``: False for a folder that may be no set at all, such as one of other things beside the sets.
    """

    path: Path
    task: BenchmarkTask | None
    flag: str
    sure: bool = True

    @property
    def key(self) -> str:
        return self.task.key if self.task else self.path.stem.removeprefix("wds_").removesuffix("_test")

    @property
    def name(self) -> str:
        return self.task.name if self.task else self.key

    def open(self) -> EvaluationSet:
        """The set. ValueError: it is not valid; the message names it."""
        said = f"{self.flag} {self.path}"
        if self.task is not None and is_table(self.path):
            return open_table(self.path, self.task, said)
        if has_shards(self.path):
            return open_shards(self.path, self.task, said)
        if self.task is not None and self.task.is_winogavil:
            raise ValueError(f"{said}: it has neither parquet files, nor a csv file and a zip, nor test/*.tar")
        if tars := _tars(self.path):
            return captioned(tars, said)
        return open_folders(self.path, said)


@dataclass(frozen=True)
class Catalog:
    """``found``: what is evaluated. ``missing``: tasks of the benchmark that are not there."""

    found: Sequence[FoundSet]
    missing: Sequence[BenchmarkTask]


def find_sets(folder: str, words: str, flag: str, words_flag: str) -> Catalog:
    """The sets below ``folder``, the value of ``flag``, that ``words``, that of ``words_flag``, names.

    ValueError: there is no such folder, it holds none, or one that is named is not there.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        what = "it is a file" if path.exists() else "there is no such folder"
        raise ValueError(
            f"{flag} {folder}: {what}; give the folder that holds the sets, wds_imagenet1k_test/ and so on"
        )
    tasks, further = chosen(words)
    inner = {name: path / name for name in sorted(os.listdir(path))}
    found: list[FoundSet] = []
    missing: list[BenchmarkTask] = []
    if has_shards(path):  # the folder of one set
        path, inner = path.absolute().parent, {path.absolute().name: path}
        tasks = [task for task in TASKS if inner.keys() & set(task.folders)] if words == "all" else tasks
    for task in tasks:
        places = [inner.get(name, path / name) for name in task.folders]
        if there := [place for place in places if place.is_dir()]:
            found.append(FoundSet(there[0], task, flag))
        else:
            missing.append(task)
    taken = {name for task in TASKS for name in task.folders}
    if words.strip() == "all":
        further = [name for name, place in inner.items() if name not in taken and _may_be_a_set(place)]
    for word in further:
        names = [name for name in (word, f"{word}.tar", f"wds_{word.replace('/', '-')}_test") if name in inner]
        if not names:
            said = f"{words_flag} {words}: {word} is neither a task of the benchmark nor in {folder}"
            raise ValueError(f"{said}; {hint}" if (hint := near(word)) else said)
        place = inner[names[0]]
        found.append(FoundSet(place, None, flag, sure=words.strip() != "all" or has_shards(place)))
    if missing and words.strip() != "all":
        raise ValueError(f"{words_flag} {words}: {missing[0].key} is not in {folder}; {needed(missing[0])}")
    if not found:
        raise ValueError(
            f"{flag} {folder}: it holds no set; the benchmark's are folders in it such as wds_imagenet1k_test/ "
            "(python -m training.download_evalsets fetches them)"
        )
    return Catalog(found, missing)


def read_picture(place: Place) -> bytes:
    """The file of the picture at ``place``, as a source of pictures names it. OSError: it cannot be read."""
    kind, path, *rest = place
    source: PictureSource
    try:
        if kind == "file":
            source = FilePictures([FileSpan(str(path), *map(int, rest))])
        elif kind == "sample":
            found = _pictures_in(str(path))[str(rest[0])]
            source = FilePictures([FileSpan(str(path), *found)])
        elif kind == "zip":
            source = ZipPictures([(str(path), str(rest[0]))])
        else:
            group, row, number = map(int, rest[1:])
            source = ParquetPictures(str(rest[0]), [(str(path), group, row, number)])
        return source.read(0)
    except (ValueError, TypeError, LookupError, ImportError) as error:
        raise OSError(f"{path}: the picture cannot be read ({error})") from error


@lru_cache(maxsize=8)
def _pictures_in(shard: str) -> dict[str, tuple[int, int]]:
    """Key of a sample -> where its picture is in a tar file. ValueError: it cannot be read."""
    samples = index_shard(Path(shard), shard, ())
    return {sample.key: sample.picture for sample in samples if sample.picture is not None}


def needed(task: BenchmarkTask) -> str:
    """What a task that is missing would need."""
    if not (task.is_winogavil or task.is_retrieval):
        return f"it needs {task.folders[0]}/"
    files = "winogavil_dataset.csv and winogavil_images.zip" if task.is_winogavil else "a csv and a zip"
    shards = next(name for name in reversed(task.folders) if name.endswith("_test"))
    return f"it needs {task.folders[0]}/ with parquet files, or {files}; or {shards}/"


def has_shards(path: Path) -> bool:
    """Whether a folder is in the webdataset layout."""
    test = path / "test"
    return (test / "nshards.txt").is_file() or (test.is_dir() and any(test.glob("*.tar")))


def _tars(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(path.glob("*.tar"))


def _may_be_a_set(path: Path) -> bool:
    """Whether an entry of the folder looks like a set of any kind: it is opened, and may turn out to be none."""
    if path.name.startswith(".") or path.name in ("nlphuji", "hf_cache"):
        return False
    if path.is_file():
        return path.suffix == ".tar"
    return has_shards(path) or bool(_tars(path)) or _has_class_folders(path)


def _has_class_folders(path: Path) -> bool:
    return (
        path.is_dir() and sum(entry.is_dir() and not entry.name.startswith(".") for entry in os.scandir(path)) > 1
    )
