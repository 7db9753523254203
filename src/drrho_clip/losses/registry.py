"""Which losses there are, what each one asks of a run, and how it is built.

A program reads this table before anything else: which losses keep rows in the sample state, which have a use for a
reference model, which settings they take. So a combination that cannot work is refused while flags are parsed, and
nobody asks a loss for its name. Nothing here imports torch: a built-in loss names its builder, which is imported
when it is called.

A loss from outside this package is registered by whoever starts the run, before the flags are parsed
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

# Columns of the sample state, one per direction: anchors are images, or texts.
LOG_U = ("log_u_image", "log_u_text")
TAU = ("tau_image", "tau_text")
TAU_M, TAU_V = ("tau_m_image", "tau_m_text"), ("tau_v_image", "tau_v_text")


@dataclass(frozen=True)
class LossSpec:
    """What the rest of a program asks of a loss.

    ``build``        (LossEnvironment, **settings) -> Loss, or where that function is: 'package.module:name'.
    ``settings``     keyword of ``build`` -> the name of the run's setting that it gets.
    ``estimates``    columns of the sample state that are read only where gamma is below 1.
    ``columns``      columns that are kept in any case.
    ``reference``    'none': has no use for a reference model's embeddings; 'margins': subtracts its losses where
                     there is one; 'teacher': needs it, to distill from.
    ``temperature``  'model': the model's logit_scale; 'individual': one per sample, kept in the sample state;
                     'none': the loss has none, and the model's stays as it is.
    ``decoder``      needs a model that writes captions.
    ``initial``      what the model's scalars start from, in open_clip's words: init_logit_scale, init_logit_bias.
    ``trains_bias``  the model's logit_bias is part of the loss.
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
        """Whether it is about all samples of the data set, and not about those of a batch alone."""
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
        """The columns of the sample state for a run in which gamma ends at ``gamma``; none: it keeps no state."""
        return (() if gamma == 1 else self.estimates) + self.columns

    def takes(self, setting: str) -> bool:
        """Whether the run's ``setting`` has any effect on it."""
        return setting in self.settings.values()

    def builder(self) -> Callable[..., Loss]:
        """The function that builds it."""
        if callable(self.build):
            return self.build
        module, _, name = self.build.partition(":")
        return getattr(import_module(module), name)


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


_GATHER = {"local_loss": "local_loss", "gather_with_grad": "gather_with_grad"}
_ESTIMATOR = {
    "gamma": "gamma",
    "gamma_schedule": "gamma_schedule",
    "gamma_decay_epochs": "gamma_decay_epochs",
    "eps": "fastclip_eps",
    "rho": "rho",
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
        {"weight": "distill_weight", "teacher_scale": "distill_logit_scale", **_GATHER},
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
