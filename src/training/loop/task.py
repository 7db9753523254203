"""Target, frozen reference and loss behind two questions: what are this batch's embeddings, what do they cost?

The loop knows nothing else, and the loss never sees a model. The reference is no submodule of anything that the
optimizer, ``train()`` or a checkpoint touches: it stays frozen by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drrho_clip import collectives
from drrho_clip.batch import Batch
from drrho_clip.losses.distillation import Distillation
from drrho_clip.losses.interface import Loss, LossInputs, LossOutput
from drrho_clip.normalize import normalize
from drrho_clip.reference import CachedReference, Reference
from drrho_clip.selection import select
from training.models.precision import Precision
from training.rng import MASKS, SELECTION, step_seed


@dataclass(frozen=True)
class Selection:
    """Batch selection: keep the share ``keep_ratio`` of each batch in ``n_chunks`` draws (JEST)."""

    keep_ratio: float
    n_chunks: int
    topk: bool


class Task:
    """One objective on one pair of models.

    ``model``         what is trained, perhaps wrapped (DDP, compile); ``bare`` is the same without wrapping.
    ``logit_scale``   the model's parameter ln(1/tau).
    ``mean``, ``std`` of the target's pixels; ``precision`` of its forward passes.
    ``loss``          from the registry; ``loss_weight`` multiplies what it returns.
    ``reference``     its embeddings reach the loss where ``margins`` is set, ``distillation`` and ``selection``
                      where they are given.
    ``constant_scale``  1/tau of the loss in place of the model's, which is left to distillation; 0: the model's.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        bare: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        precision: Precision,
        loss: Loss,
        loss_weight: float = 1.0,
        reference: Reference | CachedReference | None = None,
        margins: bool = False,
        constant_scale: float = 0.0,
        distillation: Distillation | None = None,
        selection: Selection | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.bare = model, bare
        self.logit_scale = bare.get_parameter("logit_scale")
        self.mean, self.std, self.precision = mean, std, precision
        self.loss, self.loss_weight = loss, loss_weight
        self.reference, self.margins, self.constant_scale = reference, margins, constant_scale
        self.distillation, self.selection = distillation, selection
        self._seed = seed

    def seed_generators(self, step: int) -> None:
        """Seed torch's default generators for optimizer step ``step`` on this rank.

        Dropout, patch dropout and stochastic depth draw from them. So their masks depend on the seed, the step and
        the rank alone, and a run that goes on at this step draws them again without having kept a generator.
        """
        torch.manual_seed(step_seed(self._seed, step, collectives.rank(), MASKS))

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """The target's outputs for a batch on its device; keys as open_clip names them.

        Embeddings are normalized again in float32: in bfloat16 their norms are off by up to 0.4 %, which a
        temperature of 0.01 turns into tens of percents of a pair's weight.
        """
        image = normalize(batch.image, self.mean, self.std, self.precision.pixel_dtype)
        with self.precision.autocast():
            outputs = self.model(image, batch.text)
        unit = {name: F.normalize(outputs[name].float(), dim=-1) for name in ("image_features", "text_features")}
        return {**outputs, **unit}

    def reference_features(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """The reference's unit-norm embeddings, [b, d_r] each; None without one."""
        return None if self.reference is None else self.reference.features(batch)

    def inputs(
        self, outputs: dict[str, Tensor], index: Tensor, reference: tuple[Tensor, Tensor] | None
    ) -> LossInputs:
        """What the loss gets for the samples ``index`` (int64 [b], on the CPU)."""
        ref_image, ref_text = reference or (None, None)
        return LossInputs(
            image=outputs["image_features"],
            text=outputs["text_features"],
            logit_scale=outputs["logit_scale"],
            logit_bias=outputs.get("logit_bias"),
            index=index,
            ref_image=ref_image,
            ref_text=ref_text,
        )

    def objective(self, inputs: LossInputs) -> LossOutput:
        """The terms that are functions of the embeddings of this rank's whole batch."""
        given = inputs if self.margins else replace(inputs, ref_image=None, ref_text=None)
        if self.constant_scale:
            scale = torch.full_like(inputs.logit_scale, self.constant_scale, requires_grad=False)
            given = replace(given, logit_scale=scale)
        result = self.loss(given)
        terms = {name: self.loss_weight * term for name, term in result.terms.items()}
        if self.distillation is not None:
            terms["distill_loss"] = self.distillation(inputs)
        return replace(result, terms=terms)

    def select(
        self,
        batch: Batch,
        step: int,
        forward: Callable[[Batch], tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]],
    ) -> Batch:
        """The samples of ``batch`` that step ``step`` trains on. ``forward`` gives outputs and reference features
        of a whole batch without a graph."""
        if self.selection is None:
            return batch
        outputs, reference = forward(batch)
        assert reference is not None, "selection ranks samples by a reference"
        image = outputs["image_features"].float()
        generator = torch.Generator(image.device)
        generator.manual_seed(step_seed(self._seed, step, collectives.rank(), SELECTION))
        positions = select(
            image,
            outputs["text_features"].float(),
            *reference,
            outputs["logit_scale"].detach().float(),
            keep_ratio=self.selection.keep_ratio,
            n_chunks=self.selection.n_chunks,
            topk=self.selection.topk,
            generator=generator,
        )
        return batch.select(positions)
