"""Losses on embeddings that ranks exchange within a bound: against a float64 oracle, and the promise's proof."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from drrho_clip import collectives
from drrho_clip.codec import Format, decode, encode
from drrho_clip.losses import fastclip
from drrho_clip.losses.gather import PairGather
from drrho_clip.losses.interface import LossInputs
from drrho_clip.sample_state import SampleState
from drrho_clip.schedules import ErrorBounds
from tests.support import oracle
from tests.support.objectives import columns, make, relative
from tests.support.ranks import ranks

B, D, D_REF, SCALE = 12, 48, 20, 25.0
E, E_REF = 4e-3, 6e-3
BOUNDS = {
    "all": ErrorBounds((E, E), (E, E), (E_REF, E_REF)),
    "images": ErrorBounds(image=(E, E)),
    "reference": ErrorBounds(ref=(E_REF, E_REF)),
}


def embeddings():
    """Target's images and texts, the reference's: float32 [B, d], of unit norm; those of a pair are alike."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for width in (D, D_REF):
        common = torch.randn(B, width, generator=generator)
        found += [normalize(common + torch.randn(B, width, generator=generator), dim=1) for _ in range(2)]
    return found


def _step(name, bounds, reference, index):
    """One rank's slice of the step: its part of the gradient, the new log u, the value."""
    k, rank = collectives.world_size(), collectives.rank()
    own = slice(rank * B // k, (rank + 1) * B // k)
    image, text, *ref = (x[own].clone() for x in embeddings())
    image.requires_grad_(), text.requires_grad_()
    state = SampleState(B, columns(name))
    loss = make(name, state, gather=PairGather(bounds), gamma=lambda epoch: 1.0)
    scale = torch.tensor(SCALE, requires_grad=True)
    result = loss(LossInputs(image, text, scale, None, index[own], *(ref if reference else (None, None))))
    result.terms["contrastive_loss"].backward()
    log_u = torch.stack([result.update.values[c] for c in fastclip.COLUMNS], 1)
    return image.grad / k, text.grad / k, log_u, result.terms["contrastive_loss"].item()


def decoded(x, span):
    return x if span is None else decode(encode(x, span[0], norm=1.0))


def expected(bounds, reference, index, tau):
    """The same in float64: exact anchors and positives, decoded negatives. Also each row's S and D."""
    image, text, ref_image, ref_text = embeddings()
    seen = [decoded(image, bounds.image), decoded(text, bounds.text)]
    rows, others = [image.double(), text.double()], [x.double() for x in seen]
    refs = [ref_image.double(), ref_text.double()]
    ref_others = [decoded(x, bounds.ref).double() for x in (ref_image, ref_text)]
    positives = (rows[0] * rows[1]).sum(1)
    if reference:
        positives = positives - (refs[0] * refs[1]).sum(1)
    negative = index[:, None] != index[None, :]
    weights, u = [], []
    margins = []
    for i in range(2):
        q = rows[i] @ others[1 - i].T
        if reference:
            q = q - refs[i] @ ref_others[1 - i].T
        margins.append(q)
        u.append((negative * ((q - positives[:, None]) / tau).exp()).sum(1) / (B - 1))
    for value in index.unique():
        for each in u:
            each[index == value] = each[index == value].mean()
    gradients, pulls, pushes = [], [], []
    for i in range(2):
        own = negative * ((margins[i] - positives[:, None]) / tau).exp() / u[i][:, None]  # as an anchor
        other = negative * ((margins[i] - positives[None, :]) / tau).exp() / u[1 - i][None, :]  # as a negative
        weights.append(own)
        pulls.append((own + other).sum(1))
        gradients.append((own + other) @ others[1 - i])
    for i in range(2):
        pushes.append(weights[0].sum(1) + weights[1].sum(1))
        gradients[i] = (gradients[i] - pushes[i][:, None] * rows[1 - i]) / (2 * B * (B - 1))
    return torch.stack(u, 1).log(), gradients, pulls, pushes


DISTINCT, WITH_COPIES = torch.arange(B), torch.tensor([3, 5, 3, 0, 7, 9, 3, 11, 1, 5, 2, 8])


@pytest.mark.parametrize("index", [DISTINCT, WITH_COPIES], ids=["distinct", "copies"])
@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("k", [2, 3])
def test_exact_anchors_and_decoded_negatives(k, bounds, index):
    log_u, gradients, _, _ = expected(BOUNDS[bounds], True, index, 1 / SCALE)
    parts = ranks(k).run(_step, "v3", BOUNDS[bounds], True, index)
    for image, text, found, _ in parts:
        assert (found - log_u).abs().max() < 2e-5, "each rank has the log u of all"
        assert image.shape == text.shape == (B // k, D)
    for i in range(2):
        assert relative(torch.cat([part[i] for part in parts]), gradients[i]) < 2e-5


@pytest.mark.parametrize("reference", [False, True], ids=["fastclip", "drrho"])
def test_the_gradient_is_as_close_as_promised(reference):
    tau, index = 1 / SCALE, DISTINCT
    exact = oracle.step(
        *embeddings()[:2],
        index,
        torch.full((B, 2), tau),
        torch.full((B, 2), math.nan),
        gamma=1.0,
        eps=1e-8,
        weight=torch.ones(B, 2),
        **(dict(zip(("ref_image", "ref_text"), embeddings()[2:])) if reference else {}),
    )
    parts = ranks(2).run(_step, "v3", BOUNDS["all"], reference, index)
    _, _, pulls, pushes = expected(ErrorBounds(), reference, index, tau)
    delta = E * math.sqrt(D) + (E_REF * math.sqrt(D_REF) if reference else 0)
    factor = math.exp(2 * delta / tau)
    for i, of_oracle in enumerate((exact.grad_image, exact.grad_text)):
        found = torch.cat([part[i] for part in parts]).double()
        most = (factor - 1) * (pulls[i] + pushes[i]) + factor * pulls[i] * E * math.sqrt(D)
        error = (found - of_oracle).norm(dim=1)
        assert (error <= most / (2 * B * (B - 1))).all()
        assert 1e-4 < (error / of_oracle.norm(dim=1)).mean() < 0.2, "the errors are there, and small"


@pytest.mark.parametrize(("name", "tau"), [("v1", 1 / SCALE), ("v2", 0.03)])
def test_objectives_that_are_not_multiplied_by_tau(name, tau):
    log_u, gradients, _, _ = expected(BOUNDS["all"], True, DISTINCT, tau)
    parts = ranks(2).run(_step, name, BOUNDS["all"], True, DISTINCT)
    for _, _, found, _ in parts:
        assert (found - log_u).abs().max() < 2e-5
    for i in range(2):
        assert relative(torch.cat([part[i] for part in parts]), gradients[i] / tau) < 2e-5


def test_a_single_process_has_nothing_to_compress():
    bounded, exact = (_step("v3", bounds, True, DISTINCT) for bounds in (BOUNDS["all"], None))
    assert all(np.array_equal(a, b) for a, b in zip(bounded, exact, strict=True))


def _sent(bounds, progress):
    """Bytes that this rank sends for its target's and its reference's pairs."""
    gather, sent = PairGather(bounds, progress), []
    image, text, ref_image, ref_text = embeddings()
    original = collectives.all_gather
    collectives.all_gather = lambda local: sent.append(local.nbytes) or original(local)
    try:
        gather.target(image, text), gather.reference(ref_image, ref_text)
    finally:
        collectives.all_gather = original
    return sent


def test_bytes_follow_from_the_bounds_alone():
    def row(bound, dim):
        return Format.of_norm(bound, dim, 1.0).row_bytes

    span = ErrorBounds(image=(8e-3, 5e-4), ref=(1e-3, 1e-3))
    for progress, bound in ((0.0, 8e-3), (0.999, 5e-4)):
        for sent in ranks(2).run(_sent, span, progress):
            assert sent == [B * (row(bound, D) + 4 * D + 4), B * (2 * row(1e-3, D_REF) + 4)]
    assert ranks(2).run(_sent, None, 0.0)[0] == [8 * B * D, 8 * B * D_REF]


def test_bounds_go_from_the_first_to_the_last_in_steps_of_equal_ratio():
    bounds = ErrorBounds(image=(8e-3, 5e-4), text=(1e-3, 1e-3))
    seen = [bounds.at("image", step / 1000) for step in range(1000)]
    stages = sorted(set(seen), reverse=True)
    assert seen == sorted(seen, reverse=True) and len(stages) == 16
    assert (seen[0], seen[-1]) == (8e-3, 5e-4)
    ratios = [b / a for a, b in pairwise(stages)]
    assert ratios == pytest.approx([(1 / 16) ** (1 / 15)] * 15)
    assert {bounds.at("text", step / 10) for step in range(10)} == {1e-3}
    assert bounds.at("ref", 0.5) is None
