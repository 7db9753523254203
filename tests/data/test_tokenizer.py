"""Ids are those of the tokenizer for every caption, and the caches behind them stay small."""

from __future__ import annotations

import pickle
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from training.data import tokenizer as tokens
from training.data.tokenizer import Tokens

ODD = [
    *("", " ", "a", "\n", "a\nb\tc\r\nd", "a\x0bb\x0cc", "tab\tin\x1c\x1d it", "nul\0in it", "\x1b[31mred\x1b[0m"),
    *("a photo of a cat", "  spaces   between  ", "CAPITALS and MiXeD", "it's we'll THEY'RE i'd o'clock 'tis ''s"),
    *("<start_of_text> and <END_OF_TEXT>in", "<start_of_text", "a<b>c</b> &lt;tag&gt;", "Tom &amp;amp; J", "R&D"),
    *("&eacute;", "AT&T &#8217;s", "& & &", "&notanentity;", "1234567890", "3.14e-10 + 50% = $1,000.00", "a1b2c3"),
    *("user_name@example.com", "https://example.com/a?b=c_d#e", "!?...;;;,,,---___***", "#hash_tag (a[b{c}d]e)"),
    *("Ünïcode, naïve café", "“curly” ‘quotes’ – dashes — …", "schÃ¶n mojibake â€œquotesâ€\x9d", "ﬁne ﬂow"),
    *("ＦＵＬＬ　ＷＩＤＴＨ", "日本語の説明文", "русский текст", "נוסח עברי", "नमस्ते दुनिया", "🙂 emoji 🇫🇷"),
    *(
        "soft\u00adhyphen",
        "zero\u200bwidth",
        "no\u00a0break",
        "line\u2028separator",
        "\ufeffbom",
        "½ ² ① Ⅳ",
        "İ ſ",
    ),
    *("e\u0301", "word " * 200, "x" * 300, "supercalifragilistic " * 9, " ".join("abcdefghij" * 9)),
]


@pytest.fixture(scope="module")
def simple() -> SimpleTokenizer:
    return SimpleTokenizer()


def check(tokenizer, texts: list[str], ours: Tokens | None = None) -> None:
    ids = (ours or Tokens(tokenizer))(texts, range(len(texts)))
    expected = tokenizer(texts)
    assert ids.dtype == expected.dtype == torch.int64
    assert torch.equal(ids, expected), [t for t, a, b in zip(texts, ids, expected) if not torch.equal(a, b)]


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
@pytest.mark.parametrize("length", [77, 16, 3])
def test_odd_captions(clean, length):
    tokenizer = SimpleTokenizer(context_length=length, clean=clean)
    ours = Tokens(tokenizer)
    for _ in range(2):  # the second time from what was kept
        check(tokenizer, ODD, ours)
    check(tokenizer, [f"{a} {b}" for a in ODD for b in ODD[::7]], ours)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(st.characters(codec="ascii"), max_size=60), max_size=3))
def test_any_ascii(simple, texts):
    check(simple, texts)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_any_text(simple, text):
    check(simple, [text])


def test_lengths_around_the_limit(simple):
    ours = Tokens(simple)
    for n in range(70, 82):
        check(simple, ["dog " * n, "dog " * (n - 1) + "zyzzyvaxq"], ours)


def test_words_are_encoded_once(simple, monkeypatch):
    encoded = []
    monkeypatch.setattr(simple, "encode", lambda text, encode=simple.encode: encoded.append(text) or encode(text))
    ours = Tokens(simple)
    for _ in range(2):
        ours(["a red dog", "a green dog & a cat", "a red bird"], [0, 1, 2])
    assert encoded == ["a", "red", "dog", "a green dog & a cat", "bird", "a green dog & a cat"]


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(tokens, "KEPT", 100)
    tokenizer = SimpleTokenizer()
    ours = Tokens(tokenizer)
    texts = [f"word{chr(97 + i % 26)}{chr(97 + i // 26)} é{i}" for i in range(600)]
    for i in range(0, 600, 10):
        check(SimpleTokenizer(), texts[i : i + 10], ours)
        assert len(tokenizer.cache) <= 100
        assert ours._word is None or ours._word.cache_info().currsize <= 100
    check(tokenizer, ["<start_of_text> x <end_of_text>"], ours)


def test_loader_processes_get_a_copy(simple):
    ours = Tokens(simple)
    ours(["a red dog"], [0])
    check(simple, ODD, pickle.loads(pickle.dumps(ours)))


def test_other_tokenizers_are_asked_for_every_batch():
    asked = []

    def tokenizer(texts):
        asked.append(texts)
        return torch.ones(len(texts), 5, dtype=torch.long)

    assert Tokens(tokenizer)(["a", "b"], [0, 1]).shape == (2, 5) and asked == [["a", "b"]]
    special = SimpleTokenizer(additional_special_tokens=["new york"])
    check(special, ["in new york city", "in new", "york"])


@pytest.mark.parametrize("mask", ["simple", "random", "shuffle"])
def test_random_masks_belong_to_the_caption(mask):
    tokenizer = SimpleTokenizer(context_length=12, reduction_mask=mask)
    ours, text = Tokens(tokenizer), " ".join(f"word{i}" for i in range(60))
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    together = ours([text] * 4, [1, 2, 3, 2**64 - 1])
    alone = [ours([text], [seed]) for seed in (2**64 - 1, 3, 2, 1)]
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert torch.equal(together, torch.cat(alone[::-1]))
    assert len({tuple(row.tolist()) for row in together}) == 4
