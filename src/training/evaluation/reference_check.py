"""What a reference says of the pairs that a target will be trained on, measured on a sample of them.

With r_ij the reference's similarity of image i and text j, the margins of pair i are r_ij - r_ii where its image
is the anchor, and r_ji - r_ii where its text is: what DRRho-CLIP (arXiv:2505.06699) subtracts. Here j runs over
the pairs with other captions: two pairs of the same caption cannot be told apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from drrho_clip.float32 import exact_float32
from drrho_clip.reference import Reference
from training.config.params import Config
from training.data.build import build_train
from training.distributed.process_group import World
from training.evaluation.evaluate import gather_rows
from training.evaluation.retrieval import DIRECTIONS, TIE
from training.models import precision
from training.models.frozen import build_reference

TILE = 1024  # anchors whose similarities are held at a time
AMONG = (64, 256, 1024, 4096, 16384, 65536)  # numbers of candidates that are reported, as far as the sample goes
# Of docs/study.md: the share that references rank first among 256 pairs of the target's data (%, the mean of both
# directions), and by how many points they changed the zero-shot accuracy of targets that had 8 % without them.
STUDIED = ((4.5, 0.5), (9.9, 8.4), (18.2, 14.3), (26.6, 15.7), (33.4, 14.1))
# The same of one trained on other pictures (emoji), and of one trained on the target's own pairs.
STUDIED_ELSEWHERE, STUDIED_ON_TARGET = (3.0, 9.5), (91.2, 9.2)
STUDIED_AMONG = 256


@dataclass(frozen=True)
class Direction:
    """What was measured over the anchors of one direction.

    ``first``    n -> share of anchors whose own partner is nearer than those of n - 1 other pairs drawn at random.
    ``margin``   mean of the margins; the lower, the better the reference tells pairs apart.
    ``spread``   standard deviation of all margins.
    ``loss``     mean over anchors of log mean_j exp(margin / tau), the inner loss that FastCLIP estimates.
    ``loss_spread``  its standard deviation over anchors, ``hardest`` its mean over the worst tenth of them.
    """

    first: dict[int, float]
    margin: float
    spread: float
    loss: float
    loss_spread: float
    hardest: float


@dataclass(frozen=True)
class ReferenceCheck:
    """The result: ``samples`` pairs with ``captions`` different captions, losses at the temperature ``tau``."""

    name: str
    samples: int
    captions: int
    tau: float
    directions: dict[str, Direction]

    def lines(self) -> list[str]:
        """The table that the program prints."""
        found = [
            f"reference {self.name}, on {self.samples:,} pairs of the training data with {self.captions:,} "
            "different captions",
            f"{'':60}{'image to text':>15}{'text to image':>15}",
        ]

        def row(title: str, shown: Callable[[Direction], str]) -> None:
            cells = "".join(f"{shown(self.directions[one]):>15}" for one in DIRECTIONS)
            found.append(f"{title:60}{cells}")

        def share(n: int) -> Callable[[Direction], str]:
            return lambda one: f"{100 * one.first[n]:.3g} %"

        for n in self.directions[DIRECTIONS[0]].first:
            row(f"ranks the own partner first among {n:,} (chance {100 / n:.2g} %)", share(n))
        row("margin, mean", lambda one: f"{one.margin:.3f}")
        row("margin, spread over all pairs", lambda one: f"{one.spread:.3f}")
        row(f"loss at its temperature {self.tau:.3g}, mean", lambda one: f"{one.loss:.2f}")
        row("loss, spread over pairs", lambda one: f"{one.loss_spread:.2f}")
        row("loss, mean of the hardest tenth", lambda one: f"{one.hardest:.2f}")
        return found + self._study()

    def _study(self) -> list[str]:
        """What docs/study.md found of such references."""
        shares = [one.first.get(STUDIED_AMONG) for one in self.directions.values()]
        here = [100 * share for share in shares if share is not None]
        if len(here) < len(shares):
            return []
        among, gains = (
            ", ".join(f"{value:{spec}}" for value in row) for row, spec in zip(zip(*STUDIED), ("g", "+g"))
        )
        elsewhere, on_target = (
            f"{share:g} % first gave {gain:+g}" for share, gain in (STUDIED_ELSEWHERE, STUDIED_ON_TARGET)
        )
        return [
            f"In docs/study.md, checkpoints of one reference that rank {among} % first among {STUDIED_AMONG}",
            f"(this one: {sum(here) / len(here):.3g} %) changed the accuracy of small targets by {gains} points.",
            f"The share orders references of one kind alone: one of other pictures that ranks {elsewhere},",
            f"one trained on the target's own pairs that ranks {on_target}. What counts is how it compares with",
            "your target: evaluate it on your task (training.evaluate), and run this on a checkpoint of a target",
            "that was trained without it, if only for a short time.",
        ]


def check_reference(config: Config, world: World, samples: int) -> ReferenceCheck:
    """Measure the reference of ``config`` on the first ``samples`` pairs that a run with its flags trains on.

    The reference sees the views that training would give it. Collective: the ranks share the pairs. ValueError:
    the reference or the data cannot be read, or all captions are the same.
    """
    built = build_reference(config, world)
    assert built is not None, "the command line asks for a reference"
    train = build_train(config, world, built, None)
    run = precision.resolve(config.run.precision, world.device)
    reference = Reference(built.module, built.preprocess.mean, built.preprocess.std, run.autocast_dtype)
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    wanted = -(-samples // world.world_size)
    try:
        for batch in train.epoch(0):
            image, text = reference.features(batch)
            for part, rows in zip(parts, (image, text, batch.text.to(image.dtype)), strict=True):
                part.append(rows[: wanted - sum(map(len, part))])
            if sum(map(len, parts[0])) >= wanted:
                break
    finally:
        train.close()
    image, text, tokens = (gather_rows(part, world)[:samples] for part in parts)
    captions = torch.unique(tokens, dim=0, return_inverse=True)[1]
    scale = built.module.logit_scale
    assert isinstance(scale, Tensor), "open_clip's models have a logit scale"
    return measure(built.name, image, text, captions, tau=math.exp(-scale.item()))


def measure(name: str, image: Tensor, text: Tensor, captions: Tensor, tau: float) -> ReferenceCheck:
    """The check on unit-norm embeddings [N, d] of N pairs; ``captions`` int64 [N] numbers their captions.

    ValueError: all pairs have the same caption.
    """
    different = len(captions.unique())
    if different < 2:
        raise ValueError(
            f"--train-data: the {len(captions):,} pairs that were read have the same caption, so that there is "
            "nothing to tell apart; give data with different captions"
        )
    directions = (_direction(image, text, captions, tau), _direction(text, image, captions, tau))
    return ReferenceCheck(name, len(image), different, tau, dict(zip(DIRECTIONS, directions, strict=True)))


@torch.no_grad()
def _direction(anchors: Tensor, partners: Tensor, captions: Tensor, tau: float) -> Direction:
    pieces = list(_tiles(anchors, partners, captions, tau))
    above, negatives, sums, squares, losses = (torch.cat(column) for column in zip(*pieces, strict=True))
    count, n = negatives.sum(), len(anchors)
    mean = sums.sum() / count
    hardest = losses.sort(descending=True).values[: max(n // 10, 1)]
    sizes = [size for size in AMONG if size < n] + [n]
    return Direction(
        {size: _first_among(size, above, negatives) for size in sizes},
        mean.item(),
        (squares.sum() / count - mean**2).clamp(min=0).sqrt().item(),
        losses.mean().item(),
        losses.std(correction=0).item(),
        hardest.mean().item(),
    )


def _tiles(
    anchors: Tensor, partners: Tensor, captions: Tensor, tau: float
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Per anchor: negatives nearer than its partner, negatives, sum and sum of squares of margins, its loss."""
    own = (anchors.double() * partners.double()).sum(1)
    with exact_float32(anchors.device.type):
        for start in range(0, len(anchors), TILE):
            rows = slice(start, start + TILE)
            negative = captions[rows, None] != captions[None, :]
            margin = (anchors[rows] @ partners.T).double() - own[rows, None]
            inside = margin.where(negative, 0)
            total = negative.sum(1)
            logits = (margin / tau).masked_fill(~negative, -torch.inf)
            above = ((margin > TIE) & negative).sum(1)
            yield (
                above.cpu(),
                total.cpu(),
                inside.sum(1).cpu(),
                inside.square().sum(1).cpu(),
                (logits.logsumexp(1) - total.log()).cpu(),
            )


def _first_among(n: int, above: Tensor, negatives: Tensor) -> float:
    """The mean probability that n - 1 negatives, drawn without replacement, hold none of those ``above``.

    That is C(negatives - above, n - 1) / C(negatives, n - 1); an anchor with fewer negatives is compared with all.
    """
    drawn = negatives.clamp(max=n - 1).double()
    left = (negatives - above).double()
    possible = left >= drawn
    rest = torch.where(possible, left, drawn)

    def log_choose(of: Tensor) -> Tensor:
        return torch.lgamma(of + 1) - torch.lgamma(drawn + 1) - torch.lgamma(of - drawn + 1)

    return (log_choose(rest) - log_choose(negatives.double())).exp().where(possible, 0).mean().item()
