"""The objective: which loss a run minimizes, chosen by ``--loss`` or the published flags, and its settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from drrho_clip.losses import registry
from drrho_clip.losses.registry import INDIVIDUAL_TAU, LOG_U, LossSpec
from drrho_clip.schedules import ErrorBounds
from drrho_clip.state.fixed_point import FixedPoint
from training.config.flags import ALL
from training.config.given import Given, Refusal
from training.config.model import is_coca
from training.config.optim import OptimConfig
from training.config.remarks import Idle, Pitfall, Setting


@dataclass(frozen=True)
class LossConfig:
    """The objective. ``name`` is the loss's name in the registry, ``decided_by`` the flag that chose it, in words.

    ``temperature`` is None where the flag was not given or has no effect. ``multiply_tau`` is False for individual
    temperatures, whose objective is multiplied by them anyway. ``sample_state_dtype``: the largest error of log u
    where it is kept in 16 bits; None: it is float32.
    """

    name: str
    temperature_scheme: str
    multiply_tau: bool
    temperature: float | None
    tau_gradient: str
    rho: float
    fastclip_eps: float
    gamma: float
    gamma_schedule: str
    gamma_decay_epochs: int
    loss_weight: float
    logit_scale_bound: float
    sample_state_device: str
    gather_error_bound: ErrorBounds | None
    sample_state_dtype: float | None
    local_loss: bool
    gather_with_grad: bool
    coca_caption_loss_weight: float
    coca_contrastive_loss_weight: float
    distill_weight: float
    distill_logit_scale: float
    distill_ref_logit_scale: float
    distill_teacher_dimension: tuple[int, ...]
    distill_average_after_softmax: bool
    decided_by: str = ""

    @property
    def spec(self) -> LossSpec:
        """The loss's entry in the registry."""
        return registry.get(self.name)

    @property
    def state_columns(self) -> tuple[str, ...]:
        """The columns of the sample state that the loss keeps; empty where it keeps none."""
        return self.spec.state_columns(self.gamma)

    @property
    def state_codes(self) -> dict[str, FixedPoint]:
        """Column of the sample state -> how it is kept in 16 bits; the others are float32."""
        if self.sample_state_dtype is None:
            return {}
        code = FixedPoint.of_bound(self.sample_state_dtype, *_log_u(self.fastclip_eps))
        return {name: code for name in self.state_columns if name in LOG_U}

    @property
    def initial_tau(self) -> float:
        """The initial temperature: ``--temperature`` where it has an effect, else its default."""
        return ALL["temperature"].default if self.temperature is None else self.temperature

    @property
    def trains_temperature(self) -> bool:
        """Whether the model's temperature is learned."""
        constant = self.spec.sample_state and self.temperature_scheme == "global_constant"
        return self.spec.temperature == "model" and not constant


@dataclass(frozen=True)
class Objective:
    """Which loss the flags agree on, and which of them decided it."""

    spec: LossSpec
    decided_by: str
    temperature_scheme: str


_KINDS = ("image", "text", "ref")
_BOUNDS = 2e-5, 0.1
_BOUND = 1e-3  # of log u, where --sample_state_dtype names none
_FLOAT32 = 2.0**-149, (2 - 2.0**-23) * 2.0**127  # the least and the largest positive number

_DISTILL = tuple(
    key for key in ALL if key.startswith("distill_") and key not in ("distill_model", "distill_pretrained")
)


def _unless_taken(keys: tuple[str, ...], why: str) -> tuple[Idle, ...]:
    """Settings of losses: each has no effect with a loss that does not take it."""

    def without(key: str) -> Callable[[Setting], bool]:
        return lambda s: not s.loss.takes(key)

    return tuple(Idle((key,), without(key), why) for key in keys)


IDLE = (
    Idle(
        ("multiply_tau", "tau_gradient"),
        lambda s: s.loss.individual,
        "with individual temperatures, whose objective has its own form",
    ),
    *_unless_taken(
        (
            *("gamma", "gamma_schedule", "gamma_decay_epochs", "fastclip_eps", "rho", "multiply_tau"),
            *("tau_gradient", "gather_error_bound"),
        ),
        "without --fastclip",
    ),
    Idle(("temperature", "temperature_scheme"), lambda s: not s.loss.sample_state, "without --fastclip"),
    Idle(
        ("sample_state_device", "save_published_state"),
        lambda s: not s.loss.state_columns(s.given.gamma),
        "with a loss that keeps nothing per sample",
    ),
    Idle(
        ("sample_state_dtype",),
        lambda s: not set(s.loss.state_columns(s.given.gamma)) & set(LOG_U),
        "with a loss that keeps no u, as with --gamma 1",
    ),
    Idle(
        ("rho",),
        lambda s: s.loss.takes("multiply_tau") and not s.given.multiply_tau,
        "without --multiply_tau or individual temperatures",
    ),
    Idle(("tau_gradient",), lambda s: s.temperature_scheme == "global_constant", "with a constant temperature"),
    *_unless_taken(("local_loss", "gather_with_grad"), "with this loss, which has its own exchange between ranks"),
    *_unless_taken(("coca_caption_loss_weight", "coca_contrastive_loss_weight"), "without a coca model"),
    Idle(_DISTILL, lambda s: "distill" not in s.usage, "without distillation"),
    Idle(
        ("distill_ref_logit_scale",),
        lambda s: "ref" not in s.usage or s.loss.individual,
        "unless the reference serves both ref and distill, with one temperature for all samples",
    ),
)
PITFALLS = (
    Pitfall(
        lambda s: s.trains and s.loss.takes("local_loss") and s.given.local_loss and not s.given.gather_with_grad,
        "--local-loss without --gather-with-grad: the gradient through other ranks' pairs is dropped",
    ),
)


def resolve_objective(given: Given) -> Objective:
    """The loss that the published flags, the model and ``--loss`` agree on."""
    if given.loss is not None and given.loss not in registry.names():
        raise Refusal(f"{given.say('loss')}: unknown, choose one of {', '.join(registry.names())}")
    scheme = given.temperature_scheme
    if given.loss is not None and registry.get(given.loss).individual:
        if given.chose("temperature_scheme") and scheme != "individual_learnable":
            raise Refusal(
                f"{given.say('loss')} has one temperature per sample, which contradicts "
                f"{given.say('temperature_scheme')}: leave one of them out"
            )
        scheme = "individual_learnable"
    implied = _implied_losses(given, scheme)
    if len(implied) > 1:
        flags, names = zip(*((flag, name) for name, flag in implied.items()))
        raise Refusal(
            f"{flags[0]} asks for the loss {names[0]!r} and {flags[1]} for {names[1]!r}: keep one of them"
        )
    if given.loss is None:
        name, decided_by = next(iter(implied.items()), ("clip", "the default"))
    else:
        name, decided_by = given.loss, given.say("loss")
        for other, flag in implied.items():
            if other != name:
                raise Refusal(f"{decided_by} contradicts {flag}, which asks for {other!r}: leave one of them out")
    spec = registry.get(name)
    if spec.decoder and not is_coca(given.model):
        raise Refusal(f"{decided_by}: {given.say('model')} has no caption decoder; choose a CoCa model")
    if spec.sample_state and not spec.individual and scheme == "individual_learnable":
        raise Refusal(
            f"{given.say('temperature_scheme')} contradicts {decided_by}, which has one temperature for all "
            "samples: use --loss fastclip_individual"
        )
    return Objective(spec, decided_by, scheme)


def check_weight(given: Given, loss: LossSpec, usage: frozenset[str]) -> None:
    """Refusal: the contrastive loss has the weight 0, and nothing else is trained on."""
    if not given.loss_weight and ("distill" not in usage or loss.distills):
        raise Refusal(
            f"{given.say('loss_weight')} leaves nothing to train on: give a larger one, or a reference with "
            "--ref_features_usage distill"
        )


def resolve_loss(given: Given, objective: Objective, trains: bool) -> LossConfig:
    """The ``LossConfig`` of the flags.

    Refusal: a flag that the loss needs in a run that ``trains`` is missing or has a wrong value.
    """
    _check_teachers(given)
    if trains:
        _check_needs(given, objective.spec)
    known = {*LossConfig.__dataclass_fields__, *OptimConfig.__dataclass_fields__, "initial_tau"}
    if unknown := sorted(set(objective.spec.settings.values()) - known):
        raise Refusal(
            f"--loss {objective.spec.name}: its entry in the registry asks for the setting {unknown[0]!r}, but no "
            "flag sets it; use a field of LossConfig or OptimConfig"
        )
    return given.group(
        LossConfig,
        name=objective.spec.name,
        decided_by=objective.decided_by,
        temperature_scheme=objective.temperature_scheme,
        temperature=given.temperature if _temperature_acts(given, objective.spec) else None,
        multiply_tau=given.multiply_tau and not objective.spec.individual,
        gather_error_bound=_error_bounds(given),
        sample_state_dtype=_state_bound(given, objective.spec),
    )


def _error_bounds(given: Given) -> ErrorBounds | None:
    """``E``, ``E:E_end``, or these by kind: ``image=E,text=E:E_end,ref=E``."""
    if given.gather_error_bound is None:
        return None
    said = given.say("gather_error_bound")
    spans: dict[str, tuple[float, float]] = {}
    for part in given.gather_error_bound.split(","):
        kind, named, text = part.rpartition("=")
        kinds = (kind.strip(),) if named else _KINDS
        if not set(kinds) <= set(_KINDS) or spans.keys() & set(kinds):
            raise Refusal(
                f"{said}: give one bound for all, or one each for {', '.join(_KINDS)}: image=1e-3,ref=2e-3"
            )
        try:
            first, _, last = text.partition(":")
            span = float(first), float(last or first)
        except ValueError:
            raise Refusal(
                f"{said}: {text!r} is not a bound: give a number such as 1e-3, or two, 2e-3:5e-4"
            ) from None
        lowest, highest = _BOUNDS
        if not all(lowest <= bound <= highest for bound in span):
            raise Refusal(
                f"{said}: a bound must be in [{lowest:g}, {highest:g}]: finer ones need more than 16 bits of a "
                "component, and with coarser ones little is left of an embedding of norm 1"
            )
        spans |= dict.fromkeys(kinds, span)
    return ErrorBounds(**spans)


def _log_u(eps: float) -> tuple[float, float]:
    """Between which numbers log u lies where u is at least ``eps`` and a float32."""
    return math.log(max(eps, _FLOAT32[0])), math.log(_FLOAT32[1])


def _state_bound(given: Given, spec: LossSpec) -> float | None:
    """The largest error of log u in 16 bits; None: float32."""
    said, (kind, equals, number) = given.say("sample_state_dtype"), given.sample_state_dtype.partition("=")
    if not equals and kind in ("float32", "bound"):
        bound = None if kind == "float32" else _BOUND
    else:
        try:
            bound = float(number) if kind == "bound" else math.nan
        except ValueError:
            bound = math.nan
        if not 0 < bound < math.inf:
            raise Refusal(f"{said}: give float32, bound, or the largest error of log u as in bound={_BOUND:g}")
    if bound is None or not set(spec.state_columns(given.gamma)) & set(LOG_U):
        return None
    least = FixedPoint.least_bound(*_log_u(given.fastclip_eps))
    if bound < least:
        raise Refusal(
            f"{said}: 16 bits cannot keep log u so exactly with {given.say('fastclip_eps')}; give at least "
            f"bound={least:g}, or float32"
        )
    if given.gamma < 1 and bound >= (forgets := -math.log1p(-given.gamma)):
        raise Refusal(
            f"{said}: with {given.say('gamma')} log u falls by at most {forgets:.3g} from visit to visit, and "
            "would not fall at all if it is rounded so coarsely; give a smaller bound, or float32"
        )
    return bound


def fastclip_loss(scheme: str) -> str:
    """The loss that ``--fastclip`` asks for with the temperature scheme ``scheme``."""
    return "fastclip_individual" if scheme == "individual_learnable" else "fastclip"


def _implied_losses(given: Given, scheme: str) -> dict[str, str]:
    """The losses that published flags ask for: loss name -> flag."""
    implied = {}
    if given.distill_model or given.distill_pretrained:
        for key, other in (("distill_model", "distill_pretrained"), ("distill_pretrained", "distill_model")):
            if not given.values[key]:
                raise Refusal(f"{given.say(other)} needs {ALL[key].name}: give the teacher's name and its weights")
        implied["distill"] = given.say("distill_model")
    if is_coca(given.model):
        implied["coca"] = given.say("model")
    if given.siglip:
        implied["siglip"] = "--siglip"
    if given.fastclip:
        implied[fastclip_loss(scheme)] = "--fastclip"
    return implied


def _check_needs(given: Given, spec: LossSpec) -> None:
    # In a run of a single epoch gamma is always 1, but the run may be resumed for more epochs.
    if spec.state_columns(given.gamma) and given.data_size == -1:
        raise Refusal(
            f"--data_size is missing: the loss {spec.name!r} keeps values per sample, so give the number "
            "of samples in the data set (every sample key must be smaller)"
        )
    if _temperature_acts(given, spec):
        lowest, highest = INDIVIDUAL_TAU if spec.individual else (1 / given.logit_scale_bound, 1.0)
        if not lowest * (1 - 1e-6) <= given.temperature <= highest:
            why = "individual temperatures are kept" if spec.individual else "--logit_scale_bound keeps it"
            raise Refusal(
                f"{given.say('temperature')}: {why} in [{lowest:g}, {highest:g}]; give a value in that interval"
            )
    if spec.distills and given.distill_weight > 1:
        raise Refusal(
            f"{given.say('distill_weight')}: the weight of the contrastive loss is 1 minus this; give at most 1"
        )


def _temperature_acts(given: Given, spec: LossSpec) -> bool:
    """Whether ``--temperature`` has an effect: with FastCLIP's losses only, and where the user gave it."""
    return spec.sample_state and given.chose("temperature")


def _check_teachers(given: Given) -> None:
    widths = given.distill_teacher_dimension
    if widths != [-1] and min(widths) < 1:
        raise Refusal(
            f"{given.say('distill_teacher_dimension')}: every width must be at least 1; leave the flag out for a "
            "single teacher"
        )
