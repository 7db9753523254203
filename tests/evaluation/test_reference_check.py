"""check_reference: against plain loops over all pairs, and as a program on shards and a checkpoint."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch

from tests.support import shards, tiny_models
from training.check_reference import main
from training.evaluation.reference_check import _first_among, measure


def pairs(n=40, d=8, captions=30, noise=0.9, seed=0):
    """Unit-norm embeddings of n pairs, some of which have the same caption."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.randint(captions, (n,), generator=generator)
    text = torch.randn(captions, d, generator=generator)[number]
    image = text + noise * torch.randn(n, d, generator=generator)
    return *(torch.nn.functional.normalize(x, dim=1) for x in (image, text)), number


def oracle(anchors, partners, captions, tau):
    """First among all, mean and spread of margins, losses: in float64, pair by pair."""
    x, y = anchors.double().numpy(), partners.double().numpy()
    margins, first, losses = [], [], []
    for i in range(len(x)):
        own = [x[i] @ y[j] - x[i] @ y[i] for j in range(len(x)) if captions[j] != captions[i]]
        margins += own
        first.append(max(own) < 0)
        losses.append(math.log(sum(math.exp(m / tau) for m in own) / len(own)))
    worst = sorted(losses)[-max(len(x) // 10, 1) :]
    return {
        "first": np.mean(first),
        "margin": np.mean(margins),
        "spread": np.std(margins),
        "loss": np.mean(losses),
        "loss_spread": np.std(losses),
        "hardest": np.mean(worst),
    }


def test_equals_loops_over_all_pairs():
    image, text, captions = pairs()
    found = measure("x", image, text, captions, tau=0.1)
    assert (found.samples, found.captions) == (40, len(captions.unique()))
    for direction, anchors, partners in (("image_to_text", image, text), ("text_to_image", text, image)):
        expected = oracle(anchors, partners, captions, 0.1)
        one = found.directions[direction]
        for name in ("margin", "spread", "loss", "loss_spread", "hardest"):
            assert getattr(one, name) == pytest.approx(expected[name], rel=1e-5), (direction, name)
        assert one.first[40] == pytest.approx(expected["first"])
        assert 0.1 < one.first[40] < 0.9, "the case says something"


def test_tiles_do_not_matter(monkeypatch):
    data = pairs()
    whole = measure("x", *data, tau=0.05)
    monkeypatch.setattr("training.evaluation.reference_check.TILE", 7)
    tiled = measure("x", *data, tau=0.05)
    for name, one in whole.directions.items():
        assert tiled.directions[name].loss == pytest.approx(one.loss, rel=1e-6)
        assert tiled.directions[name].first == pytest.approx(one.first)


def test_it_says_what_the_study_found_where_it_can_be_compared():
    said = measure("x", *pairs(n=300, captions=300), tau=0.1).lines()
    shares = [one.first[256] for one in measure("x", *pairs(n=300, captions=300), tau=0.1).directions.values()]
    assert f"first among 256 (this one: {50 * sum(shares):.3g} %) changed" in " ".join(said[-6:])
    assert "docs/study.md" not in "".join(measure("x", *pairs(), tau=0.1).lines())


@pytest.mark.parametrize("n", [1, 2, 4, 7, 9])
def test_first_among_fewer_is_the_share_of_all_draws(n):
    negatives, above = 6, torch.tensor([0, 1, 2, 5, 6])
    drawn = [set(one) for one in itertools.combinations(range(negatives), min(n - 1, negatives))]
    expected = [np.mean([not one & set(range(a)) for one in drawn]) for a in above.tolist()]
    assert _first_among(n, above, torch.full((5,), negatives)) == pytest.approx(np.mean(expected))


def test_a_reference_that_knows_nothing_is_at_chance():
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.nn.functional.normalize(torch.randn(600, 16, generator=generator), dim=1) for _ in "ab")
    found = measure("x", image, text, torch.arange(600), tau=0.07)
    for one in found.directions.values():
        assert one.first[64] == pytest.approx(1 / 64, abs=0.01)
        assert one.margin == pytest.approx(0, abs=0.03)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check_reference")
    pattern = shards.write_shards(folder / "shards", 40, per_shard=20)
    torch.save(tiny_models.build("tiny-vit").state_dict(), folder / "reference.pt")
    return folder, pattern


def test_program(data, capsys):
    folder, pattern = data
    flags = ["--ref_model", tiny_models.path("tiny-vit", folder), "--ref_model_checkpoint"]
    flags += [str(folder / "reference.pt"), "--train-data", pattern, "--workers", "0", "--samples", "32"]
    assert main(flags) == 0
    shown = capsys.readouterr().out
    assert "tiny-vit, on 32 pairs of the training data with 32 different captions" in shown
    assert "first among 32 (chance 3.1 %)" in shown
    assert main([*flags, "--out", str(folder / "found.json")]) == 0
    assert capsys.readouterr().out == shown, "the same pairs again"
    found = json.loads((folder / "found.json").read_text())
    assert found["samples"] == 32 and found["tau"] == pytest.approx(0.07)
    assert found["directions"]["image_to_text"]["first"]["32"] < 0.3, "random weights"


@pytest.mark.parametrize(
    "flags, reason",
    [
        ([], "--ref_model is missing"),
        (["--ref_model_checkpoint", "no.pt"], "no.pt"),
        (["--ref_model", "ViT-B-32", "--ref_model_pretrained", "openai", "--samples", "1"], "--samples 1"),
        (["--ref_model", "ViT-B-32"], "has no weights"),
        (["--ref_model_checkpoint", "x.pt", "--out", "none/x.json"], "--out none/x.json: there is no folder"),
    ],
)
def test_refusals(data, flags, reason, capsys):
    assert main(["--train-data", data[1], *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and reason in said
