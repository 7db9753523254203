"""How the losses gather pairs of embeddings from all ranks: as they are, or within a promised error.

With an error bound E, each rank sends its rows encoded (``drrho_clip.codec``, by the promise that their norm is
1), and all ranks decode them to the same x̂, with |x̂ - x| <= E for every component. The losses then use

- a rank's own samples exactly, as anchors: the rows of its block of pairs;
- everybody's decoded samples, its own too, as negatives: the columns of that block;
- the similarities of the B positive pairs exactly: each rank sends its own along.

So log u of an anchor is a function of exact and decoded embeddings that is the same on whatever rank it is
computed, and all ranks work on one objective. The similarities of its negatives are off by at most E sqrt(d),
since |<a, x̂ - x>| <= |a|_1 E <= sqrt(d) E for a of unit norm. The reference's add theirs. Margins are off by at
most

    delta = E sqrt(d) + E_r sqrt(d_r),

with the larger E of both modalities. Let S_i = sum_j (W1_ij + W2_ji) be the weight with which negatives pull at
row i, and D_i = sum_j (W1_ij + W2_ij) that with which its positive does. Then the gradient of row i
(docs/objective.md) changes by at most

    (exp(2 delta / tau) - 1) (S_i + D_i) + exp(2 delta / tau) S_i E sqrt(d),    times 1 / (2 B (B - 1)),

for objectives that are multiplied by tau, and 1 / tau of it for the others: each W has a factor within
exp(+-delta / tau) for its margin and one for u, and a decoded row is at most E sqrt(d) away. That is the worst
case. Errors of components are spread evenly over [-E, E] and largely cancel: a similarity is off by 0.58 E (root
mean square).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from drrho_clip import collectives
from drrho_clip.codec import Format, pack, unpack
from drrho_clip.schedules import ErrorBounds


class Pairs(NamedTuple):
    """The embeddings of the global batch, float32 [B, d], and the inner products of the pairs, [B].

    ``positives``  as each rank computed its own from exact embeddings; None: those of ``image`` and ``text`` are.
    """

    image: Tensor
    text: Tensor
    positives: Tensor | None = None


@dataclass
class PairGather:
    """Gathers pairs of embeddings. ``bounds``: None: as they are. ``progress``: the share of the run that is done.

    A single process has nothing to send, and its embeddings stay as they are.
    """

    bounds: ErrorBounds | None = None
    progress: float = 0.0

    def target(self, image: Tensor, text: Tensor) -> Pairs:
        """From the target's embeddings of this rank, unit norm [b, d]; one collective."""
        return self._gather(image, text, ("image", "text"))

    def reference(self, image: Tensor, text: Tensor) -> Pairs:
        """From the reference's embeddings of this rank, unit norm [b, d_r]; one collective."""
        return self._gather(image, text, ("ref", "ref"))

    @torch.no_grad()
    def _gather(self, image: Tensor, text: Tensor, kinds: tuple[str, str]) -> Pairs:
        image, text = image.detach().float(), text.detach().float()
        if collectives.world_size() == 1:
            return Pairs(image, text)
        bounds = [None if self.bounds is None else self.bounds.at(kind, self.progress) for kind in kinds]
        if bounds == [None, None]:
            both = collectives.all_gather(torch.cat([image, text], 1))
            return Pairs(*both.split([image.shape[1], text.shape[1]], 1))
        parts = [_packed(rows, bound) for rows, bound in zip((image, text), bounds, strict=True)]
        parts.append(_bytes((image * text).sum(1, keepdim=True)))
        everyone = collectives.all_gather(torch.cat(parts, 1)).split([part.shape[1] for part in parts], 1)
        return Pairs(
            _unpacked(everyone[0], bounds[0], image.shape[1]),
            _unpacked(everyone[1], bounds[1], text.shape[1]),
            _floats(everyone[2])[:, 0],
        )


def _packed(rows: Tensor, bound: float | None) -> Tensor:
    """float32 [b, d] -> uint8 [b, bytes]."""
    return _bytes(rows) if bound is None else pack(rows, _format(bound, rows.shape[1]))[0]


def _unpacked(rows: Tensor, bound: float | None, dim: int) -> Tensor:
    return _floats(rows) if bound is None else unpack(rows, _format(bound, dim))


@lru_cache(maxsize=64)
def _format(bound: float, dim: int) -> Format:
    return Format.of_norm(bound, dim, 1.0)


def _bytes(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)


def _floats(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.float32)
