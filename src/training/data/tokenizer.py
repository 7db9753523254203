"""Token ids of captions: the same as the model's tokenizer returns, in less time.

open_clip's ``SimpleTokenizer`` spends its time on repairing text (ftfy, HTML entities) and on splitting it, and
keeps every word that it has ever merged. Two facts make this faster:

- Printable ASCII text without ``&`` needs no repair: ftfy repairs encodings, control characters, widths, quotes
  and entities, and such text contains none of them.
- No token spans white space, and no token depends on the text beyond the white space. So the ids of such a caption
  are those of its words, one after the other. Captions use few different words: the ids of recent words are kept.

All other captions, and all captions for other tokenizers, go through the tokenizer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from training.rng import isolated_rng, seed_all

Tokenizer = Callable[[list[str]], Tensor]

KEPT = 2**16  # words whose ids are kept, and as many whose merges are kept: about 30 MB per loader process
_LONG = 64  # characters; a longer word will hardly occur again


class Tokens:
    """Ids of captions, int64 [n, context length], equal to ``tokenizer(texts)``.

    A tokenizer that drops tokens at random (open_clip's ``reduction_mask``) draws from the global generators:
    these are seeded for each caption, and restored afterwards.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._is_random = isinstance(tokenizer, SimpleTokenizer) and tokenizer.reduction_fn is not None
        self._simple = _as_simple(tokenizer)
        self._word: Callable[[str], list[int]] | None = None

    def __call__(self, texts: list[str], seeds: Sequence[int]) -> Tensor:
        """``seeds``: one per caption, 64 bits."""
        if self._is_random:
            return torch.cat([self._random(text, seed) for text, seed in zip(texts, seeds, strict=True)])
        tokenizer = self._simple
        if tokenizer is None:
            return self.tokenizer(texts)
        length = tokenizer.context_length
        rows = np.zeros((len(texts), length), dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [tokenizer.sot_token_id, *self._ids(tokenizer, text, length), tokenizer.eot_token_id]
            if len(ids) > length:
                ids[length - 1 :] = [tokenizer.eot_token_id]
            row[: len(ids)] = ids
        _forget_words(tokenizer)
        return torch.from_numpy(rows)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_word": None}  # another process starts without words

    def _ids(self, tokenizer: SimpleTokenizer, text: str, enough: int) -> list[int]:
        """The ids between start and end. A text is cut after the word with which they exceed ``enough``."""
        if not text.isascii() or not text.isprintable() or "&" in text:
            return tokenizer.encode(text)
        if self._word is None:
            self._word = lru_cache(KEPT)(tokenizer.encode)
        ids: list[int] = []
        for word in text.split():
            ids += self._word(word) if len(word) <= _LONG else tokenizer.encode(word)
            if len(ids) > enough:
                break
        return ids

    def _random(self, text: str, seed: int) -> Tensor:
        with isolated_rng():
            seed_all(seed)
            return self.tokenizer([text])


def _as_simple(tokenizer: Tokenizer) -> SimpleTokenizer | None:
    """``tokenizer`` if it is open_clip's ``SimpleTokenizer`` with the usual two special tokens, else None."""
    if isinstance(tokenizer, SimpleTokenizer) and type(tokenizer) is SimpleTokenizer:
        # A custom config may have special tokens besides start and end of text, and those may contain any text.
        return tokenizer if len(tokenizer.all_special_ids) == 2 else None
    return None


def _forget_words(tokenizer: SimpleTokenizer) -> None:
    """Empty the tokenizer's own cache when it is large: it would grow to all words of the training data."""
    known = tokenizer.cache
    if len(known) > KEPT:
        special = [tokenizer.decoder[i] for i in tokenizer.all_special_ids]
        known.clear()
        known.update(zip(special, special))
