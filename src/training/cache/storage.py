"""How features are stored: as float32 or float16, in 8 bits with a scale, or packed with a promised error.

Plain types are arrays ``features`` [n, 2, d]. The others are bytes, ``packed`` [n, bytes], first the image's, then
the text's, so that one read brings both. Where a row has several views or captions, of which a reader takes one
each, there are instead

    images      [n, views, d], or bytes [n, views, bytes of an image]
    texts       [n, captions, d], or bytes
    caption_checksums   uint32 [n, captions]

A part's facts say how it was packed and what that changed:

    width       d
    bytes       of an image's and of a text's row
    formats     with an error bound: ``drrho_clip.codec.Format`` of images and of texts; measured for each part
    largest     the largest error of a component
    similarity  of the part's first rows, normalized: the largest and the root mean square error of the similarity
                of an image and a text

    several     [views, captions] of a row, where it has several

Constants are ``offset``, float32 [2, d], the columns' means, where one of the formats takes them off.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drrho_clip import codec
from drrho_clip.codec import Format
from training.cache.row_store import SEVERAL, PartValues, RowStore

_LARGEST_INT8 = 127
_COMPARED = 1024  # rows of a part whose similarities are compared


@dataclass(frozen=True)
class Storage:
    """``dtype`` is 'float32', 'float16' or 'int8'; ``bound``, where it is not None, replaces it."""

    dtype: str
    bound: float | None = None

    @property
    def brought(self) -> torch.dtype:
        """The type in which features are brought from the device."""
        return torch.float16 if self.bound is None and self.dtype == "float16" else torch.float32

    def identity(self) -> dict[str, Any]:
        """What tells stores apart."""
        return {"dtype": self.dtype} if self.bound is None else {"dtype": "packed", "error bound": self.bound}

    @property
    def plain(self) -> bool:
        """Whether features are kept in the type in which they are brought."""
        return self.bound is None and self.dtype != "int8"

    def pack(self, features: np.ndarray) -> PartValues:
        """The values of a part whose features are these, [n, 2, d] in ``brought``, n > 0."""
        if self.plain:
            return PartValues({"features": features})
        rows, constants, facts = self._packed(list(torch.from_numpy(features).unbind(1)))
        return PartValues({"packed": torch.cat(rows, 1).numpy()}, constants, facts)

    def pack_several(self, images: np.ndarray, texts: np.ndarray, checksums: np.ndarray) -> PartValues:
        """The same for rows with several: ``images`` [n, views, d], ``texts`` [n, captions, d], n > 0.

        ``checksums``: of the captions, uint32 [n, captions].
        """
        sides = {"images": torch.from_numpy(images), "texts": torch.from_numpy(texts)}
        several = {SEVERAL: [side.shape[1] for side in sides.values()]}
        held = {"caption_checksums": checksums}
        if self.plain:
            facts = {"width": images.shape[2]} | several
            return PartValues(held | {name: side.numpy() for name, side in sides.items()}, facts=facts)
        rows, constants, facts = self._packed([side.flatten(0, 1) for side in sides.values()])
        for (name, side), packed in zip(sides.items(), rows):
            held[name] = packed.view(*side.shape[:2], -1).numpy()
        return PartValues(held, constants, facts | several)

    def _packed(self, exact: list[Tensor]) -> tuple[list[Tensor], dict[str, np.ndarray], dict[str, Any]]:
        """Bytes of images and of texts, uint8 [n, bytes], with the part's constants and facts.

        ``exact``: float32 [n, d] each; there may be more of one than of the other.
        """
        width = exact[0].shape[1]
        # Broken vectors stay broken, so that the lookup refuses them.
        sides = [
            torch.where((torch.isfinite(side).all(1) & side.any(1))[:, None], side, torch.nan) for side in exact
        ]
        facts: dict[str, Any] = {"width": width}
        constants: dict[str, np.ndarray] = {}
        if self.bound is None:
            rows = [_int8_rows(side) for side in sides]
            back = [_from_int8_rows(side) for side in rows]
        else:
            chosen = [codec.measure(side, self.bound, float_rows=False) for side in sides]
            rows = [codec.pack(side, how, offset)[0] for side, (how, offset) in zip(sides, chosen)]
            back = [codec.unpack(side, how, offset) for side, (how, offset) in zip(rows, chosen)]
            facts["formats"] = [asdict(how) for how, _ in chosen]
            if any(how.moved for how, _ in chosen):
                nothing = torch.zeros(width)
                offsets = [nothing if offset is None else offset for _, offset in chosen]
                constants["offset"] = torch.stack(offsets).numpy()
        facts["bytes"] = [side.shape[1] for side in rows]
        return rows, constants, facts | _changes(sides, back)


class Reader(Protocol):
    """What gives features at positions int64 [n]; ``which`` int64 [2, n]: the views and captions, of several.

    ``keys``: the values of the store that it reads.
    """

    @property
    def keys(self) -> tuple[str, ...]: ...

    def __call__(self, positions: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Features [n, 2, d]."""


def reader(store: RowStore) -> tuple[Reader, int, str]:
    """What reads features from ``store``, their width d, and how they are stored."""
    facts: Mapping[str, Any] = next((facts for facts in store.facts if facts), {})
    if "bytes" not in facts:
        dtype, (*_, width) = store.shape("images" if SEVERAL in facts else "features")
        return PlainReader(store, SEVERAL in facts), width, str(dtype)
    bound = store.identity.get("error bound")
    form = "int8, with scales" if bound is None else f"with an error of at most {bound:g}"
    return PackedReader(store, facts["width"], SEVERAL in facts), facts["width"], form


def several(store: RowStore) -> tuple[int, int] | None:
    """The views and captions of each row; None where there is one of each."""
    return next((tuple(facts[SEVERAL]) for facts in store.facts if SEVERAL in facts), None)


def largest_changes(store: RowStore) -> str:
    """A sentence on what packing changed in the parts of ``store``; '' where it holds plain types."""
    facts = [part for part in store.facts if "largest" in part]
    if not facts:
        return ""
    similarity = [part["similarity"] for part in facts]
    rms = max(part["rms"] for part in similarity)
    return (
        f"the largest error of a component is {max(part['largest'] for part in facts):.3g}, that of a similarity "
        f"{max(part['largest'] for part in similarity):.2g} (root mean square {rms:.2g})"
    )


@dataclass(frozen=True)
class PlainReader:
    """Features as they were written; ``several``: rows have several views or captions."""

    store: RowStore
    several: bool

    @property
    def keys(self) -> tuple[str, ...]:
        return ("images", "texts") if self.several else ("features",)

    def __call__(self, positions: np.ndarray, which: np.ndarray) -> np.ndarray:
        """[n, 2, d] in the store's type."""
        if not self.several:
            return self.store.gather("features", positions)
        views, captions = which
        return np.stack(
            [self.store.gather("images", positions, views), self.store.gather("texts", positions, captions)], 1
        )


class PackedReader:
    """Features that were packed, with ``width`` components each; ``several`` as above."""

    def __init__(self, store: RowStore, width: int, several: bool) -> None:
        self.store, self.width, self.several = store, width, several
        # Formats that differ in the room for a row's zeros alone are unpacked together.
        forms = [[_form(facts, side) for facts in store.facts] for side in (0, 1)]
        self._forms = [list(dict.fromkeys(of_side)) for of_side in forms]
        self._form_of = [np.array([f.index(form) for form in of]) for f, of in zip(self._forms, forms)]
        self._bytes = np.array([facts.get("bytes", (0, 0)) for facts in store.facts])
        self._offsets: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_offsets": {}}  # another process reads its own

    @property
    def keys(self) -> tuple[str, ...]:
        return ("images", "texts") if self.several else ("packed",)

    def __call__(self, positions: np.ndarray, which: np.ndarray) -> np.ndarray:
        """float32 [n, 2, d]; NaN for vectors that were broken when they were written."""
        pieces = self._pieces(positions, which)
        counts = np.array([len(piece.target) for piece in pieces])
        part_of = np.repeat([piece.part for piece in pieces], counts)
        ends = np.cumsum(counts)
        first, second = self._bytes[part_of].max(0)
        images, texts = (np.zeros((len(positions), most), np.uint8) for most in (first, second))
        for piece, count, end in zip(pieces, counts.tolist(), ends.tolist()):
            images[end - count : end, : piece.images.shape[1]] = piece.images
            texts[end - count : end, : piece.texts.shape[1]] = piece.texts
        unpacked = np.empty((len(positions), 2, self.width), np.float32)
        for side, packed in enumerate((images, texts)):
            form_of = self._form_of[side][part_of]
            for number in np.unique(form_of).tolist():
                mine = np.flatnonzero(form_of == number)
                form = self._forms[side][number]
                unpacked[mine, side] = self._unpacked(form, packed[mine], part_of[mine], side).numpy()
        features = np.empty_like(unpacked)
        features[np.concatenate([piece.target for piece in pieces])] = unpacked
        return features

    def _pieces(self, positions: np.ndarray, which: np.ndarray) -> list[_Bytes]:
        """What was asked for, part by part."""
        if self.several:
            sides = zip(
                self.store.pieces("images", positions, which[0]), self.store.pieces("texts", positions, which[1])
            )
            return [
                _Bytes(image.part, image.target, image.array[image.source], text.array[text.source])
                for image, text in sides
            ]
        found = []
        for piece in self.store.pieces("packed", positions):
            rows, image_bytes = piece.array[piece.source], int(self._bytes[piece.part, 0])
            found.append(_Bytes(piece.part, piece.target, rows[:, :image_bytes], rows[:, image_bytes:]))
        return found

    def _unpacked(self, form: Format | None, packed: np.ndarray, part_of: np.ndarray, side: int) -> Tensor:
        rows = torch.from_numpy(packed)
        if form is None:
            return _from_int8_rows(rows)
        if not form.moved:
            return codec.unpack(rows, form)
        parts, place = np.unique(part_of, return_inverse=True)
        offsets = np.stack([self._offset(part)[side] for part in parts.tolist()])
        return codec.unpack(rows, form, torch.from_numpy(offsets[place]))

    def _offset(self, part: int) -> np.ndarray:
        if part not in self._offsets:
            self._offsets[part] = np.array(self.store.constant("offset", part))
        return self._offsets[part]


class _Bytes(NamedTuple):
    """Packed ``images`` and ``texts`` of one part, uint8 [m, bytes], the entries ``target`` of those asked for."""

    part: int
    target: np.ndarray
    images: np.ndarray
    texts: np.ndarray


def _form(facts: Mapping[str, Any], side: int) -> Format | None:
    """How a part's images or texts are packed, without room for zeros; None: int8, or there are none."""
    if "formats" not in facts:
        return None
    form = Format(**facts["formats"][side])
    return form if form.zeros is None else replace(form, zeros=0)


def _int8_rows(x: Tensor) -> Tensor:
    """float32 [n, d] -> uint8 [n, 4 + d]: a float32 scale and integers; the scale of a broken row is NaN."""
    scale = x.abs().amax(1, keepdim=True) / _LARGEST_INT8
    codes = torch.round(x / scale).nan_to_num().to(torch.int8)
    return torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], 1)


def _from_int8_rows(rows: Tensor) -> Tensor:
    return rows[:, 4:].view(torch.int8).float() * rows[:, :4].contiguous().view(torch.float32)


def _changes(exact: Iterable[Tensor], back: Iterable[Tensor]) -> dict[str, Any]:
    """What packing changed; see above. Broken vectors do not count."""
    largest = max(float((b - e).abs().nan_to_num().max()) for e, b in zip(exact, back))
    image, text = (F.normalize(side[:_COMPARED], dim=1) for side in exact)
    stored_image, stored_text = (F.normalize(side[:_COMPARED], dim=1) for side in back)
    wrong = (stored_image @ stored_text.T - image @ text.T).nan_to_num()
    return {
        "largest": largest,
        "similarity": {"largest": float(wrong.abs().max()), "rms": float(wrong.square().mean().sqrt())},
    }
