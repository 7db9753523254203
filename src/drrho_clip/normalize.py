"""Image normalization on the device, so that the host decodes, and sends, one byte per value.

uint8 pixels p become (p / 255 - mean) / std per channel, computed in float32 as one multiply-add.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def normalize(
    image: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """``image`` [b, 3, H, W], in any memory order -> the same shape in ``dtype``, contiguous where it was uint8.

    uint8 is normalized with ``mean`` and ``std`` of pixels scaled to [0, 1]; floating point is taken to be
    normalized already and only changes its type. ValueError: any other type.
    """
    if image.is_floating_point():
        return image.to(dtype)
    if image.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, or floating point and normalized; these are {image.dtype}")
    factor, offset = _affine(tuple(mean), tuple(std), image.device)
    normalized = torch.empty(image.shape, device=image.device)
    return torch.mul(image, factor, out=normalized).add_(offset).to(dtype)


@lru_cache(maxsize=16)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # Cached: copying constants to a GPU in every step would make the host wait for it.
    factor = torch.tensor([1 / (255 * s) for s in std], device=device)
    offset = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return factor[:, None, None], offset[:, None, None]
