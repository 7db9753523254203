"""Cached embeddings of the reference, found by a sample's row, so that the reference itself need not be built.

``--cached_ref_features_dir`` names either layout:

- ours, a folder that ``--cache_ref_model_features`` has written (see ``row_store``): float16 or float32 [2, d] per
  row, image and text, with the model they came from and a checksum of each caption;
- the published one, files ``SHARD:08d.pt`` of a tensor [n, 2, d], in which row r is entry r mod S of shard r div S
  with S = ``--num_samples_per_shard``. Rows that were never cached are zeros there. It may be a folder, or a
  pattern with braces or wildcards.

Row r of the run is row r - ``--ref_features_offset`` of the cache. (A cache of A::B serves a run on B alone with
minus A's ``--data_size`` as offset.) Whatever is missing, zero or not finite is an error that names the sample.

Loader processes look features up and send them with the batch: the time that a disk takes is spent beside the
training step, and on the way to a GPU they travel with the images, from page-locked memory and in their own type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.cache.row_store import RowStore, caption_checksum, open_store
from training.config.model import brings_weights
from training.config.params import Config
from training.config.reference import ReferenceConfig
from training.data.bad_samples import WrongRow
from training.data.samples import FeatureSource
from training.data.sources.shards import expand_shards
from training.models import pretrained

KIND = "reference features"
FLAG = "--cached_ref_features_dir"
_OPEN = 4096  # published files that a process has mapped at a time; the system allows some 65,000 in all


class StoredFeatures:
    """Embeddings in our layout."""

    def __init__(self, store: RowStore, offset: int = 0) -> None:
        self.store, self.offset = store, offset
        self.dtype, (_, self.width) = store.shape("features")

    def __call__(self, rows: Sequence[int], texts: Sequence[str], names: Sequence[str]) -> Tensor:
        """See ``FeatureSource``."""
        places = np.asarray(rows, dtype=np.int64) - self.offset
        checksums = np.fromiter(map(caption_checksum, texts), np.uint32, len(places))
        say = _sayer(places, names)
        found = self.store.gather("features", self.store.find(places, checksums, say))
        _check_values(found, say, str(self.store.folder))
        return torch.from_numpy(found)

    def describe(self) -> str:
        """See ``FeatureSource``."""
        made = self.store.identity
        return (
            f"{len(self.store):,} rows of 2 x {self.width} {self.dtype} in {self.store.folder}, "
            f"from {made['model']} with weights {made['weights']}"
        )


class PublishedFeatures:
    """Embeddings in the published layout: ``files`` by shard number, ``per_shard`` rows of the run in each."""

    def __init__(self, files: Mapping[int, str], per_shard: int, offset: int = 0) -> None:
        self.files, self.per_shard, self.offset = dict(files), per_shard, offset
        self._opened: dict[int, np.ndarray] = {}
        first = self._open(min(self.files))
        self.width, self.dtype = first.shape[2], first.dtype

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}  # another process maps for itself

    def __call__(self, rows: Sequence[int], texts: Sequence[str], names: Sequence[str]) -> Tensor:
        """See ``FeatureSource``."""
        places = np.asarray(rows, dtype=np.int64) - self.offset
        say = _sayer(places, names)
        shards, entries = np.divmod(places, self.per_shard)
        found = np.empty((len(places), 2, self.width), self.dtype)
        for shard in np.unique(shards).tolist():
            wanted = np.flatnonzero(shards == shard)
            if shard not in self.files:
                raise WrongRow(f"{say(int(wanted[0]))} would be in {FLAG} as {shard:08d}.pt, which is not there")
            held = self._open(shard)
            beyond = entries[wanted] >= len(held)
            if beyond.any():
                raise WrongRow(f"{say(int(wanted[beyond.argmax()]))} lies beyond the end of {self.files[shard]}")
            found[wanted] = held[entries[wanted]]
        _check_values(found, say, lambda i: self.files[int(shards[i])])
        return torch.from_numpy(found)

    def describe(self) -> str:
        """See ``FeatureSource``."""
        return (
            f"{len(self.files):,} files of 2 x {self.width} {self.dtype} in the published layout, "
            f"{self.per_shard} rows each, {self.files[min(self.files)]} first"
        )

    def _open(self, shard: int) -> np.ndarray:
        """[n, 2, d], mapped into memory."""
        if shard not in self._opened:
            path = self.files[shard]
            try:
                tensor = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
            except Exception as error:  # torch.load raises anything on a broken file
                raise ValueError(f"{FLAG}: {path} cannot be read ({pretrained.one_line(error)})") from error
            shape = tuple(getattr(tensor, "shape", ()))
            width = getattr(self, "width", None)
            if (
                len(shape) != 3
                or shape[1] != 2
                or shape[2] != (width or shape[2])
                or not tensor.is_floating_point()
            ):
                expected = f"[n, 2, {width or 'd'}]"
                raise ValueError(
                    f"{FLAG}: {path} holds {list(shape)}, where a float tensor {expected} was expected"
                )
            if len(self._opened) >= _OPEN:
                del self._opened[next(iter(self._opened))]
            self._opened[shard] = tensor.numpy()
        return self._opened[shard]


def open_features(config: Config) -> FeatureSource | None:
    """What ``--cached_ref_features_dir`` names, for a run that trains on it; None where the run has no cache.

    ValueError: there is nothing to read, or ``--ref_model`` and its weights are not those that it came from.
    """
    cache = config.cache
    if not cache.cached_ref_features_dir or cache.writes or not config.trains:
        return None
    given = cache.cached_ref_features_dir
    if (Path(given) / "index.json").exists() or (Path(given) / "parts").exists():
        store = open_store(given, KIND, FLAG)
        _check_model(store, config.reference)
        return StoredFeatures(store, cache.ref_features_offset)
    return PublishedFeatures(published_files(given), cache.num_samples_per_shard, cache.ref_features_offset)


def published_files(given: str) -> dict[int, str]:
    """Shard number -> path of the files in a folder or of a pattern. ValueError: there are none."""
    if Path(given).is_dir():
        paths = sorted(str(path) for path in Path(given).glob("*.pt"))
    else:
        paths = [path for source in expand_shards(given, FLAG) for path in source]
    files: dict[int, str] = {}
    for path in paths:
        name = Path(path).name
        if not re.fullmatch(r"\d+\.pt", name):
            raise ValueError(f"{FLAG} {given}: {name} is not called by the number of its shard, like 00000012.pt")
        if int(Path(path).stem) in files:
            raise ValueError(f"{FLAG} {given}: {path} and {files[int(Path(path).stem)]} are of the same shard")
        files[int(Path(path).stem)] = path
    if not files:
        raise ValueError(
            f"{FLAG} {given}: neither an index.json nor files like 00000012.pt are there; write features with "
            "--cache_ref_model_features"
        )
    return files


def model_identity(reference: ReferenceConfig) -> dict[str, str]:
    """What the flags say of the reference: architecture and weights, a file's by its contents."""
    weights = reference.ref_model_checkpoint, reference.ref_model_pretrained
    return pretrained.identity(reference.ref_model, "--ref_model", *weights)


def _check_model(store: RowStore, reference: ReferenceConfig) -> None:
    """ValueError: the flags name another model than the features came from. What they leave open is no matter."""
    if not reference.ref_model:
        return
    wanted_of = model_identity(reference)
    if wanted_of["weights"] == pretrained.OWN_WEIGHTS and not brings_weights(reference.ref_model):
        del wanted_of["weights"]
    for key, wanted in wanted_of.items():
        if store.identity[key] != wanted:
            flag = "--ref_model" if key == "model" else "the reference's weights"
            raise ValueError(
                f"{FLAG} {store.folder}: its features were made with {key} {store.identity[key]}, not {wanted}; "
                f"mend {flag}, leave it out, or cache the features of that model"
            )


def _sayer(places: np.ndarray, names: Sequence[str]) -> Callable[[int], str]:
    return lambda i: f"{FLAG}: sample {names[i]} (row {places[i]} of the cache)"


def _check_values(found: np.ndarray, say: Callable[[int], str], where: str | Callable[[int], str]) -> None:
    """WrongRow: a vector of zeros, or one that is not finite."""
    squares = np.einsum("nid,nid->ni", found, found, dtype=np.float32)
    good = ((squares > 0) & np.isfinite(squares)).all(axis=1)
    if not good.all():
        i = int(good.argmin())
        what = "was never cached: it is zero" if not found[i].any(axis=1).all() else "is not finite"
        raise WrongRow(f"{say(i)} {what} in {where if isinstance(where, str) else where(i)}")
