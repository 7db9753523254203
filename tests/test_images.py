"""Views of images: against open_clip's own transform, and the reference's against the target's."""

from __future__ import annotations

import io
import random
import warnings

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import functional as tvf

from shards import encode, picture
from training.images import TrainView, decode, eval_transform, isolated_rng, seed_all

CROP = {"scale": (0.3, 0.8)}
COLOR = {"color_jitter": (0.4, 0.4, 0.4, 0.1), "color_jitter_prob": 0.8, "gray_scale_prob": 0.3}


def photo(i: int = 3, size=(160, 120)) -> Image.Image:
    return picture(i, size)


def view(*args, seed: int = 11, image: Image.Image | None = None, **options):
    with isolated_rng():
        return TrainView(*args, **options)(image or photo(), seed)


@pytest.mark.parametrize("aug_cfg", [{}, CROP, {**CROP, **COLOR}])
@pytest.mark.parametrize("size", [32, (24, 40)])
def test_uint8_normalized_is_what_open_clip_gives(aug_cfg, size):
    preprocess = PreprocessCfg(size=size)
    for seed in range(6):
        target = view(preprocess, aug_cfg=aug_cfg, seed=seed).target
        assert target.dtype == torch.uint8
        assert target.shape == (3, *(size if isinstance(size, tuple) else (size, size)))
        with isolated_rng():
            seed_all(seed)
            expected = image_transform_v2(preprocess, is_train=True, aug_cfg=dict(aug_cfg))(photo())
        mean, std = (torch.tensor(c).view(3, 1, 1) for c in (preprocess.mean, preprocess.std))
        assert torch.allclose((target.float() / 255 - mean) / std, expected, atol=1e-6)


@pytest.mark.parametrize("aug_cfg", [CROP, {**CROP, **COLOR}])
@pytest.mark.parametrize(("rand_augment", "tolerance"), [(False, 2.0), (True, 6.0)])
def test_reference_sees_the_same_view_at_its_own_size(aug_cfg, rand_augment, tolerance):
    """Both views, brought to 16×16, agree; views of two seeds do not."""

    def small(tensor):
        return tvf.resize(tensor.float(), [16, 16], antialias=True)

    make = TrainView(PreprocessCfg(size=48), PreprocessCfg(size=64), aug_cfg, rand_augment)
    near, far = [], []
    with isolated_rng():
        for seed in range(12):
            target, reference = make(photo(), seed)
            assert target.shape == (3, 48, 48) and reference.shape == (3, 64, 64)
            near.append((small(target) - small(reference)).abs().mean().item())
            far.append((small(make(photo(), seed + 100).target) - small(reference)).abs().mean().item())
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
    got = seen.permute(1, 2, 0).numpy()
    assert np.array_equal(got, expected[Image.Resampling.BILINEAR])
    assert not np.array_equal(got, expected[Image.Resampling.BICUBIC])


def test_timm_transforms_are_used_as_they_are(caplog):
    caplog.set_level("INFO")
    aug_cfg = {"use_timm": True, "scale": (0.4, 0.9), "re_prob": 1.0, "color_jitter": 0.3}
    target = PreprocessCfg(size=48)
    make = TrainView(target, PreprocessCfg(size=64), aug_cfg)
    assert len([r for r in caplog.records if "timm" in r.message]) == 1
    with isolated_rng():
        first, again, other = make(photo(), 5), make(photo(), 5), make(photo(), 6)
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
        (encode(bitmap, "png"), np.repeat(np.asarray(bitmap, dtype=float)[..., None] * 255, 3, 2), 0),
    ):
        image = decode(data)
        assert image.mode == "RGB" and image.size == (40, 30)
        assert np.abs(np.asarray(image, dtype=float) - expected).mean() <= tolerance
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = io.BytesIO()
        palette.save(file, "png", transparency=bytes(range(256)))
        assert decode(file.getvalue()).mode == "RGB"


def test_decoding_paths_pictures_and_what_is_no_image(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(photo(), "png"))
    assert np.array_equal(np.asarray(decode(str(tmp_path / "a.png"))), np.asarray(photo()))
    assert decode(photo()).size == (160, 120)
    for data in (b"", b"no image", encode(photo())[:500], encode(photo(), "png")[:500]):
        with pytest.raises((OSError, SyntaxError)):
            decode(data)


def test_eval_transform_is_open_clips():
    preprocess = PreprocessCfg(size=32, mean=(0.1, 0.2, 0.3), resize_mode="squash", interpolation="bilinear")
    expected = image_transform_v2(preprocess, is_train=False)(photo())
    assert torch.equal(eval_transform(preprocess)(photo()), expected) and expected.shape == (3, 32, 32)
