"""The interface that all losses have: their inputs, their output and their base class."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from drrho_clip.collectives import Exchange
from drrho_clip.sample_state import SampleState, StateUpdate


@dataclass(frozen=True)
class LossEnvironment:
    """What a loss is given besides its settings.

    ``device``    the device of the embeddings.
    ``state``     a table of the columns that the loss needs (``LossSpec.state_columns``); None if it needs none.
    ``compiled``  whether expensive parts should go through ``torch.compile``.
    """

    device: torch.device
    state: SampleState | None = None
    compiled: bool = False


@dataclass(frozen=True)
class LossInputs:
    """The embeddings of the ``b`` samples of this rank, and what else a loss reads.

    ``image``, ``text``          [b, d], unit norm, with the graph to the towers (leaves under accumulation).
    ``logit_scale``              0-d, 1/tau, as the model returns it.
    ``logit_bias``               0-d, as the model returns it; None if the model has none.
    ``index``                    int64 [b], rows of the sample state; losses without one do not need it.
    ``ref_image``, ``ref_text``  [b, d_r], unit norm, without a graph; None without a reference.
    ``prepared``                 what ``Loss.prepare`` returned for these samples; None: it was not called.
    """

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None = None
    index: Tensor | None = None
    ref_image: Tensor | None = None
    ref_text: Tensor | None = None
    prepared: Exchange | None = None

    @property
    def reference(self) -> tuple[Tensor, Tensor] | None:
        """``ref_image`` and ``ref_text``; None without a reference. ValueError: one is there without the other."""
        if self.ref_image is None and self.ref_text is None:
            return None
        if self.ref_image is None or self.ref_text is None:
            raise ValueError("a reference has embeddings of both: give ref_image and ref_text, or neither")
        return self.ref_image, self.ref_text

    def require_reference(self) -> tuple[Tensor, Tensor]:
        """``reference``, for losses that need one. ValueError: there is none."""
        if (reference := self.reference) is None:
            raise ValueError("this loss needs the embeddings of a reference model, ref_image and ref_text")
        return reference

    def require_index(self) -> Tensor:
        """``index``, for losses that need it. ValueError: it is missing."""
        if self.index is None:
            raise ValueError("this loss keeps values per sample, so it needs index, the samples' rows")
        return self.index


@dataclass(frozen=True)
class LossOutput:
    """The result of a loss.

    ``terms``    name -> 0-d tensor; their sum is minimized.
    ``update``   new rows of the sample state, for ``SampleState.commit``; None for losses without a sample state.
    ``metrics``  name -> 0-d tensor, further values to log.
    """

    terms: dict[str, Tensor]
    update: StateUpdate | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Loss(nn.Module):
    """``forward(LossInputs) -> LossOutput``, a function of the embeddings of all ``b`` samples of this rank.

    ``state``: the loss's sample state; None if it keeps none.
    """

    state: SampleState | None = None

    def forward(self, inputs: LossInputs) -> LossOutput:
        raise NotImplementedError

    def prepare(
        self, index: Tensor, reference: tuple[Tensor, Tensor] | None, device: torch.device
    ) -> Exchange | None:
        """Starts to exchange what does not depend on the target's embeddings, for samples of this rank.

        A training loop may call it before the target's forward pass, so that both run at the same time, and passes
        the result on as ``LossInputs.prepared``. ``index``, ``reference``: as in ``LossInputs``. ``device``: the
        target's. Most losses have nothing to prepare and return None.
        """
        return None

    def set_epoch(self, epoch: int) -> None:
        """Is called before each epoch. Losses with a schedule by epoch override it."""

    def set_progress(self, share: float) -> None:
        """Is called before each step with the share of the run's steps that were taken, from 0 to 1.

        Losses with a schedule by step override it.
        """

    def set_temperature_rate(self, lr_tau: float) -> None:
        """Is called before each step. Losses that keep temperatures of their own override it."""

    def local_terms(self, outputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Terms that need other outputs of the model than embeddings: name -> (sum over the micro-batch, count).

        The terms are evaluated on each micro-batch and divided by the count over all micro-batches and ranks, so
        that the result is the mean over the global batch. Most losses have no such terms.
        """
        return {}
