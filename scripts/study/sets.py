"""The training sets of the study: the halves that ``scripts/icons.py`` writes, and sets derived from them.

    a, b              the halves
    a+b               both
    emoji             other pictures (``scripts/icons.py --emoji``)
    b-half, -quarter, -eighth   nested random parts of b
    b-noise20, -noise40         b with the captions of that share of its pictures shuffled among them

A derived set is written once, below ``derived/``. Its rows are numbered from 0, its order is the half's.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PER_SHARD = 2048
SHARES = {"half": 2, "quarter": 4, "eighth": 8}
EVALUATED = {"test": ("icons", "retrieval"), "val": ("icons_val", "retrieval_val")}  # zero-shot, retrieval: keys
TASKS = "wds_icons_test,wds_icons_val,retrieval_test,retrieval_val"


@dataclass(frozen=True)
class TrainingSet:
    """``pattern`` is a value for --train-data, ``sizes`` has the samples of each source that it joins."""

    pattern: str
    sizes: tuple[int, ...]

    @property
    def samples(self) -> int:
        return sum(self.sizes)

    @property
    def data_size(self) -> str:
        """A value for --data_size."""
        return "::".join(map(str, self.sizes))


def find(root: Path, name: str) -> TrainingSet:
    """The training set ``name`` in the folder ``root`` of ``scripts/icons.py``, which may be still to ``make``.

    ValueError: there is no such set.
    """
    if "+" in name:
        parts = [find(root, part) for part in name.split("+")]
        return TrainingSet("::".join(part.pattern for part in parts), sum((part.sizes for part in parts), ()))
    half, _, change = name.partition("-")
    described = root / half / "set.json"
    if not described.exists():
        raise ValueError(
            f"--data {root}: there is no {described}; make the sets with scripts/icons.py --emoji first"
        )
    about, folder = json.loads(described.read_text()), root / half
    if change:
        samples = about["samples"] // SHARES.get(change, 1)
        about, folder = {"samples": samples, "shards": _shards(samples)}, root / "derived" / name
    return TrainingSet(str(folder / f"{{00000..{about['shards'] - 1:05d}}}.tar"), (about["samples"],))


def make(root: Path, name: str) -> None:
    """Write the training set ``name`` if it is one that is derived and not there, or in shards of another size.

    ValueError: as for ``find``.
    """
    half, _, change = name.partition("-")
    folder = root / "derived" / name
    if "+" in name or not change or _is_current(folder, find(root, name).samples):
        return
    shutil.rmtree(folder, ignore_errors=True)
    samples = list(_read(root / half))
    order = np.random.default_rng(0).permutation(len(samples))
    if change in SHARES:
        samples = [samples[i] for i in np.sort(order[: len(samples) // SHARES[change]])]
    elif match := re.fullmatch(r"noise(\d+)", change):
        changed = order[: len(samples) * int(match[1]) // 100]
        captions = [samples[i]["txt"] for i in np.roll(changed, 1)]  # of another one of them
        for i, caption in zip(changed, captions, strict=True):
            samples[i]["txt"] = caption
    else:
        raise ValueError(f"{name}: no such set; there are parts ({', '.join(SHARES)}) and noiseN, N percent")
    write(folder, samples, PER_SHARD)


def _is_current(folder: Path, samples: int) -> bool:
    """Whether a derived set of so many samples is there, in shards of the present size."""
    about = folder / "set.json"
    return about.exists() and json.loads(about.read_text()) == {"shards": _shards(samples), "samples": samples}


def _shards(samples: int) -> int:
    return -(-samples // PER_SHARD)


def _read(folder: Path) -> Iterator[dict[str, bytes]]:
    """Picture and caption of each sample, in the order of the shards."""
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members: dict[str, bytes] = {}
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                members[member.name.rpartition(".")[2]] = file.read()
                if len(members) == 3:
                    yield {"png": members["png"], "txt": members["txt"]}
                    members = {}


def write(folder: Path, samples: Sequence[Mapping[str, bytes]], per_shard: int) -> None:
    """Write ``samples``, extension -> content, as shards with ``set.json``; a json gives each its row."""
    scratch = folder.with_name(folder.name + f".{os.getpid()}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    starts = range(0, len(samples), per_shard)
    for number, start in enumerate(starts):
        with tarfile.open(scratch / f"{number:05d}.tar", "w") as tar:
            for key in range(start, min(start + per_shard, len(samples))):
                members = {**samples[key], "json": json.dumps({"key": key}).encode()}
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{key:08d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (scratch / "set.json").write_text(json.dumps({"shards": len(starts), "samples": len(samples)}))
    scratch.rename(folder)
