"""Joint example selection (JEST, arXiv:2406.17711): train on samples hard for the target, easy for the reference.

Of each rank's ``b`` samples, ``kept = b * keep_ratio`` are taken in ``n_chunks`` draws of equal size. A sample's
score is its loss under the target minus its loss under the reference. With t the model's 1/tau, the loss is

    first draw    l_i = -t s_ii
    later draws   l_i = -t s_ii + (log sum_{j kept} exp(t s_ij) + log sum_{j kept} exp(t s_ji)) / 2

where ``kept`` are the samples drawn so far on all ranks. A draw takes samples without replacement with probability
proportional to exp(score): it takes those with the largest score + Gumbel noise, which needs no exp and no
normalization. With ``topk`` it takes those with the largest score. Every rank draws from its own samples, so that
the ranks' batches keep equal sizes. A rank may also draw from each of ``parts`` equal parts of its samples, and
keeps what so many ranks with a part each would: what a run keeps need not depend on its number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drrho_clip import collectives
from drrho_clip.float32 import exact_float32


@torch.no_grad()
def select(
    image: Tensor,
    text: Tensor,
    ref_image: Tensor,
    ref_text: Tensor,
    logit_scale: Tensor,
    *,
    keep_ratio: float,
    n_chunks: int,
    topk: bool,
    ref_scale: float = 100.0,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    parts: int = 1,
) -> Tensor:
    """The positions of the kept samples in this rank's batch: int64 [kept], ascending, on the device.

    The host does not wait for the device.

    ``image``, ``text``           [b, d], unit norm, from the target.
    ``ref_image``, ``ref_text``   [b, d_r], unit norm, from the reference.
    ``logit_scale``               0-d, the target's 1/tau. ``ref_scale``: the reference's.
    ``keep_ratio``, ``n_chunks``  b * keep_ratio must be a multiple of n_chunks * parts.
    ``topk``                      take the samples with the largest scores instead of drawing.
    ``generator``                 on the embeddings' device, one for each part; each part of each rank must have a
                                  different seed.
    ``parts``                     of this rank's batch, in order; b must be a multiple of it.

    ValueError: these numbers do not divide so, the ratio is not in (0, 1], or there are too few generators.
    """
    kept = _number_kept(len(image), keep_ratio, n_chunks, parts)
    generators = [generator] if isinstance(generator, torch.Generator) else generator
    if not topk and (generators is None or len(generators) != parts):
        raise ValueError(f"{parts} parts draw by themselves: give a generator for each, or topk")
    first = torch.arange(0, len(image), len(image) // parts, device=image.device)[:, None]
    with exact_float32(image.device.type):
        target = _Losses(image, text, logit_scale)
        reference = _Losses(ref_image, ref_text, ref_scale)
        draws: list[Tensor] = []
        taken = torch.zeros(len(image), dtype=torch.bool, device=image.device)
        while len(draws) < n_chunks:
            if draws:
                taken.index_fill_(0, draws[-1], True)
                target.keep(draws[-1])
                reference.keep(draws[-1])
            score = (target.losses() - reference.losses()).view(parts, -1)
            if not topk:
                assert generators is not None
                noise = [torch.empty_like(own).exponential_(generator=g) for own, g in zip(score, generators)]
                # If E is exponentially distributed, -log E has a Gumbel distribution.
                score = score - torch.stack(noise).log()
            score = score.masked_fill(taken.view(parts, -1), -torch.inf)
            draws.append((score.topk(kept // n_chunks // parts, sorted=False).indices + first).flatten())
        return torch.cat(draws).sort().values


def _number_kept(b: int, keep_ratio: float, n_chunks: int, parts: int) -> int:
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio {keep_ratio} is no share of the samples: give one above 0, and at most 1")
    kept = round(b * keep_ratio)
    if kept == 0 or abs(kept - b * keep_ratio) >= 1e-6 * b:
        raise ValueError(f"keep_ratio {keep_ratio} of {b} samples is no whole number of them")
    if kept % (n_chunks * parts) or b % parts:
        raise ValueError(
            f"{kept} of {b} samples cannot be kept in {n_chunks} draws of equal size from {parts} equal parts"
        )
    return kept


class _Losses:
    """One model's loss of each sample, given the samples kept so far."""

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor | float) -> None:
        # Scaling one side by t scales every similarity by t.
        self.image, self.text = image.float() * scale, text.float()
        self.own = torch.einsum("ij,ij->i", self.image, self.text)
        self.lse: tuple[Tensor, Tensor] | None = None

    def losses(self) -> Tensor:
        """[b], averaged over both directions; before the first draw only minus the scaled similarity s_ii."""
        return -self.own if self.lse is None else (self.lse[0] + self.lse[1]) / 2 - self.own

    def keep(self, new: Tensor) -> None:
        """Add samples to those kept: on each rank those at its own positions ``new``. Collective."""
        both = collectives.all_gather(torch.cat([self.image[new], self.text[new]], 1))
        kept_image, kept_text = both.chunk(2, dim=1)
        rows = (self.image @ kept_text.T).logsumexp(1)
        columns = (self.text @ kept_image.T).logsumexp(1)
        if self.lse is not None:
            rows, columns = torch.logaddexp(self.lse[0], rows), torch.logaddexp(self.lse[1], columns)
        self.lse = (rows, columns)
