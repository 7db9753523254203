"""The methods that the study compares, each by its published flags, and what is tuned of each.

All methods share model, data, order of samples, initial weights, optimizer and schedule (``runs.COMMON``). Each
one's own settings are searched along its axes, one after the other, in short runs of equal length (``tuning.py``):
5 for OpenCLIP, which has two axes, up to 10 for those that have more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LEARNING_RATES = ("2e-3", "1e-3", "4e-3")
GAMMA = "--gamma"


@dataclass(frozen=True)
class Axis:
    """One search: a flag and its values, the first of which is where the search starts."""

    flag: str
    values: tuple[str, ...]

    @property
    def needs_epochs(self) -> bool:
        """Whether the setting acts from the second epoch on: gamma is 1 throughout the first."""
        return self.flag == GAMMA


@dataclass(frozen=True)
class Method:
    """``flags`` make a run of the trainer this method.

    ``reference``   whether it needs a reference.
    ``tuned_as``    the method whose settings it takes instead of being tuned itself; '' for its own.
    ``super_batch`` samples that are read for each one that is trained on (batch selection).
    ``model``       entries added to the model's config: SigLIP's initial temperature and bias.
    ``ranks``       processes of a run, which share its batch.
    ``store``       flags with which the reference's features are stored; '' for float32.
    """

    name: str
    title: str
    flags: tuple[str, ...]
    axes: tuple[Axis, ...] = ()
    reference: bool = False
    tuned_as: str = ""
    super_batch: int = 1
    model: tuple[tuple[str, float], ...] = ()
    ranks: int = 1
    store: str = ""


def _flags(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_RATE = Axis("--lr", LEARNING_RATES)
_OPENCLIP_AXES = (_RATE, Axis("--lr_tau", ("2e-3", "1e-2", "3e-2")))
_LEARNED = (Axis("--temperature", ("0.07", "0.03")), Axis("--lr_tau", ("2e-3", "1e-2")))
_FIXED = Axis("--temperature", ("0.03", "0.01", "0.05", "0.07"))
_RHO = Axis("--rho", ("8.5", "6.5", "11.0"))
_GAMMA = Axis(GAMMA, ("advice", "0.6", "0.3"))  # "advice": the authors' for the number of epochs
_V2_AXES = (
    _RATE,
    Axis("--temperature", ("0.03", "0.07")),
    Axis("--lr_tau", ("1e-2", "1e-3")),
    Axis("--rho", ("7.0", "5.0", "9.0")),
    _GAMMA,
)
_V0 = _flags("--fastclip --temperature_scheme global_learnable")
_V1 = _flags("--fastclip --temperature_scheme global_constant")
_V2 = _flags("--fastclip --temperature_scheme individual_learnable --lr_tau_scheduler const")
_V3 = _flags("--fastclip --multiply_tau --temperature_scheme global_learnable --lr_tau_scheduler step_thresh")
_FIXED_TAU = _flags("--fastclip --multiply_tau --temperature_scheme global_constant --fastclip_eps 1e-4")
_JEST = _flags("--ref_features_usage select --ref_filter_ratio 0.8")

# What is compressed (docs/compression.md), each beside the same without.
_COMPRESSED = tuple(
    Method(f"drrho_{name}", f"DRRho-CLIP, {title}", (*_FIXED_TAU, *_flags(more)), (), True, "drrho_fixed", **other)
    for name, title, more, other in (
        ("stored1e-3", "features within 1e-3", "", {"store": "--ref_features_error_bound 1e-3"}),
        ("stored2e-3", "features within 2e-3", "", {"store": "--ref_features_error_bound 2e-3"}),
        ("u16", "u in 16 bits", "--sample_state_dtype bound", {}),
        ("2ranks", "two ranks", "", {"ranks": 2}),
        ("gather1e-3", "two ranks, embeddings within 1e-3", "--gather_error_bound 1e-3", {"ranks": 2}),
        ("bf16", "two ranks, gradients in bfloat16", "--grad_compression bf16", {"ranks": 2}),
        ("powersgd", "two ranks, PowerSGD", "--grad_compression powersgd", {"ranks": 2}),
    )
)
METHODS = {
    method.name: method
    for method in (
        Method("openclip", "OpenCLIP", (), _OPENCLIP_AXES),
        # Tuning found three learning rates alike for OpenCLIP; this is the one that the other methods chose.
        Method("openclip_2e-3", "OpenCLIP at 2e-3", (), (Axis("--lr", ("2e-3",)), Axis("--lr_tau", ("2e-3",)))),
        # OpenCLIP's temperature starts at 0.07 whatever is trained; FastCLIP's was searched.
        Method(
            "openclip_tau",
            "OpenCLIP from τ = 0.03",
            (),
            _OPENCLIP_AXES,
            model=(("init_logit_scale", math.log(1 / 0.03)),),
        ),
        Method(
            "siglip",
            "SigLIP",
            ("--siglip",),
            _OPENCLIP_AXES,
            model=(("init_logit_scale", math.log(10)), ("init_logit_bias", -10.0)),
        ),
        Method("fastclip_v0", "FastCLIP-v0", _V0, (_RATE, *_LEARNED, _GAMMA)),
        Method("fastclip_v1", "FastCLIP-v1", _V1, (_RATE, _FIXED, _GAMMA)),
        Method("fastclip_v2", "FastCLIP-v2", _V2, _V2_AXES),
        Method("fastclip_v3", "FastCLIP-v3", _V3, (_RATE, *_LEARNED, _RHO, _GAMMA)),
        Method("sogclr", "SogCLR", (*_V1, "--gamma_schedule", "constant"), tuned_as="fastclip_v1"),
        Method("isogclr", "iSogCLR", (*_V2, "--gamma_schedule", "constant"), tuned_as="fastclip_v2"),
        Method("drrho_fixed", "DRRho-CLIP, fixed τ", _FIXED_TAU, (_RATE, _FIXED, _GAMMA), reference=True),
        Method("drrho_v3", "DRRho-CLIP, learned τ", _V3, (_RATE, *_LEARNED, _RHO, _GAMMA), reference=True),
        # v1's loss is that of the fixed tau divided by it, which AdamW does not see.
        Method("drrho_v1", "DRRho-CLIP on v1", _V1, reference=True, tuned_as="drrho_fixed"),
        Method("drrho_v2", "DRRho-CLIP on v2", _V2, reference=True, tuned_as="fastclip_v2"),
        Method("jest", "JEST", _JEST, reference=True, tuned_as="openclip", super_batch=5),
        Method(
            "jest_topk",
            "JEST top-k",
            (*_JEST, "--ref_filter_topk"),
            reference=True,
            tuned_as="openclip",
            super_batch=5,
        ),
        Method(
            "distill",
            "distillation",
            _flags("--loss distill"),
            (
                _RATE,
                Axis("--distill_weight", ("0.5", "1.0")),
                Axis("--distill_logit_scale", ("30", "15", "60", "7.5")),
            ),
            reference=True,
        ),
        Method(
            "drrho_select",
            "DRRho-CLIP + selection",
            (*_FIXED_TAU, *_flags("--ref_features_usage select,ref --ref_filter_ratio 0.8")),
            reference=True,
            tuned_as="drrho_fixed",
            super_batch=5,
        ),
        Method(
            "drrho_distill",
            "DRRho-CLIP + distillation",
            (*_FIXED_TAU, *_flags("--ref_features_usage ref,distill")),
            (
                _RATE,
                _FIXED,
                Axis("--distill_weight", ("0.5", "1.0")),
                Axis("--distill_logit_scale", ("30", "15", "7.5")),
            ),
            reference=True,
        ),
        *_COMPRESSED,
    )
}
