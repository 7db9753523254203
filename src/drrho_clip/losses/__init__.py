"""The losses; importing this package fills the registry."""

from drrho_clip.losses import baselines, fastclip, individual
from drrho_clip.losses.registry import Loss, LossInputs, LossOutput, LossSpec, get, names

__all__ = [
    "Loss",
    "LossInputs",
    "LossOutput",
    "LossSpec",
    "baselines",
    "fastclip",
    "get",
    "individual",
    "names",
]
