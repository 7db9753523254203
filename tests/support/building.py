"""Building target and reference from flags in one process, and looking at what was built."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import open_clip
import torch
from torch import nn

from tests.support import tiny_models
from training.config.params import Config, parse
from training.distributed.process_group import World
from training.models.build import build_target
from training.models.create import BuiltModel
from training.models.frozen import build_reference

ALONE = World(0, 0, 1, 1, torch.device("cpu"))
SYNTHETIC = ["--dataset-type", "synthetic", "--train-num-samples", "64", "--batch-size", "8", "--data_size", "64"]


def config(*flags: object) -> Config:
    return parse([*SYNTHETIC, *map(str, flags)])


def target(*flags: object) -> BuiltModel:
    return build_target(config(*flags), ALONE)


def reference(tmp_path: Path, *flags: object) -> BuiltModel | None:
    model = tiny_models.path("tiny-vit", tmp_path)
    return build_reference(config("--model", model, "--fastclip", *flags), ALONE)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-6)


@torch.no_grad()
def embed(module: nn.Module, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    text = open_clip.SimpleTokenizer(context_length=module.context_length)(["one", "two words", "and three words"])
    module.eval()
    return module.encode_image(image, normalize=True), module.encode_text(text, normalize=True)


def trained(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


def known_to_open_clip() -> str:
    """open_clip's own name for ``tiny-vit``. It is never forgotten, so it is none that other tests give a file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tiny-vit-of-open-clip.json")
        file.write_text(json.dumps(tiny_models.CONFIGS["tiny-vit"]))
        open_clip.add_model_config(file)
    return file.stem


@contextmanager
def shrunk(*built_in: str) -> Iterator[None]:
    """Models of open_clip as ``tiny-vit``, for a while: names and tags stay, weights fit a test."""
    with tempfile.TemporaryDirectory() as folder:
        for model in built_in:
            Path(folder, f"{model}.json").write_text(json.dumps(tiny_models.CONFIGS["tiny-vit"]))
            open_clip.add_model_config(Path(folder, f"{model}.json"))
        try:
            yield
        finally:
            for model in built_in:
                Path(folder, f"{model}.json").unlink()
            open_clip.add_model_config(folder)  # scans again, and finds only open_clip's own
            assert all(open_clip.get_model_config(model)["embed_dim"] > 32 for model in built_in)
