"""Evaluation during a run: on which data, and how often."""

from __future__ import annotations

from dataclasses import dataclass

from training.config.data import check_file, kind_of_data
from training.config.given import Given
from training.config.remarks import Idle


@dataclass(frozen=True)
class EvalConfig:
    """What a run evaluates on. ``val_dataset_type``: as ``DataConfig.dataset_type``, for ``val_data``.

    Frequencies are in epochs; 0: never.
    """

    val_data: str | None
    val_num_samples: int | None
    val_frequency: int
    imagenet_val: str | None
    imagenet_v2: str | None
    zeroshot_frequency: int
    val_dataset_type: str = "none"


IDLE = (
    Idle(("val_num_samples", "val_frequency"), lambda s: not s.given.val_data, "without --val-data"),
    Idle(
        ("zeroshot_frequency",),
        lambda s: not (s.given.imagenet_val or s.given.imagenet_v2),
        "without --imagenet-val or --imagenet-v2",
    ),
)


def evaluates(given: Given) -> bool:
    """Whether there is anything to evaluate on."""
    return bool(given.val_data or given.imagenet_val or given.imagenet_v2)


def resolve_evaluation(given: Given) -> EvalConfig:
    """The ``EvalConfig`` of the flags. Refusal: a file that is to be read does not exist."""
    for key in ("val_data", "imagenet_val", "imagenet_v2"):
        check_file(given, key)
    return given.group(EvalConfig, val_dataset_type=kind_of_data(given, "val_data"))
