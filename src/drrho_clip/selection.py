"""Joint example selection (JEST, arXiv:2406.17711): train on samples hard for the target, easy for the reference.

Of each rank's ``b`` samples, ``kept = b * keep_ratio`` are taken in ``n_chunks`` equal draws. A sample's score is
its loss under the target minus its loss under the reference, with t the scale 1/tau of either model:

    first draw    l_i = -t s_ii
    later draws   l_i = -t s_ii + (log sum_{j kept} exp(t s_ij) + log sum_{j kept} exp(t s_ji)) / 2

where ``kept`` are the samples drawn so far on all ranks. A draw takes samples without replacement with probability
proportional to exp(score), as the largest of score + Gumbel noise, which needs no exp and no normalization; or the
best ones. Every rank draws from its own samples, so that batches stay equal.
"""

from __future__ import annotations

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
    generator: torch.Generator | None,
) -> Tensor:
    """Positions of the kept samples of this rank's batch: int64 [kept], ascending, on the device, without a sync.

    ``image``, ``text``          [b, d] of the target, ``ref_image``, ``ref_text`` [b, d_r], all of unit norm.
    ``logit_scale``              0-d, the target's 1/tau; ``ref_scale`` the reference's.
    ``keep_ratio``, ``n_chunks`` b * keep_ratio is a whole multiple of n_chunks.
    ``topk``                     take the best instead of drawing.
    ``generator``                on the embeddings' device, seeded differently on every rank.
    """
    kept = round(len(image) * keep_ratio)
    assert kept > 0 and abs(kept - len(image) * keep_ratio) < 1e-6 * len(image), (len(image), keep_ratio)
    assert kept % n_chunks == 0, (kept, n_chunks)
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
            score = target.losses() - reference.losses()
            if not topk:
                # Minus the logarithm of an exponential variate is a Gumbel variate.
                score -= torch.empty_like(score).exponential_(generator=generator).log()
            draws.append(score.masked_fill(taken, -torch.inf).topk(kept // n_chunks, sorted=False).indices)
        return torch.cat(draws).sort().values


class _Losses:
    """One model's loss of each sample among those kept so far."""

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor | float) -> None:
        # Scaling one side by t scales every similarity by it.
        self.image, self.text = image.float() * scale, text.float()
        self.own = torch.einsum("ij,ij->i", self.image, self.text)
        self.lse: tuple[Tensor, Tensor] | None = None

    def losses(self) -> Tensor:
        """[b], both directions averaged; before anything is kept, minus the scaled similarity with oneself."""
        return -self.own if self.lse is None else (self.lse[0] + self.lse[1]) / 2 - self.own

    def keep(self, new: Tensor) -> None:
        """Add the samples ``new`` of every rank, local positions, to those kept."""
        both = collectives.all_gather(torch.cat([self.image[new], self.text[new]], 1))
        kept_image, kept_text = both.chunk(2, dim=1)
        rows = (self.image @ kept_text.T).logsumexp(1)
        columns = (self.text @ kept_image.T).logsumexp(1)
        if self.lse is not None:
            rows, columns = torch.logaddexp(self.lse[0], rows), torch.logaddexp(self.lse[1], columns)
        self.lse = (rows, columns)
