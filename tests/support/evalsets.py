"""Evaluation sets made on the spot, in the layouts in which people have them.

``write_classification(folder, labels, names, templates)`` writes the benchmark's webdataset; picture i of a set is
``shards.picture(seed + i)``.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.support import shards

TEMPLATES = ("a photo of a {c}.", "many {c}s", "the {c}")


def npy(values: Sequence[int]) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(values))
    return file.getvalue()


def encoded(i: int, kind: str = "png") -> bytes:
    return shards.encode(shards.picture(i), {"jpg": "jpeg"}.get(kind, kind))


def write_wds(
    folder: Path,
    samples: Sequence[dict],
    names: Sequence[str] = (),
    templates: Sequence[str] = TEMPLATES,
    kind: str = "",
    per_shard: int = 7,
) -> Path:
    """``folder``, with ``samples`` as ``shards.write_tar`` takes them."""
    test = folder / "test"
    test.mkdir(parents=True)
    parts = [samples[i : i + per_shard] for i in range(0, len(samples), per_shard)]
    (test / "nshards.txt").write_text(f"{len(parts)}\n")
    for number, part in enumerate(parts):
        shards.write_tar(test / f"{number}.tar", part)
    if names:
        (folder / "classnames.txt").write_text("\n".join(names) + "\n")
        (folder / "zeroshot_classification_templates.txt").write_text("".join(f" {t} \n" for t in templates))
    if kind:
        (folder / "dataset_type.txt").write_text(kind)
    return folder


def write_classification(
    folder: Path, labels: Sequence[int], names: Sequence[str], columns: Sequence[Sequence[int]] | None = None
) -> Path:
    """One picture per label, of different formats; ``columns``: integers of its ``.npy``."""
    samples = []
    for i, label in enumerate(labels):
        kind = ("jpg", "png", "webp")[i % 3]
        sample = {"__key__": f"s{i:05d}", kind: encoded(i, kind), "cls": str(label)}
        samples.append(sample | ({"npy": npy(columns[i])} if columns is not None else {}))
    return write_wds(folder, samples, names)


def write_csv_and_zip(folder: Path, name: str, rows: Sequence[dict], pictures: dict[str, bytes]) -> Path:
    """A table as the retrieval sets and WinoGAViL are published: lists are JSON."""
    folder.mkdir(parents=True)
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
        for member, data in pictures.items():
            archive.writestr(f"images/{member}", data)
    return folder
