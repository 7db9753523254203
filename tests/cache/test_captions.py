"""Synthetic captions follow the model, are the same whichever process writes them, and are drawn by seed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from open_clip import SimpleTokenizer

from tests.support import shards, tiny_models
from tests.support.flag_parts import PIXELS, Pixels, train_data
from tests.support.lab import WORLD, Lab
from training.cache import captioner, captions
from training.cache.captioner import random_numbers, sample_captions
from training.cache.captions import open_captions
from training.cache.row_store import open_store
from training.config.params import parse
from training.main import main

WRITE = "--cap_model @coca --cap_model_pretrained @coca_weights --cache_syn_texts --num_syn_texts 3"
WORDS = SimpleTokenizer(context_length=16)


@pytest.fixture(scope="module")
def coca():
    return tiny_models.build("tiny-coca").eval()


def pictures(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def held(folder) -> dict[int, list[str]]:
    """The captions of every row of a store."""
    found = {}
    for file in sorted(folder.glob("parts/*.rows.npy")):
        texts = np.load(str(file).replace(".rows.", ".captions."))
        found |= {int(row): [t.decode() for t in of_row] for row, of_row in zip(np.load(file)[:, 0], texts)}
    return found


# -------------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def test_the_likeliest_tokens_are_those_of_one_pass_over_the_text(coca, monkeypatch):
    """With the top token alone, each token is the one that a pass over the whole caption predicts there."""
    monkeypatch.setattr(captioner, "TOP", 1)
    monkeypatch.setattr(captioner, "_words", lambda ids, _: ids)
    pixels = pictures(3)
    written = sample_captions(coca, pixels, torch.zeros(3, 1, 9), WORDS)
    assert all(one[0] == WORDS.sot_token_id and len(one) == 10 for (one,) in written)
    text = torch.tensor([one for (one,) in written])
    logits = coca(pixels, text, output_labels=False)["logits"]
    assert torch.equal(logits[:, :-1].argmax(-1), text[:, 1:])


@torch.no_grad()
def test_the_first_token_follows_its_distribution(coca, monkeypatch):
    """For evenly spread numbers, tokens occur as often as a softmax over the fifty most likely ones predicts."""
    monkeypatch.setattr(captioner, "_words", lambda ids, _: ids[1])
    pixels, n = pictures(1), 150
    uniform = ((torch.arange(n) + 0.5) / n).view(1, n, 1)
    counts = Counter(sample_captions(coca, pixels, uniform, WORDS)[0])
    logits = coca(pixels, torch.tensor([[WORDS.sot_token_id]]), output_labels=False)["logits"][0, -1].double()
    logits[WORDS.eot_token_id] = -torch.inf
    likely = logits.sort(descending=True)
    chances = (likely.values[:50] / 0.75).softmax(0)
    for token, chance in zip(likely.indices[:50].tolist(), chances.tolist()):
        assert abs(counts[token] - n * chance) <= 1
    assert sum(counts[token] for token in likely.indices[:50].tolist()) == n


def test_a_caption_does_not_depend_on_its_neighbours(coca):
    rows = np.arange(5)
    uniform = random_numbers(rows, 2, 8, seed=3)
    together = sample_captions(coca, pictures(5), uniform, WORDS)
    alone = sample_captions(coca, pictures(5)[3:4], random_numbers(rows[3:4], 2, 8, seed=3), WORDS)
    assert together[3] == alone[0]
    assert len({text for of_image in together for text in of_image}) == 10


def test_random_numbers_are_uniform_and_fixed():
    numbers = random_numbers(np.arange(100), 5, 29, seed=0)
    assert numbers.shape == (100, 5, 29)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.01 and abs(numbers.var() - 1 / 12) < 0.003
    assert not torch.equal(numbers, random_numbers(np.arange(100), 5, 29, seed=1))
    assert torch.equal(numbers[7:9], random_numbers(np.array([7, 8]), 5, 29, seed=0))


def test_a_caption_ends_where_the_model_ends_it(coca):
    """Neither the special tokens around a text nor the tokens after its end are part of a caption."""
    ids = [WORDS.sot_token_id, *WORDS.encode("a red house"), WORDS.eot_token_id, *WORDS.encode("and more")]
    assert captioner._words(ids, WORDS) == "a red house"
    assert captioner._words(ids[: len(WORDS.encode("a red house")) + 1], WORDS) == "a red house"


# --------------------------------------------------------------------------------------------------------- writing


def test_captions_are_the_same_whoever_writes_them(lab, tmp_path):
    few = f"--train-data {lab.path('shards').replace('{00000..00003}', '{00000..00001}')}"
    for i, how in enumerate(("--batch-size 5", "--workers 2 --batch-size 3")):
        line = f"{WRITE} {few} {how} --cached_syn_texts_dir {tmp_path}/{i}"
        assert main([*lab.words(line), "--name", f"write{i}"]) == 0
    first, second = held(tmp_path / "0"), held(tmp_path / "1")
    assert first == second
    assert sorted(first) == list(range(8))
    assert all(len(set(of_row)) == 3 for of_row in first.values())


def test_other_numbers_of_captions_do_not_mix(lab, capsys):
    line = f"{WRITE} --num_syn_texts 2 --cached_syn_texts_dir {lab.path('captions')}"
    assert main([*lab.words(line), "--name", "mix"]) == 2
    assert (
        "was begun with captions per sample 3, and this run has captions per sample 2" in capsys.readouterr().err
    )


# --------------------------------------------------------------------------------------------------------- drawing


def drawn(lab: Lab, line: str, epochs: int = 1) -> list[dict[int, torch.Tensor]]:
    """The tokens that each row has, by epoch."""
    words = lab.words(f"--train-num-samples 16 --cached_syn_texts_dir @captions {line}")
    train = train_data(words)
    batches = ((epoch, batch) for epoch in range(epochs) for batch in train.epoch(epoch))
    found: list[dict[int, torch.Tensor]] = [{} for _ in range(epochs)]
    for epoch, batch in batches:
        found[epoch] |= dict(zip(batch.index.tolist(), batch.text))
    return found


def test_own_and_synthetic_captions_come_equally_often(lab):
    store = held(lab.root / "captions") if lab.path("captions") else {}
    epochs, counts = drawn(lab, "", epochs=8), Counter()
    for of_epoch in epochs:
        assert sorted(of_epoch) == list(range(16))
        for row, tokens in of_epoch.items():
            choices = PIXELS.tokenizer([shards.caption(row), *store[row]])
            (matches,) = (choices == tokens).all(1).nonzero(as_tuple=True)
            counts[int(matches[0])] += 1
    assert sorted(counts) == [0, 1, 2, 3]
    assert all(16 <= count <= 48 for count in counts.values())  # of 128 draws; 32 is the mean, 5 the deviation
    assert any(not torch.equal(epochs[0][row], epochs[1][row]) for row in range(16))


def test_draws_follow_from_the_seed_alone(lab):
    (once,), (again,), (workers,) = drawn(lab, ""), drawn(lab, ""), drawn(lab, "--workers 2")
    (other,) = drawn(lab, "--seed 1")
    assert all(torch.equal(once[row], again[row]) and torch.equal(once[row], workers[row]) for row in range(16))
    assert any(not torch.equal(once[row], other[row]) for row in range(16))


def test_fewer_captions_than_are_there(lab, capsys):
    store = open_captions(parse(lab.words("--cached_syn_texts_dir @captions --num_syn_texts 1")))
    rows = held(lab.root / "captions")
    texts = {store.draw(5, [shards.caption(5)], "five", seed) for seed in range(50)}
    assert texts == {(0, shards.caption(5)), (1, rows[5][0])}
    line = "--cached_syn_texts_dir @captions --num_syn_texts 4"
    assert main([*lab.words(line), "--name", "four"]) == 2
    assert "--num_syn_texts 4: " in capsys.readouterr().err


def test_a_sample_without_captions_ends_the_run(lab, tmp_path, capsys):
    lab.path("shards")
    line = f"{WRITE} --train-data {lab.root}/shards/00000.tar --cached_syn_texts_dir {tmp_path}/few"
    assert main([*lab.words(line), "--name", "few"]) == 0
    line = f"--train-num-samples 16 --cached_syn_texts_dir {tmp_path}/few --workers 1"
    assert main([*lab.words(line), "--name", "draws"]) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert (
        sentence.startswith("error: --cached_syn_texts_dir: sample ") and f"is not in {tmp_path}/few" in sentence
    )


def test_the_reference_reads_the_caption_that_was_drawn(lab):
    """Through its own tokenizer."""
    other = Pixels()
    other.tokenizer = SimpleTokenizer(context_length=24)
    words = lab.words("--train-num-samples 16 --cached_syn_texts_dir @captions")
    store = held(lab.root / "captions")
    for batch in train_data(words, WORLD, other).epoch(0):
        for row, text, ref_text in zip(batch.index.tolist(), batch.text, batch.ref_text, strict=True):
            choices = [shards.caption(row), *store[row]]
            drawn_one = int((PIXELS.tokenizer(choices) == text).all(1).nonzero()[0])
            assert torch.equal(ref_text, other.tokenizer([choices[drawn_one]])[0])


def test_a_run_says_where_its_captions_come_from(lab):
    run = lab.run(lab.words("--cached_syn_texts_dir @captions"))
    assert run.code == 0
    assert "captions are the samples' own or synthetic ones: 3 per sample of 16 samples" in run.log


def test_the_plan_of_a_run_that_writes_captions(lab, capsys):
    assert main([*lab.words(f"{WRITE} --cached_syn_texts_dir {lab.root}/none"), "--dry_run"]) == 0
    plan = capsys.readouterr().out
    assert "captions by" in plan and f"3 captions of each sample to {lab.root}/none/" in plan


def test_features_are_no_captions(lab, capsys):
    assert main([*lab.words("--cached_syn_texts_dir @features"), "--name", "features as captions"]) == 2
    assert "holds reference features, not synthetic captions" in capsys.readouterr().err
    assert len(open_store(lab.path("captions"), captions.KIND, "x")) == 16
