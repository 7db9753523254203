"""The demo's own parts: its model configs, and the table that it ends with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PICTURES = 10_000


@pytest.mark.parametrize("config", sorted((ROOT / "assets" / "models").glob("*.json")), ids=lambda path: path.stem)
def test_model_configs_load_in_open_clip(config: Path) -> None:
    open_clip.add_model_config(config)
    model, _, preprocess = open_clip.create_model_and_transforms(config.stem)
    size = json.loads(config.read_text())["vision_cfg"]["image_size"]
    pixels = preprocess(Image.new("RGB", (size, size)))[None]
    tokens = open_clip.get_tokenizer(config.stem)(["home outline"])
    image, text, _ = model.eval()(pixels.expand(2, -1, -1, -1), tokens.expand(2, -1))
    assert image.shape == text.shape == (2, json.loads(config.read_text())["embed_dim"])
    assert torch.isfinite(image).all()


def write_run(folder: Path, epoch: int, accuracy: float) -> None:
    """What training.main leaves of an evaluation."""
    recalls = {f"{kind}_retrieval_recall@{k}": accuracy / 2 * k for kind in ("image", "text") for k in (1, 5)}
    lines = [
        {"key": "icons", "metrics": {"acc1": accuracy, "acc5": 2 * accuracy}, "num_samples": PICTURES},
        {"key": "retrieval", "metrics": {**recalls, "mean_recall@1": accuracy / 2}},
    ]
    (folder / "eval_results").mkdir(parents=True, exist_ok=True)
    path = folder / "eval_results" / f"epoch_{epoch}_eval_results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_seed(folder: Path, **accuracies: float) -> Path:
    for run, accuracy in accuracies.items():
        write_run(folder / run, 9, accuracy / 3)
        write_run(folder / run, 10, accuracy)  # the last one, though not by the order of letters
    return folder


def run_table(tmp_path: Path, *folders: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/demo/table.py"), *map(str, folders)]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)


def test_table_of_one_seed_has_errors_over_pictures(tmp_path: Path) -> None:
    logs = write_seed(tmp_path / "seed_0", reference=0.18, openclip=0.11, fastclip_v3=0.1, drrho_clip=0.11)
    done = run_table(tmp_path, logs)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("| DRRho-CLIP"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["11.0", "22.0", "5.5", "27.5"]
    # sqrt(.11 * .89 / 10,000 + .1 * .9 / 10,000) is 0.434 points.
    assert "DRRho-CLIP - FastCLIP-v3: +1.0 ± 0.4 points, ahead" in done.stdout
    assert "DRRho-CLIP - OpenCLIP: +0.0 ± 0.4 points, no clear difference" in done.stdout
    assert "10,000 pictures" in done.stdout and (logs / "table.md").read_text() == done.stdout


def test_table_of_several_seeds_has_errors_over_seeds(tmp_path: Path) -> None:
    ours = (0.12, 0.14, 0.16)
    logs = [
        write_seed(tmp_path / f"seed_{i}", reference=0.2, openclip=0.15, fastclip_v3=0.1, drrho_clip=accuracy)
        for i, accuracy in enumerate(ours)
    ]
    done = run_table(tmp_path, *logs)
    assert done.returncode == 0, done.stderr
    # The standard deviation is 2 points, and 2 / sqrt(3) is 1.15.
    assert "DRRho-CLIP - FastCLIP-v3: +4.0 ± 1.2 points, ahead" in done.stdout
    assert "DRRho-CLIP - OpenCLIP: -1.0 ± 1.2 points, no clear difference" in done.stdout
    assert "3 seeds" in done.stdout and not (logs[0] / "table.md").exists()


def test_table_of_a_missing_run_says_what_to_do(tmp_path: Path) -> None:
    logs = write_seed(tmp_path / "seed_0", reference=0.18, openclip=0.11, fastclip_v3=0.1)
    done = run_table(tmp_path, logs)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "drrho_clip: has no eval_results" in done.stderr and "run scripts/demo.sh" in done.stderr
