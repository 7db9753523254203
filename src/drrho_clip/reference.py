"""The frozen reference model, which gives its embeddings of a batch: computed now, or read with the data.

DRRho-CLIP (arXiv:2505.06699) subtracts the reference's per-pair loss from the target's, distillation imitates
its softmax, selection ranks samples by it. All three need only the unit-norm embeddings of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drrho_clip.batch import Batch
from drrho_clip.normalize import normalize


class DualEncoder(Protocol):
    """What a reference model must be: an ``nn.Module`` with the two encoders that open_clip's models have."""

    def encode_image(self, image: Tensor, /, *, normalize: bool) -> Tensor:
        """[b, 3, H, W] -> [b, d_r]."""

    def encode_text(self, text: Tensor, /, *, normalize: bool) -> Tensor:
        """int64 [b, L] -> [b, d_r]."""

    def modules(self) -> Iterator[nn.Module]:
        """``nn.Module``'s."""

    def eval(self) -> object:
        """``nn.Module``'s."""

    def requires_grad_(self, requires_grad: bool) -> object:
        """``nn.Module``'s."""


class Reference:
    """A frozen CLIP model that runs on each batch.

    This class is not an ``nn.Module``. So a module that holds a reference does not train, move, save or wrap it,
    and its ``train()`` does not reach the reference's BatchNorm and dropout. ``module`` is put into eval mode, and
    its parameters no longer require gradients.

    ``mean``, ``std``   the reference's own normalization of pixels scaled to [0, 1].
    ``autocast_dtype``  the type for autocast; None: the model runs in the type of its weights, even if the caller
                        is inside an autocast context.
    """

    def __init__(
        self,
        module: DualEncoder,
        mean: Sequence[float],
        std: Sequence[float],
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        module.eval()
        module.requires_grad_(False)
        self.module = module
        self.mean, self.std = tuple(mean), tuple(std)
        self.autocast_dtype = autocast_dtype
        # Under autocast the first layer rounds its input to autocast's type anyway.
        self.image_dtype = autocast_dtype or _input_dtype(module)
        self._encode_image, self._encode_text = module.encode_image, module.encode_text

    def compile(self) -> Reference:
        """Run both towers through ``torch.compile`` from now on. Returns itself."""
        self._encode_image = torch.compile(self.module.encode_image)
        self._encode_text = torch.compile(self.module.encode_text)
        return self

    # no_grad, not inference_mode: the losses multiply these embeddings with ones that need a gradient, and
    # autograd refuses to save inference tensors for that.
    @torch.no_grad()
    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Image and text embeddings, each float32 [b, d_r] of unit norm, without a graph.

        They are computed from ``batch.ref_image`` and ``batch.ref_text`` if the batch has them, else from the
        target's inputs. They are normalized in float32, so that the norm is 1 to float32 precision under any
        autocast.
        """
        image = batch.image if batch.ref_image is None else batch.ref_image
        text = batch.text if batch.ref_text is None else batch.ref_text
        image = normalize(image, self.mean, self.std, self.image_dtype)
        with torch.autocast(image.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            image_features = self._encode_image(image, normalize=False)
            text_features = self._encode_text(text, normalize=False)
        return F.normalize(image_features.float(), dim=-1), F.normalize(text_features.float(), dim=-1)


class CachedReference:
    """A reference whose embeddings were computed before training and are part of each batch."""

    def compile(self) -> CachedReference:
        """Does nothing, since no model runs. Returns itself."""
        return self

    @torch.no_grad()
    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As ``Reference.features``. ValueError: the batch has no ``ref_features``.

        The embeddings are normalized again, because storing them as float16 changes their norms by up to 5e-4.
        """
        if batch.ref_features is None:
            raise ValueError("a cached reference needs Batch.ref_features, and this batch has none")
        image, text = F.normalize(batch.ref_features.float(), dim=-1).transpose(0, 1).contiguous()
        return image, text


def _input_dtype(model: DualEncoder) -> torch.dtype:
    """The type in which the image tower takes its input: that of its first linear or convolutional layer.

    The type of its first parameter may differ: open_clip's bf16 and fp16 models keep embeddings and norms in
    float32.
    """
    tower = getattr(model, "visual", model)
    for layer in tower.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            return layer.weight.dtype
    return torch.float32
