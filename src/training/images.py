"""From an encoded image to the views that the target and the reference see.

The target's train transform is open_clip's for its preprocess config and ``--aug-cfg``. Where it ends, as usual,
in "to tensor, normalize", those two are left to the device and a view is uint8 [3, H, W]; the pixels are the ones
that open_clip would have normalized. Other transforms (``use_timm=True``) are used as they are: float, normalized.

The reference sees the same view: the same crop of the same image and the same color changes, through its own size
and interpolation. Both transforms draw their random numbers in the same order, whatever their sizes, so the
reference's is simply run again from the same seed.

Random numbers belong to the sample: ``seed`` sets all generators that transforms use, inside ``isolated_rng``,
so that a view does not depend on which process makes it, nor anything else on how many were made.
"""

from __future__ import annotations

import io
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision import transforms as tv
from torchvision.transforms import functional as tvf

log = logging.getLogger(__name__)


class Views(NamedTuple):
    """One sample as the target and as the reference see it, uint8 or normalized float, [3, H, W] each.

    ``reference`` is None where ``target`` serves both, or without a reference.
    """

    target: Tensor
    reference: Tensor | None


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
        self._target, on_device = _train_transform(target, augmentation, rand_augment)
        self._reference = None
        if not on_device:
            log.info("--aug-cfg asks for timm's transforms: images are normalized in the loader, as float")
        if reference is not None and not _same_pixels(target, reference, on_device):
            self._reference, _ = _train_transform(reference, augmentation, rand_augment, own_interpolation=True)

    def __call__(self, image: Image.Image, seed: int) -> Views:
        """Views of an RGB ``image``, fixed by ``seed`` (64 bits). To be called inside ``isolated_rng``."""
        seed_all(seed)
        target = self._target(image)
        if self._reference is None:
            return Views(target, None)
        seed_all(seed)
        return Views(target, self._reference(image))


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


def _train_transform(
    preprocess: PreprocessCfg, augmentation: AugmentationCfg, rand_augment: bool, own_interpolation: bool = False
) -> tuple[tv.Compose, bool]:
    """The transform of one image, and whether normalization is left to the device (then it gives uint8).

    open_clip trains with bicubic crops whatever the config says; ``own_interpolation`` takes the config's, which a
    frozen model was evaluated with.
    """
    steps = list(image_transform_v2(preprocess, is_train=True, aug_cfg=augmentation).transforms)
    to_tensor = next(i for i, step in enumerate(steps) if isinstance(step, tv.ToTensor))
    if rand_augment:
        steps.insert(to_tensor, tv.RandAugment())
        to_tensor += 1
    if augmentation.use_timm:
        return tv.Compose(steps), False
    assert isinstance(steps[0], tv.RandomResizedCrop) and isinstance(steps[-1], tv.Normalize), steps
    assert to_tensor == len(steps) - 2, steps
    if own_interpolation:
        steps[0].interpolation = _interpolation(preprocess)
    return tv.Compose([*steps[:to_tensor], tvf.pil_to_tensor]), True


def _same_pixels(target: PreprocessCfg, reference: PreprocessCfg, on_device: bool) -> bool:
    """Whether the target's view serves the reference: it normalizes uint8 itself and takes floats as they are."""
    if _size(target) != _size(reference):
        return False
    if on_device:
        return _interpolation(reference) == tv.InterpolationMode.BICUBIC
    fields = ("interpolation", "mean", "std")
    return all(getattr(target, field) == getattr(reference, field) for field in fields)


def _size(preprocess: PreprocessCfg) -> tuple[int, int]:
    size = preprocess.size
    return (size, size) if isinstance(size, int) else tuple(size)


def _interpolation(preprocess: PreprocessCfg) -> tv.InterpolationMode:
    bilinear = preprocess.interpolation == "bilinear"
    return tv.InterpolationMode.BILINEAR if bilinear else tv.InterpolationMode.BICUBIC
