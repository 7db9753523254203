"""open_clip's own losses with the interface of this package.

Similarities and their gradients are computed in exact float32, whatever the towers' precision is. How gradients
cross ranks is decided by open_clip and its settings ``local_loss`` and ``gather_with_grad``.
"""

from __future__ import annotations

from collections.abc import Sequence

import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from torch import Tensor, nn

from drrho_clip import collectives, float32
from drrho_clip.losses.distillation import split_teachers
from drrho_clip.losses.interface import Loss, LossEnvironment, LossInputs, LossOutput


class _OneGather:
    """open_clip's losses with one gather of both embeddings, whose backward pass sends each rank its own part."""

    local_loss: bool
    gather_with_grad: bool
    world_size: int

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """open_clip's: logits per image and per text, of this rank's rows with ``local_loss``, else of all."""
        if self.world_size == 1 or not self.gather_with_grad:
            return super().get_logits(image_features, text_features, logit_scale, logit_bias)  # type: ignore[misc]
        width = image_features.shape[1]
        gathered = collectives.gather_with_grad(torch.cat([image_features, text_features], 1))
        all_image, all_text = gathered[:, :width], gathered[:, width:]
        if self.local_loss:
            per_image = logit_scale * image_features @ all_text.T
            per_text = logit_scale * text_features @ all_image.T
        else:
            per_image = logit_scale * all_image @ all_text.T
            per_text = per_image.T
        return (per_image, per_text) if logit_bias is None else (per_image + logit_bias, per_text + logit_bias)


class _ClipLoss(_OneGather, open_clip.ClipLoss):  # type: ignore[misc]
    pass


class _DistillClipLoss(_OneGather, open_clip.DistillClipLoss):  # type: ignore[misc]
    pass


class _ClipBased(Loss):
    """A loss that wraps one of open_clip's contrastive losses, ``self.contrastive``."""

    loss_class: type[nn.Module] = _ClipLoss

    def __init__(self, *, local_loss: bool = False, gather_with_grad: bool = False) -> None:
        super().__init__()
        self.contrastive = self.loss_class(
            local_loss=local_loss,
            gather_with_grad=gather_with_grad,
            cache_labels=True,
            rank=collectives.rank(),
            world_size=collectives.world_size(),
        )


class Clip(_ClipBased):
    """Mini-batch InfoNCE, OpenCLIP's default loss."""

    def forward(self, inputs: LossInputs) -> LossOutput:
        bias = () if inputs.logit_bias is None else (inputs.logit_bias,)
        loss = float32.differentiable(self.contrastive, inputs.image, inputs.text, inputs.logit_scale, *bias)
        return LossOutput({"contrastive_loss": loss})


class CoCa(_ClipBased):
    """InfoNCE plus the captioner's cross-entropy (arXiv:2205.01917), each with its weight.

    The caption term is a mean over the tokens of the global batch: it is summed over micro-batches and ranks and
    divided by the number of all their tokens. ``pad_id``: the padding token, which has no caption loss.
    """

    def __init__(
        self,
        *,
        contrastive_weight: float,
        caption_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
    ) -> None:
        super().__init__(local_loss=local_loss, gather_with_grad=gather_with_grad)
        self.contrastive_weight, self.caption_weight, self.pad_id = contrastive_weight, caption_weight, pad_id

    def forward(self, inputs: LossInputs) -> LossOutput:
        loss = float32.differentiable(self.contrastive, inputs.image, inputs.text, inputs.logit_scale)
        return LossOutput({"contrastive_loss": self.contrastive_weight * loss})

    def local_terms(self, outputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        total, tokens = caption_loss(outputs, self.pad_id)
        return {"caption_loss": (self.caption_weight * total, tokens)}


def caption_loss(outputs: dict[str, Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """The cross-entropy of a captioner's ``outputs``, summed over all tokens but padding, and their number."""
    labels = outputs["labels"]
    logits = outputs["logits"].float().flatten(0, 1)
    total = F.cross_entropy(logits, labels.flatten(), ignore_index=pad_id, reduction="sum")
    return total, (labels != pad_id).sum()


class SigLip(Loss):
    """Pairwise sigmoid loss (arXiv:2303.15343). ValueError: the model has no ``logit_bias``."""

    def __init__(self) -> None:
        super().__init__()
        self.contrastive = SigLipLoss(rank=collectives.rank(), world_size=collectives.world_size())

    def forward(self, inputs: LossInputs) -> LossOutput:
        if inputs.logit_bias is None:
            raise ValueError("the sigmoid loss needs a model with a logit_bias")
        given = inputs.image, inputs.text, inputs.logit_scale, inputs.logit_bias
        loss = float32.differentiable(self.contrastive, *given)
        return LossOutput({"contrastive_loss": loss})


class Distill(_ClipBased):
    """InfoNCE with weight ``1 - weight`` plus distillation of a teacher's rows with ``weight``, as in MobileCLIP.

    ``teacher_scale``: the teacher's 1/tau. ``teacher_dimensions``, ``average_after_softmax``: several teachers, as
    in ``Distillation``. ValueError: there are no reference embeddings, or the widths do not add up to theirs.
    """

    loss_class = _DistillClipLoss

    def __init__(
        self,
        *,
        weight: float,
        teacher_scale: float,
        teacher_dimensions: Sequence[int] = (-1,),
        average_after_softmax: bool = False,
        local_loss: bool = False,
        gather_with_grad: bool = False,
    ) -> None:
        super().__init__(local_loss=local_loss, gather_with_grad=gather_with_grad)
        self.weight, self.teacher_scale = weight, teacher_scale
        self.teacher_dimensions, self.average_after_softmax = tuple(teacher_dimensions), average_after_softmax

    def forward(self, inputs: LossInputs) -> LossOutput:
        teachers = self._teachers(inputs)

        def losses(*leaves: Tensor) -> tuple[Tensor, Tensor]:
            each = [self.contrastive(*leaves, image, text, scale) for image, text, scale in teachers]
            # The contrastive loss is the same with every teacher.
            return each[0][0], torch.stack([distill for _, distill in each]).mean()

        contrastive, distill = float32.differentiable(losses, inputs.image, inputs.text, inputs.logit_scale)
        return LossOutput(
            {"contrastive_loss": (1 - self.weight) * contrastive, "distill_loss": self.weight * distill}
        )

    def _teachers(self, inputs: LossInputs) -> list[tuple[Tensor, Tensor, float]]:
        """Embeddings and 1/tau of each teacher. Those of a single one are taken as they are, as in OpenCLIP."""
        if self.teacher_dimensions == (-1,):
            image, text = inputs.require_reference()
            return [(image.float(), text.float(), self.teacher_scale)]
        split = split_teachers(inputs, self.teacher_dimensions, self.average_after_softmax)
        return [(image, text, self.teacher_scale * share) for image, text, share in split]


def build_clip(environment: LossEnvironment, *, local_loss: bool, gather_with_grad: bool) -> Clip:
    """For the registry. The settings are ``Clip``'s."""
    return Clip(local_loss=local_loss, gather_with_grad=gather_with_grad)


def build_siglip(environment: LossEnvironment) -> SigLip:
    """For the registry."""
    return SigLip()


def build_coca(
    environment: LossEnvironment,
    *,
    contrastive_weight: float,
    caption_weight: float,
    local_loss: bool,
    gather_with_grad: bool,
) -> CoCa:
    """For the registry. The settings are ``CoCa``'s."""
    return CoCa(
        contrastive_weight=contrastive_weight,
        caption_weight=caption_weight,
        local_loss=local_loss,
        gather_with_grad=gather_with_grad,
    )


def build_distill(
    environment: LossEnvironment,
    *,
    weight: float,
    teacher_scale: float,
    teacher_dimensions: Sequence[int],
    average_after_softmax: bool,
    local_loss: bool,
    gather_with_grad: bool,
) -> Distill:
    """For the registry. The settings are ``Distill``'s."""
    return Distill(
        weight=weight,
        teacher_scale=teacher_scale,
        teacher_dimensions=teacher_dimensions,
        average_after_softmax=average_after_softmax,
        local_loss=local_loss,
        gather_with_grad=gather_with_grad,
    )
