"""What is exported: the model in a checkpoint, and what is known of the run that trained it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.checkpoint import pt_file
from training.config.inputs.weights import TORCH, kind_of
from training.distributed.process_group import World
from training.models.create import BuiltModel
from training.models.frozen import build_saved

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SCALARS = ("logit_scale", "logit_bias")  # they stay float32: a step of bfloat16 is 1% of a temperature


class CannotExport(ValueError):
    """Why a model cannot be written in a format: the end of a sentence that begins with the format."""


@dataclass(frozen=True)
class Subject:
    """A model and its run.

    ``built``     the model on the CPU in float32, frozen and in eval mode.
    ``file``      the checkpoint; None for a pretrained tag of open_clip.
    ``held``      what the checkpoint holds besides tensors: flags, epoch, step, ... Empty for bare weights.
    ``dtype``     of the weights that are written.
    ``license``   an identifier such as ``mit`` or ``cc-by-4.0``; '' where the user gave none.
    """

    built: BuiltModel
    file: Path | None
    held: Mapping[str, Any]
    dtype: torch.dtype
    license: str

    @property
    def config(self) -> dict[str, Any]:
        """The model's config for use: without the patches that training drops."""
        config = {
            key: dict(v) if isinstance(v, Mapping) else v for key, v in self.built.description.held().items()
        }
        model: dict[str, Any] = config["model_cfg"]
        if model["vision_cfg"].get("patch_dropout"):
            model["vision_cfg"]["patch_dropout"] = 0.0
        return model

    @property
    def preprocess(self) -> dict[str, Any]:
        """The fields of open_clip's ``PreprocessCfg`` as plain values."""
        preprocess: dict[str, Any] = self.built.description.held()["preprocess_cfg"]
        return preprocess

    def weights(self) -> dict[str, Tensor]:
        """Name -> tensor of the open_clip model, in ``dtype``; none shares memory with another."""
        state = self.built.module.state_dict()
        return {name: self.stored(name, tensor) for name, tensor in state.items()}

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor``, called ``name``, as it is written: in ``dtype`` if it is a weight, in memory of its own."""
        keep = not tensor.is_floating_point() or name in SCALARS
        return (
            tensor.detach().to(tensor.dtype if keep else self.dtype).clone(memory_format=torch.contiguous_format)
        )


def open_subject(checkpoint: str, model: str, precision: str, license: str) -> Subject:
    """Build the model of ``checkpoint``, a file or ``NAME:TAG``. ValueError: a flag is wrong."""
    built = build_saved(checkpoint, model, World(0, 0, 1, 1, torch.device("cpu")))
    file = Path(checkpoint) if Path(checkpoint).exists() else None
    held: dict[str, Any] = {}
    if file is not None and kind_of(file) == TORCH:
        skipped = ("state_dict", "optimizer", "stream", "scaler")
        held = {key: value for key, value in pt_file.read(file).items() if key not in skipped}
    return Subject(built, file, held if "epoch" in held else {}, DTYPES[precision], license)
