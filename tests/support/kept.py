"""Evaluations and runs as the report reads them, made of a few numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training.predictions import Classified, Retrieved, classified
from training.run_report.history import History


def classes(labels, top, probability=None, names=None, key="set", places=None) -> Classified:
    """``top`` [N, k], the classes in falling order of ``probability``."""
    top = np.array(top)
    probability = np.full(top.shape, 0.5) if probability is None else np.array(probability)
    names = names or [f"class {i}" for i in range(int(max(top.max(), max(labels))) + 1)]
    place = (lambda i: ("file", f"{i}.png", 0, -1)) if places is None else places.__getitem__
    return classified(key, f"The {key}", names, np.array(labels), top, probability, place)


def retrieval(similarity, captions=None, places=None, top=3) -> Retrieved:
    """Of as many captions as pictures, ``similarity`` [N, N] of pictures (rows) and captions, i to i."""
    s = np.array(similarity)
    n = len(s)

    def found(scores):
        order = (-scores).argsort(1)
        return order[:, :top], np.array([row.tolist().index(i) + 1 for i, row in enumerate(order)])

    image_top, image_rank = found(s)
    text_top, text_rank = found(s.T)
    every = np.arange(n)
    return Retrieved(
        key="pairs", name="Pairs", image_right=image_rank == 1, text_right=text_rank == 1,
        image_query=every, image_top=image_top, image_score=-np.sort(-s)[:, :top], image_rank=image_rank,
        image_own=every, image_hits=image_top == every[:, None],
        text_query=every, text_top=text_top, text_score=-np.sort(-s.T)[:, :top], text_rank=text_rank,
        text_own=every,
        pictures={i: places[i] if places else ("file", f"{i}.png", 0, -1) for i in range(n)},
        captions=dict(enumerate(captions or [f"caption {i}" for i in range(n)])),
    )  # fmt: skip


def run(name, *kept) -> History:
    """A run that has kept these evaluations."""
    found = History(Path(name), name)
    found.kept = {each.key: each for each in kept}
    found.kept_at = {each.key: "epoch_7" for each in kept}
    return found
