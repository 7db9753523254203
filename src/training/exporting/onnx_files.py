"""The two towers as ONNX graphs, for any number of images or captions.

``image.onnx``  pixel_values, float32 [n, 3, H, W], normalized -> image_embeds, float32 [n, d], unit norm
``text.onnx``   input_ids, int64 [n, t] -> text_embeds, float32 [n, d], unit norm
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.exporting.subject import CannotExport, Subject
from training.exporting.tokenizer_files import write_tokenizer
from training.models.open_clip_model import OpenClipModel

_NEEDED = ("onnx", "onnxscript")


class _Image(nn.Module):
    def __init__(self, model: OpenClipModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.encode_image(pixel_values, normalize=True)


class _Text(nn.Module):
    def __init__(self, model: OpenClipModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model.encode_text(input_ids, normalize=True)


def write_graphs(subject: Subject, folder: Path) -> None:
    """Both graphs, with their preprocess config and tokenizer files. CannotExport: torch cannot write them."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotExport(f"it needs packages that are missing: pip install {' '.join(missing)}")
    if subject.dtype != torch.float32:
        raise CannotExport("graphs are written in float32: leave --precision out, and convert them where they run")
    size = subject.preprocess["size"]
    height, width = size if isinstance(size, list) else (size, size)
    module, length = subject.built.module, subject.built.context_length
    _write(_Image(module), torch.zeros(2, 3, height, width), "pixel_values", "image_embeds", folder / "image.onnx")
    text = subject.built.tokenizer(["a photo", "a caption"])
    assert text.shape == (2, length)
    _write(_Text(module), text, "input_ids", "text_embeds", folder / "text.onnx")
    (folder / "preprocess.json").write_text(json.dumps(subject.preprocess, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(subject.built.tokenizer, folder)


def _write(tower: nn.Module, example: Tensor, given: str, made: str, path: Path) -> None:
    settings: dict[str, Any] = {"dynamic_shapes": ({0: torch.export.Dim("n")},), "dynamo": True, "verbose": False}
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(tower.eval(), (example,), path, input_names=[given], output_names=[made], **settings)
    except Exception as error:  # the exporter can fail in any way on a tower that it does not know
        raise CannotExport(
            f"torch cannot write {path.name} of it ({' '.join(str(error).split())[:200]})"
        ) from error
    finally:
        logging.disable(level)
