"""--dry_run: lengths, sizes and paths against numbers computed by hand, and that nothing is done."""

from __future__ import annotations

import math
import shlex

import pytest
import torch

from tests.support import tiny_models
from training import dry_run
from training.config.params import Config, parse
from training.models import pretrained


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def config(line: str, tmp_path, model: str = "tiny-vit") -> Config:
    data = "--train-data shards/{0..9}.tar --train-num-samples 1001 --name run"
    return parse(shlex.split(f"{data} --model {tiny_models.path(model, tmp_path / 'models')} {line}"))


def line_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"  {name} "))


def test_steps_are_rounded_up_over_the_global_batch(tmp_path):
    text = dry_run.describe(config("--batch-size 10 --epochs 3 --warmup 7 --accum-freq 2", tmp_path), 4)
    assert text.startswith("Training on 4 ranks")
    assert "40 samples: 4 ranks with 10 in 2 micro-batches each" in line_of(text, "global batch")
    assert "1,001 samples in 26 steps" in line_of(text, "epoch")  # 1001 / 40 = 25.025
    assert line_of(text, "steps").split(maxsplit=1)[1] == "78 in 3 epochs, 7 of warm-up"


def test_where_a_run_ends(tmp_path):
    steps = {
        "--iters 50": "50 by --iters, 7 of warm-up",
        "--stop_epochs 2": "303 in 3 epochs, 7 of warm-up, this run stops after 202",
        "--stop_iters 20": "303 in 3 epochs, 7 of warm-up, this run stops after 20",
        "--skip-scheduler": "303 in 3 epochs",
        "--iters 5": "5 by --iters, 7 of warm-up, so the full learning rate is never reached",
    }
    for flags, expected in steps.items():
        text = dry_run.describe(config(f"--batch-size 10 --epochs 3 --warmup 7 {flags}", tmp_path), 1)
        assert line_of(text, "steps").split(maxsplit=1)[1] == expected


FASTCLIP = "--fastclip --data_size 10000001"


@pytest.mark.parametrize(
    "flags, columns",
    [
        (FASTCLIP, 2),
        (f"{FASTCLIP} --gamma 1.0", 0),
        (f"{FASTCLIP} --temperature_scheme individual_learnable", 8),
        (f"{FASTCLIP} --temperature_scheme individual_learnable --gamma 1.0", 6),
        ("", 0),
    ],
)
def test_memory_of_the_sample_state_per_rank(flags, columns, tmp_path):
    c = config(flags, tmp_path)
    size = dry_run.state_size(c, 4)
    assert size.columns == columns
    assert size.bytes_per_rank == (4 * columns * math.ceil(10000001 / 4) if columns else 0)
    text = line_of(dry_run.describe(c, 4), "sample state")
    assert text.endswith(
        f"10,000,001 rows of {columns} numbers, {columns * 10} MB per rank" if columns else "none"
    )


def test_memory_of_a_sample_state_in_16_bits(tmp_path):
    c = config(f"{FASTCLIP} --temperature_scheme individual_learnable --sample_state_dtype bound", tmp_path)
    assert dry_run.state_size(c, 4).bytes_per_rank == (2 * 2 + 6 * 4) * math.ceil(10000001 / 4)
    text = line_of(dry_run.describe(c, 4), "sample state")
    assert text.endswith("10,000,001 rows of 8 numbers (2 in 16 bits), 70 MB per rank")


@pytest.mark.parametrize("model", tiny_models.CONFIGS)
def test_parameters_are_those_of_the_built_model(model, tmp_path):
    built = sum(parameter.numel() for parameter in tiny_models.build(model).parameters())
    path = tiny_models.path(model, tmp_path / "models")
    assert pretrained.count_parameters(path, "--model") == built
    assert f"{built:,} parameters, random weights" in line_of(
        dry_run.describe(config("", tmp_path, model)), "target"
    )


def test_the_reference_is_shown_with_its_weights_and_use(tmp_path):
    torch.save({}, tmp_path / "weights.pt")
    reference = tiny_models.path("tiny-vit-reference", tmp_path / "models")
    flags = f"--ref_model {reference} --ref_model_checkpoint weights.pt --ref_features_usage ref,distill"
    text = dry_run.describe(config(f"{FASTCLIP} {flags}", tmp_path))
    assert line_of(text, "loss").endswith("fastclip (--fastclip), reference margins, a distillation term")
    built = sum(parameter.numel() for parameter in tiny_models.build("tiny-vit-reference").parameters())
    assert line_of(text, "reference").endswith(f"{built:,} parameters, weights weights.pt")


def test_launched_ranks(tmp_path, monkeypatch):
    c = config("--world_size 8", tmp_path)
    assert dry_run.describe(c).startswith("Training on 8 ranks")
    assert dry_run.launched_ranks(c, {"WORLD_SIZE": "2"}) == 2
    assert dry_run.launched_ranks(c, {"SLURM_STEP_NUM_TASKS": "3"}) == 3
    assert dry_run.launched_ranks(config("", tmp_path), {}) == 1


def test_evaluation_alone(tmp_path):
    (tmp_path / "val").mkdir()
    text = dry_run.describe(config("--epochs 0 --imagenet-val val", tmp_path))
    assert text.startswith("Evaluation on 1 rank ")
    assert line_of(text, "evaluation").endswith("zero-shot on val")
    assert "loss" not in text and "steps" not in text


def test_nothing_is_written(tmp_path):
    c = config("--logs out --report-to tensorboard", tmp_path)
    before = sorted(tmp_path.rglob("*"))
    text = dry_run.describe(c)
    assert line_of(text, "folder").endswith("out/run/")
    assert line_of(text, "files").endswith("params.txt, out.log, checkpoints/epoch_N.pt, tensorboard/")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_holds_another_run_is_refused_as_by_the_run_itself(tmp_path):
    (tmp_path / "logs/run").mkdir(parents=True)
    (tmp_path / "logs/run/job.done").write_text("")
    with pytest.raises(ValueError, match="--name run: logs/run already holds a run"):
        dry_run.describe(config("", tmp_path))


def test_remarks_are_shown(tmp_path):
    assert dry_run.describe(config("--rho 3", tmp_path)).endswith("  remark: --rho: no effect without --fastclip")
