"""How large an encoded image is, from its header: a picture of a gigapixel is refused before anything is decoded.

JPEG headers are read here (a few microseconds, as every training sample goes through it), other formats are opened
by Pillow, which reads no pixels until they are asked for.
"""

from __future__ import annotations

import io
import warnings

from PIL import Image

from training.data.bad_samples import Unusable

MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # where Pillow begins to warn: a quarter of a gigabyte as RGB

_LENGTHLESS = frozenset([0x01, *range(0xD0, 0xD9)])  # TEM, RST0 to RST7, SOI
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15 without DHT, JPG, DAC


def check_size(image: bytes | str) -> None:
    """Unusable: the image (encoded, or its path) has more than ``MAX_PIXELS`` pixels."""
    width, height = image_size(image)
    if width * height > MAX_PIXELS:
        raise Unusable("image too large")


def image_size(image: bytes | str) -> tuple[int, int]:
    """(width, height) in pixels, as the header says. Where there is no sound header, Pillow's error comes out.

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
    """From the frame header (ITU-T T.81, B.2.2); None where the segments before it are not in order."""
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
