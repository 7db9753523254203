"""Target, frozen reference and loss: a task computes the embeddings of a batch, and the loss of embeddings.

The loop uses the models and the loss only through the task, and the loss never sees a model. The reference is not
a submodule of anything that the optimizer, ``train()`` or a checkpoint touches, so it always stays frozen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drrho_clip import collectives
from drrho_clip.batch import Batch
from drrho_clip.collectives import Exchange
from drrho_clip.losses.distillation import Distillation
from drrho_clip.losses.interface import Loss, LossInputs, LossOutput
from drrho_clip.normalize import normalize
from drrho_clip.reference import CachedReference, Reference
from drrho_clip.selection import select
from training.distributed.powersgd import PowerSGD
from training.models.open_clip_model import with_labels
from training.models.precision import Precision
from training.rng import MASKS, SELECTION, step_seed


@dataclass(frozen=True)
class Selection:
    """Batch selection (JEST): keep the share ``keep_ratio`` of each batch, drawn in ``n_chunks`` draws."""

    keep_ratio: float
    n_chunks: int
    topk: bool


class Task:
    """One objective for one pair of models.

    ``model``           the target, which is trained; it may be wrapped (DDP, torch.compile).
    ``bare``            the target without wrapping.
    ``logit_scale``     the target's parameter ln(1/tau).
    ``mean``, ``std``   normalization of the target's pixels.
    ``precision``       of the target's forward passes.
    ``loss``            from the registry. ``loss_weight``: factor of its terms.
    ``reference``       its embeddings are used by the loss if ``margins`` is True, and by ``distillation`` and
                        ``selection`` if they are given.
    ``compression``     of the gradients that ranks exchange, where that keeps a state.
    ``parts``           of a rank's samples, from each of which ``selection`` draws by itself; it may be set later.
    ``constant_scale``  1/tau for the loss instead of the model's, which only distillation then uses; 0: the
                        model's.
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
        compression: PowerSGD | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.bare = model, bare
        self.logit_scale = bare.get_parameter("logit_scale")
        self.mean, self.std, self.precision = mean, std, precision
        self.loss, self.loss_weight = loss, loss_weight
        self.reference, self.margins, self.constant_scale = reference, margins, constant_scale
        self.distillation, self.selection, self.parts = distillation, selection, 1
        self.compression = compression
        self._seed = seed

    def seed_generators(self, step: int) -> None:
        """Seed torch's default generators for optimizer step ``step`` on this rank.

        Dropout, patch dropout and stochastic depth draw from them. So their masks depend only on the seed, the
        step and the rank. A run that resumes at this step draws the same masks, although no checkpoint has the
        generators.
        """
        torch.manual_seed(step_seed(self._seed, step, collectives.rank(), MASKS))

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """The target's outputs for a batch on its device. The keys are open_clip's.

        The embeddings are normalized again in float32. In bfloat16 their norms are wrong by up to 0.4 %, and with
        a temperature of 0.01 this changes a pair's weight by tens of percent.
        """
        image = normalize(batch.image, self.mean, self.std, self.precision.pixel_dtype)
        with self.precision.autocast():
            outputs = with_labels(self.model(image, batch.text), batch.text)
        unit = {name: F.normalize(outputs[name].float(), dim=-1) for name in ("image_features", "text_features")}
        return {**outputs, **unit}

    def reference_features(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """The reference's unit-norm embeddings, [b, d_r] each; None without a reference."""
        return None if self.reference is None else self.reference.features(batch)

    def prepare(self, index: Tensor, reference: tuple[Tensor, Tensor] | None) -> Exchange | None:
        """Start to exchange what the loss needs besides the target's embeddings of the samples ``index``."""
        return self.loss.prepare(index, reference if self.margins else None, self.logit_scale.device)

    def inputs(
        self,
        outputs: dict[str, Tensor],
        index: Tensor,
        reference: tuple[Tensor, Tensor] | None,
        prepared: Exchange | None = None,
    ) -> LossInputs:
        """The inputs of the loss for the samples ``index``, int64 [b]. ``prepared``: from ``prepare``."""
        ref_image, ref_text = reference or (None, None)
        return LossInputs(
            image=outputs["image_features"],
            text=outputs["text_features"],
            logit_scale=outputs["logit_scale"],
            logit_bias=outputs.get("logit_bias"),
            index=index,
            ref_image=ref_image,
            ref_text=ref_text,
            prepared=prepared,
        )

    def objective(self, inputs: LossInputs) -> LossOutput:
        """The terms that depend on the embeddings of this rank's whole batch."""
        given = inputs if self.margins else replace(inputs, ref_image=None, ref_text=None)
        if self.constant_scale:
            scale = torch.full_like(inputs.logit_scale, self.constant_scale, requires_grad=False)
            given = replace(given, logit_scale=scale)
        result = self.loss(given)
        terms = {name: self.loss_weight * term for name, term in result.terms.items()}
        if self.distillation is not None:
            terms["distill_loss"] = self.distillation(inputs)
        return replace(result, terms=terms)

    def kept(self, samples: int) -> int:
        """Of how many of ``samples`` samples selection makes a batch."""
        assert self.selection is not None
        return round(samples * self.selection.keep_ratio)

    def select(
        self, batch: Batch, step: int, outputs: dict[str, Tensor], reference: tuple[Tensor, Tensor]
    ) -> tuple[Batch, tuple[Tensor, Tensor]]:
        """The samples of ``batch`` that step ``step`` trains on, all of them on the device, and their reference.

        ``outputs``, ``reference``: of the whole batch, without a graph. The host does not wait for the device.
        IndexError: a row of the batch is none of the sample state's.
        """
        assert self.selection is not None
        if self.loss.state is not None:
            self.loss.state.choose_from(batch.index)
        image = outputs["image_features"].float()
        numbers = range(collectives.rank() * self.parts, (collectives.rank() + 1) * self.parts)
        generators = [torch.Generator(image.device) for _ in numbers]
        for generator, number in zip(generators, numbers, strict=True):
            generator.manual_seed(step_seed(self._seed, step, number, SELECTION))
        positions = select(
            image,
            outputs["text_features"].float(),
            *reference,
            outputs["logit_scale"].detach().float(),
            keep_ratio=self.selection.keep_ratio,
            n_chunks=self.selection.n_chunks,
            topk=self.selection.topk,
            generator=generators,
            parts=self.parts,
        )
        return batch.select(positions), (reference[0][positions], reference[1][positions])
