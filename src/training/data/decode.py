"""From an encoded image to RGB pixels, and the size of an image before anything is decoded.

An image of a gigapixel is refused because of its header. JPEG headers are read here, in a few microseconds, since
every training sample goes through it. Other formats are opened by Pillow, which reads no pixels until they are
needed.

``decode`` returns a Pillow image, ``decode_pixels`` a tensor; the pixels are the same. Both use libjpeg-turbo,
which writes rows of RGB bytes: tensors are [3, H, W] by their shape and H, W, 3 in memory (channels last).
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torchvision.io
from PIL import Image
from torch import Tensor

from training.data.samples import Unusable

# Above it Pillow warns: a quarter of a gigabyte as RGB. Pillow has None where a program has lifted its limit.
MAX_PIXELS: int = Image.MAX_IMAGE_PIXELS or sys.maxsize

_JPEG = b"\xff\xd8\xff"
_LENGTHLESS = frozenset([0x01, *range(0xD0, 0xD9)])  # TEM, RST0 to RST7, SOI
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15 without DHT, JPG, DAC


def check_size(image: bytes | str) -> None:
    """Unusable: the image (encoded, or its path) has more than ``MAX_PIXELS`` pixels."""
    width, height = image_size(image)
    if width * height > MAX_PIXELS:
        raise Unusable("image too large")


def image_size(image: bytes | str) -> tuple[int, int]:
    """(width, height) in pixels, from the header. Where there is no valid header, Pillow's error is raised.

    Unusable: so large that Pillow does not open it.
    """
    size = _jpeg_size(image) if isinstance(image, bytes) and image[:2] == b"\xff\xd8" else None
    if size is not None:
        return size
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                return opened.size
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise Unusable("image too large") from None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """From the frame header (ITU-T T.81, B.2.2); None where the segments before it are malformed."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _FRAMES:
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        elif marker in _LENGTHLESS:
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def decode(image: bytes | str | Image.Image) -> Image.Image:
    """An RGB image from its encoded bytes or its path. Grey, CMYK and palette are converted, alpha is dropped.

    If the file is broken, Pillow's own error is raised; its decoders raise many kinds.
    """
    if not isinstance(image, Image.Image):
        image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow would warn about a direct conversion to RGB
    return image.convert("RGB")


def decode_pixels(image: bytes | str | Image.Image) -> Tensor:
    """The same as a tensor, uint8 [3, H, W], channels last; JPEGs are decoded without Pillow."""
    if isinstance(image, str):
        image = Path(image).read_bytes()
    if isinstance(image, bytes) and image.startswith(_JPEG) and (decode_jpeg := jpeg_decoder()) is not None:
        with suppress(RuntimeError):  # Pillow reads some of these, and has clearer errors for the rest
            return decode_jpeg(image)
    return torch.from_numpy(np.array(decode(image))).permute(2, 0, 1)


@cache
def jpeg_decoder() -> Callable[[bytes], Tensor] | None:
    """torchvision's decoder: bytes to uint8 [3, H, W]; None if torchvision has none.

    It is deprecated since torchvision 0.29 and will be removed, and builds without libjpeg never had it.
    """

    def decode_jpeg(image: bytes) -> Tensor:
        # A copy, since torch does not accept read-only memory.
        return torchvision.io.decode_jpeg(torch.frombuffer(bytearray(image), dtype=torch.uint8), mode=mode)

    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "jpeg")
    try:
        mode = torchvision.io.ImageReadMode.RGB
        decode_jpeg(file.getvalue())
    except (AttributeError, RuntimeError):
        return None
    return decode_jpeg
