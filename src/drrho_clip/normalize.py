"""Image normalization on the device, so that the host decodes and sends only one byte per value.

uint8 pixels p become (p / 255 - mean) / std per channel, computed in float32 as one multiplication and one
addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def normalize(
    image: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """``image`` [b, 3, H, W] in any memory order -> the same shape in ``dtype``; contiguous if ``image`` is uint8.

    uint8 images are normalized with ``mean`` and ``std``, which refer to pixels scaled to [0, 1]. Floating-point
    images are assumed to be normalized already; only their type changes. ValueError: any other type.
    """
    if image.is_floating_point():
        return image.to(dtype)
    if image.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, or floating point and normalized; these are {image.dtype}")
    factor, offset = _affine(tuple(mean), tuple(std), image.device)
    scaled = torch.mul(image, factor, out=torch.empty(image.shape, device=image.device))
    if dtype == torch.float32:
        return scaled.add_(offset)
    # The sum is rounded to ``dtype`` where it is made, instead of being written and read once more.
    return torch.add(scaled, offset, out=torch.empty(image.shape, device=image.device, dtype=dtype))


@lru_cache(maxsize=16)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # Cached, because copying constants to a GPU in every step would make the host wait for the GPU.
    factor = torch.tensor([1 / (255 * s) for s in std], device=device)
    offset = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return factor[:, None, None], offset[:, None, None]
