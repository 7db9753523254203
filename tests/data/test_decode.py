"""Sizes from headers agree with Pillow; images of gigapixels are refused without decoding them."""

from __future__ import annotations

import time

import pytest
from PIL import Image

from tests.support.shards import encode, picture
from tests.support.spoiled import jpeg_header, png_header
from training.data.decode import MAX_PIXELS, check_size, image_size
from training.data.samples import Unusable


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": b"Exif\0\0" + b"x" * 3000}])
def test_jpeg(mode, options):
    for size in ((1, 1), (48, 40), (7, 300)):
        assert image_size(encode(picture(1, size).convert(mode), **options)) == size
    assert image_size(b"\xff\xd8\xff" + encode(picture(1))[2:]) == (48, 40)  # a fill byte


@pytest.mark.parametrize("format", ["png", "webp", "gif", "bmp"])
def test_other_formats(format, tmp_path):
    data = encode(picture(1, (33, 21)), format)
    assert image_size(data) == (33, 21)
    (tmp_path / "x").write_bytes(data)
    assert image_size(str(tmp_path / "x")) == (33, 21)


@pytest.mark.parametrize("make", [png_header, jpeg_header])
def test_bombs_are_refused_unread(make):
    side = int(MAX_PIXELS**0.5)
    check_size(make(side, side))
    for width, height in ((side + 1, side + 1), (30_000, 30_000), (65_535, 65_535)):
        started = time.perf_counter()
        with pytest.raises(Unusable, match="image too large"):
            check_size(make(width, height))
        assert time.perf_counter() - started < 0.5


def test_what_is_no_image_is_pillows_to_refuse():
    whole = encode(picture(0))
    for data in (b"", b"\xff\xd8", b"\xff\xd8\xff", b"no image", whole[:100], b"\xff\xd8\xff\xe0\0\0" * 3):
        with pytest.raises((OSError, SyntaxError)):
            image_size(data)
    assert image_size(whole[: len(whole) // 2]) == (48, 40)  # the header is whole: decoding will find out
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS  # Pillow's own guard stays as it was
