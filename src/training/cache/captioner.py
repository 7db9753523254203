"""Synthetic captions: what a captioning model writes about an image.

``--cache_syn_texts`` samples ``--num_syn_texts`` captions per image from an open_clip CoCa: token by token from
the ``TOP`` most likely ones at ``TEMPERATURE``, the published code's settings. The random numbers of a caption
follow from (seed, row, number of the caption), so that a caption does not depend on the process that writes it, or
on its batch. (open_clip's own ``generate`` draws from the global generator, and needs transformers below 5.)
"""

from __future__ import annotations

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from training.rng import generator

TOP, TEMPERATURE = 50, 0.75


SHORTEST, LONGEST = 5, 30  # tokens, including the one that begins a text


@torch.no_grad()
def sample_captions(
    model: nn.Module, pixels: Tensor, uniform: Tensor, tokenizer: SimpleTokenizer
) -> list[list[str]]:
    """``k`` captions for each of the images ``pixels`` [n, 3, H, W], by an open_clip CoCa.

    ``uniform`` [n, k, L] has a number in [0, 1) for each token: caption j of image i depends on ``uniform[i, j]``.
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
    """Numbers in [0, 1), float32 [rows, captions, tokens]; those of a row are fixed by (seed, row)."""
    drawn = [generator(seed, row, j).random_raw(tokens) for row in rows.tolist() for j in range(captions)]
    uniform = (np.array(drawn, np.uint64) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return torch.from_numpy(uniform).view(len(rows), captions, tokens)


def packed(captions: list[list[str]]) -> np.ndarray:
    """Captions [n][k] as an array of bytes [n, k]."""
    return np.array([[caption.encode() for caption in of_image] for of_image in captions], dtype=np.bytes_)


def _words(ids: list[int], tokenizer: SimpleTokenizer) -> str:
    """The text of token ids, without the tokens that mark its beginning and end."""
    end = ids.index(tokenizer.eot_token_id) if tokenizer.eot_token_id in ids else len(ids)
    return tokenizer.decode([i for i in ids[1:end] if i not in tokenizer.all_special_ids]).strip()
