"""Every seed and every generator of a run.

A random number is determined by ``--seed`` and by its purpose (``seed_of``), never by what was drawn before it: so
any rank, loader process or resumed run draws the same one. What is drawn, and its seed:

    the order of samples       (seed, epoch, turn[, lane]), see ``data.order`` and the sources
    a sample's view            ``sample_seed``: crop, color, which of several captions
    a stored view              ``view_seed``: crop, color; which of them a use of the sample gets: ``view_number``
    dropout and similar masks  ``step_seed``, MASKS
    batch selection            ``step_seed``, SELECTION
    initial weights            ``seeded_cpu``: the same on every rank
    synthetic captions         (seed, row, number of the caption), see ``cache.captioner``

``seed_of`` is a keyed hash (BLAKE2b), and orders come from a counter-based generator keyed by it (Philox): both
are fixed by their definitions and do not change between releases of a library.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

MASKS, SELECTION = range(2)  # purposes of the random numbers in a step: each has its own seeds
CAPTION = 1  # a purpose of a sample's seed: which of several captions
_VIEW = -1  # in place of an epoch, which is never negative


def seed_of(*parts: int) -> int:
    """An unsigned 64-bit seed for ``parts``, integers in the range of int64."""
    return int.from_bytes(
        hashlib.blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=8).digest(), "little"
    )


def sample_seed(seed: int, epoch: int, turn: int, row: int) -> int:
    """The seed of all random numbers for one use of one sample."""
    return seed_of(seed, epoch, turn, row)


def view_seed(seed: int, view: int, row: int) -> int:
    """The seed of view number ``view`` of the sample at ``row`` of a store with this ``seed``."""
    return seed_of(seed, _VIEW, view, row)


def view_number(seed: int, epoch: int, turn: int, row: int, views: int) -> int:
    """Which of a sample's ``views`` one use of it gets.

    They come in turn, from one that differs from sample to sample: so ``views`` epochs see each of them once.
    """
    return (seed_of(seed, _VIEW, row) + epoch + turn) % views


def caption_number(seed: int, own: int, synthetic: int, ratio: float | None = None) -> int:
    """Which of a sample's captions the use with this ``seed`` gets, of ``own`` ones and then ``synthetic`` ones.

    ``ratio``: the chance of a synthetic one, if there is any; None: all have the same chance.
    """
    drawn = seed_of(seed >> 1, CAPTION)
    if ratio is None or not synthetic:
        return drawn % (own + synthetic) if own + synthetic > 1 else 0
    chosen = seed_of(seed >> 1, CAPTION, 0)
    return own + chosen % synthetic if (drawn >> 11) * 2.0**-53 < ratio else chosen % own


def step_seed(seed: int, step: int, rank: int, purpose: int) -> int:
    """The seed for ``purpose``, MASKS or SELECTION, inside optimizer step ``step`` on ``rank``."""
    return seed_of(seed, step, rank, purpose)


def generator(*key: int) -> np.random.Philox:
    """The generator for ``key``."""
    return np.random.Philox(key=seed_of(*key))


def permutation(n: int, *key: int) -> np.ndarray:
    """A random order of 0..n-1, int64 [n], determined by ``key``: the argsort of n words of its generator."""
    return np.argsort(generator(*key).random_raw(n), kind="stable")


def draws(n: int, weights: Sequence[float] | np.ndarray, *key: int) -> np.ndarray:
    """``n`` draws with replacement of 0..len(weights)-1, by ``weights``, determined by ``key``; int64 [n]."""
    uniform = (generator(*key).random_raw(n) >> np.uint64(11)) * 2.0**-53
    ends = np.cumsum(np.asarray(weights, dtype=np.float64))
    return np.searchsorted(ends / ends[-1], uniform, side="right")


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Leave Python's, numpy's and torch's (CPU) random state as it was before the body."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 see seed_all
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's CPU generators; ``torch.manual_seed`` would seed the devices too."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 timm draws from numpy's global generator
    torch.default_generator.manual_seed(seed)


@contextmanager
def seeded_cpu(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for the body; afterwards it is as before. Those of GPUs are not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The state of torch's default generators: the CPU's, and that of ``device`` where it is a GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def restore_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    """Restore what ``random_state`` returned."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
