"""Evaluation during a run: on which data, and how often."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from training.config.data import check_file, kind_of_data, with_home
from training.config.flags import ALL
from training.config.given import Given
from training.config.remarks import Idle

# The data sets for zero-shot accuracy: name in the results -> flag with the folder.
ZERO_SHOT = {"imagenet": "imagenet_val", "imagenetv2": "imagenet_v2"}
DATA = ("val_data", *ZERO_SHOT.values(), "eval_data_dir")


def any_of(keys: Iterable[str]) -> str:
    """The names of two flags or more: ``--one, --two or --three``."""
    *others, last = (ALL[key].name for key in keys)
    return f"{', '.join(others)} or {last}"


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
    eval_data_dir: str | None = None
    eval_tasks: str = "all"
    val_dataset_type: str = "none"

    @property
    def zero_shot(self) -> dict[str, tuple[str, str]]:
        """Name in the results -> (flag, folder), for the data sets that were given."""
        folders = {name: (ALL[key].name, getattr(self, key)) for name, key in ZERO_SHOT.items()}
        return {name: (flag, folder) for name, (flag, folder) in folders.items() if folder}


IDLE = (
    Idle(("val_num_samples", "val_frequency"), lambda s: not s.given.val_data, "without --val-data"),
    Idle(
        ("zeroshot_frequency",),
        lambda s: not any(s.given.values[key] for key in DATA[1:]),
        f"without {any_of(DATA[1:])}",
    ),
    Idle(("eval_tasks",), lambda s: not s.given.eval_data_dir, "without --eval_data_dir"),
)


def evaluates(given: Given) -> bool:
    """Whether there is anything to evaluate on."""
    return any(given.values[key] for key in DATA)


def resolve_evaluation(given: Given) -> EvalConfig:
    """The ``EvalConfig`` of the flags. Refusal: a file that is to be read does not exist."""
    for key in DATA:
        check_file(given, key)
    data = {key: with_home(given.values[key]) for key in DATA}
    return given.group(EvalConfig, val_dataset_type=kind_of_data(given, "val_data"), **data)
