"""How features are stored: as float32 or float16, in 8 bits with a scale, or packed with a promised error.

Plain types are arrays ``features`` [n, 2, d]. The others are bytes, ``packed`` [n, bytes], first the image's, then
the text's, so that one read brings both. A part's facts say how it was packed and what that changed:

    width       d
    bytes       of an image's and of a text's row
    formats     with an error bound: ``drrho_clip.codec.Format`` of images and of texts; measured for each part
    largest     the largest error of a component
    similarity  of the part's first rows, normalized: the largest and the root mean square error of the similarity
                of an image and a text

Constants are ``offset``, float32 [2, d], the columns' means, where one of the formats takes them off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drrho_clip import codec
from drrho_clip.codec import Format
from training.cache.row_store import PartValues, RowStore

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

    def pack(self, features: np.ndarray) -> PartValues:
        """The values of a part whose features are these, [n, 2, d] in ``brought``, n > 0."""
        if self.bound is None and self.dtype != "int8":
            return PartValues({"features": features})
        exact = torch.from_numpy(features)
        # Broken vectors stay broken, so that the lookup refuses them.
        broken = ~(torch.isfinite(exact).all(2) & exact.any(2))
        sides = torch.where(broken[..., None], torch.nan, exact).unbind(1)
        facts: dict[str, Any] = {"width": exact.shape[2]}
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
                nothing = torch.zeros(exact.shape[2])
                offsets = [nothing if offset is None else offset for _, offset in chosen]
                constants["offset"] = torch.stack(offsets).numpy()
        facts["bytes"] = [side.shape[1] for side in rows]
        return PartValues({"packed": torch.cat(rows, 1).numpy()}, constants, facts | _changes(sides, back))


def reader(store: RowStore) -> tuple[Callable[[np.ndarray], np.ndarray], int, str]:
    """What gives features [n, 2, d] at positions int64 [n], d, and how they are stored."""
    packed = next((facts for facts in store.facts if facts), None)
    if packed is None:
        dtype, (_, width) = store.shape("features")
        return PlainReader(store), width, str(dtype)
    bound = store.identity.get("error bound")
    form = "int8, with scales" if bound is None else f"with an error of at most {bound:g}"
    return PackedReader(store, packed["width"]), packed["width"], form


def largest_changes(store: RowStore) -> str:
    """A sentence on what packing changed in the parts of ``store``; '' where it holds plain types."""
    facts = [part for part in store.facts if part]
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
    """Features as they were written."""

    store: RowStore

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """[n, 2, d] in the store's type."""
        return self.store.gather("features", positions)


class PackedReader:
    """Features that were packed, with ``width`` components each."""

    def __init__(self, store: RowStore, width: int) -> None:
        self.store, self.width = store, width
        # Formats that differ in the room for a row's zeros alone are unpacked together.
        forms = [[_form(facts, side) for facts in store.facts] for side in (0, 1)]
        self._forms = [list(dict.fromkeys(of_side)) for of_side in forms]
        self._form_of = [np.array([f.index(form) for form in of]) for f, of in zip(self._forms, forms)]
        self._bytes = np.array([facts.get("bytes", (0, 0)) for facts in store.facts])
        self._offsets: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_offsets": {}}  # another process reads its own

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """float32 [n, 2, d]; NaN for vectors that were broken when they were written."""
        pieces = self.store.pieces("packed", positions)
        counts = np.array([len(piece.source) for piece in pieces])
        part_of = np.repeat([piece.part for piece in pieces], counts)
        ends = np.cumsum(counts)
        first, second = self._bytes[part_of].max(0)
        images, texts = (np.zeros((len(positions), most), np.uint8) for most in (first, second))
        for piece, count, end in zip(pieces, counts.tolist(), ends.tolist()):
            rows, image_bytes = piece.array[piece.source], int(self._bytes[piece.part, 0])
            images[end - count : end, :image_bytes] = rows[:, :image_bytes]
            texts[end - count : end, : rows.shape[1] - image_bytes] = rows[:, image_bytes:]
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
