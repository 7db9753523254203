"""What the name of a metric says: whether it is only a count, and whether the least value is the best one."""

from __future__ import annotations

_COUNTS = ("num_samples", "num_captions", "num_sets", "left_out", "epoch", "step")
_LOWER_IS_BETTER = ("loss", "rank")  # clip_val_loss, image_to_text_mean_rank, ...


def is_count(name: str) -> bool:
    """Whether ``name`` says of what a metric is, or when it was measured."""
    return name.endswith(_COUNTS)


def lower_is_better(name: str) -> bool:
    """Whether the least value of the metric ``name`` is the best one."""
    # The end alone counts: names begin with that of their set, such as wds_blossoms_test or wds_franklin_test.
    return name.endswith(_LOWER_IS_BETTER)
