"""What a step has to compute, and what share of that a card could do at most (model FLOPs utilization, MFU)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from drrho_clip.batch import Batch
from drrho_clip.reference import Reference
from training.loop.task import Task

_log = logging.getLogger(__name__)
_VISUAL = "visual."
# Dense bfloat16 and float16 operations per second by the vendor's data sheet; TF32, which float32 uses, has half.
_PEAKS = {
    r"B200": 2250e12,
    r"H200|GH200|H100(?! (PCIe|NVL))": 989e12,
    r"H100 NVL": 835e12,
    r"H100 PCIe": 756e12,
    r"A100": 312e12,
    r"L40S": 362e12,
    r"L4$": 121e12,
    r"A10$": 125e12,
    r"RTX 4090": 165e12,
    r"RTX 3090": 71e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Floating point operations per second of the card in ``precision``; None for a CPU or an unknown card."""
    if device.type != "cuda":
        return None
    card = torch.cuda.get_device_name(device)
    known = [flops for pattern, flops in _PEAKS.items() if re.search(pattern, card)]
    if not known:
        return None
    return known[0] / 2 if precision == "fp32" else known[0]


def forward_flops(module: nn.Module, image: Tensor, text: Tensor) -> float:
    """Operations of the forward pass per sample, counted on one sample with the shapes of ``image`` and ``text``.

    ``image`` [b, 3, H, W], ``text`` [b, L]. Nothing is computed: parameters and inputs are on the meta device.
    """
    return sum(_count(module, image, text))


def training_flops(module: nn.Module, image: Tensor, text: Tensor) -> float:
    """As ``forward_flops``, with the backward pass, which takes twice the forward pass of what is trained.

    What gradient checkpointing computes again is not counted.
    """
    visual, rest = _count(module, image, text)
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad and parameter.ndim]
    trains_visual = any(name.startswith(_VISUAL) for name in names)
    trains_rest = not all(name.startswith(_VISUAL) for name in names)
    return visual * (3 if trains_visual else 1) + rest * (3 if trains_rest else 1)


def step_flops(task: Task, batch: Batch) -> float:
    """Operations of a step of ``task`` per sample of ``batch``: target, reference, the scores of a selection."""
    trained = training_flops(task.bare, batch.image, batch.text)
    total = trained
    if task.selection is not None:
        total = forward_flops(task.bare, batch.image, batch.text) + task.selection.keep_ratio * trained
    if isinstance(task.reference, Reference):
        image = batch.image if batch.ref_image is None else batch.ref_image
        text = batch.text if batch.ref_text is None else batch.ref_text
        total += forward_flops(cast(nn.Module, task.reference.module), image, text)
    return total


@dataclass
class Utilization:
    """MFU: the operations that the models need, per second and GPU, of what the card could do.

    ``peak``  operations per second of one card; None: unknown, and so is the utilization.
    """

    peak: float | None
    _per_sample: float | None = None

    def of(self, task: Task, batch: Batch, rate: float) -> float | None:
        """The utilization at ``rate`` samples of such batches per second and GPU. The first call counts.

        None: the card is not known, or the model's operations cannot be counted, which is said once.
        """
        if self.peak is None:
            return None
        if self._per_sample is None:
            try:
                self._per_sample = step_flops(task, batch)
            except Exception as error:  # models of others do what they like, and a run does not end for a figure
                self.peak = None
                _log.warning("no MFU is reported, because the model's operations could not be counted: %r", error)
                return None
        return rate * self._per_sample / self.peak


def _count(module: nn.Module, image: Tensor, text: Tensor) -> tuple[float, float]:
    """Operations of the image tower and of the rest."""
    state = {
        name: torch.empty_like(t, device="meta")
        for name, t in (*module.named_parameters(), *module.named_buffers())
    }
    dtype = next(module.parameters()).dtype
    picture = torch.empty(1, *image.shape[1:], dtype=dtype, device="meta")
    caption = torch.empty(1, *text.shape[1:], dtype=text.dtype, device="meta")
    with (
        torch.no_grad(),
        _no_batch_statistics(module),
        _no_fused_attention_block(),
        FlopCounterMode(display=False) as counter,
    ):
        functional_call(module, state, (picture, caption))
    visual = sum(counter.get_flop_counts().get(f"{type(module).__name__}.visual", {}).values())
    return float(visual), float(counter.get_total_flops() - visual)


@contextmanager
def _no_batch_statistics(module: nn.Module) -> Iterator[None]:
    """One sample has none where its map is 1 x 1, and synchronized ones are not for the meta device."""
    training = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    for norm in training:
        norm.eval()
    try:
        yield
    finally:
        for norm in training:
            norm.train()


@contextmanager
def _no_fused_attention_block() -> Iterator[None]:
    """The counter does not know the fused attention layer that torch takes without gradients."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
