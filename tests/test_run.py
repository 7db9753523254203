"""Runs of the whole program in one process: other kinds of data, where runs end, and how they resume."""

import json
import math
import re

import pytest
import torch

from tests.support import shards, tiny_models
from training import main as program
from training.checkpoint.pt_file import load_weights, read
from training.evaluation.evaluate import Evaluation
from training.loop.trainer import Trainer

LAUNCHERS = (
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def flags(tmp_path):
    """The flags of a run of 24 synthetic samples in 3 steps per epoch, and what is given in addition."""
    model = tiny_models.path("tiny-vit", tmp_path)
    common = f"--model {model} --logs {tmp_path}/logs --batch-size 8 --workers 0 --precision fp32 --lr 1e-3"
    common += " --log-every-n-steps 1 --warmup 0 --seed 3"

    def words(*more: object, data: str = "--dataset-type synthetic --train-num-samples 24") -> list[str]:
        return [*common.split(), *data.split(), *map(str, more)]

    return words


FASTCLIP = (
    "--fastclip",
    "--multiply_tau",
    "--data_size",
    "30",
    "--gamma",
    "0.6",
    "--lr_tau",
    "1e-4",
    "--rho",
    "6.5",
)


def lines(log: str) -> list[str]:
    return [line for line in log.splitlines() if "Train Epoch" in line]


def losses(log: str) -> list[float]:
    return [float(value) for value in re.findall(r"(?<!_)Loss: (-?[\d.]+)", log)]


@pytest.mark.parametrize("kind", ["csv", "synthetic"])
def test_training_on_other_kinds_of_data(flags, tmp_path, kind):
    given = {} if kind == "synthetic" else {"data": f"--train-data {shards.write_csv(tmp_path / 'csv', 24)}"}
    assert program.main(flags("--name", kind, "--epochs", "3", "--save_published_state", *FASTCLIP, **given)) == 0
    log = (tmp_path / "logs" / kind / "out.log").read_text()
    assert len(losses(log)) == 9 and all(map(math.isfinite, losses(log)))
    assert sum(losses(log)[-3:]) < sum(losses(log)[:3])
    u = read(tmp_path / "logs" / kind / "checkpoints" / "epoch_3.pt")["u_im"]
    assert u.shape == (30, 1)
    assert (u[:24] != 0).all() and (u[24:] == 0).all()  # every row of the data was seen, no other


def test_the_run_ends_at_iters(flags, tmp_path):
    """Inside the second of three epochs, with the schedule laid out for it."""
    assert program.main(flags("--name", "a", "--epochs", "3", "--iters", "4")) == 0
    log = (tmp_path / "logs" / "a" / "out.log").read_text()
    rates = [float(rate) for rate in re.findall(r"LR: ([\d.]+)", log)]
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)], abs=1e-8)
    end = read(tmp_path / "logs" / "a" / "checkpoints" / "step_4.pt")
    assert (end["step"], end["epoch"], end["epoch_step"]) == (4, 1, 1)
    assert (tmp_path / "logs" / "a" / "job.done").exists()


def test_amp_on_the_cpu_is_float32_and_says_so_once(flags, tmp_path):
    for name in ("amp", "fp32"):
        assert program.main(flags("--name", name, "--epochs", "2", "--precision", name)) == 0
    log = (tmp_path / "logs" / "amp" / "out.log").read_text()
    assert log.count("--precision amp on the CPU is float32") == 1
    assert "is float32" not in (tmp_path / "logs" / "fp32" / "out.log").read_text()
    amp, plain = (
        load_weights(tmp_path / "logs" / name / "checkpoints" / "epoch_2.pt") for name in ("amp", "fp32")
    )
    assert all(torch.equal(amp[name], plain[name]) for name in plain)


class Killed(Exception):
    """Stands for the end of the job at its time limit, in the middle of an epoch."""


@pytest.mark.parametrize("name", [(), ("--name", "mine")])
@pytest.mark.parametrize(
    ("job", "count"),
    [
        ({"SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0"}, "SLURM_RESTART_COUNT"),
        ({"TORCHELASTIC_RUN_ID": "none"}, "TORCHELASTIC_RESTART_COUNT"),
    ],
)
def test_a_job_that_its_launcher_starts_again_goes_on(flags, tmp_path, monkeypatch, job, count, name):
    """The same command three times: killed in its first epoch, in its second, and then not at all."""
    words = flags("--epochs", "3", *FASTCLIP)
    assert program.main([*words, "--name", "whole"]) == 0
    for key, value in job.items():
        monkeypatch.setenv(key, value)
    words = [*words[: words.index("--logs") + 1], f"{tmp_path}/job", *words[words.index("--logs") + 2 :], *name]
    train_epoch = Trainer.train_epoch
    for attempt, last in enumerate((0, 1, 3)):
        monkeypatch.setenv(count, str(attempt))

        def killed_in_its_last(self, after_step, last=last):
            if self.epoch == last:
                raise Killed
            train_epoch(self, after_step)

        monkeypatch.setattr(Trainer, "train_epoch", killed_in_its_last)
        if last < 3:
            with pytest.raises(Killed):
                program.main(words)
        else:
            assert program.main(words) == 0

    (folder,) = (tmp_path / "job").iterdir()
    log = (folder / "out.log").read_text()
    assert log.count("restarted before the first checkpoint: starts at the beginning") == 1
    assert log.count("resumed ") == 1 and "epoch_1.pt: 1 epochs, 3 steps" in log
    assert len(lines(log)) == 9  # no line twice: both launches were killed at the beginning of an epoch
    assert (folder / "job.done").exists()
    whole, parts = (read(path / "checkpoints" / "epoch_3.pt") for path in (tmp_path / "logs" / "whole", folder))
    assert all(torch.equal(parts["state_dict"][key], value) for key, value in whole["state_dict"].items())
    assert {p.name for p in (folder / "checkpoints").iterdir()} >= {f"epoch_{n}.pt" for n in (1, 2, 3)}


def test_a_start_that_fails_does_not_use_up_the_name(flags, tmp_path, capfd):
    torch.save(tiny_models.build("tiny-vit", embed_dim=8).state_dict(), tmp_path / "bad.pt")
    words = flags("--name", "a", "--epochs", "1", *FASTCLIP, "--ref_model", tiny_models.path("tiny-vit", tmp_path))
    assert program.main([*words, "--ref_model_checkpoint", str(tmp_path / "bad.pt")]) == 2
    assert "error: " in capfd.readouterr().err
    weights = tiny_models.build("tiny-vit", seed=7).state_dict()
    torch.save(weights, tmp_path / "good.pt")
    assert program.main([*words, "--ref_model_checkpoint", str(tmp_path / "good.pt")]) == 0
    log = (tmp_path / "logs" / "a" / "out.log").read_text()
    assert log.index("bad.pt") < log.index("trained 3 steps")
    assert program.main([*words, "--ref_model_checkpoint", str(tmp_path / "good.pt")]) == 2
    assert "--name a: " in capfd.readouterr().err


def test_latest_without_a_checkpoint_begins_the_run_and_evaluates_nothing(flags, tmp_path, capfd):
    words = flags("--name", "a", "--resume", "latest", "--epochs", "1")
    evaluate = [*words, "--epochs", "0", "--val-data", shards.write_csv(tmp_path / "csv", 4)]
    assert program.main(evaluate) == 2
    error = capfd.readouterr().err
    assert f"--resume latest: there is no checkpoint in {tmp_path}/logs/a/checkpoints to evaluate" in error
    assert not (tmp_path / "logs").exists()
    assert program.main(words) == 0
    log = (tmp_path / "logs/a/out.log").read_text()
    assert f"no checkpoint in {tmp_path}/logs/a/checkpoints yet: the run starts at the beginning" in log
    assert "trained 3 steps" in log and program.main(evaluate) == 0


def test_the_parts_of_a_run_each_reach_their_end(flags, tmp_path):
    """--stop_epochs: the job.done of the first part is gone until the second part ends."""
    words = flags("--name", "a", "--epochs", "2")
    done = tmp_path / "logs" / "a" / "job.done"
    assert program.main([*words, "--stop_epochs", "1"]) == 0
    assert done.exists()
    seen = []

    def look(self, after_step):
        seen.append(done.exists())
        train_epoch(self, after_step)

    train_epoch = Trainer.train_epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", look)
        assert program.main([*words, "--resume", "latest"]) == 0
    assert seen == [False] and done.exists()


def test_bad_evaluation_folders_are_refused_before_models_are_built(flags, tmp_path, capfd, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("training.run.build_target", lambda *_: pytest.fail("a model was built"))
    words = flags(
        "--name", "a", "--epochs", "1", "--imagenet-val", tmp_path / "empty", "--zeroshot-frequency", "1"
    )
    assert program.main(words) == 2
    assert "--imagenet-val" in capfd.readouterr().err
    assert not (tmp_path / "logs").exists()


def test_an_evaluation_that_was_cut_off_is_made_up_for_once(flags, tmp_path, monkeypatch):
    pairs = shards.write_shards(tmp_path, 6, per_shard=3)
    words = flags("--name", "a", "--epochs", "2", "--val-data", pairs, "--val-frequency", "1")
    evaluate, results = Evaluation.__call__, tmp_path / "logs/a/eval_results.jsonl"

    def killed(self, model, epoch, *args, **kwargs):
        if epoch == 1:
            raise Killed
        return evaluate(self, model, epoch, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "__call__", killed)
        with pytest.raises(Killed):
            program.main(words)
    assert not results.exists()
    assert program.main([*words, "--resume", "latest", "--stop_epochs", "1"]) == 0
    assert program.main([*words, "--resume", "latest"]) == 0
    measured = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["epoch"] for line in measured] == [1, 2]
    log = (tmp_path / "logs/a/out.log").read_text()
    values = [line["clip_val_loss"] for line in measured]
    epoch, value = min(enumerate(values, 1), key=lambda pair: pair[1])
    assert (
        f"clip_val_loss: {value:.4g} (epoch {epoch})"
        in [text for text in log.splitlines() if "Best so far" in text][-1]
    )


def test_bare_weights_begin_a_run_with_the_temperature_that_was_asked_for(flags, tmp_path):
    weights = tiny_models.build("tiny-vit").state_dict()
    torch.save({**weights, "logit_scale": torch.tensor(4.5)}, tmp_path / "weights.pt")
    words = flags("--name", "a", "--epochs", "1", "--resume", tmp_path / "weights.pt", *FASTCLIP)
    words[words.index("--lr") + 1] = "0"
    assert program.main([*words, "--lr_tau", "0", "--temperature", "0.05"]) == 0
    trained = load_weights(tmp_path / "logs/a/checkpoints/epoch_1.pt")
    assert trained["logit_scale"].exp().item() == pytest.approx(20)
    assert all(torch.equal(trained[name], value) for name, value in weights.items() if name != "logit_scale")


def test_a_run_that_resumes_without_the_flags_of_its_model_trains_that_model_on(flags, tmp_path):
    model = ("--force-quick-gelu", "--image-std", "0.5", "--force-image-size", "48")
    assert program.main(flags("--name", "whole", "--epochs", "2", *model)) == 0
    assert program.main(flags("--name", "parts", "--epochs", "2", "--stop_iters", "3", *model)) == 0
    assert program.main(flags("--name", "parts", "--epochs", "2", "--resume", "latest")) == 0
    log = (tmp_path / "logs" / "parts" / "out.log").read_text()
    assert "quick_gelu True, not False, vision_cfg.image_size 48, not 32, std (0.5, 0.5, 0.5), not" in log
    whole, parts = (read(tmp_path / "logs" / name / "checkpoints" / "epoch_2.pt") for name in ("whole", "parts"))
    assert all(torch.equal(parts["state_dict"][key], value) for key, value in whole["state_dict"].items())
    assert parts["architecture"] == whole["architecture"]


def test_a_checkpoint_of_a_run_is_a_reference_without_its_name(flags, tmp_path, capfd):
    assert program.main(flags("--name", "a", "--epochs", "1", "--force-quick-gelu")) == 0
    file = str(tmp_path / "logs" / "a" / "checkpoints" / "epoch_1.pt")
    assert program.main(flags("--name", "b", "--epochs", "1", *FASTCLIP, "--ref_model_checkpoint", file)) == 0
    assert "reference tiny-vit: " in (tmp_path / "logs" / "b" / "out.log").read_text()
    capfd.readouterr()
    assert program.main(flags(*FASTCLIP, "--ref_model_checkpoint", file, "--dry_run")) == 0
    assert file in capfd.readouterr().out
    weights = tmp_path / "weights.pt"
    torch.save(read(file)["state_dict"], weights)
    assert (
        program.main(flags("--name", "c", "--epochs", "1", *FASTCLIP, "--ref_model_checkpoint", str(weights))) == 2
    )
    assert "the file does not say of which model it is" in capfd.readouterr().err
