"""Sets in the benchmark's webdataset layout, ``wds_NAME_test/``, tar files of captioned pictures, folders."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.data.bad_samples import Skips
from training.evaluation.benchmark.associations import AssociationSet, instance
from training.evaluation.benchmark.classification import (
    FACES,
    Classes,
    EvaluationSet,
    FacesSet,
    LabelledSet,
    MultilabelSet,
)
from training.evaluation.benchmark.measures import Integers
from training.evaluation.benchmark.retrieval_sets import CaptionedSet
from training.evaluation.benchmark.sources import FilePictures, FileSpan, PictureSource, decoded
from training.evaluation.benchmark.tasks import BenchmarkTask
from training.evaluation.shard_index import SHARD_PICTURES, ShardSample, index_shard
from training.evaluation.zero_shot import (
    CLASSNAMES,
    PROBES,
    TEMPLATES,
    class_number,
    count_shards,
    index_labelled,
    open_set,
    read_classnames,
    read_lines,
    read_templates,
    template,
)

CAPTION_FIELDS = ("captions", "caption", "texts", "text")
_FACES_COLUMNS = 4
_INSTANCE = ("cue", "candidates", "associations")


def open_shards(path: Path, task: BenchmarkTask | None, said: str) -> EvaluationSet:
    """The set in ``path``, of the kind that its ``dataset_type.txt`` and ``task`` say. ValueError: not valid."""
    file = path / "dataset_type.txt"
    kind = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
    is_faces = task is not None and task.metric is None
    if kind not in ("", "classification", "multilabel", "retrieval", "winogavil"):
        raise ValueError(
            f"{said}: dataset_type.txt says {kind!r}; known are classification, multilabel, retrieval, winogavil"
        )
    shards = [path / "test" / f"{number}.tar" for number in range(count_shards(path / "test", said))]
    if kind == "winogavil" or (task is not None and task.is_winogavil):
        return _associations(shards, said)
    if kind == "retrieval" or (task is not None and task.is_retrieval):
        return captioned(shards, said)
    label = ".npy" if is_faces or kind == "multilabel" else ".cls"
    samples = [sample for shard in shards for sample in index_labelled(shard, said, label, (".cls", ".npy"))]
    source = _pictures(samples, said)
    if is_faces:
        return FacesSet(source, _classes_by_prefix(path, said), _columns(samples, _FACES_COLUMNS, said))
    names = read_classnames(path, said)
    if names is None or not (path / TEMPLATES).is_file():
        raise ValueError(f"{said}: {CLASSNAMES if names is None else TEMPLATES} is missing next to test/")
    classes = Classes(names, read_templates(path, said))
    if kind == "multilabel":
        return MultilabelSet(source, classes, _columns(samples, len(names), said) > 0)
    labels = np.array([class_number(sample, len(names), said) for sample in samples], dtype=np.int64)
    if task is None or not task.columns:
        return LabelledSet(source, classes, labels)
    for sample in samples:
        if ".npy" not in sample.contents:
            raise ValueError(f"{said}: {sample.key} has no .npy file with {task.columns.replace(' ', ', ')}")
    columns = _columns(samples, len(task.columns.split()), said)
    return LabelledSet(source, classes, labels, columns, task.key)


def open_folders(path: Path, said: str) -> EvaluationSet:
    """An image folder with a folder for each class. ValueError: it is none."""
    found = open_set(str(path), said.removesuffix(f" {path}"))
    pictures = FilePictures([FileSpan(one.path, one.offset, one.size) for one in found.pictures])
    labels = np.array([one.label for one in found.pictures], dtype=np.int64)
    return LabelledSet(pictures, Classes(found.classnames, found.templates), labels, remarks=found.remarks)


def captioned(shards: Sequence[Path], said: str) -> CaptionedSet:
    """Pictures in tar files with ``.txt``, a caption per line, or ``.json`` with a list of captions.

    ValueError: a file cannot be read, or there is no picture with a caption.
    """
    found: list[tuple[ShardSample, list[str]]] = []
    bare = 0
    for shard in shards:
        for sample in _samples(shard, said, (".txt", ".json")):
            captions = captions_of(sample, f"{said}: {sample.key} in {shard.name}")
            if sample.picture is not None and captions:
                found.append((sample, captions))
            else:
                bare += 1
    if not found:
        raise ValueError(
            f"{said}: it contains no pictures with captions ({', '.join(SHARD_PICTURES)}; .txt, a caption per "
            "line, or .json with a list under captions)"
        )
    remarks = (f"{said}: samples without a picture or without a caption are not used: {bare}",) if bare else ()
    source = _pictures([sample for sample, _ in found], said)
    return CaptionedSet(source, [captions for _, captions in found], remarks)


def _associations(shards: Sequence[Path], said: str) -> AssociationSet:
    """WinoGAViL in tar files: a sample per instance, with ``.json`` and its pictures ``.0.jpg``, ``.1.jpg``, ...

    The json has ``cue``, ``candidates``, names in the order of the pictures, and which are ``associations``.
    ValueError: a file cannot be read, or a sample is no instance.
    """
    spans: list[FileSpan] = []
    instances = []
    for shard in shards:
        for sample in _samples(shard, said, (".json",)):
            where = f"{said}: {sample.key} in {shard.name}"
            held = _json(sample, where)
            if not isinstance(held, dict) or not all(held.get(name) for name in _INSTANCE):
                raise ValueError(f"{where} has no .json with {', '.join(_INSTANCE)}")
            candidates, associations = (list(map(str, held[name])) for name in _INSTANCE[1:])
            pictures = [
                next((part for kind in SHARD_PICTURES if (part := sample.parts.get(f".{i}{kind}"))), None)
                for i in range(len(candidates))
            ]
            places = [place for place in pictures if place is not None]
            if len(places) < len(pictures):
                lacking = pictures.index(None)
                raise ValueError(f"{where} has no .{lacking}.jpg, the picture of {candidates[lacking]}")
            numbers = range(len(spans), len(spans) + len(places))
            spans += [FileSpan(sample.shard, *place) for place in places]
            instances.append(instance(str(held["cue"]), numbers, candidates, associations))
    if not instances:
        raise ValueError(f"{said}: it contains no instances, .json files with {', '.join(_INSTANCE)}")
    source = FilePictures(spans)
    probe(source, said)
    return AssociationSet(source, instances)


def _samples(shard: Path, said: str, read: tuple[str, ...]) -> list[ShardSample]:
    if not shard.is_file():
        raise ValueError(f"{said}: {shard.name} is missing, but test/nshards.txt counts it")
    return index_shard(shard, said, read)


def captions_of(sample: ShardSample, said: str) -> list[str]:
    """The captions of a sample, none where it has no ``.txt`` and no list in its ``.json``."""
    if ".txt" in sample.contents:
        try:
            return [line.strip() for line in sample.contents[".txt"].decode().splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise ValueError(f"{said}: its captions are not utf-8; write them anew") from None
    return listed(_json(sample, said)) if ".json" in sample.contents else []


def _json(sample: ShardSample, said: str) -> Any:
    """What the ``.json`` of a sample holds; None: it has none."""
    try:
        return json.loads(sample.contents.get(".json", b"null"))
    except ValueError as error:
        raise ValueError(f"{said}: its .json cannot be read ({error}); write it anew") from None


def listed(held: Any) -> list[str]:
    """The captions in what a json holds: a list, or an object with one."""
    if isinstance(held, dict):
        return next((texts for name in CAPTION_FIELDS if (texts := listed(held.get(name)))), [])
    if isinstance(held, str):
        return [held.strip()] if held.strip() else []
    if isinstance(held, list):
        return [text.strip() for text in held if isinstance(text, str) and text.strip()]
    return []


def probe(source: PictureSource, said: str) -> None:
    """ValueError: of some pictures, evenly chosen, none can be decoded."""
    some = range(len(source))[:: max(1, len(source) // PROBES)][:PROBES]
    skips = Skips()
    if not any(decoded(source, number, skips) for number in some):
        raise ValueError(
            f"{said}: of {len(some)} pictures that were looked at none can be used: {skips}; copy them again"
        )


def _pictures(samples: Sequence[ShardSample], said: str) -> PictureSource:
    if not samples:
        raise ValueError(f"{said}: it contains no pictures ({', '.join(SHARD_PICTURES)})")
    spans = []
    for sample in samples:
        assert sample.picture is not None, "samples without a picture are sorted out before"
        spans.append(FileSpan(sample.shard, *sample.picture))
    source = FilePictures(spans)
    probe(source, said)
    return source


def _columns(samples: Sequence[ShardSample], width: int, said: str) -> Integers:
    """int64 [N, width], the first ``width`` values of each sample's ``.npy``."""
    rows = []
    for sample in samples:
        try:
            values = np.load(io.BytesIO(sample.contents[".npy"]), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{said}: {sample.key}.npy cannot be read ({error}); copy it again") from error
        row = np.ravel(values)
        if len(row) < width or row.dtype.kind not in "biuf" or (row[:width] < 0).any():
            raise ValueError(f"{said}: {sample.key}.npy holds {row.tolist()}, not {width} numbers from 0")
        rows.append(row[:width].astype(np.int64))
    return np.stack(rows)


def _classes_by_prefix(path: Path, said: str) -> list[Classes]:
    """The classes of ``FACES``, whose lines in both files begin with ``race:`` and so on."""
    names = _by_prefix(path / CLASSNAMES, said, lambda text, _: text)
    templates = _by_prefix(path / TEMPLATES, said, template)
    return [Classes(names[kind], templates[kind]) for kind in FACES]


def _by_prefix(file: Path, said: str, made: Callable[[str, str], Any]) -> dict[str, list[Any]]:
    if not file.is_file():
        raise ValueError(f"{said}: {file.name} is missing next to test/")
    found: dict[str, list[Any]] = {kind: [] for kind in FACES}
    for number, line in enumerate(read_lines(file, said), 1):
        kind, colon, text = line.strip().partition(":")
        if not line.strip():
            continue
        if not colon or kind not in found:
            raise ValueError(
                f"{said}: line {number} of {file.name}, {line!r}, does not begin with one of "
                f"{', '.join(f'{kind}:' for kind in FACES)}"
            )
        found[kind].append(made(text, f"{said}: line {number} of {file.name}, {line!r},"))
    if lacking := [kind for kind, texts in found.items() if not texts]:
        raise ValueError(f"{said}: {file.name} has no line that begins with {lacking[0]}:")
    return found
