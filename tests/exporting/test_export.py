"""Exports, opened by the libraries that they are for: the embeddings are those of the model that was trained."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch

from tests.support import tiny_models
from tests.support.lab import Lab
from training import export
from training.checkpoint import pt_file
from training.main import main

CAPTIONS = ["a photo of a cat", "Two dogs, running!"]


def train(lab: Lab, folder: Path, *flags: str) -> Path:
    """A run of two steps with ``flags``; its folder."""
    words = (
        f"--train-data {lab.shards} --train-num-samples 8 --batch-size 4 --workers 0 --epochs 1 --precision fp32"
    )
    assert main([*words.split(), "--logs", str(folder), "--name", "run", *flags]) == 0
    return folder / "run"


def trained(run: Path, config: dict) -> torch.nn.Module:
    """open_clip's model of ``config`` with the weights of the run."""
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    kind = open_clip.CoCa if "multimodal_cfg" in config else kind
    model = kind(**config)
    model.load_state_dict(pt_file.read(run / "checkpoints" / "epoch_1.pt")["state_dict"])
    return model.eval()


def embed(model: torch.nn.Module, size: int, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.encode_image(images, normalize=True), model.encode_text(text, normalize=True)


def exported(run: Path, folder: Path, *flags: str) -> Path:
    assert export.main(["--checkpoint", str(run), "--out", str(folder), *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def quick_run(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose flags make another model than ``--model`` names."""
    flags = "--force-quick-gelu --image-mean 0.1 0.2 0.3 --image-std 0.9"
    flags += " --force-image-size 48 --force-patch-dropout 0.5"
    return train(lab, tmp_path_factory.mktemp("quick"), "--model", lab.vit, *flags.split())


def quick_config() -> dict:
    return tiny_models.config(
        "tiny-vit", quick_gelu=True, vision_cfg={"image_size": 48}, text_cfg={"width": 16, "heads": 1}
    )


def test_open_clip_opens_the_folder_to_the_same_model(quick_run, tmp_path):
    folder = exported(quick_run, tmp_path / "out")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    text = tokenizer(CAPTIONS)
    assert text.shape == (2, 16)
    expected = embed(trained(quick_run, quick_config()), 48, text)
    # Without eval(): what training does to images must not be part of the exported model.
    torch.testing.assert_close(embed(model, 48, text), expected, rtol=0, atol=1e-5)
    normalize = preprocess.transforms[-1]
    assert (list(normalize.mean), list(normalize.std)) == ([0.1, 0.2, 0.3], [0.9] * 3)
    other = tiny_models.build("tiny-vit", vision_cfg={"image_size": 48}, text_cfg={"width": 16, "heads": 1}).eval()
    other.load_state_dict(model.state_dict())
    assert (embed(other, 48, text)[0] - expected[0]).abs().max() > 1e-4  # the activation matters


def test_transformers_opens_the_folder_to_the_same_model(quick_run, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    folder = exported(quick_run, tmp_path / "out", "--format", "transformers")
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    text = open_clip.SimpleTokenizer(context_length=16)(CAPTIONS)
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=16, truncation=True, return_tensors="pt")[
        "input_ids"
    ]
    ends = text.argmax(1) + 1  # transformers pads with the end of text, and looks at the first one
    assert [row[:end].tolist() for row, end in zip(ids, ends)] == [
        row[:end].tolist() for row, end in zip(text, ends)
    ]
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(input_ids=ids, pixel_values=images)
    expected = embed(trained(quick_run, quick_config()), 48, text)
    torch.testing.assert_close((found.image_embeds, found.text_embeds), expected, rtol=0, atol=1e-5)


def test_onnxruntime_computes_the_same_for_any_number_of_samples(quick_run, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"needs {package}")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    folder = exported(quick_run, tmp_path / "out", "--format", "onnx")
    model = trained(quick_run, quick_config())
    for n in (1, 3):
        images = torch.rand(n, 3, 48, 48, generator=torch.Generator().manual_seed(n))
        text = open_clip.SimpleTokenizer(context_length=16)(["a photo of a cat", "Two dogs", "three, four"][:n])
        with torch.no_grad():
            expected = model.encode_image(images, normalize=True), model.encode_text(text, normalize=True)
        graphs = {"image": {"pixel_values": images.numpy()}, "text": {"input_ids": text.numpy()}}
        for (name, given), wanted in zip(graphs.items(), expected):
            session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
            (found,) = session.run(None, given)
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-5)
