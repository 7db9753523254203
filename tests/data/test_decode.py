"""Sizes from headers agree with Pillow, pixels with open_clip's; gigapixels are refused without decoding them."""

from __future__ import annotations

import time

import numpy as np
import pytest
from PIL import Image
from webdataset.autodecode import imagehandler

from tests.support.shards import encode, picture
from tests.support.spoiled import jpeg_header, png_header
from training.data.decode import MAX_PIXELS, check_size, decode, decode_pixels, image_size
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
        started = time.process_time()
        with pytest.raises(Unusable, match="image too large"):
            check_size(make(width, height))
        assert time.process_time() - started < 0.5


def test_what_is_no_image_is_pillows_to_refuse():
    whole = encode(picture(0))
    for data in (b"", b"\xff\xd8", b"\xff\xd8\xff", b"no image", whole[:100], b"\xff\xd8\xff\xe0\0\0" * 3):
        with pytest.raises((OSError, SyntaxError)):
            image_size(data)
    assert image_size(whole[: len(whole) // 2]) == (48, 40)  # the header is whole: decoding will find out
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS  # Pillow's own guard stays as it was


def odd_pictures() -> dict[str, bytes]:
    """Pictures that a decoder could see in several ways."""
    plain, other = picture(3, (40, 30)), picture(4, (40, 30))
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a viewer turns it by 90 degrees
    deep = Image.fromarray(np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40))
    few_colors, clear = plain.quantize(16), plain.copy()
    clear.putalpha(other.convert("L"))
    return {
        **{f"rotated {kind}": encode(plain, kind, exif=turned) for kind in ("jpeg", "png", "webp")},
        "16 bits": encode(deep, "png"),
        **{
            f"animated {kind}": encode(plain, kind, save_all=True, append_images=[other])
            for kind in ("webp", "gif", "png")
        },
        "cmyk jpeg": encode(plain.convert("CMYK")),
        "grey jpeg": encode(plain.convert("L")),
        "grey and alpha": encode(plain.convert("LA"), "png"),
        "one bit": encode(plain.convert("1"), "png"),
        "palette": encode(few_colors, "png"),
        "palette with a clear color": encode(few_colors, "png", transparency=3),
        "palette with alpha": encode(few_colors, "png", transparency=bytes(range(0, 160, 10))),
        "alpha": encode(clear, "png"),
        "alpha in webp": encode(clear, "webp", lossless=True),
        "a clear color": encode(plain, "png", transparency=(3, 4, 5)),
    }


@pytest.mark.parametrize("name", odd_pictures())
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_pictures_look_as_in_open_clip(name):
    """open_clip reads shards by webdataset's handler "pilrgb"."""
    data = odd_pictures()[name]
    expected = np.asarray(imagehandler("pilrgb")("jpg", data))
    assert np.array_equal(np.asarray(decode(data)), expected)
    assert np.array_equal(decode_pixels(data).permute(1, 2, 0).numpy(), expected)


def test_what_becomes_of_odd_pictures():
    found = {name: np.asarray(decode(data)) for name, data in odd_pictures().items()}
    assert found["rotated png"].shape == (30, 40, 3)  # as stored, not as a viewer shows it
    assert np.array_equal(found["animated png"], np.asarray(picture(3, (40, 30))))  # the first frame
    assert np.array_equal(found["alpha"], np.asarray(picture(3, (40, 30))))  # alpha is dropped
    assert (found["16 bits"].reshape(-1, 3)[5:] == 255).all()  # not scaled: what is above 255 is white
