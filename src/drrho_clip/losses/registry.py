"""The table of losses: what each loss needs of a run, and how it is built.

A program can read this table before it builds anything: it shows which losses keep rows in the sample state, which
of them use a reference model, and which settings they take. So a program can refuse a combination that cannot work
while it parses flags, and needs no special cases for the names of losses. Nothing here imports torch: a built-in
loss gives the name of its builder, which is imported when it is called.

A loss from outside this package is registered by the program that starts the run, before it parses the flags
(docs/extending.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drrho_clip.losses.interface import Loss

# Columns of the sample state, one per direction: with images as anchors, and with texts as anchors.
LOG_U = ("log_u_image", "log_u_text")
TAU = ("tau_image", "tau_text")
TAU_M, TAU_V = ("tau_m_image", "tau_m_text"), ("tau_v_image", "tau_v_text")

INDIVIDUAL_TAU = (0.01, 1.0)  # the interval in which individual temperatures are kept


@dataclass(frozen=True)
class LossSpec:
    """What a program needs to know about a loss.

    ``build``        (LossEnvironment, **settings) -> Loss, or the name of that function: 'package.module:name'.
    ``settings``     keyword of ``build`` -> name of the run's setting that is passed to it.
    ``estimates``    columns of the sample state that are kept only if gamma is below 1.
    ``columns``      columns that are always kept.
    ``reference``    'none': does not use a reference model's embeddings; 'margins': subtracts the reference's
                     losses if there is a reference; 'teacher': needs a reference, to distill from.
    ``temperature``  'model': the model's logit_scale; 'individual': one per sample, kept in the sample state;
                     'none': the loss has no temperature, and the model's is not trained.
    ``decoder``      whether it needs a model that writes captions.
    ``initial``      initial values of the model's scalars, named as in open_clip: init_logit_scale,
                     init_logit_bias.
    ``trains_bias``  whether the model's logit_bias is part of the loss.
    """

    name: str
    build: str | Callable[..., Loss]
    settings: Mapping[str, str] = field(default_factory=dict)
    estimates: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    reference: str = "none"
    temperature: str = "model"
    decoder: bool = False
    initial: Mapping[str, float] = field(default_factory=dict)
    trains_bias: bool = False

    @property
    def sample_state(self) -> bool:
        """Whether the objective is over all samples of the data set, not only over those of a batch."""
        return bool(self.estimates or self.columns)

    @property
    def individual(self) -> bool:
        """Whether each sample has a temperature of its own."""
        return self.temperature == "individual"

    @property
    def distills(self) -> bool:
        """Whether a teacher's embeddings are part of the loss itself."""
        return self.reference == "teacher"

    def state_columns(self, gamma: float) -> tuple[str, ...]:
        """The columns of the sample state in a run with the final gamma ``gamma``; empty if it keeps no state."""
        return (() if gamma == 1 else self.estimates) + self.columns

    def takes(self, setting: str) -> bool:
        """Whether the run's ``setting`` has any effect on the loss."""
        return setting in self.settings.values()

    def builder(self) -> Callable[..., Loss]:
        """The function that builds the loss."""
        if callable(self.build):
            return self.build
        module, _, name = self.build.partition(":")
        return getattr(import_module(module), name)


_REGISTRY: dict[str, LossSpec] = {}


def register(spec: LossSpec) -> LossSpec:
    """Add ``spec`` to the table and return it. ValueError: a loss of that name is registered already."""
    if spec.name in _REGISTRY:
        raise ValueError(f"a loss named {spec.name!r} is registered already")
    _REGISTRY[spec.name] = spec
    return spec


def get(name: str) -> LossSpec:
    """The entry called ``name``. ValueError: there is none; the message lists the known names."""
    if name not in _REGISTRY:
        raise ValueError(f"unknown loss {name!r}; known: {', '.join(names())}")
    return _REGISTRY[name]


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_REGISTRY)


_GATHER = {"local_loss": "local_loss", "gather_with_grad": "gather_with_grad"}
_ESTIMATOR = {
    "gamma": "gamma",
    "gamma_schedule": "gamma_schedule",
    "gamma_decay_epochs": "gamma_decay_epochs",
    "eps": "fastclip_eps",
    "rho": "rho",
    "bounds": "gather_error_bound",
}
_BASELINES = "drrho_clip.losses.baselines"

register(LossSpec("clip", f"{_BASELINES}:build_clip", _GATHER))
register(
    LossSpec(
        "siglip",
        f"{_BASELINES}:build_siglip",
        initial={"init_logit_scale": math.log(10), "init_logit_bias": -10.0},
        trains_bias=True,
    )
)
register(
    LossSpec(
        "coca",
        f"{_BASELINES}:build_coca",
        {
            "contrastive_weight": "coca_contrastive_loss_weight",
            "caption_weight": "coca_caption_loss_weight",
            **_GATHER,
        },
        decoder=True,
    )
)
register(
    LossSpec(
        "distill",
        f"{_BASELINES}:build_distill",
        {
            "weight": "distill_weight",
            "teacher_scale": "distill_logit_scale",
            "teacher_dimensions": "distill_teacher_dimension",
            "average_after_softmax": "distill_average_after_softmax",
            **_GATHER,
        },
        reference="teacher",
    )
)
register(
    LossSpec(
        "fastclip",
        "drrho_clip.losses.fastclip:build",
        {**_ESTIMATOR, "multiply_tau": "multiply_tau", "tau_gradient": "tau_gradient"},
        estimates=LOG_U,
        reference="margins",
    )
)
register(
    LossSpec(
        "fastclip_individual",
        "drrho_clip.losses.individual:build",
        {
            **_ESTIMATOR,
            "temperature": "initial_tau",
            "beta1": "beta1",
            "beta2": "beta2",
            "adam_eps": "eps",
            "lr_tau": "lr_tau",
        },
        estimates=LOG_U,
        columns=TAU + TAU_M + TAU_V,
        reference="margins",
        temperature="individual",
    )
)
