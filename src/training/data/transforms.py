"""From a decoded image to the views that the target and the reference see.

The target's train transform is open_clip's for its preprocess config and ``--aug-cfg``: a random resized crop,
then possibly changes of color, then "to tensor, normalize". The last two are left to the device: a view is uint8.
Crop and resize work on uint8 tensors, as decoding does (``decode``). torch's antialiased resize takes and returns
rows of RGB bytes: images and views are [3, H, W] by their shape and H, W, 3 in memory (channels last), and nothing
is transposed on the way to the device.

The pixels are those of open_clip's transform of the same crop, up to rounding: both decoders are libjpeg-turbo,
and both resizes are Pillow's filter in fixed-point arithmetic. What tensors cannot express is done by
open_clip's own transforms on Pillow images: changes of color (after the crop, on the small picture), and
everything under ``use_timm=True``, whose result is used as it is: float and normalized.

The reference sees the same view: the same crop of the same image and the same changes of color, at its own size
and with its own interpolation.

Random numbers belong to the sample and follow from its ``seed``. The crop is drawn from a separate generator.
open_clip's own transforms draw from the global generators, and draw the same numbers whatever the size of the
view: the global generators are seeded for the target, seeded again for the reference, and restored afterwards.

A model that looks at each image once, so that its results can be stored, has one fixed view of the image
(``FixedView``): the largest centred part with the shape of the model's input, resized to it. That is open_clip's
evaluation transform on decoded pixels, so a square image gives exactly the pixels that the reference gets in
training with ``--aug-cfg scale=(1.0,1.0)``. Where the model's config does not crop (``resize_mode`` squash or
longest), open_clip's own transform is used. Or it has several random views, fixed by seeds of their own
(``KeptViews``), and training gives the same seeds to the target.
"""

from __future__ import annotations

import logging
import math
import random
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision import transforms as tv
from torchvision.transforms import functional as tvf

from training.data.decode import decode, decode_pixels, jpeg_decoder
from training.data.samples import Unusable
from training.rng import isolated_rng, seed_all, view_seed

log = logging.getLogger(__name__)

# RandAugment's operations, in torchvision's order: DataCompDR numbers them.
OPERATIONS = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color",
              "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize")  # fmt: skip
_TRIES = 10  # crops drawn before a fixed one is taken, as in torchvision


class Views(NamedTuple):
    """One sample as the target and as the reference see it, uint8 or normalized float, [3, H, W] each.

    ``reference`` is None where ``target`` serves both models, and where there is no reference.
    """

    target: Tensor
    reference: Tensor | None


class Box(NamedTuple):
    """Rows ``top`` to ``top + height`` and columns ``left`` to ``left + width`` of an image."""

    top: int
    left: int
    height: int
    width: int


class Replay(NamedTuple):
    """A view that was drawn before: a crop, then RandAugment's ``operations`` with their magnitudes."""

    box: Box
    operations: tuple[tuple[str, float], ...] = ()

    def check(self, height: int, width: int) -> None:
        """Unusable: the crop is not inside an image of this size."""
        if self.box.top + self.box.height > height or self.box.left + self.box.width > width:
            raise Unusable(
                "crop is outside the image", f"{self.box} of {height} x {width}: take the images at full size"
            )


class TrainView:
    """Random views of an image for the target and, with ``reference``, for the reference model.

    ``aug_cfg`` are the fields of open_clip's ``AugmentationCfg``; ``rand_augment`` adds torchvision's RandAugment.
    ValueError: ``aug_cfg`` has an unknown field.
    """

    def __init__(
        self,
        target: PreprocessCfg,
        reference: PreprocessCfg | None = None,
        aug_cfg: Mapping[str, Any] | None = None,
        rand_augment: bool = False,
    ) -> None:
        augmentation = _augmentation(aug_cfg or {})
        self._target = _random_view(target, augmentation, rand_augment)
        self._reference: _View | _CropView | None = None
        if isinstance(self._target, _View):
            log.info("--aug-cfg use_timm=True: timm transforms images, and the loader normalizes them as float")
        else:
            if slow := ", ".join(self._target.color_steps):
                log.info("augmentation by %s is done on Pillow images, after the crop", slow)
            if jpeg_decoder() is None:
                log.warning("this torchvision cannot decode JPEGs: Pillow does, to the same pixels but slower")
        if reference is not None and not _same_pixels(target, reference, on_device=not augmentation.use_timm):
            self._reference = _random_view(reference, augmentation, rand_augment, _interpolation(reference))

    def decode(self, image: bytes | str | Image.Image) -> Tensor | Image.Image:
        """What a view of ``image`` is made from: an RGB image as ``decode`` or ``decode_pixels`` returns it."""
        return self._target.decode(image)

    def __call__(self, image: Tensor | Image.Image, seed: int) -> Views:
        """Views of what ``decode`` returned, fixed by ``seed`` (64 bits)."""
        return Views(self._target(image, seed), None if self._reference is None else self._reference(image, seed))

    def replay(self, image: Tensor | Image.Image, view: Replay) -> Tensor:
        """The target's view of what ``decode`` returned, as ``view`` says; not with timm's transforms.

        Unusable: the crop is not inside the image.
        """
        assert isinstance(self._target, _CropView) and isinstance(image, Tensor), "refused with use_timm=True"
        view.check(*image.shape[1:])
        return self._target.replay(image, view)


class FixedView:
    """The view of a model with ``preprocess``: uint8 [3, h, w], or float and normalized where it does not crop."""

    def __init__(self, preprocess: PreprocessCfg) -> None:
        self.size, self.mode = _size(preprocess), _interpolation(preprocess)
        self._whole = None if preprocess.resize_mode == "shortest" else eval_transform(preprocess)

    def decode(self, image: bytes | str | Image.Image) -> Tensor | Image.Image:
        """The image as ``__call__`` takes it."""
        # Decoded as in training: Pillow refuses some damaged JPEGs of which training needs what is stored.
        pixels = decode_pixels(image)
        return pixels if self._whole is None else tvf.to_pil_image(pixels)

    def __call__(self, image: Tensor | Image.Image) -> Tensor:
        """The view of what ``decode`` returned."""
        if isinstance(image, Tensor):
            height, width = image.shape[1:]
            return resized_crop(image, centred(height, width, self.size), self.size, self.mode)
        assert self._whole is not None, "``decode`` returns a Pillow image only then"
        return self._whole(image)

    def __str__(self) -> str:
        return f"centre, {self.size[0]} x {self.size[1]}, {self.mode}" if self._whole is None else "whole"


class KeptViews:
    """The views of an image for which a frozen model with ``preprocess`` computes what is stored.

    With ``count`` 0 it is the fixed view. Else they are so many random ones, as a live reference sees them in
    training with ``aug_cfg`` and ``rand_augment``: number v of the image at ``row`` of the store is drawn with
    ``view_seed(seed, v, row)``.
    """

    def __init__(
        self,
        preprocess: PreprocessCfg,
        count: int = 0,
        seed: int = 0,
        aug_cfg: Mapping[str, Any] | None = None,
        rand_augment: bool = False,
    ) -> None:
        self.count, self.seed = count, seed
        self._view: FixedView | _View | _CropView = FixedView(preprocess)
        if count:
            augmentation = _augmentation(aug_cfg or {})
            self._view = _random_view(preprocess, augmentation, rand_augment, _interpolation(preprocess))

    def decode(self, image: bytes | str | Image.Image) -> Tensor | Image.Image:
        """The image as ``__call__`` takes it."""
        return self._view.decode(image)

    def __call__(self, image: Tensor | Image.Image, row: int) -> Tensor:
        """The views of what ``decode`` returned, [max(count, 1), 3, h, w]."""
        if isinstance(self._view, FixedView):
            return self._view(image)[None]
        return torch.stack([self._view(image, view_seed(self.seed, v, row)) for v in range(self.count)])


def centred(height: int, width: int, shape: tuple[int, int]) -> Box:
    """The largest box with the aspect ratio of ``shape`` = (h, w), in the middle of an image."""
    h, w = min(height, round(width * shape[0] / shape[1])), min(width, round(height * shape[1] / shape[0]))
    h, w = max(h, 1), max(w, 1)
    return Box((height - h) // 2, (width - w) // 2, h, w)


def describe_augmentation(aug_cfg: Mapping[str, Any], rand_augment: bool) -> str:
    """``--aug-cfg`` with open_clip's defaults, and ``--rand_augment``, as they are typed.

    Settings that mean the same give the same text. ValueError: ``aug_cfg`` has an unknown field.
    """
    fields = vars(_augmentation(aug_cfg)).items()
    told = [f"{name}={_typed(value)}" for name, value in fields if value is not None and value is not False]
    return f"--aug-cfg {shlex.join(told)}" + (" --rand_augment" if rand_augment else "")


def _typed(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"({','.join(map(_typed, value))})"
    return str(float(value)) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def eval_transform(preprocess: PreprocessCfg) -> Callable[[Image.Image], Tensor]:
    """open_clip's transform for evaluation: a PIL image to float [3, H, W], normalized."""
    return image_transform_v2(preprocess, is_train=False)


def random_box(height: int, width: int, scale: Sequence[float], ratio: Sequence[float], rng: random.Random) -> Box:
    """A crop distributed as torchvision's ``RandomResizedCrop``.

    ``scale``: smallest and largest share of the image's area; ``ratio``: smallest and largest width / height.
    """
    # The only method of Random that is documented to return the same numbers in every release of Python.
    draw = rng.random
    low, span = math.log(ratio[0]) / 2, math.log(ratio[1] / ratio[0]) / 2
    for _ in range(_TRIES):
        side = math.sqrt(height * width * (scale[0] + (scale[1] - scale[0]) * draw()))
        stretch = math.exp(low + span * draw())  # the square root of w / h
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
    # torch's fast path for RGB bytes needs packed memory and its strides; whole rows are packed already.
    part = rows.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return F.interpolate(part, size, mode=mode, antialias=True).squeeze(0)


_Step = Callable[[Any], Any]  # one of torchvision's, of an image or of its pixels


class _View:
    """One model's view by the transforms ``steps``, unchanged."""

    decode = staticmethod(decode)

    def __init__(self, steps: list[_Step]) -> None:
        self._steps = tv.Compose(steps)

    def __call__(self, image: Tensor | Image.Image, seed: int) -> Tensor:
        with isolated_rng():
            seed_all(seed)
            return self._steps(image)


class _CropView:
    """One model's view of decoded pixels: the crop of ``steps`` on tensors, their changes of color unchanged.

    open_clip trains with bicubic crops whatever the config says; ``mode`` is for a frozen model, which was
    evaluated with its own interpolation.
    """

    decode = staticmethod(decode_pixels)

    def __init__(self, steps: list[_Step], mode: str = "bicubic") -> None:
        crop, _to_rgb, *colors, _to_tensor, _normalize = steps
        assert isinstance(crop, tv.RandomResizedCrop) and isinstance(_normalize, tv.Normalize), steps
        self._scale, self._ratio, self._size, self._mode = crop.scale, crop.ratio, tuple(crop.size), mode
        self._colors = _View([tvf.to_pil_image, *colors, tvf.pil_to_tensor]) if colors else None
        self.color_steps = [type(step).__name__ for step in colors]

    def __call__(self, image: Tensor | Image.Image, seed: int) -> Tensor:
        assert isinstance(image, Tensor), "``TrainView.decode`` returns pixels"
        height, width = image.shape[1:]
        box = random_box(height, width, self._scale, self._ratio, random.Random(seed))
        view = resized_crop(image, box, self._size, self._mode)
        return view if self._colors is None else self._colors(view, seed)

    def replay(self, image: Tensor, view: Replay) -> Tensor:
        """The crop and the operations of ``view``."""
        # What RandAugment itself calls; nothing public applies an operation that was drawn before.
        from torchvision.transforms.autoaugment import _apply_op

        crop = resized_crop(image, view.box, self._size, self._mode)
        if not view.operations:
            return crop
        picture = tvf.to_pil_image(crop)
        for name, magnitude in view.operations:
            picture = _apply_op(picture, name, magnitude, tv.InterpolationMode.NEAREST, None)
        return tvf.pil_to_tensor(picture)


def _random_view(
    preprocess: PreprocessCfg, augmentation: AugmentationCfg, rand_augment: bool, mode: str = "bicubic"
) -> _View | _CropView:
    steps = _steps(preprocess, augmentation, rand_augment)
    return _View(steps) if augmentation.use_timm else _CropView(steps, mode)


def _steps(preprocess: PreprocessCfg, augmentation: AugmentationCfg, rand_augment: bool) -> list[_Step]:
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
            f"--aug-cfg color_jitter={jitter}: with color_jitter_prob it must be four numbers, "
            "(brightness, contrast, saturation, hue)"
        )
    return augmentation


def _same_pixels(target: PreprocessCfg, reference: PreprocessCfg, on_device: bool) -> bool:
    """Whether the target's view serves the reference: it normalizes uint8 itself and takes floats unchanged."""
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
