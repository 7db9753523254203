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

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drrho_clip import codec
from drrho_clip.codec import Format
from training.cache.row_store import PartValues, Portion, RowStore

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


@dataclass(frozen=True)
class PackedReader:
    """Features that were packed."""

    store: RowStore
    width: int

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """float32 [n, 2, d]; NaN for vectors that were broken when they were written."""
        features = np.empty((len(positions), 2, self.width), np.float32)
        pieces = [(piece, piece.array[piece.source]) for piece in self.store.pieces("packed", positions)]
        for side in (0, 1):
            groups: dict[Format | None, list[tuple[Portion, np.ndarray]]] = defaultdict(list)
            for piece, rows in pieces:
                facts = self.store.facts[piece.part]
                begin = facts["bytes"][0] if side else 0
                form = Format(**facts["formats"][side]) if "formats" in facts else None
                # Parts whose longest rows differ are unpacked together.
                key = replace(form, zeros=0) if form and form.zeros is not None else form
                groups[key].append((piece, rows[:, begin : begin + facts["bytes"][side]]))
            for form, members in groups.items():
                targets = np.concatenate([piece.target for piece, _ in members])
                features[targets, side] = self._unpacked(form, members, side).numpy()
        return features

    def _unpacked(self, form: Format | None, members: list[tuple[Portion, np.ndarray]], side: int) -> Tensor:
        rows = torch.from_numpy(_stacked([rows for _, rows in members]))
        if form is None:
            return _from_int8_rows(rows)
        offset = None
        if form.moved:
            each = [np.broadcast_to(self._offset(piece.part)[side], (len(p), self.width)) for piece, p in members]
            offset = torch.from_numpy(np.concatenate(each))
        return codec.unpack(rows, form, offset)

    def _offset(self, part: int) -> np.ndarray:
        return self.store.constant("offset", part)


def _stacked(pieces: list[np.ndarray]) -> np.ndarray:
    """Rows of bytes, with zeros behind those that are shorter than the longest."""
    stacked = np.zeros((sum(map(len, pieces)), max(piece.shape[1] for piece in pieces)), np.uint8)
    begin = 0
    for piece in pieces:
        stacked[begin : begin + len(piece), : piece.shape[1]] = piece
        begin += len(piece)
    return stacked


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
