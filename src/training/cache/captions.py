"""Synthetic captions: a captioning model's own words for each image, written once, and drawn from in training.

Writing (``--cache_syn_texts``) samples ``--num_syn_texts`` captions per image from an open_clip CoCa: token by
token from the ``TOP`` likeliest under ``TEMPERATURE``, the published code's settings. The random numbers of a
caption follow from (seed, row, number of the caption), so that it does not matter who writes it, beside which
others. (open_clip's own ``generate`` draws from the global generator, and needs transformers before version 5.)

Training (``--cached_syn_texts_dir``) takes for each sample its own caption or one of the synthetic ones, all with
the same chance, by a seed that follows from (seed, epoch, sample). The store (see ``row_store``) keeps them as
utf-8, [captions per sample] strings of bytes for each row.
"""

from __future__ import annotations

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from training.cache.row_store import RowStore, caption_checksum, open_store
from training.config.params import Config
from training.data.order import seed_of

KIND = "synthetic captions"
FLAG = "--cached_syn_texts_dir"
TOP, TEMPERATURE = 50, 0.75
SHORTEST, LONGEST = 5, 30  # tokens, of which the first says that a text begins
_DRAW = 1


class Captions:
    """The captions of a store, ``count`` per sample; row 0 of the store is row ``offset`` of the run."""

    def __init__(self, store: RowStore, count: int, offset: int = 0) -> None:
        self.store, self.count, self.offset = store, count, offset

    def draw(self, row: int, text: str, name: str, seed: int) -> str:
        """``text``, the sample's own caption, or one of the synthetic ones of its ``row``; by ``seed`` (64 bits).

        MissingRow: there are none of this row and caption; ``name`` says which sample that is.
        """
        place = np.array([row - self.offset])
        checksum = np.array([caption_checksum(text)], np.uint32)
        (position,) = self.store.find(
            place, checksum, lambda _: f"{FLAG}: sample {name} (row {place[0]} of the captions)"
        )
        number = seed_of(seed >> 1, _DRAW) % (self.count + 1)
        if number == 0:
            return text
        return bytes(self.store.one("captions", int(position))[number - 1]).decode(errors="replace")

    def describe(self) -> str:
        """One line for the log."""
        made = self.store.identity
        return (
            f"{self.count} per sample of {len(self.store):,} samples in {self.store.folder}, "
            f"by {made['model']} with weights {made['weights']}"
        )


def open_captions(config: Config) -> Captions | None:
    """What ``--cached_syn_texts_dir`` names, for a run that trains on it. ValueError: it holds something else."""
    cache = config.cache
    if not cache.cached_syn_texts_dir or cache.writes or not config.trains:
        return None
    store = open_store(cache.cached_syn_texts_dir, KIND, FLAG)
    _, (held,) = store.shape("captions")
    count = cache.num_syn_texts or held
    if count > held:
        raise ValueError(
            f"--num_syn_texts {count}: {store.folder} has {held} captions per sample; give at most as many"
        )
    return Captions(store, count, cache.syn_texts_offset)


@torch.no_grad()
def sample_captions(
    model: nn.Module, pixels: Tensor, uniform: Tensor, tokenizer: SimpleTokenizer
) -> list[list[str]]:
    """``k`` captions of each of the images ``pixels`` [n, 3, H, W] by an open_clip CoCa.

    ``uniform`` [n, k, L] has a number of [0, 1) for each token: caption j of image i depends on ``uniform[i, j]``.
    """
    seen = model(pixels)
    columns = [
        _sample(model, pixels, seen["image_features"], seen["image_embs"], u, tokenizer) for u in uniform.unbind(1)
    ]
    return [[_words(ids, tokenizer) for ids in of_image] for of_image in zip(*(c.tolist() for c in columns))]


def _sample(
    model: nn.Module,
    pixels: Tensor,
    latent: Tensor,
    embeddings: Tensor,
    uniform: Tensor,
    tokenizer: SimpleTokenizer,
) -> Tensor:
    """Token ids [n, 1 + at most L], one caption for each image."""
    text = torch.full((len(pixels), 1), tokenizer.sot_token_id, device=pixels.device)
    ended = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
    for position in range(uniform.shape[1]):
        out = model(pixels, text, image_latent=latent, image_embs=embeddings, output_labels=False)
        logits = out["logits"][:, -1].float()
        if position < SHORTEST - 1:
            logits[:, tokenizer.eot_token_id] = -torch.inf
        likely = logits.topk(min(TOP, logits.shape[1]))
        chances = (likely.values / TEMPERATURE).softmax(-1).cumsum(-1)
        chosen = (chances <= uniform[:, position, None]).sum(-1, keepdim=True).clamp_(max=chances.shape[1] - 1)
        token = likely.indices.gather(1, chosen)
        text = torch.cat([text, token.masked_fill(ended[:, None], tokenizer.eot_token_id)], 1)
        ended |= token[:, 0] == tokenizer.eot_token_id
        if bool(ended.all()):
            break
    return text


def random_numbers(rows: np.ndarray, captions: int, tokens: int, seed: int) -> Tensor:
    """Numbers of [0, 1), float32 [rows, captions, tokens], each row's fixed by (seed, row)."""
    drawn = [
        np.random.Philox(key=seed_of(seed, row, j)).random_raw(tokens)
        for row in rows.tolist()
        for j in range(captions)
    ]
    uniform = (np.array(drawn, np.uint64) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return torch.from_numpy(uniform).view(len(rows), captions, tokens)


def packed(captions: list[list[str]]) -> np.ndarray:
    """Captions [n][k] as an array of bytes [n, k]."""
    return np.array([[caption.encode() for caption in of_image] for of_image in captions], dtype=np.bytes_)


def _words(ids: list[int], tokenizer: SimpleTokenizer) -> str:
    """The text of token ids, without what marks its beginning and end."""
    end = ids.index(tokenizer.eot_token_id) if tokenizer.eot_token_id in ids else len(ids)
    return tokenizer.decode([i for i in ids[1:end] if i not in tokenizer.all_special_ids]).strip()
