"""The program as users start it: one process and several, every loss, stopped and resumed, evaluation alone."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.support import shards, tiny_models
from training import main as program
from training.checkpoint.pt_file import load_weights

ROOT = Path(__file__).parents[1]
SAMPLES = 24
# The published DRRho-CLIP command with small values in place of paths, sizes, model, batch and reference.
DRRHO = shlex.split("""
    --workers 0 --save-frequency 1 --local-loss --epochs 3 --warmup 1 --wd 0.2 --seed 2025 --lr 3.125e-4 --lr_min 0
    --fastclip --temperature_scheme global_constant --temperature 0.01 --multiply_tau --lr_tau 0.0
    --lr_tau_scheduler const --rho 11.0 --fastclip_eps 1e-4 --gamma 0.5 --gamma_schedule cosine
    --gamma_decay_epochs 2 --aug-cfg scale=(1.0,1.0) --precision fp32
""")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards, model configs and a reference's checkpoint as the published code writes it."""
    folder = tmp_path_factory.mktemp("run")
    shards.write_shards(folder, SAMPLES, per_shard=7)
    for name in tiny_models.CONFIGS:
        tiny_models.path(name, folder)
    reference = tiny_models.build("tiny-vit-reference", seed=7)
    weights = {f"module.{k}": v for k, v in reference.state_dict().items()}
    torch.save({"epoch": 1, "name": "reference", "state_dict": weights}, folder / "reference.pt")
    return folder


def flags(folder, name, batch=SAMPLES, model="tiny-vit", data=True):
    given = ["--model", str(folder / f"{model}.json"), "--logs", str(folder / "logs"), "--name", name]
    given += ["--batch-size", str(batch), "--log-every-n-steps", "1", "--data_size", "40"]
    if data:
        given += ["--train-data", f"{folder}/{{00000..00003}}.tar", "--train-num-samples", str(SAMPLES)]
    return given


def reference_flags(folder):
    return [
        "--ref_model",
        str(folder / "tiny-vit-reference.json"),
        "--ref_model_checkpoint",
        str(folder / "reference.pt"),
    ]


def start(command, cwd, **env):
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    env = plain | {"OMP_NUM_THREADS": "1", **env}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def checkpoint(folder, name, file="epoch_3.pt"):
    path = folder / "logs" / name / "checkpoints" / file
    state = {c: torch.zeros(40) for c in ("log_u_image", "log_u_text")}
    dcp.load(state, checkpoint_id=path.with_suffix(".state"), no_dist=True)
    return load_weights(path), state


def embed(weights):
    """Unit-norm embeddings [16, d] of pictures the shards hold."""
    model = tiny_models.build("tiny-vit").eval()
    model.load_state_dict(weights)
    pixels = torch.from_numpy(np.stack([np.asarray(shards.picture(i, (32, 32))) for i in range(16)]))
    with torch.no_grad():
        return model.encode_image(pixels.permute(0, 3, 1, 2) / 255.0 - 0.5, normalize=True)


def test_python_and_torchrun_land_on_the_same_embeddings_and_u(folder, tmp_path):
    """If the data set is one global batch, K ranks take the same steps as one rank."""
    script = [sys.executable, ROOT / "src" / "training" / "main.py"]
    one = start([*script, *flags(folder, "one"), *reference_flags(folder), *DRRHO], tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two_ranks = [*flags(folder, "two", batch=SAMPLES // 2), *reference_flags(folder), *DRRHO]
    start([*torchrun, "-m", "training.main", "--", *two_ranks], tmp_path, PYTHONPATH=str(ROOT / "src"))
    (weights, u), (weights2, u2) = checkpoint(folder, "one"), checkpoint(folder, "two")

    start([*script, *flags(folder, "still"), *reference_flags(folder), *DRRHO, "--lr", "0"], tmp_path)
    still, trained, trained2 = embed(checkpoint(folder, "still")[0]), embed(weights), embed(weights2)
    distance = (trained - still).norm(dim=1)
    assert distance.min() > 1e-3
    assert ((trained2 - trained).norm(dim=1) <= 1e-4 * distance).all()
    for column in u:
        assert u[column].isnan().sum() == 40 - SAMPLES
        torch.testing.assert_close(u[column], u2[column], rtol=1e-4, atol=1e-4, equal_nan=True)

    line = (
        r"Train Epoch: 2 \[24/24 \(100%\)\] ETA: \S+ Data \(t\): [\d.]+ Batch \(t\): [\d.]+, \S+/s, \S+/s/gpu "
        r"LR: [\d.]+ LR_tau: [\d.]+ Logit Scale: 100.000 "
        r"Contrastive_loss: [\d.-]+ \([\d.-]+\) Loss: [\d.-]+ \([\d.-]+\)"
    )
    assert re.search(line, one.stderr)
    run = folder / "logs" / "one"
    assert re.search(line, (run / "out.log").read_text())
    assert "lr_tau: 0.0\n" in (run / "params.txt").read_text()
    assert {p.name for p in run.iterdir()} >= {"checkpoints", "params.txt", "out.log", "job.done"}


LOSSES = {
    "clip": [],
    "clip-global": ["--local-loss", "--gather-with-grad"],
    "siglip": ["--siglip"],
    "coca": [],
    "v0": ["--fastclip", "--temperature_scheme", "global_learnable"],
    "v1": ["--fastclip", "--temperature_scheme", "global_constant"],
    "v2": ["--fastclip", "--temperature_scheme", "individual_learnable", "--lr_tau", "0.0133", "--rho", "7"],
    "v3": ["--fastclip", "--multiply_tau", "--temperature_scheme", "global_learnable", "--rho", "6.5"],
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(folder, name):
    model = "tiny-coca" if name == "coca" else "tiny-resnet" if name == "v1" else "tiny-vit"
    given = [*flags(folder, name, batch=8, model=model), *LOSSES[name]]
    given += [
        "--workers",
        "0",
        "--epochs",
        "2",
        "--warmup",
        "1",
        "--lr",
        "1e-3",
        "--accum-freq",
        "2",
        "--gamma",
        "0.6",
    ]
    assert program.main(given) == 0
    log = (folder / "logs" / name / "out.log").read_text()
    losses = [float(x) for x in re.findall(r"(?<!_)Loss: (-?[\d.]+)", log)]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("usage", ["ref,distill", "select,ref", "distill"])
def test_uses_of_the_reference_combine(folder, usage):
    name = usage.replace(",", "-")
    given = [*flags(folder, name, batch=12), *reference_flags(folder), *DRRHO, "--epochs", "1"]
    given += ["--ref_features_usage", usage, "--ref_filter_ratio", "0.5", "--lanes", "4,4"]
    assert program.main(given) == 0
    log = (folder / "logs" / name / "out.log").read_text()
    assert ("Distill_loss" in log) == ("distill" in usage)
    told = (
        "batch selection draws 3 samples per rank at a time, which the 4 virtual ranks of a rank (--lanes) do not"
    )
    assert (told in log) == ("select" in usage)


def test_the_teacher_of_openclips_distillation_selects_too(folder):
    reference, weights = reference_flags(folder)[1::2]
    given = [*flags(folder, "teacher-selects", batch=12), "--lanes", "4,4", "--epochs", "1"]
    given += ["--distill-model", reference, "--distill-pretrained", weights]
    given += ["--ref_features_usage", "select", "--ref_filter_ratio", "0.5"]
    assert program.main(given) == 0
    log = (folder / "logs/teacher-selects/out.log").read_text()
    assert "Distill_loss" in log and "batch selection draws 3 samples per rank at a time" in log
    assert "no effect" not in log


@pytest.mark.parametrize("precision", ["amp", "amp_bf16", "bf16", "pure_bf16"])
def test_precisions_on_the_cpu(folder, precision):
    given = [*flags(folder, precision), *reference_flags(folder), *DRRHO, "--epochs", "1"]
    assert program.main([*given, "--precision", precision]) == 0
    weights = load_weights(folder / "logs" / precision / "checkpoints" / "epoch_1.pt")
    assert weights["logit_scale"].dtype == torch.float32
    assert all(w.isfinite().all() for w in weights.values())
    halved = any(w.dtype == torch.bfloat16 for w in weights.values())
    assert halved == (precision in ("bf16", "pure_bf16"))


def test_resuming_at_an_epoch_is_the_uninterrupted_run(folder):
    given = [*reference_flags(folder), *DRRHO, "--temperature_scheme", "global_learnable", "--lr_tau", "1e-4"]
    assert program.main([*flags(folder, "whole", batch=8), *given]) == 0
    assert program.main([*flags(folder, "parts", batch=8), *given, "--stop_epochs", "1"]) == 0
    assert program.main([*flags(folder, "parts", batch=8), *given]) == 2  # a folder with a run in it
    assert program.main([*flags(folder, "parts", batch=8), *given, "--resume", "latest"]) == 0
    (whole, u), (parts, u2) = checkpoint(folder, "whole"), checkpoint(folder, "parts")
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert all(torch.equal(u[c].nan_to_num(7), u2[c].nan_to_num(7)) for c in u)


def test_evaluation_alone(folder):
    training = [*flags(folder, "evaluated-later"), "--workers", "0", "--epochs", "2", "--warmup", "1"]
    assert program.main(training) == 0
    given = [*flags(folder, "evaluated", data=False), "--val-data", f"{folder}/{{00000..00003}}.tar"]
    given += ["--epochs", "0", "--resume", str(folder / "logs" / "evaluated-later" / "checkpoints" / "epoch_2.pt")]
    given += ["--val-num-samples", str(SAMPLES), "--workers", "0", "--precision", "fp32"]
    assert program.main(given) == 0
    (result,) = (folder / "logs" / "evaluated" / "eval_results.jsonl").read_text().splitlines()
    result = json.loads(result)
    assert result["epoch"] == 2
    assert 0 <= result["image_to_text_R@1"] <= result["image_to_text_R@10"] <= 1
    assert not list((folder / "logs" / "evaluated" / "checkpoints").iterdir())


def test_a_batch_without_negatives_is_refused(folder, capfd):
    assert program.main([*flags(folder, "alone", batch=1), *DRRHO]) == 2
    assert "--batch-size 1 on 1 rank" in capfd.readouterr().err


def test_dry_run_leaves_nothing_behind(folder, capsys):
    given = [*flags(folder, "dry"), *reference_flags(folder), *DRRHO, "--dry_run"]
    assert program.main(given) == 0
    plan = capsys.readouterr().out
    assert "fastclip" in plan and "reference margins" in plan
    assert not (folder / "logs" / "dry").exists()


def test_what_is_wrong_is_one_sentence(folder, capfd):
    given = [*flags(folder, "wrong"), *DRRHO, "--ref_model", str(folder / "tiny-vit-reference.json")]
    assert program.main([*given, "--ref_model_checkpoint", str(folder / "00000.tar")]) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and "00000.tar" in error[0]


def test_a_run_without_streams_without_a_home_and_in_no_language(folder):
    """As in a bare container: an environment of two variables, a locale of ASCII, all streams closed."""
    line = shlex.join(
        [sys.executable, "-m", "training.main", *flags(folder, "bäre"), "--epochs", "1", "--workers", "1"]
    )
    done = subprocess.run(
        ["bash", "-c", f"{line} --workers 1 --precision fp32 --warmup 0 <&- >&- 2>&-"],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT / "src"), "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert done.returncode == 0
    log = (folder / "logs" / "bäre" / "out.log").read_text(encoding="utf-8")
    assert "saved " in log and "logs/bäre/checkpoints/epoch_1.pt" in log
