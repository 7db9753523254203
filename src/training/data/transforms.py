"""From an encoded image to the views that the target and the reference see.

The target's train transform is open_clip's for its preprocess config and ``--aug-cfg``: a random resized crop,
then perhaps changes of color, then "to tensor, normalize". The last two are left to the device: a view is uint8.
Decoding, crop and resize stay in uint8 tensors from the first byte on: libjpeg-turbo writes rows of RGB pixels,
and torch's antialiased resize takes and gives them in that order. Images and views are [3, H, W] by their shape
and H, W, 3 in memory (channels last); nothing is transposed on the way to the device.

Pixels are those of open_clip's transform of the same crop, up to rounding: both decoders are libjpeg-turbo, both
resizes are Pillow's filter in fixed-point arithmetic. What tensors cannot express, open_clip's own transforms do
on Pillow images: changes of color (after the crop, on the small picture), and all of ``use_timm=True``, whose
result is used as it is: float, normalized.

The reference sees the same view: the same crop of the same image and the same color changes, through its own size
and interpolation.

Random numbers belong to the sample and follow from its ``seed``. The crop is drawn from a generator of its own.
Transforms that run as they are draw from the global generators, the same numbers whatever the size of the view:
these are seeded for the target, again for the reference, and then restored.
"""

from __future__ import annotations

import io
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.io
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision import transforms as tv
from torchvision.transforms import functional as tvf

log = logging.getLogger(__name__)

_JPEG = b"\xff\xd8\xff"
_TRIES = 10  # crops drawn before a fixed one is taken, as in torchvision


class Views(NamedTuple):
    """One sample as the target and as the reference see it, uint8 or normalized float, [3, H, W] each.

    ``reference`` is None where ``target`` serves both, or without a reference.
    """

    target: Tensor
    reference: Tensor | None


class Box(NamedTuple):
    """Rows ``top`` to ``top + height`` and columns ``left`` to ``left + width`` of an image."""

    top: int
    left: int
    height: int
    width: int


class TrainView:
    """Random views of an image for the target and, with ``reference``, for the reference model.

    ``aug_cfg`` are the fields of open_clip's ``AugmentationCfg``; ``rand_augment`` adds torchvision's RandAugment.
    ValueError: an unknown field of ``aug_cfg``.
    """

    def __init__(
        self,
        target: PreprocessCfg,
        reference: PreprocessCfg | None = None,
        aug_cfg: Mapping[str, Any] | None = None,
        rand_augment: bool = False,
    ) -> None:
        augmentation = _augmentation(aug_cfg or {})
        steps = _steps(target, augmentation, rand_augment)
        self._in_timm = augmentation.use_timm
        self._target = _View(steps) if self._in_timm else _CropView(steps)
        self._reference = None
        if self._in_timm:
            log.info("--aug-cfg asks for timm's transforms: images are normalized in the loader, as float")
        elif slow := ", ".join(self._target.color_steps):
            log.info("augmentation by %s goes through Pillow images, after the crop", slow)
        if not self._in_timm and _jpeg_decoder() is None:
            log.warning("this torchvision decodes no JPEGs: Pillow does, to the same pixels, in more time")
        if reference is not None and not _same_pixels(target, reference, on_device=not self._in_timm):
            steps = _steps(reference, augmentation, rand_augment)
            self._reference = _View(steps) if self._in_timm else _CropView(steps, _interpolation(reference))

    def decode(self, image: bytes | str | Image.Image) -> Tensor | Image.Image:
        """What a view of ``image`` is made from: an RGB image as ``decode`` or ``decode_pixels`` gives it."""
        return decode(image) if self._in_timm else decode_pixels(image)

    def __call__(self, image: Tensor | Image.Image, seed: int) -> Views:
        """Views of what ``decode`` gave, fixed by ``seed`` (64 bits)."""
        return Views(self._target(image, seed), None if self._reference is None else self._reference(image, seed))


def eval_transform(preprocess: PreprocessCfg) -> Callable[[Image.Image], Tensor]:
    """open_clip's transform for evaluation: a PIL image to float [3, H, W], normalized."""
    return image_transform_v2(preprocess, is_train=False)


def decode(image: bytes | str | Image.Image) -> Image.Image:
    """An RGB image from its encoded bytes or its path. Grey, CMYK and palette are converted, alpha is dropped.

    Whatever is wrong with the file, Pillow's own error comes out; its decoders raise many kinds.
    """
    if not isinstance(image, Image.Image):
        image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB Pillow would warn
    return image.convert("RGB")


def decode_pixels(image: bytes | str | Image.Image) -> Tensor:
    """The same as a tensor, uint8 [3, H, W], channels last; JPEGs without Pillow."""
    if isinstance(image, str):
        image = Path(image).read_bytes()
    if isinstance(image, bytes) and image.startswith(_JPEG) and (decode_jpeg := _jpeg_decoder()) is not None:
        with suppress(RuntimeError):  # Pillow reads some more, and says better what is wrong with the rest
            return decode_jpeg(image)
    return torch.from_numpy(np.array(decode(image))).permute(2, 0, 1)


@cache
def _jpeg_decoder() -> Callable[[bytes], Tensor] | None:
    """torchvision's: bytes to uint8 [3, H, W]; None where there is none.

    It is deprecated since torchvision 0.29, to be removed, and it has always been missing from builds without
    libjpeg.
    """

    def decode_jpeg(image: bytes) -> Tensor:
        # A copy, since torch takes no memory that it may not write to.
        return torchvision.io.decode_jpeg(torch.frombuffer(bytearray(image), dtype=torch.uint8), mode=mode)

    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "jpeg")
    try:
        mode = torchvision.io.ImageReadMode.RGB
        decode_jpeg(file.getvalue())
    except (AttributeError, RuntimeError):
        return None
    return decode_jpeg


def random_box(height: int, width: int, scale: Sequence[float], ratio: Sequence[float], rng: random.Random) -> Box:
    """A crop distributed as torchvision's ``RandomResizedCrop``: ``scale`` of the area, ``ratio`` of its sides."""
    # Of Random's methods only this one promises the same numbers under every release of Python.
    draw = rng.random
    low, span = math.log(ratio[0]) / 2, math.log(ratio[1] / ratio[0]) / 2
    for _ in range(_TRIES):
        side = math.sqrt(height * width * (scale[0] + (scale[1] - scale[0]) * draw()))
        stretch = math.exp(low + span * draw())  # the root of w / h
        w, h = round(side * stretch), round(side / stretch)
        if 0 < w <= width and 0 < h <= height:
            return Box(int(draw() * (height - h + 1)), int(draw() * (width - w + 1)), h, w)
    w, h = width, height
    if width < min(ratio) * height:
        h = round(width / min(ratio))
    elif width > max(ratio) * height:
        w = round(height * max(ratio))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def resized_crop(image: Tensor, box: Box, size: tuple[int, int], mode: str) -> Tensor:
    """``box`` of a uint8 ``image`` [3, H, W] at ``size`` = (h, w), uint8 [3, h, w], channels last.

    ``mode``: "bicubic" or "bilinear", both antialiased.
    """
    top, left, height, width = box
    rows = image.permute(1, 2, 0)[top : top + height, left : left + width].unsqueeze(0)
    # torch's fast path for RGB bytes wants them packed, with strides that say so; whole rows are already.
    part = rows.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return F.interpolate(part, size, mode=mode, antialias=True).squeeze(0)


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Leave Python's, numpy's and torch's (CPU) random state as it was before the body."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 see seed_all
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's CPU generators; ``torch.manual_seed`` would seed the devices too."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 timm draws from numpy's global generator
    torch.default_generator.manual_seed(seed)


class _View:
    """One model's view of a Pillow image by the transforms ``steps`` as they are."""

    def __init__(self, steps: list[Callable]) -> None:
        self._steps = tv.Compose(steps)

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        with isolated_rng():
            seed_all(seed)
            return self._steps(image)


class _CropView:
    """One model's view of decoded pixels: the crop of ``steps`` on tensors, their changes of color as they are.

    open_clip trains with bicubic crops whatever the config says; ``mode`` is for a frozen model, which was
    evaluated with its own.
    """

    def __init__(self, steps: list[Callable], mode: str = "bicubic") -> None:
        crop, _to_rgb, *colors, _to_tensor, _normalize = steps
        assert isinstance(crop, tv.RandomResizedCrop) and isinstance(_normalize, tv.Normalize), steps
        self._scale, self._ratio, self._size, self._mode = crop.scale, crop.ratio, tuple(crop.size), mode
        self._colors = _View([tvf.to_pil_image, *colors, tvf.pil_to_tensor]) if colors else None
        self.color_steps = [type(step).__name__ for step in colors]

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        box = random_box(*image.shape[1:], self._scale, self._ratio, random.Random(seed))
        view = resized_crop(image, box, self._size, self._mode)
        return view if self._colors is None else self._colors(view, seed)


def _steps(preprocess: PreprocessCfg, augmentation: AugmentationCfg, rand_augment: bool) -> list[Callable]:
    """open_clip's train transform of a Pillow image, with RandAugment before "to tensor"."""
    steps = list(image_transform_v2(preprocess, is_train=True, aug_cfg=augmentation).transforms)
    if rand_augment:
        to_tensor = next(i for i, step in enumerate(steps) if isinstance(step, tv.ToTensor))
        steps.insert(to_tensor, tv.RandAugment())
    return steps


def _augmentation(aug_cfg: Mapping[str, Any]) -> AugmentationCfg:
    known = AugmentationCfg.__dataclass_fields__
    if unknown := set(aug_cfg) - set(known):
        raise ValueError(f"--aug-cfg: unknown {', '.join(sorted(unknown))}; open_clip knows {', '.join(known)}")
    augmentation = AugmentationCfg(**aug_cfg)
    jitter = augmentation.color_jitter
    if augmentation.color_jitter_prob and not augmentation.use_timm and np.shape(jitter) != (4,):
        raise ValueError(
            f"--aug-cfg color_jitter={jitter}: with color_jitter_prob it has to be four numbers, "
            "(brightness, contrast, saturation, hue)"
        )
    return augmentation


def _same_pixels(target: PreprocessCfg, reference: PreprocessCfg, on_device: bool) -> bool:
    """Whether the target's view serves the reference: it normalizes uint8 itself and takes floats as they are."""
    if _size(target) != _size(reference):
        return False
    if on_device:
        return _interpolation(reference) == "bicubic"
    fields = ("interpolation", "mean", "std")
    return all(getattr(target, field) == getattr(reference, field) for field in fields)


def _size(preprocess: PreprocessCfg) -> tuple[int, int]:
    size = preprocess.size
    return (size, size) if isinstance(size, int) else tuple(size)


def _interpolation(preprocess: PreprocessCfg) -> str:
    return "bilinear" if preprocess.interpolation == "bilinear" else "bicubic"
