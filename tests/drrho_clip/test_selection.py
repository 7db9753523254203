"""JEST selection: scores against the definition in slow float64 code, draws against exact probabilities.

And what it is for: of a set in which captions have changed places, it keeps the pairs that are right.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from drrho_clip import collectives
from drrho_clip.losses.fastclip import COLUMNS, FastCLIP
from drrho_clip.losses.interface import LossInputs
from drrho_clip.sample_state import SampleState
from drrho_clip.selection import select
from tests.support.ranks import ranks

BATCH, SCALE = 24, 14.0


def embeddings(batch: int = BATCH, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(batch, d, generator=generator), dim=1) for d in (10, 10, 7, 7)]


def scores(e: list[torch.Tensor], kept: list[int], scale: float, ref_scale: float) -> torch.Tensor:
    """[B] scores given the global positions kept so far, in float64."""
    image, text, ref_image, ref_text = (t.double() for t in e)
    total = torch.zeros(len(image), dtype=torch.float64)
    for sign, t, a, b in ((1, scale, image, text), (-1, ref_scale, ref_image, ref_text)):
        for i in range(len(a)):
            loss = -t * (a[i] @ b[i])
            if kept:
                rows = torch.stack([t * (a[i] @ b[j]) for j in kept]).logsumexp(0)
                columns = torch.stack([t * (a[j] @ b[i]) for j in kept]).logsumexp(0)
                loss = loss + (rows + columns) / 2
            total[i] += sign * loss
    return total


def best(e: list[torch.Tensor], size: int, per_draw: int, draws: int, ref_scale: float = 100.0) -> list[list[int]]:
    """What each of ``size`` ranks keeps with top-k, as global positions."""
    share, kept = len(e[0]) // size, [[] for _ in range(size)]
    for _ in range(draws):
        score = scores(e, [i for own in kept for i in own], SCALE, ref_scale)
        new = []
        for rank in range(size):
            candidates = [i for i in range(rank * share, (rank + 1) * share) if i not in kept[rank]]
            new.append(sorted(candidates, key=lambda i: -score[i].item())[:per_draw])
        kept = [old + more for old, more in zip(kept, new, strict=True)]
    return [sorted(k) for k in kept]


def choose(e: list[torch.Tensor], seed: int = 0, **options) -> torch.Tensor:
    settings = {"keep_ratio": 0.5, "n_chunks": 2, "topk": False} | options
    return select(*e, torch.tensor(SCALE), generator=torch.Generator().manual_seed(seed), **settings)


def on_this_rank() -> list[int]:
    rank, share = dist.get_rank(), BATCH // dist.get_world_size()
    mine = [t[rank * share : (rank + 1) * share] for t in embeddings()]
    return (choose(mine, topk=True, n_chunks=3) + rank * share).tolist()


PARTS = 4


def of_parts(topk: bool, ref_scale: float) -> list[int]:
    """The global positions that this rank keeps of its parts of 48 samples, which are four in all."""
    k, r = collectives.world_size(), collectives.rank()
    numbers = range(r * PARTS // k, (r + 1) * PARTS // k)
    mine = [t.chunk(k)[r] for t in embeddings(2 * BATCH, seed=5)]
    generators = [torch.Generator().manual_seed(number) for number in numbers]
    settings = {"keep_ratio": 0.5, "n_chunks": 3, "topk": topk, "ref_scale": ref_scale, "parts": len(numbers)}
    return (select(*mine, torch.tensor(SCALE), generator=generators, **settings) + r * len(mine[0])).tolist()


@pytest.mark.parametrize(("keep_ratio", "n_chunks"), [(0.5, 1), (0.5, 3), (1 - 0.75, 2), (1.0, 4)])
def test_topk_keeps_the_best_given_what_is_kept(keep_ratio, n_chunks):
    e = embeddings()
    kept = choose(e, topk=True, keep_ratio=keep_ratio, n_chunks=n_chunks)
    assert kept.dtype == torch.int64
    assert kept.tolist() == best(e, 1, round(BATCH * keep_ratio) // n_chunks, n_chunks)[0]


@pytest.mark.parametrize("size", [2, 4])
def test_later_draws_see_what_all_ranks_kept(size):
    together = ranks(size).run(on_this_rank)
    assert together == best(embeddings(), size, BATCH // size // 6, 3)
    # If each rank looked only at its own samples, the result would differ, and the test would fail.
    share = BATCH // size
    alone = [
        [i + r * share for i in best([t[r * share : (r + 1) * share] for t in embeddings()], 1, share // 6, 3)[0]]
        for r in range(size)
    ]
    assert together != alone


@pytest.mark.parametrize("topk", [True, False])
def test_any_number_of_ranks_keeps_what_one_process_keeps_of_the_whole_super_batch(topk):
    scale = 100.0 if topk else 14.0  # scores that leave something to the draw
    alone = of_parts(topk, scale)
    for k in (2, 4):
        assert [i for own in ranks(k).run(of_parts, topk, scale) for i in own] == alone
    slow = best(embeddings(2 * BATCH, seed=5), PARTS, 2, 3)
    assert (alone == [i for own in slow for i in own]) is topk
    assert len(set(alone)) == BATCH


def test_reference_scale_counts():
    e = embeddings()
    assert choose(e, topk=True, ref_scale=1.0).tolist() == best(e, 1, 6, 2, ref_scale=1.0)[0]
    assert choose(e, topk=True, ref_scale=1.0).tolist() != choose(e, topk=True).tolist()


def test_draws_follow_the_softmax_of_the_scores_without_replacement():
    """Two draws of one sample each out of four: all six pairs have a known probability."""
    e, ref_scale, trials = embeddings(4, seed=3), 3.0, 4000
    expected = dict.fromkeys(itertools.combinations(range(4), 2), 0.0)
    first = scores(e, [], SCALE, ref_scale).softmax(0)
    for i in range(4):
        second = scores(e, [i], SCALE, ref_scale)
        second[i] = -torch.inf
        for j, p in enumerate(second.softmax(0).tolist()):
            if j != i:
                expected[min(i, j), max(i, j)] += first[i].item() * p
    counts = dict.fromkeys(expected, 0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(trials):
        kept = select(
            *e,
            torch.tensor(SCALE),
            keep_ratio=0.5,
            n_chunks=2,
            topk=False,
            ref_scale=ref_scale,
            generator=generator,
        )
        counts[tuple(kept.tolist())] += 1
    assert max(expected.values()) < 0.9  # otherwise the test could hardly fail
    for pair, p in expected.items():
        deviation = (p * (1 - p) / trials) ** 0.5
        assert abs(counts[pair] / trials - p) < 4.5 * deviation + 1e-3, pair


def test_one_draw_of_many_equals_drawing_one_after_the_other():
    """A chunk is drawn without replacement from one softmax: P(set) sums over the orders of its members."""
    e, trials = embeddings(4, seed=3), 4000
    p = scores(e, [], SCALE, 3.0).softmax(0).tolist()
    generator = torch.Generator().manual_seed(1)
    counts = dict.fromkeys(itertools.combinations(range(4), 2), 0)
    for _ in range(trials):
        kept = select(
            *e, torch.tensor(SCALE), keep_ratio=0.5, n_chunks=1, topk=False, ref_scale=3.0, generator=generator
        )
        counts[tuple(kept.tolist())] += 1
    for i, j in counts:
        exact = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        assert abs(counts[i, j] / trials - exact) < 4.5 * (exact * (1 - exact) / trials) ** 0.5 + 1e-3


def test_seed_decides_the_draw():
    e = embeddings(64)
    assert choose(e, seed=1).tolist() == choose(e, seed=1).tolist()
    flat = {"keep_ratio": 0.5, "n_chunks": 2, "topk": False, "ref_scale": 1.0}  # scores that leave all to the draw
    drawn = [
        select(*e, torch.tensor(1.0), generator=torch.Generator().manual_seed(seed), **flat).tolist()
        for seed in range(20)
    ]
    assert len({tuple(positions) for positions in drawn}) == 20


@pytest.mark.parametrize("topk", [False, True])
def test_extreme_scores_still_give_distinct_positions_in_order(topk):
    e = embeddings(64)
    kept = select(
        *e, torch.tensor(1e4), keep_ratio=0.25, n_chunks=4, topk=topk, ref_scale=1e4, generator=torch.Generator()
    ).tolist()
    assert len(kept) == 16 and kept == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < 64


def test_low_precision_embeddings_are_compared_in_float32():
    e = [t.bfloat16() for t in embeddings()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = choose(e, topk=True, n_chunks=3)
    assert kept.tolist() == best(e, 1, 4, 3)[0]


# ------------------------------------------------------------------------------- 30 % of the captions are wrong

PAIRS, SUPER_BATCH, KEPT = 1536, 128, 0.25


def planted(known: bool) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Images and captions of hidden points, [n, 16] each, a reference's embeddings, and which pairs are right.

    The captions of 30 % of the pairs have changed places. A reference that is ``known`` to be good is made of the
    points themselves; the other one knows nothing.
    """
    generator = torch.Generator().manual_seed(0)
    points, caption = torch.randn(PAIRS, 8, generator=generator), torch.arange(PAIRS)
    wrong = torch.randperm(PAIRS, generator=generator)[: round(0.3 * PAIRS)]
    caption[wrong] = wrong.roll(1)
    seen = [
        points @ torch.randn(8, 16, generator=generator) + 0.1 * torch.randn(PAIRS, 16, generator=generator)
        for _ in range(2)
    ]
    reference = [points, points[caption]] if known else list(torch.randn(2, PAIRS, 8, generator=generator))
    return [seen[0], seen[1][caption]], [F.normalize(r, dim=1) for r in reference], caption == torch.arange(PAIRS)


def trained_on_selected(known: bool, keep_ratio: float, topk: bool = False) -> tuple[list[float], float]:
    """The share of right pairs in each of 100 batches of 32, and of images that find their own caption then."""
    seen, reference, right = planted(known)
    torch.manual_seed(1)
    towers, scale = [nn.Linear(16, 16), nn.Linear(16, 16)], nn.Parameter(torch.tensor(1 / 0.07).log())
    optimizer = torch.optim.Adam([*towers[0].parameters(), *towers[1].parameters(), scale], 3e-2)
    state = SampleState(PAIRS, COLUMNS)
    loss = FastCLIP(state=state, gamma=lambda epoch: 0.8, eps=1e-14, rho=6.5, multiply_tau=True)
    generator, shares = torch.Generator().manual_seed(2), []

    def embed(rows: torch.Tensor) -> list[torch.Tensor]:
        return [F.normalize(tower(x[rows]), dim=1) for tower, x in zip(towers, seen, strict=True)]

    for _ in range(100):
        rows = torch.randperm(PAIRS, generator=generator)[: round(KEPT * SUPER_BATCH / keep_ratio)]
        with torch.no_grad():
            given = *embed(rows), *(r[rows] for r in reference), scale.exp()
        rows = rows[select(*given, keep_ratio=keep_ratio, n_chunks=2, topk=topk, generator=generator)]
        shares.append(right[rows].float().mean().item())
        image, text = embed(rows)
        result = loss(LossInputs(image=image, text=text, logit_scale=scale.exp(), index=rows))
        optimizer.zero_grad()
        sum(result.terms.values()).backward()
        optimizer.step()
        state.commit(result.update)
        with torch.no_grad():
            scale.clamp_(0, math.log(100))
            image, text = embed(right.nonzero().flatten()[:400])
    found = (image @ text.T).argmax(1) == torch.arange(400)
    return shares, found.float().mean().item()


def mean(shares: list[float]) -> float:
    return sum(shares) / len(shares)


def test_the_good_pairs_are_kept_of_a_set_with_wrong_captions():
    everything, recall = trained_on_selected(known=True, keep_ratio=1.0)
    assert mean(everything) == pytest.approx(0.7, abs=0.02)
    for topk in (False, True):
        kept, better = trained_on_selected(known=True, keep_ratio=KEPT, topk=topk)
        # Also when the target has learned to tell them apart, and wrong pairs are the hardest.
        assert mean(kept) > 0.98 and mean(kept[-30:]) > 0.98
        assert better > 0.95 > recall + 0.2
        # Without a reference that knows better, the hardest pairs are kept, and those are wrong ones.
        lost, worse = trained_on_selected(known=False, keep_ratio=KEPT, topk=topk)
        assert mean(lost) < 0.65 and worse < recall


@pytest.mark.parametrize(
    ("keep_ratio", "n_chunks", "said"),
    [
        (0.0, 1, "keep_ratio 0.0 is no share"),
        (2.0, 2, "keep_ratio 2.0 is no share"),
        (0.3, 1, "keep_ratio 0.3 of 12 samples is no whole number"),
        (0.5, 5, "6 of 12 samples cannot be kept in 5 draws"),
    ],
)
def test_numbers_that_do_not_divide_are_refused(keep_ratio, n_chunks, said):
    given = F.normalize(torch.randn(4, 12, 8), dim=2)
    with pytest.raises(ValueError, match=said):
        select(*given, torch.tensor(10.0), keep_ratio=keep_ratio, n_chunks=n_chunks, topk=True, generator=None)
    with pytest.raises(ValueError, match="give a generator for each, or topk"):
        select(*given, torch.tensor(10.0), keep_ratio=0.5, n_chunks=2, topk=False, generator=None)
