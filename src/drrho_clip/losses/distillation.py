"""Distillation: cross-entropy of the target's softmax rows against the reference's.

With student logits L_ij = s_ij / tau and teacher logits R_ij = teacher_scale * r_ij over the global batch,

    D = weight / (2B) sum_i [ CE(softmax_j R_ij, softmax_j L_ij) + CE(softmax_j R_ji, softmax_j L_ji) ]

If the objective beside it is multiplied by tau, D is multiplied by tau too, and no gradient flows through that
factor. With P, Q the teacher's softmax over rows and over columns, and p, q the student's,

    dD/dS_ij = weight / (2B tau) G_ij,    G_ij = (p_ij - P_ij) + (q_ij - Q_ij).

A rank needs its rows of G for its images and its columns of G for its texts. It can compute the softmax over its
own rows by itself. For the softmax over the columns that cross them it needs the normalizers of other ranks, which
are scalars. So, like FastCLIP's gradient reduction (arXiv:2407.01445), the forward pass gathers embeddings once
and scalars once, and the backward pass has no collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drrho_clip import collectives
from drrho_clip.float32 import exact_float32
from drrho_clip.losses.compositional import AttachGradient
from drrho_clip.losses.interface import LossInputs
from drrho_clip.losses.pair_kernels import Budget


class Distillation(nn.Module):
    """The term D, for models whose ``LossInputs`` carry reference embeddings.

    ``weight``                 factor of D.
    ``teacher_scale``          the reference's 1/tau; the student uses the model's.
    ``multiply_tau``           whether to multiply D by tau, as the objective beside it is.
    ``teacher_dimensions``     widths of the teachers whose embeddings the reference concatenates; each part is
                               normalized separately. ``(-1,)``: one teacher.
    ``average_after_softmax``  average the teachers' softmax rows; if False, average their logits.
    """

    def __init__(
        self,
        weight: float,
        teacher_scale: float,
        multiply_tau: bool,
        teacher_dimensions: Sequence[int] = (-1,),
        average_after_softmax: bool = False,
    ) -> None:
        super().__init__()
        self.weight, self.teacher_scale, self.multiply_tau = weight, teacher_scale, multiply_tau
        self.teacher_dimensions = tuple(teacher_dimensions)
        self.average_after_softmax = average_after_softmax

    def forward(self, inputs: LossInputs) -> Tensor:
        """D of the global batch, 0-d and equal on all ranks. DDP's average of the ranks' gradients is that of D.

        ValueError: there are no reference embeddings, or the teachers' widths do not add up to theirs.
        """
        with torch.no_grad(), exact_float32(inputs.image.device.type):
            image, text = inputs.image.detach().float(), inputs.text.detach().float()
            scale = inputs.logit_scale.detach().float()
            value, grad_scaled_image, grad_text = _solve([_Pair(image * scale, text), *self._teachers(inputs)])
            factor = self.weight / scale if self.multiply_tau else self.weight
            grad_scale = (grad_scaled_image * image).sum().to(inputs.logit_scale.dtype)
            # Each rank has its part of a sum, and DDP averages over the ranks.
            k = collectives.world_size() * factor
            gradients = (k * scale * grad_scaled_image, k * grad_text, k * grad_scale)
            value = factor * value
        return AttachGradient.apply(value, inputs.image, inputs.text, inputs.logit_scale, *gradients)

    def _teachers(self, inputs: LossInputs) -> list[_Pair]:
        split = split_teachers(inputs, self.teacher_dimensions, self.average_after_softmax)
        return [_Pair(self.teacher_scale * share * image, text) for image, text, share in split]


def split_teachers(
    inputs: LossInputs, widths: Sequence[int], average_after_softmax: bool
) -> list[tuple[Tensor, Tensor, float]]:
    """The teachers whose embeddings the reference concatenates: image and text [n, width], and a factor of logits.

    Each part is normalized separately. The distillation loss is the mean of the losses against the entries.
    Without ``average_after_softmax`` there is one, whose logits are the mean of the teachers'. ``widths``: those
    of the teachers; ``(-1,)``: one teacher. ValueError: no reference embeddings, or their width is another.
    """
    ref_image, ref_text = inputs.require_reference()
    width = ref_image.shape[1]
    sizes = [width] if tuple(widths) == (-1,) else list(widths)
    if sum(sizes) != width:
        raise ValueError(
            f"the teachers' widths {', '.join(map(str, sizes))} add up to {sum(sizes)}, but the reference's "
            f"embeddings are {width} wide: give the width of each teacher"
        )
    images = [F.normalize(part, dim=1) for part in ref_image.float().split(sizes, 1)]
    texts = [F.normalize(part, dim=1) for part in ref_text.float().split(sizes, 1)]
    if average_after_softmax:
        return [(image, text, 1.0) for image, text in zip(images, texts, strict=True)]
    # The mean of the teachers' logits is the inner product of their concatenated embeddings.
    return [(torch.cat(images, 1), torch.cat(texts, 1), 1 / len(sizes))]


@dataclass(frozen=True)
class _Pair:
    """The embeddings of one model, [n, width] each. Its logits are <image_i, text_j>: one side contains 1/tau."""

    image: Tensor
    text: Tensor


def _solve(models: list[_Pair]) -> tuple[Tensor, Tensor, Tensor]:
    """D for weight 1, and its gradients with respect to this rank's rows of ``models[0]``, [b, d] each.

    ``models``: the student, then the teachers.
    """
    sides = [side for model in models for side in (model.image, model.text)]
    gathered = collectives.all_gather(torch.cat(sides, 1)).split([side.shape[1] for side in sides], 1)
    images = [_Logits(m.image, texts) for m, texts in zip(models, gathered[1::2], strict=True)]
    texts = [_Logits(m.text, images) for m, images in zip(models, gathered[::2], strict=True)]

    image_lse, image_loss = _cross_entropy(images)
    text_lse, text_loss = _cross_entropy(texts)
    scalars = collectives.all_gather(torch.cat([image_lse, text_lse, (image_loss + text_loss)[:, None]], 1))
    all_image_lse, all_text_lse, loss = scalars.split([len(models), len(models), 1], 1)

    factor = 1 / (2 * len(loss))
    grad_image = factor * _gradient(images, image_lse, all_text_lse)
    grad_text = factor * _gradient(texts, text_lse, all_image_lse)
    return factor * loss.sum(), grad_image, grad_text


@dataclass(frozen=True)
class _Logits:
    """A block of one model's logits, <rows_i, columns_j>: this rank's anchors [n, d] with all samples [m, d]."""

    rows: Tensor
    columns: Tensor

    def tile(self, rows: slice) -> Tensor:
        return self.rows[rows] @ self.columns.T


def _tiles(block: _Logits) -> list[slice]:
    n, m = len(block.rows), len(block.columns)
    step = max(1, Budget.default(block.rows.device).tile_bytes // (4 * m))
    return [slice(start, start + step) for start in range(0, n, step)]


def _cross_entropy(blocks: list[_Logits]) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each model's rows, [n, models], and the student's cross-entropy of each row, [n]."""
    normalizers, losses = [], []
    for tile in _tiles(blocks[0]):
        logits = [block.tile(tile) for block in blocks]
        lse = torch.stack([a.logsumexp(1) for a in logits], 1)
        student, *teachers = logits
        cross = [
            torch.einsum("ij,ij->i", (a - lse[:, j : j + 1]).exp_(), student) for j, a in enumerate(teachers, 1)
        ]
        normalizers.append(lse)
        losses.append(lse[:, 0] - torch.stack(cross).mean(0))
    return torch.cat(normalizers), torch.cat(losses)


def _gradient(blocks: list[_Logits], row_lse: Tensor, column_lse: Tensor) -> Tensor:
    """``G columns`` of the student, [n, d]. ``row_lse`` [n, models], ``column_lse`` [m, models]."""

    def softmaxes(j: int, tile: slice) -> Tensor:
        """P + Q of teacher ``j``; p + q of the student for ``j`` = 0."""
        logits = blocks[j].tile(tile)
        return (logits - row_lse[tile, j : j + 1]).exp_() + (logits - column_lse[:, j]).exp_()

    teachers = range(1, len(blocks))
    grads = []
    for tile in _tiles(blocks[0]):
        g = softmaxes(0, tile)
        for j in teachers:
            g = softmaxes(j, tile).mul_(-1 / len(teachers)).add_(g)
        grads.append(g @ blocks[0].columns)
    return torch.cat(grads)
