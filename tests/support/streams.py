"""The training data of a rank without models behind it: 16 pixels, and captions that can be read back."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from open_clip.transform import PreprocessCfg

from training.config.params import parse
from training.data.build import build_train
from training.data.loader import TrainData
from training.distributed.process_group import World


class Letters:
    """A tokenizer: the code points of the first ``length`` characters."""

    def __init__(self, length: int = 40) -> None:
        self.length = length

    def __call__(self, texts: list[str]) -> torch.Tensor:
        codes = [[ord(c) for c in text[: self.length]] for text in texts]
        return torch.tensor([row + [0] * (self.length - len(row)) for row in codes])


def text_of(row: torch.Tensor) -> str:
    return "".join(chr(c) for c in row.tolist() if c)


def model(size: int = 16, tokenizer=None, **preprocess) -> SimpleNamespace:
    return SimpleNamespace(preprocess=PreprocessCfg(size=size, **preprocess), tokenizer=tokenizer or Letters())


def world(rank: int = 0, ranks: int = 1) -> World:
    return World(rank, rank, ranks, ranks, torch.device("cpu"))


def config(
    train_data: str | None, *flags, samples: int | None = None, batch: int = 4, workers: int = 0, rows=1000
):
    argv = ["--model", "RN50", "--batch-size", batch, "--workers", workers, "--data_size", rows, *flags]
    argv += ["--train-data", train_data] if train_data else []
    argv += ["--train-num-samples", samples] if samples else []
    return parse([str(word) for word in argv])


def train(c, rank=0, ranks=1, target=None, reference=None) -> TrainData:
    return build_train(c, world(rank, ranks), target or model(), reference)


def flat(lists) -> list:
    return [item for part in lists for item in part]


def rows(batches) -> list[list[int]]:
    return [batch.index.tolist() for batch in batches]


def global_batches(c, ranks: int, epoch: int = 0) -> list[list[int]]:
    """Per step, the rows of all ranks."""
    per_rank = [rows(train(c, rank, ranks).epoch(epoch)) for rank in range(ranks)]
    return [flat(step) for step in zip(*per_rank, strict=True)]
