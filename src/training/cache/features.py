"""Cached embeddings of the reference, found by a sample's row, so that the reference itself need not be built.

``--cached_ref_features_dir`` names one of two layouts:

- ours, a folder that ``--cache_ref_model_features`` has written (see ``row_store``): [2, d] per row, image and
  text, as they are or packed (see ``storage``), with the model that computed them and a checksum of each caption.
  With ``--ref_features_views`` it has embeddings of several random views of each image: training shows the target
  the very view whose embedding it reads. Written with synthetic captions, it has an embedding of each of them;
- the published one, files ``SHARD:08d.pt`` with a tensor [n, 2, d] each, in which row r is entry r mod S of
  shard r div S with S = ``--num_samples_per_shard``. Rows that were never cached are zeros there. The flag's
  value may be a folder, or a pattern with braces or wildcards.

Row r of the run is row r - ``--ref_features_offset`` of the cache. (A cache of A::B serves a run on B alone with
minus A's ``--data_size`` as offset.) A row that is missing, zero or not finite is an error that names the sample.

Loader processes look up the features and send them with the batch: the disk is read during the training step,
and on the way to a GPU the features travel with the images, from page-locked memory and in the type they are
stored in. The disk is told the rows of a window of samples before they are looked up (``coming``), and the
kernel's page cache, which all processes of a node share, holds them until then. A row is read once in an epoch, so
from one to the next only a part that is never dropped is of use: see ``resident``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.cache.captions import FLAG as CAPTIONS_FLAG
from training.cache.captions import Captions
from training.cache.row_store import RowStore, caption_checksum, open_store
from training.cache.storage import reader, several
from training.checkpoint import pt_file
from training.config.model import brings_weights
from training.config.params import Config
from training.config.reference import ReferenceConfig
from training.data.bad_samples import WrongRow
from training.data.samples import FeatureSource, Shown, StoredViews
from training.data.sources.paths import expand_shards
from training.data.transforms import describe_augmentation
from training.distributed.collectives import on_main
from training.models import described, pretrained

KIND = "reference features"
FLAG = "--cached_ref_features_dir"
# In the identity of a store with several views, and of one with embeddings of synthetic captions.
VIEWS, SEED, AUGMENTATION, CAPTIONS = "--ref_features_views", "--seed", "augmentation", "synthetic captions"
_FLOATS = (torch.float16, torch.float32, torch.float64)  # those that numpy has too
_ANNOUNCED = 64  # rows that the disk is told of at a time
_OPEN = 4096  # published files that a process maps at a time; the system allows about 65,000 mappings in all


class StoredFeatures:
    """Embeddings in our layout; ``captions`` is the number of embedded synthetic captions of each sample."""

    def __init__(self, store: RowStore, offset: int = 0) -> None:
        self.store, self.offset = store, offset
        self._read, self.width, self.form = reader(store)
        self._several = several(store)
        self.captions = self._several[1] - 1 if self._several else 0
        self._keys = (*self._read.keys, *(("caption_checksums",) if self.captions else ()))  # what a lookup reads
        count = store.identity.get(VIEWS, 0)
        self.views = StoredViews(count, store.identity[SEED], offset) if count else None
        self._coming: list[tuple[int, int]] = []

    @property
    def paths(self) -> list[Path]:
        """See ``FeatureSource``."""
        return self.store.paths(self._keys)

    def coming(self, row: int, view: int = 0) -> None:
        """See ``FeatureSource``."""
        self._coming.append((row - self.offset, view))
        if len(self._coming) == _ANNOUNCED:
            rows, views = np.array(self._coming).T
            self.store.expect(rows, self._keys, {"images": views})
            self._coming = []

    def __call__(
        self, rows: Sequence[int], texts: Sequence[str], names: Sequence[str], shown: Sequence[Shown] = ()
    ) -> Tensor:
        """See ``FeatureSource``."""
        places = np.asarray(rows, dtype=np.int64) - self.offset
        checksums = np.fromiter(map(caption_checksum, texts), np.uint32, len(places))
        name_of = _namer(places, names)
        positions = self.store.find(places, checksums, name_of)
        which = np.zeros((2, len(places)), np.int64)
        if self._several and shown:
            which[:] = np.array([(use.view, use.caption) for use in shown]).T
            if self.captions:
                self._check_captions(positions, which[1], shown, name_of)
        found = self._read(positions, which)
        _check_values(found, name_of, str(self.store.folder))
        return torch.from_numpy(found)

    def describe(self) -> str:
        """See ``FeatureSource``."""
        made = self.store.identity
        each = "2" if self._several is None else "{} + {} (views and captions)".format(*self._several)
        return (
            f"{len(self.store):,} rows of {each} x {self.width} {self.form} in {self.store.folder}, "
            f"from {made['model']} with weights {made['weights']}"
        )

    def _check_captions(
        self, positions: np.ndarray, captions: np.ndarray, shown: Sequence[Shown], name_of: Callable[[int], str]
    ) -> None:
        """WrongRow: a caption that a sample shows is not the one that was embedded."""
        held = self.store.gather("caption_checksums", positions, captions)
        good = held == np.fromiter((caption_checksum(use.text) for use in shown), np.uint32, len(shown))
        if not good.all():
            i = int(good.argmin())
            raise WrongRow(
                f"{name_of(i)} has another synthetic caption {captions[i]} than in {self.store.folder}: those "
                "features were written with other captions, write them again with these"
            )


class PublishedFeatures:
    """Embeddings in the published layout: ``files`` by shard number, ``per_shard`` rows of the run in each."""

    views = None

    def __init__(self, files: Mapping[int, str], per_shard: int, offset: int = 0) -> None:
        self.files, self.per_shard, self.offset = dict(files), per_shard, offset
        self._opened: dict[int, np.ndarray] = {}
        first = self._open(min(self.files))
        self.width, self.dtype = first.shape[2], first.dtype

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}  # another process maps for itself

    def __call__(
        self, rows: Sequence[int], texts: Sequence[str], names: Sequence[str], shown: Sequence[Shown] = ()
    ) -> Tensor:
        """See ``FeatureSource``."""
        places = np.asarray(rows, dtype=np.int64) - self.offset
        name_of = _namer(places, names)
        shards, entries = np.divmod(places, self.per_shard)
        found = np.empty((len(places), 2, self.width), self.dtype)
        for shard in np.unique(shards).tolist():
            wanted = np.flatnonzero(shards == shard)
            if shard not in self.files:
                raise WrongRow(f"{name_of(int(wanted[0]))} should be in {shard:08d}.pt, which is missing")
            held = self._open(shard)
            beyond = entries[wanted] >= len(held)
            if beyond.any():
                raise WrongRow(f"{name_of(int(wanted[beyond.argmax()]))} is beyond the end of {self.files[shard]}")
            found[wanted] = held[entries[wanted]]
        _check_values(found, name_of, lambda i: self.files[int(shards[i])])
        return torch.from_numpy(found)

    @property
    def paths(self) -> list[Path]:
        """See ``FeatureSource``."""
        return [Path(self.files[shard]) for shard in sorted(self.files)]

    def describe(self) -> str:
        """See ``FeatureSource``."""
        return (
            f"{len(self.files):,} files of 2 x {self.width} {self.dtype} in the published layout, "
            f"{self.per_shard} rows each, the first is {self.files[min(self.files)]}"
        )

    def coming(self, row: int, view: int = 0) -> None:
        """See ``FeatureSource``. These files are read when they are looked up."""

    def _open(self, shard: int) -> np.ndarray:
        """[n, 2, d], mapped into memory."""
        if shard not in self._opened:
            path = self.files[shard]
            try:
                tensor = pt_file.content(path)
            except ValueError as error:
                raise ValueError(f"{FLAG}: {path} cannot be read ({error})") from error
            shape, dtype = tuple(getattr(tensor, "shape", ())), getattr(tensor, "dtype", None)
            width = getattr(self, "width", None)
            if len(shape) != 3 or shape[1] != 2 or shape[2] != (width or shape[2]) or dtype not in _FLOATS:
                held = f"{list(shape)} of {dtype}" if dtype else f"a {type(tensor).__name__}"
                raise ValueError(
                    f"{FLAG}: {path} holds {held}, where a tensor [n, 2, {width or 'd'}] of float16 or float32 "
                    "was expected"
                )
            if len(self._opened) >= _OPEN:
                del self._opened[next(iter(self._opened))]
            self._opened[shard] = tensor.detach().numpy()
        return self._opened[shard]


def open_features(config: Config) -> FeatureSource | None:
    """The features in ``--cached_ref_features_dir``; None if the run does not train on any.

    ValueError: there is nothing to read, or the features were computed by another model or other weights than
    ``--ref_model`` names.
    """
    cache = config.cache
    if not cache.cached_ref_features_dir or cache.writes or not config.trains:
        return None
    given = cache.cached_ref_features_dir
    if (Path(given) / "index.json").exists() or (Path(given) / "parts").exists():
        store = open_store(given, KIND, FLAG)
        _check_model(store, config.reference)
        _check_augmentation(store, config)
        return StoredFeatures(store, cache.ref_features_offset)
    files = on_main(lambda: published_files(given))
    return PublishedFeatures(files, cache.num_samples_per_shard, cache.ref_features_offset)


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
            raise ValueError(f"{FLAG} {given}: the name of {name} is not the number of a shard, like 00000012.pt")
        if int(Path(path).stem) in files:
            raise ValueError(f"{FLAG} {given}: {path} and {files[int(Path(path).stem)]} are for the same shard")
        files[int(Path(path).stem)] = path
    if not files:
        raise ValueError(
            f"{FLAG} {given}: it has neither an index.json nor files like 00000012.pt; write features with "
            "--cache_ref_model_features"
        )
    return files


def model_identity(reference: ReferenceConfig) -> dict[str, str]:
    """The reference that the flags name: architecture and weights; a file is identified by its contents."""
    weights = reference.ref_model_checkpoint, reference.ref_model_pretrained
    return pretrained.identity(described.reference_name(reference)[0], *weights)


def _check_augmentation(store: RowStore, config: Config) -> None:
    """ValueError: the views in ``store`` were drawn in another way than the flags say."""
    made = store.identity.get(AUGMENTATION)
    wanted = describe_augmentation(config.data.aug_cfg, config.data.rand_augment)
    if made not in (None, wanted):
        raise ValueError(
            f"{wanted}: the views in {store.folder} were drawn with {made}, and training shows the target these "
            f"very views: give {made}, or write features with {wanted}"
        )


def check_captions(features: FeatureSource | None, captions: Captions | None) -> None:
    """ValueError: ``features`` lacks embeddings of some of the synthetic ``captions`` that training draws from."""
    if features is None or captions is None:
        return
    if not isinstance(features, StoredFeatures) or not features.captions:
        raise ValueError(
            f"{CAPTIONS_FLAG} {captions.store.folder}: {FLAG} holds features of the samples' own captions alone, "
            f"and these replace them: write features with {CAPTIONS_FLAG} too, run the reference live, or train "
            "without synthetic captions"
        )
    folder = features.store.folder
    if captions.count > features.captions:
        raise ValueError(
            f"--num_syn_texts {captions.count}: {folder} has embeddings of {features.captions} synthetic captions "
            f"per sample; give at most {features.captions}"
        )


def _check_model(store: RowStore, reference: ReferenceConfig) -> None:
    """ValueError: the flags name another model than the features came from. What they leave open may differ."""
    if not reference.named:
        return
    wanted_of = model_identity(reference)
    if wanted_of["weights"] == pretrained.OWN_WEIGHTS and not brings_weights(reference.ref_model):
        del wanted_of["weights"]
    for key, wanted in wanted_of.items():
        if store.identity[key] != wanted:
            flag = "--ref_model" if key == "model" else "the reference's weights"
            raise ValueError(
                f"{FLAG} {store.folder}: its features were made with {key} {store.identity[key]}, not {wanted}; "
                f"correct {flag}, leave it out, or cache the features of that model"
            )


def _namer(places: np.ndarray, names: Sequence[str]) -> Callable[[int], str]:
    return lambda i: f"{FLAG}: sample {names[i]} (row {places[i]} of the cache)"


def _check_values(found: np.ndarray, name_of: Callable[[int], str], where: str | Callable[[int], str]) -> None:
    """WrongRow: a vector of zeros, or one that is not finite."""
    squares = np.einsum("nid,nid->ni", found, found, dtype=np.float32)
    good = ((squares > 0) & np.isfinite(squares)).all(axis=1)
    if not good.all():
        i = int(good.argmin())
        what = "zero: they were never cached" if not found[i].any(axis=1).all() else "not finite"
        raise WrongRow(f"{name_of(i)}: its features in {where if isinstance(where, str) else where(i)} are {what}")
