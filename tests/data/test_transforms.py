"""Views of images: against open_clip's own transform, and the reference's against the target's."""

from __future__ import annotations

import io
import random
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.io
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tvf

from tests.support.shards import encode, picture
from training.data.decode import decode, decode_pixels, jpeg_decoder
from training.data.transforms import Box, FixedView, TrainView, eval_transform, random_box, resized_crop
from training.rng import isolated_rng, seed_all

CROP = {"scale": (0.3, 0.8)}
COLOR = {"color_jitter": (0.4, 0.4, 0.4, 0.1), "color_jitter_prob": 0.8, "gray_scale_prob": 0.3}
SHIPPED = ("matplotlib/mpl-data/sample_data/*.jpg", "sklearn/datasets/images/*.jpg", "skimage/data/rocket.jpg")


def photographs() -> list[Image.Image]:
    """Those that installed packages ship; matplotlib, which is required, has one."""
    found = []
    for pattern in SHIPPED:
        package, _, rest = pattern.partition("/")
        if spec := find_spec(package):
            found += sorted(Path(spec.origin).parent.glob(rest))
    return [Image.open(path).convert("RGB") for path in found]


def photo(i: int = 3, size=(160, 120)) -> Image.Image:
    return picture(i, size)


def view(*args, seed: int = 11, image: Image.Image | None = None, **options):
    make = TrainView(*args, **options)
    return make(make.decode(image or photo()), seed)


def same_crop(image: Image.Image, box: Box, preprocess: PreprocessCfg, monkeypatch) -> torch.Tensor:
    """``box`` by open_clip's own train transform, in levels of 0..255."""
    monkeypatch.setattr(RandomResizedCrop, "get_params", staticmethod(lambda *_: tuple(box)))
    normalized = image_transform_v2(preprocess, is_train=True)(image)
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (preprocess.mean, preprocess.std))
    return (normalized * std + mean) * 255


@pytest.mark.parametrize("size", [224, (96, 160), 500])
def test_pixels_are_those_of_open_clips_transform_of_the_same_crop(size, monkeypatch):
    preprocess = PreprocessCfg(size=size)
    make = TrainView(preprocess, aug_cfg=CROP)
    shape = (3, *(size if isinstance(size, tuple) else (size, size)))
    photos = photographs()
    assert photos
    for i, image in enumerate(photos):
        encoded = encode(image, subsampling=i % 3)
        target = make(make.decode(encoded), seed=i).target
        assert target.dtype == torch.uint8 and target.shape == shape
        box = random_box(*reversed(image.size), CROP["scale"], (3 / 4, 4 / 3), random.Random(i))
        expected = same_crop(decode(encoded), box, preprocess, monkeypatch)
        difference = (target - expected).abs()
        assert difference.mean() <= 0.05 and difference.max() <= 3


def test_bilinear_pixels_are_pillows():
    for image in photographs():
        seen = resized_crop(decode_pixels(image), Box(10, 20, 200, 300), (224, 224), "bilinear")
        expected = image.crop((20, 10, 320, 210)).resize((224, 224), Image.Resampling.BILINEAR)
        difference = np.abs(seen.permute(1, 2, 0).numpy().astype(float) - np.asarray(expected, dtype=float))
        assert difference.mean() <= 0.05 and difference.max() <= 3


@pytest.mark.parametrize("size", [(423, 560), (100, 300), (1, 1)])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 1.0)])
def test_crops_are_distributed_like_torchvisions(size, scale):
    """Means of 3000 crops agree within 4 standard errors; spreads and extremes agree roughly."""
    n, ratio = 3000, (3 / 4, 4 / 3)
    rng = random.Random(7)
    ours = np.array([random_box(*size, scale, ratio, rng) for _ in range(n)], dtype=float)
    with isolated_rng():
        seed_all(1)
        image = torch.empty(3, *size)
        theirs = [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(n)]
    theirs = np.array(theirs, dtype=float)

    def area_and_ratio(boxes):
        return np.stack([boxes[:, 2] * boxes[:, 3], boxes[:, 2] / boxes[:, 3]], 1)

    for a, b in ((ours, theirs), (area_and_ratio(ours), area_and_ratio(theirs))):
        assert (np.abs(a.mean(0) - b.mean(0)) <= 4 * np.sqrt((a.var(0) + b.var(0)) / n) + 1e-9).all()
        assert np.allclose(a.std(0), b.std(0), rtol=0.1, atol=1e-9)
        for extreme in (np.min, np.max):
            assert np.allclose(extreme(a, 0), extreme(b, 0), rtol=0.15, atol=3)


@pytest.mark.parametrize(("size", "box"), [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10))])
def test_where_no_crop_fits_the_middle_is_taken(size, box):
    assert random_box(*size, (0.9, 1.0), (3 / 4, 4 / 3), random.Random(1)) == box


def test_a_view_is_fixed_by_its_seed_alone():
    make = TrainView(PreprocessCfg(size=32), aug_cfg={**CROP, **COLOR})
    pixels = make.decode(encode(photo()))
    first = [make(pixels, seed).target for seed in range(8)]
    random.seed(5)
    torch.manual_seed(5)
    again = [make(pixels, seed).target for seed in reversed(range(8))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert len({a.numpy().tobytes() for a in first}) == 8
    before = random.random(), torch.rand(1)
    random.seed(5)
    torch.manual_seed(5)
    make(pixels, 2**64 - 1)
    assert (random.random(), torch.rand(1)) == before


def test_views_keep_bytes_in_the_order_of_pixels():
    """So that no copy on the way to the device is a transposition."""
    for aug_cfg in ({}, COLOR):
        for data in (encode(photo()), encode(photo(), "png")):
            make = TrainView(PreprocessCfg(size=32), aug_cfg=aug_cfg)
            assert make(make.decode(data), 1).target.stride() == (1, 3 * 32, 3)
    pixels = decode_pixels(encode(photo()))
    for box in (Box(0, 0, 120, 160), Box(5, 0, 80, 160), Box(0, 7, 120, 60), Box(5, 7, 1, 1), Box(5, 7, 1, 160)):
        assert resized_crop(pixels, box, (32, 32), "bicubic").stride() == (1, 3 * 32, 3)


def test_color_steps_are_open_clips_after_the_crop(monkeypatch, caplog):
    caplog.set_level("INFO")
    preprocess, aug_cfg = PreprocessCfg(size=40), {"scale": (1.0, 1.0), **COLOR}
    seen = [view(preprocess, aug_cfg=aug_cfg, seed=seed).target for seed in range(6)]
    assert sum("color_jitter, gray_scale" in r.message for r in caplog.records) == 6
    plain = [view(preprocess, aug_cfg={"scale": (1.0, 1.0)}, seed=seed).target for seed in range(6)]
    assert any(torch.equal(t[0], t[1]) and torch.equal(t[0], t[2]) for t in seen)
    assert not any(torch.equal(t[0], t[1]) for t in plain)
    steps = image_transform_v2(preprocess, is_train=True, aug_cfg=dict(aug_cfg)).transforms[2:4]
    for seed, (target, crop) in enumerate(zip(seen, plain)):
        with isolated_rng():
            seed_all(seed)
            image = tvf.to_pil_image(crop)
            for step in steps:
                image = step(image)
        assert torch.equal(tvf.pil_to_tensor(image), target)


@pytest.mark.parametrize("aug_cfg", [CROP, {**CROP, **COLOR}])
@pytest.mark.parametrize(("rand_augment", "tolerance"), [(False, 2.0), (True, 6.0)])
def test_reference_sees_the_same_view_at_its_own_size(aug_cfg, rand_augment, tolerance):
    """Both views, brought to 16×16, agree; views of two seeds do not."""

    def small(tensor):
        return tvf.resize(tensor.float(), [16, 16], antialias=True)

    make = TrainView(PreprocessCfg(size=48), PreprocessCfg(size=64), aug_cfg, rand_augment)
    pixels = make.decode(photo())
    near, far = [], []
    for seed in range(12):
        target, reference = make(pixels, seed)
        assert target.shape == (3, 48, 48) and reference.shape == (3, 64, 64)
        near.append((small(target) - small(reference)).abs().mean().item())
        far.append((small(make(pixels, seed + 100).target) - small(reference)).abs().mean().item())
    assert np.median(near) < tolerance and np.median(far) > 4 * np.median(near)


def test_one_view_serves_both_where_only_normalization_differs():
    target = PreprocessCfg(size=32)
    normalized_otherwise = PreprocessCfg(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert view(target, normalized_otherwise).reference is None
    assert view(target).reference is None
    bilinear = view(target, PreprocessCfg(size=32, interpolation="bilinear"))
    assert not torch.equal(bilinear.target, bilinear.reference)
    assert (bilinear.target.float() - bilinear.reference.float()).abs().mean() < 4
    assert torch.equal(view(PreprocessCfg(size=32, interpolation="bilinear")).target, view(target).target)


def test_reference_interpolates_as_its_config_says():
    target, reference = PreprocessCfg(size=48), PreprocessCfg(size=32, interpolation="bilinear")
    seen = view(target, reference, aug_cfg={"scale": (1.0, 1.0)}, image=photo(size=(96, 96)), seed=1).reference
    expected = {
        mode: np.asarray(photo(size=(96, 96)).resize((32, 32), mode))
        for mode in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    }
    got = seen.permute(1, 2, 0).numpy().astype(float)
    assert np.abs(got - expected[Image.Resampling.BILINEAR]).max() <= 1
    assert np.abs(got - expected[Image.Resampling.BICUBIC]).max() > 1


def test_timm_transforms_are_used_as_they_are(caplog):
    caplog.set_level("INFO")
    aug_cfg = {"use_timm": True, "scale": (0.4, 0.9), "re_prob": 1.0, "color_jitter": 0.3}
    target = PreprocessCfg(size=48)
    make = TrainView(target, PreprocessCfg(size=64), aug_cfg)
    assert len([r for r in caplog.records if "timm" in r.message]) == 1
    first, again, other = (make(make.decode(encode(photo(), "png")), seed) for seed in (5, 5, 6))
    with isolated_rng():
        seed_all(5)
        expected = image_transform_v2(target, is_train=True, aug_cfg=dict(aug_cfg))(photo())
    assert first.target.is_floating_point() and torch.equal(first.target, expected)
    assert torch.equal(first.target, again.target) and not torch.equal(first.target, other.target)
    assert first.reference.shape == (3, 64, 64) and torch.equal(first.reference, again.reference)
    assert view(target, PreprocessCfg(size=48), aug_cfg={"use_timm": True}).reference is None
    assert view(target, PreprocessCfg(size=48, mean=(0, 0, 0)), aug_cfg={"use_timm": True}).reference is not None


def test_rand_augment_changes_the_view_and_keeps_it_uint8():
    preprocess = PreprocessCfg(size=32)
    plain = [view(preprocess, seed=seed).target for seed in range(8)]
    augmented = [view(preprocess, rand_augment=True, seed=seed).target for seed in range(8)]
    assert all(a.dtype == torch.uint8 for a in augmented)
    assert sum(not torch.equal(a, b) for a, b in zip(plain, augmented)) >= 6
    timm = {"aug_cfg": {"use_timm": True}}
    floats, plain_floats = view(preprocess, rand_augment=True, **timm).target, view(preprocess, **timm).target
    assert floats.is_floating_point() and not torch.equal(floats, plain_floats)


@pytest.mark.parametrize(
    ("aug_cfg", "message"),
    [
        ({"scales": (0.1, 1.0)}, "--aug-cfg: unknown scales"),
        ({"color_jitter": 0.4, "color_jitter_prob": 0.8}, "--aug-cfg color_jitter=0.4"),
    ],
)
def test_wrong_augmentation_is_refused(aug_cfg, message):
    with pytest.raises(ValueError, match=message):
        TrainView(PreprocessCfg(size=32), aug_cfg=aug_cfg)


def test_random_state_is_isolated():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    seed_all(1)
    before = draw()
    seed_all(1)
    with isolated_rng():
        seed_all(2)
        inside = draw()
    assert draw() == before != inside
    seed_all(1)
    with pytest.raises(KeyError), isolated_rng():
        draw()
        raise KeyError
    assert draw() == before
    seed_all(2**64 - 1)  # seeds have 64 bits


def test_decoding_any_mode_gives_rgb():
    rgb = photo(size=(40, 30))
    grey, cmyk = rgb.convert("L"), rgb.convert("CMYK")
    half = rgb.copy()
    half.putalpha(128)
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    bitmap = rgb.convert("1")
    pixels = np.asarray(rgb, dtype=float)
    for data, expected, tolerance in (
        (encode(rgb, "png"), pixels, 0),
        (encode(rgb, "webp", lossless=True), pixels, 0),
        (encode(rgb), pixels, 4),
        (encode(grey, "png"), np.repeat(np.asarray(grey, dtype=float)[..., None], 3, 2), 0),
        (encode(grey), np.repeat(np.asarray(grey, dtype=float)[..., None], 3, 2), 4),
        (encode(cmyk), pixels, 6),
        (encode(half, "png"), pixels, 0),
        (encode(grey.convert("LA"), "png"), np.repeat(np.asarray(grey, dtype=float)[..., None], 3, 2), 0),
        (encode(palette, "png"), np.asarray(palette.convert("RGB"), dtype=float), 0),
        (encode(rgb, keep_rgb=True), pixels, 4),
        (encode(rgb, progressive=True), pixels, 4),
        (encode(bitmap, "png"), np.repeat(np.asarray(bitmap, dtype=float)[..., None] * 255, 3, 2), 0),
    ):
        image = decode(data)
        assert image.mode == "RGB" and image.size == (40, 30)
        assert np.array_equal(decode_pixels(data).permute(1, 2, 0).numpy(), np.asarray(image))
        assert np.abs(np.asarray(image, dtype=float) - expected).mean() <= tolerance
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = io.BytesIO()
        palette.save(file, "png", transparency=bytes(range(256)))
        assert decode(file.getvalue()).mode == "RGB"


@pytest.mark.parametrize("missing", ["decode_jpeg", "ImageReadMode", "libjpeg"])
def test_without_torchvisions_decoder_pillow_gives_the_same_pixels(missing, monkeypatch, caplog):
    files = [encode(photo(), subsampling=i) for i in range(3)] + [encode(photo().convert("L"))]
    expected = [decode_pixels(file) for file in files]
    TrainView(PreprocessCfg(size=32))
    assert not caplog.records
    if missing == "libjpeg":
        monkeypatch.setattr("torchvision.io.image._has_image_ops", lambda: False)
    else:
        monkeypatch.delattr(torchvision.io, missing)
    jpeg_decoder.cache_clear()
    try:
        assert jpeg_decoder() is None
        for file, pixels in zip(files, expected, strict=True):
            assert torch.equal(decode_pixels(file), pixels) and decode_pixels(file).stride() == pixels.stride()
        TrainView(PreprocessCfg(size=32), aug_cfg={"use_timm": True})
        assert not [r for r in caplog.records if r.levelname == "WARNING"]
        TrainView(PreprocessCfg(size=32))
        (told,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert "Pillow does" in told
    finally:
        jpeg_decoder.cache_clear()


def test_decoding_paths_pictures_and_what_is_no_image(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(photo(), "png"))
    (tmp_path / "a.jpg").write_bytes(encode(photo()))
    assert np.array_equal(np.asarray(decode(str(tmp_path / "a.png"))), np.asarray(photo()))
    assert decode(photo()).size == (160, 120)
    for image in (photo(), str(tmp_path / "a.png"), str(tmp_path / "a.jpg"), encode(photo())):
        pixels = decode_pixels(image)
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 120, 160)
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(decode(image)))
    whole = encode(photo())
    for data in (b"", b"no image", whole[:500], whole[: len(whole) // 2], encode(photo(), "png")[:500]):
        for read in (decode, decode_pixels):
            with pytest.raises((OSError, SyntaxError)):
                read(data)


def test_eval_transform_is_open_clips():
    preprocess = PreprocessCfg(size=32, mean=(0.1, 0.2, 0.3), resize_mode="squash", interpolation="bilinear")
    expected = image_transform_v2(preprocess, is_train=False)(photo())
    assert torch.equal(eval_transform(preprocess)(photo()), expected) and expected.shape == (3, 32, 32)


@pytest.mark.skipif(jpeg_decoder() is None, reason="Pillow decodes everything")
@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
def test_what_training_decodes_is_decoded_when_features_are_written(resize_mode):
    """A JPEG with a damaged marker: libjpeg does with the standard tables what Pillow refuses to open."""
    damaged = encode(photo(), quality=85).replace(b"\xff\xc4\x00", b"\xff\x01\x00", 1)
    with pytest.raises(OSError):
        decode(damaged)
    preprocess = PreprocessCfg(size=32, resize_mode=resize_mode)
    train, fixed = TrainView(preprocess), FixedView(preprocess)
    assert train(train.decode(damaged), 0).target.shape == fixed(fixed.decode(damaged)).shape == (3, 32, 32)


def test_the_whole_view_is_open_clips():
    preprocess = PreprocessCfg(size=32, resize_mode="squash")
    fixed = FixedView(preprocess)
    assert torch.equal(fixed(fixed.decode(encode(photo()))), eval_transform(preprocess)(decode(encode(photo()))))
