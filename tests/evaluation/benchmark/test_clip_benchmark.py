"""``python -m training.evaluate`` beside clip_benchmark's own program, which opens the model as it is exported.

clip_benchmark needs an older NumPy than the trainer may have: ``bash scripts/test_clients.sh`` has a virtual
environment for it.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from tests.support import evalsets, tiny_models
from training import evaluate, export

pytestmark = pytest.mark.client
pytest.importorskip("clip_benchmark", reason="needs clip_benchmark: bash scripts/test_clients.sh has it")

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROPERTIES = ("an even number", "a prime number", "a number above four")


def file_of(picture: np.ndarray, kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, kind)
    return out.getvalue()


def write_digits(data: Path) -> None:
    """Scanned digits of 8x8 pixels: which one it is, whether it is even, and what is true of it."""
    digits = load_digits()
    some = range(0, len(digits.target), 9)
    pictures = {i: file_of((digits.images[i] * 15).astype(np.uint8), "png") for i in some}
    labels = {i: int(digits.target[i]) for i in some}
    true = {i: [y % 2 == 0, y in (2, 3, 5, 7), y > 4] for i, y in labels.items()}
    common = [{"__key__": f"d{i:04d}", "png": pictures[i]} for i in some]
    ten = [sample | {"cls": str(labels[i])} for i, sample in zip(some, common)]
    two = [sample | {"cls": str(labels[i] % 2)} for i, sample in zip(some, common)]
    many = [sample | {"npy": evalsets.npy(np.array(true[i], dtype=np.int64))} for i, sample in zip(some, common)]
    evalsets.write_wds(data / "wds_mnist_test", ten, DIGITS, per_shard=80)
    evalsets.write_wds(data / "wds_parity_test", two, ("an even number", "an odd number"), per_shard=150)
    evalsets.write_wds(data / "wds_facts_test", many, PROPERTIES, kind="multilabel", per_shard=150)


def write_photographs(data: Path) -> None:
    """Parts of two photographs, of different shapes, with one to three captions each."""
    rng, samples = np.random.default_rng(0), []
    photographs = list(zip(load_sample_images().images, ("a temple in China", "a flower")))
    for i in range(40):
        picture, what = photographs[i % 2]
        height, width = rng.integers(60, 300, 2)
        top, left = (rng.integers(0, side - part) for side, part in zip(picture.shape, (height, width)))
        part = file_of(picture[top : top + height, left : left + width], "jpeg")
        captions = [f"{what}, {text}" for text in (f"part {i}", f"from row {top}", f"{height} high")]
        samples.append({"__key__": f"p{i:02d}", "jpg": part, "txt": "\n".join(captions[: 1 + i % 3])})
    evalsets.write_wds(data / "wds_flickr30k_test", samples, kind="retrieval", per_shard=25)


def theirs(model: Path, data: Path, out: Path, *datasets: str) -> dict[str, dict]:
    """What clip_benchmark finds, by its name of each of ``datasets``."""
    out.mkdir()
    words = ["eval", "--model", f"local-dir:{model}", "--pretrained", "", "--no_amp", "--recall_k", "1", "5", "10"]
    words += ["--dataset", *(f"wds/{name}" for name in datasets), "--num_workers", "0"]
    words += ["--dataset_root", f"{data}/wds_{{dataset_cleaned}}_test", "--output", f"{out}/{{dataset}}.json"]
    command = [sys.executable, "-m", "clip_benchmark.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return {name: json.loads((out / f"{name}.json").read_text())["metrics"] for name in datasets}


def test_figures_are_those_of_clip_benchmark(one_thread, tmp_path):
    torch.save({"state_dict": tiny_models.build("tiny-vit", seed=5).state_dict()}, tmp_path / "model.pt")
    checkpoint = ["--checkpoint", str(tmp_path / "model.pt"), "--model", tiny_models.path("tiny-vit", tmp_path)]
    data = tmp_path / "data"
    write_digits(data)
    write_photographs(data)

    assert evaluate.main([*checkpoint, "--data_dir", str(data), "--out", str(tmp_path / "out.jsonl")]) == 0
    ours = {line["key"]: line["metrics"] for line in map(json.loads, (tmp_path / "out.jsonl").open())}
    ours["flickr30k"] = ours.pop("retrieval/flickr_1k_test_image_text_retrieval")

    assert export.main([*checkpoint, "--out", str(tmp_path / "model")]) == 0
    found = theirs(tmp_path / "model", data, tmp_path / "theirs", "mnist", "parity", "facts", "flickr30k")

    assert np.isnan(found["parity"].pop("acc5")), "they have NaN where there are fewer than five classes"
    assert ours["parity"].pop("acc5") is None
    assert found.keys() == ours.keys()
    for name, metrics in found.items():
        assert {key: ours[name][key] for key in metrics} == pytest.approx(metrics, abs=1e-6, rel=0), name
    assert 0.1 < found["mnist"]["acc5"] < 1 and 0 < found["flickr30k"]["text_retrieval_recall@5"] < 1
