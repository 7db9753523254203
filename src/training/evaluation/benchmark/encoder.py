"""A model that embeds pictures and prompts: each rank its share, and all of them together.

A rank that fails must not leave the others waiting: what ranks do alone is done in ``together``, after which all
know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from drrho_clip.normalize import normalize
from training.data.bad_samples import Skips
from training.data.transforms import eval_transform
from training.distributed.collectives import gather_object
from training.distributed.loader_processes import Loader, start_method, start_worker
from training.distributed.process_group import World
from training.evaluation.benchmark.sources import NumberedBatches, PictureSource
from training.evaluation.retrieval import normalized
from training.logger import ProgressBar
from training.models.create import BuiltModel
from training.models.precision import Precision

T = TypeVar("T")
Templates = Sequence[Callable[[str], str]]

PROMPTS_AT_ONCE = 256


class TaskFailed(ValueError):
    """A task cannot be evaluated, on any rank; the message says why."""


class MakesProgress(Protocol):
    """Makes a progress bar: ``progress(total, what, unit="batch")``."""

    def __call__(self, total: int, desc: str, *, unit: str) -> ProgressBar: ...


@dataclass(frozen=True)
class Encoder:
    """A model in eval mode, and how its inputs are made.

    ``batch_size``, ``workers``: of the loader of pictures on each rank. ``classifiers``: those built so far, by
    their prompts; sets that share classes and prompts, as ImageNet's do, build one.
    """

    model: nn.Module
    built: BuiltModel
    world: World
    precision: Precision
    progress: MakesProgress
    batch_size: int = 64
    workers: int = 4
    classifiers: dict[tuple[tuple[str, ...], ...], Tensor] = field(default_factory=dict)

    def share(self, n: int) -> range:
        """This rank's part of n things, in one piece."""
        rank, ranks = self.world.rank, self.world.world_size
        return range(rank * n // ranks, (rank + 1) * n // ranks)

    @property
    def logit_scale(self) -> float:
        """1/τ of the model, with which similarities become probabilities."""
        scale = self.model.logit_scale
        assert isinstance(scale, Tensor), "open_clip's models have a logit scale"
        return scale.exp().item()

    def pictures(
        self, source: PictureSource, name: str, use: Callable[[Tensor, Tensor], None], skips: Skips
    ) -> None:
        """Call ``use(features, numbers)`` with unit float32 [n, d] and int64 [n] for this rank's share.

        ``skips`` counts what is left out. ``features`` are on the device, ``numbers`` on the CPU.
        """
        encode = self.model.encode_image
        assert callable(encode), "open_clip's models have an image encoder"
        device, cfg = self.world.device, self.built.preprocess
        batches = NumberedBatches(
            source, self.share(len(source)), self.batch_size, eval_transform(self.built.preprocess)
        )
        workers = min(self.workers, len(batches))
        loader = Loader(
            DataLoader(
                batches,
                batch_size=None,
                num_workers=workers,
                pin_memory=device.type == "cuda",
                worker_init_fn=start_worker,
                multiprocessing_context=start_method(workers),
                generator=torch.Generator(),  # otherwise it would draw a seed from the generator of training
            )
        )
        with self.progress(len(batches), name, unit="batch") as progress, torch.no_grad():
            for batch in loader:
                skips.merge(batch.skips)
                if len(batch.number):
                    moved = batch.image.to(device, non_blocking=True)
                    pixels = normalize(moved, cfg.mean, cfg.std, self.precision.pixel_dtype)
                    with self.precision.autocast():
                        features = encode(pixels, normalize=True)
                    use(normalized(features), batch.number)
                progress.update()

    def texts(self, texts: Sequence[str], name: str, unit: str = "text") -> Tensor:
        """Unit float32 [n, d] on the device, of ``texts`` on this rank alone."""
        encode = self.model.encode_text
        rows: list[Tensor] = []
        assert callable(encode), "open_clip's models have a text encoder"
        with self.progress(len(texts), name, unit=unit) as progress, torch.no_grad():
            for start in range(0, len(texts), PROMPTS_AT_ONCE):
                some = list(texts[start : start + PROMPTS_AT_ONCE])
                tokens = self.built.tokenizer(some).to(self.world.device)
                with self.precision.autocast():
                    rows.append(normalized(encode(tokens, normalize=True)))
                progress.update(len(some))
        return torch.cat(rows) if rows else torch.zeros(0, 0, device=self.world.device)

    def classifier(self, names: Sequence[str], templates: Templates, name: str) -> Tensor:
        """float32 [d, C]: of each class, the mean of its unit prompts, made unit. Collective."""
        prompts = tuple(tuple(template(one) for template in templates) for one in names)
        if prompts not in self.classifiers:
            mine = [prompts[i] for i in self.share(len(prompts))]

            def embed() -> Tensor:
                each = self.texts([prompt for some in mine for prompt in some], f"{name} prompts")
                means = [part.mean(0) for part in each.split(len(templates))] if mine else []
                return normalized(torch.stack(means)).cpu() if means else torch.zeros(0)

            parts = [part for part in together(embed) if len(part)]
            self.classifiers[prompts] = torch.cat(parts).T.to(self.world.device)
        return self.classifiers[prompts]


def embed_pictures(
    encoder: Encoder, source: PictureSource, name: str, row: Callable[[Tensor], Tensor] = lambda features: features
) -> tuple[Tensor, Tensor, Skips]:
    """``row(features)`` [n, ...] and numbers int64 [n] of the pictures of all ranks, on the CPU. Collective.

    ``features``, unit float32 [b, d], are those of a batch. TaskFailed: no picture can be decoded.
    """

    def embed() -> tuple[list[Tensor], list[Tensor], Skips]:
        skips, rows, numbers = Skips(), [], []

        def use(features: Tensor, number: Tensor) -> None:
            rows.append(row(features).cpu())
            numbers.append(number)

        encoder.pictures(source, name, use, skips)
        return rows, numbers, skips

    rows, numbers, skips = [], [], Skips()
    for some, which, left_out in together(embed):
        rows += some
        numbers += which
        skips.merge(left_out)
    if not rows:
        raise TaskFailed(f"it contains no usable picture; left out: {skips}")
    return torch.cat(rows), torch.cat(numbers), skips


def together(function: Callable[[], T]) -> list[T]:
    """``function()`` of every rank, in rank order. Collective. TaskFailed on all ranks: it has failed on one."""
    result, failure = None, ""
    try:
        result = function()
    except Exception as error:
        failure = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    gathered = gather_object((failure, result))
    if failures := [text for text, _ in gathered if text]:
        raise TaskFailed(failures[0])
    return [part for _, part in gathered]
