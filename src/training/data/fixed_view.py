"""One fixed view of an image for a model that looks at it once: what is computed from it can be kept.

It is the largest centred part with the shape of the model's input, resized to it: open_clip's evaluation
transform, but on decoded pixels, as training does it (see ``images``). So a square image gives the very pixels
that training with ``--aug-cfg scale=(1.0,1.0)`` gives the reference. Where the model's config does not crop
(``resize_mode`` squash or longest), open_clip's own transform is used.
"""

from __future__ import annotations

from open_clip.transform import PreprocessCfg
from PIL import Image
from torch import Tensor

from training.data.transforms import Box, decode, decode_pixels, eval_transform, resized_crop


class FixedView:
    """The view of a model with ``preprocess``: uint8 [3, h, w], or float and normalized where it does not crop."""

    def __init__(self, preprocess: PreprocessCfg) -> None:
        size = preprocess.size
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.mode = "bilinear" if preprocess.interpolation == "bilinear" else "bicubic"
        self._whole = None if preprocess.resize_mode == "shortest" else eval_transform(preprocess)

    def decode(self, image: bytes | str | Image.Image) -> Tensor | Image.Image:
        """What ``__call__`` takes."""
        return decode_pixels(image) if self._whole is None else decode(image)

    def __call__(self, image: Tensor | Image.Image) -> Tensor:
        """The view of what ``decode`` gave."""
        if self._whole is not None:
            return self._whole(image)
        return resized_crop(image, centred(*image.shape[1:], self.size), self.size, self.mode)

    def __str__(self) -> str:
        return f"centre, {self.size[0]} x {self.size[1]}, {self.mode}" if self._whole is None else "whole"


def centred(height: int, width: int, shape: tuple[int, int]) -> Box:
    """The largest box with the sides' ratio of ``shape`` = (h, w) in the middle of an image."""
    h, w = min(height, round(width * shape[0] / shape[1])), min(width, round(height * shape[1] / shape[0]))
    h, w = max(h, 1), max(w, 1)
    return Box((height - h) // 2, (width - w) // 2, h, w)
