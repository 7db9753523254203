"""What DataCompDR's shards hold beside each sample: a teacher's embeddings, captions, and the crops they are of.

The layout is that of the public data sets apple/DataCompDR-12M, -12M-bf16 and -1B (huggingface.co, their cards;
arXiv:2311.17049) and of the programs that write and read them (github.com/apple/ml-mobileclip-dr and
ml-mobileclip). A sample has, in addition to its image and its own captions:

    .syn.json           {"syn_text": [caption, ...]}; there may be several lists, whose names begin with syn_text
    .paug.json          {"param_aug": [view, ...]}, one view for each image embedding. The list may be a json in a
                        string. A view is [[top, left, height, width], [[operation, magnitude], ...]]: a crop in
                        pixels, then operations of torchvision's RandAugment, by their numbers, on the crop at the
                        model's size; null where there are none
    .npz or .pth.gz     image_emb [views, d], text_emb [captions, d]: first the own captions, then the synthetic
                        ones, or these as NAME_emb for each list NAME. npz is float32; pth.gz is torch's file,
                        compressed, of bfloat16. Where there are both, npz is taken

Several teachers' embeddings are concatenated: 2 x 768 in the data sets.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.data.samples import RawSample, Unusable
from training.data.transforms import OPERATIONS, Box, Replay
from training.rng import caption_number, view_number

EXTENSIONS = ("npz", "pth.gz", "syn.json", "paug.json")
_SYNTHETIC = re.compile(r"syn_text.*")
_MOST = 2**28  # bytes of a sample's embeddings; what claims to be larger is broken


class Reinforced(NamedTuple):
    """What one use of a sample gets: its view (None: a random one), its caption, and their embeddings [2, d]."""

    view: Replay | None
    text: str
    features: Tensor


@dataclass(frozen=True)
class Reinforcement:
    """Chooses among the views and captions of a sample.

    ``captions``  the number of synthetic captions to draw from, the first ones; None: all.
    ``ratio``     the chance of a synthetic caption; None: own and synthetic captions all have the same chance.
    """

    captions: int | None
    ratio: float | None

    def __call__(self, raw: RawSample, run_seed: int, epoch: int, seed: int) -> Reinforced:
        """The choice for one use of ``raw``, whose random numbers follow from ``seed``.

        Views come in turn, as stored ones do. Unusable: the sample lacks something, or it is not of this layout.
        """
        own = (raw.text, *raw.more)
        held = _Held.of(raw.extras or {}, len(own))
        synthetic = held.synthetic[: self.captions]
        number = view_number(run_seed, epoch, raw.turn, raw.row, len(held.images))
        caption = caption_number(seed, len(own), len(synthetic), self.ratio)
        features = np.stack([held.images[number], held.texts[caption]])
        _check_values(features)
        view = held.views[number] if held.views else None
        return Reinforced(view, [*own, *synthetic][caption], torch.from_numpy(features))


def check(raw: RawSample, height: int, width: int) -> None:
    """Unusable: something is wrong with what ``raw`` holds, whose image has this size."""
    held = _Held.of(raw.extras or {}, 1 + len(raw.more))
    _check_values(held.images)
    _check_values(held.texts)
    for view in held.views:
        view.check(height, width)


def _check_values(vectors: np.ndarray) -> None:
    if not (np.isfinite(vectors).all() and vectors.any(1).all()):
        raise Unusable("embedding is zero or not finite")


class _Held(NamedTuple):
    """All that a sample has: embeddings float32 [views, d] and [captions, d], synthetic captions, views."""

    images: np.ndarray
    texts: np.ndarray
    synthetic: list[str]
    views: list[Replay]

    @classmethod
    def of(cls, extras: Mapping[str, bytes], own: int) -> _Held:
        """``extras``: files by extension; ``own``: how many captions of its own the sample has."""
        lists = _lists(extras)
        vectors = _embeddings(extras)
        synthetic = [caption for captions in lists.values() for caption in captions]
        images, texts = vectors.get("image_emb"), vectors.get("text_emb")
        if images is None or texts is None or not len(images):
            raise Unusable("embeddings are incomplete", f"there are {', '.join(vectors) or 'none'}")
        if len(texts) == own and synthetic:
            apart, width = [vectors.get(f"{name}_emb", texts[:0]) for name in lists], texts.shape[1]
            if [part.shape for part in apart] != [(len(captions), width) for captions in lists.values()]:
                raise Unusable("embeddings do not fit the captions", "of synthetic captions")
            texts = np.concatenate([texts, *apart])
        if len(texts) != own + len(synthetic) or images.shape[1] != texts.shape[1]:
            shapes = f"{list(texts.shape)} and {list(images.shape)}"
            raise Unusable("embeddings do not fit the captions", f"text_emb and image_emb are {shapes}")
        views = _views(extras)
        if views and len(views) != len(images):
            raise Unusable("embeddings do not fit the views", f"{len(images)} for {len(views)} in .paug.json")
        return cls(images, texts, synthetic, views)


def _lists(extras: Mapping[str, bytes]) -> dict[str, list[str]]:
    """The lists of synthetic captions by name."""
    held = _json(extras, "syn.json")
    lists = {name: held[name] for name in held if _SYNTHETIC.fullmatch(name) and not name.endswith("_emb")}
    for captions in lists.values():
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise Unusable("synthetic captions are no list of texts")
        try:
            "".join(captions).encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which a json can hold
            raise Unusable("text is not utf-8") from None
    return lists


def _views(extras: Mapping[str, bytes]) -> list[Replay]:
    held = _json(extras, "paug.json").get("param_aug", [])
    try:
        listed = json.loads(held) if isinstance(held, str) else held
        return [_view(*view) for view in listed]
    except (ValueError, TypeError, IndexError, OverflowError, RecursionError):
        raise Unusable("views are not of the known form", f"param_aug is {held!r:.60}") from None


def _view(crop: Sequence[int], operations: Sequence[Sequence[float]] | None = None) -> Replay:
    box = Box(*(int(number) for number in crop))
    steps = [(OPERATIONS[_number(index)], float(magnitude)) for index, magnitude in operations or ()]
    if min(box) < 0 or not box.height or not box.width or not all(math.isfinite(size) for _, size in steps):
        raise ValueError("no crop")
    if any(name == "Posterize" and not 0 <= int(bits) <= 8 for name, bits in steps):
        raise ValueError("no number of bits")  # the only magnitude that torchvision refuses
    return Replay(box, tuple(steps))


def _number(index: float) -> int:
    if not isinstance(index, int) or index < 0:
        raise ValueError("no operation")
    return index


def _embeddings(extras: Mapping[str, bytes]) -> dict[str, np.ndarray]:
    """The arrays whose names end in emb, float32 [n, d] each. Code in a file is never run."""
    try:
        if "npz" in extras:
            with np.load(io.BytesIO(extras["npz"]), allow_pickle=False) as file:
                if sum(member.file_size for member in file.zip.infolist()) > _MOST:
                    raise ValueError(f"more than {_MOST} bytes")
                held: dict[str, Any] = {name: file[name] for name in file.files}
        elif "pth.gz" in extras:
            with gzip.GzipFile(fileobj=io.BytesIO(extras["pth.gz"])) as packed:
                plain = packed.read(_MOST)
            held = torch.load(io.BytesIO(plain), map_location="cpu", weights_only=True)
        else:
            raise Unusable("missing embeddings", "it has neither .npz nor .pth.gz")
        vectors = {name: array for name, array in held.items() if name.endswith("emb")}
        found = {name: torch.as_tensor(array).float().numpy() for name, array in vectors.items()}
    except Unusable:
        raise
    except Exception as error:  # numpy's and torch's readers raise any exception on a broken file
        raise Unusable("embeddings cannot be read", str(error).split("\n")[0]) from None
    return {name: array for name, array in found.items() if array.ndim == 2}


def _json(extras: Mapping[str, bytes], extension: str) -> dict[str, Any]:
    try:
        held = json.loads(extras.get(extension, b"{}"))
    except (ValueError, RecursionError):
        raise Unusable("json is not valid", f".{extension}") from None
    if not isinstance(held, dict):
        raise Unusable("json is not valid", f".{extension} is no object")
    return held
