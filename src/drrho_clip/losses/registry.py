"""Names of losses, what each one needs, and how it is built.

The command line asks this table what a run needs (sample state, a reference, a temperature) before any model
exists, so that a bad combination of flags is one sentence at start-up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from drrho_clip.sample_state import SampleState, StateUpdate


@dataclass(frozen=True)
class LossInputs:
    """What the towers give a loss for the ``b`` samples of this rank.

    ``image``, ``text``          [b, d], unit norm, with the graph to the towers (or leaves when accumulating).
    ``logit_scale``              0-d, 1/tau, as the model returns it; ``logit_bias`` the same where there is one.
    ``index``                    int64 [b] rows of the sample state, on the CPU.
    ``ref_image``, ``ref_text``  [b, d_r], unit norm, without a graph; None without a reference.
    """

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None = None
    index: Tensor | None = None
    ref_image: Tensor | None = None
    ref_text: Tensor | None = None


@dataclass(frozen=True)
class LossOutput:
    """What a step gives.

    ``terms``    name -> 0-d tensor; what is minimized is their sum.
    ``update``   new rows of the sample state, for ``SampleState.commit``; None for losses without one.
    ``metrics``  further 0-d tensors worth logging.
    """

    terms: dict[str, Tensor]
    update: StateUpdate | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Loss(nn.Module):
    """``forward(LossInputs) -> LossOutput``, a function of the embeddings of all ``b`` samples of this rank.

    ``state``: the sample state of losses that keep one, else None.
    """

    state: SampleState | None = None

    def forward(self, inputs: LossInputs) -> LossOutput:
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch; losses with an epoch schedule override it."""

    def set_temperature_rate(self, lr_tau: float) -> None:
        """Called before each step; losses that keep temperatures of their own override it."""

    def local_terms(self, outputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Terms that need more of the model than embeddings: name -> (sum over the micro-batch, count).

        They are evaluated on each micro-batch and divided by the count over all micro-batches and ranks, so that
        both weigh them as one batch does. Most losses have none.
        """
        return {}


@dataclass(frozen=True)
class LossSpec:
    """An entry of the registry.

    ``build``         keyword settings -> Loss.
    ``sample_state``  keeps per-sample rows across steps.
    ``reference``     'none': has no use for a reference model; 'optional'; 'required'.
    ``temperature``   'model': the model's logit_scale; 'individual': one per sample, kept in the sample state.
    """

    name: str
    build: Callable[..., Loss]
    sample_state: bool = False
    reference: str = "none"
    temperature: str = "model"


_REGISTRY: dict[str, LossSpec] = {}


def register(spec: LossSpec) -> LossSpec:
    """Add ``spec``; a name that is taken raises ValueError."""
    if spec.name in _REGISTRY:
        raise ValueError(f"a loss named {spec.name!r} is registered already")
    _REGISTRY[spec.name] = spec
    return spec


def get(name: str) -> LossSpec:
    """The entry called ``name``; ValueError with the known names otherwise."""
    if name not in _REGISTRY:
        raise ValueError(f"unknown loss {name!r}; known: {', '.join(names())}")
    return _REGISTRY[name]


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_REGISTRY)
