"""TensorBoard and W&B that fail at the start, in between or at the end: the run goes on and says what is lost."""

from __future__ import annotations

import http.server
import os
import resource
import sys
import threading
import time

import pytest
import torch

from training import reports
from training.checkpoint.run_folder import choose_folder
from training.config.params import parse
from training.distributed.process_group import World
from training.logger import EarlyRecords, open_run

MAIN = World(0, 0, 1, 1, torch.device("cpu"))


def start(tmp_path, *flags):
    data = ["--dataset-type", "synthetic", "--train-num-samples", "8", "--logs", str(tmp_path), "--name", "a"]
    config = parse([*data, *flags])
    with EarlyRecords() as early:
        log = open_run(config, MAIN, choose_folder(config, MAIN))
        early.hand_over()
    return log


@pytest.fixture
def limited():
    """Lets files grow no longer, as on a full disk, until it is called with None."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)


# --------------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_goes_on_after_a_full_disk(tmp_path, limited, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(reports, "_REOPEN", 0.0)
    with start(tmp_path, "--report-to", "tensorboard") as log:
        log.scalars(1, {"train/loss": 1.0})
        (writer,) = log.writers
        writer._writer.flush()
        limited(300)
        for step in range(2, 40):
            log.scalars(step, {"train/loss": float(step)})
            time.sleep(0.001)
        limited(None)
        log.scalars(40, {"train/loss": 40.0})
    text = (tmp_path / "a/out.log").read_text()
    assert text.count("--report-to tensorboard: values are lost there") == 1
    assert "Traceback" not in text + capsys.readouterr().err
    found = set()
    for file in (tmp_path / "a/tensorboard").iterdir():
        events = EventAccumulator(str(file)).Reload()
        if "train/loss" in events.Tags()["scalars"]:
            found |= {event.step for event in events.Scalars("train/loss")}
    assert {1, 40} <= found


@pytest.mark.parametrize("what", ["tensorboard", "out.log", "checkpoints"])
def test_something_else_where_a_run_writes_is_one_sentence(tmp_path, what):
    (tmp_path / "a").mkdir()
    if what == "out.log":
        (tmp_path / "a" / what).mkdir()
    else:
        (tmp_path / "a" / what).touch()
    hooks = threading.excepthook
    with pytest.raises(ValueError, match=rf"--(logs|report-to tensorboard).*{tmp_path}/a.*{what}"):
        start(tmp_path, "--report-to", "tensorboard")
    assert threading.excepthook is hooks


# ----------------------------------------------------------------------------------------------------- W&B


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """W&B on a machine of its own: no account, no settings."""
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody listens
    for name in ("_BEGIN", "_FINISH"):
        monkeypatch.setattr(reports, name, 4 * getattr(reports, name))  # its process may start slowly here
    wandb.teardown()
    yield wandb
    wandb.teardown()


def recorded(tmp_path):
    return list((tmp_path / "a/wandb").glob("offline-run-*/*.wandb"))


def test_without_a_network_a_run_is_recorded_for_later(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    begun = time.monotonic()
    with start(tmp_path, "--report-to", "wandb") as log:
        log.scalars(1, {"train/loss": 1.0})
        log.done()
    assert time.monotonic() - begun < 80  # W&B alone would try for a minute and a half
    wandb.teardown()  # as at the end of a program
    first, last = (line for line in (tmp_path / "a/out.log").read_text().splitlines() if "wandb" in line)
    assert "http://127.0.0.1:9 cannot be reached (" in first and "WANDB_MODE=offline" in first
    (file,) = recorded(tmp_path)
    assert f"'wandb sync {file.parent}' sends it" in last
    assert b"train/loss" in file.read_bytes()


@pytest.fixture
def server():
    """Somebody who answers, but not as W&B does."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404)
            self.end_headers()

        do_HEAD = do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("key", "reason"),
    [(None, "no API key is configured"), ("short", "API key"), ("x" * 40, "W&B has not accepted the run")],
)
def test_without_an_account_a_run_is_recorded_for_later(tmp_path, wandb, server, monkeypatch, key, reason):
    monkeypatch.setenv("WANDB_BASE_URL", server)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    with start(tmp_path, "--report-to", "wandb") as log:
        log.scalars(1, {"train/loss": 1.0})
    first, _ = (line for line in (tmp_path / "a/out.log").read_text().splitlines() if "wandb" in line)
    assert reason in first and "WANDB_MODE=offline" in first
    assert len(recorded(tmp_path)) == 1


@pytest.mark.parametrize("model, beta2, eps", [("ViT-B-32", 0.98, 1e-6), ("RN50", 0.999, 1e-8)])
def test_w_and_b_knows_the_optimizers_defaults(tmp_path, wandb, monkeypatch, model, beta2, eps):
    monkeypatch.setenv("WANDB_MODE", "offline")
    told, init = {}, wandb.init
    monkeypatch.setattr(
        wandb, "init", lambda *, config, **given: told.update(config) or init(config=config, **given)
    )
    with start(tmp_path, "--report-to", "wandb", "--model", model) as log:
        log.done()
    values = [told[key] for key in ("lr", "lr_tau", "beta1", "beta2", "eps")]
    assert values == [5e-4, 5e-4, 0.9, beta2, eps]


def test_a_run_that_cannot_be_recorded_goes_on(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/wandb").touch()
    with start(tmp_path, "--report-to", "wandb") as log:
        log.scalars(1, {"train/loss": 1.0})
        log.watch(torch.nn.Linear(1, 1))
        log.done()
    assert (tmp_path / "a/job.done").exists()
    assert "it goes on without W&B" in (tmp_path / "a/out.log").read_text()


def test_w_and_b_that_dies_during_the_run_does_not_end_it(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with start(tmp_path, "--report-to", "wandb") as log:
        log.scalars(1, {"train/loss": 1.0})
        wandb.teardown()
        log.scalars(2, {"train/loss": 1.0})
        log.scalars(3, {"train/loss": 1.0})
        log.done()
    assert (tmp_path / "a/job.done").exists()
    text = (tmp_path / "a/out.log").read_text()
    assert text.count("--report-to wandb: values are lost there") == 1


def test_a_wrong_setting_of_w_and_b_is_refused(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(ValueError, match=r"--report-to wandb: a setting of W&B is wrong \(mode: .*'offline'"):
        start(tmp_path, "--report-to", "wandb")


def test_a_package_that_does_not_fit_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("raise TypeError('Descriptors cannot be created directly')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match=r"--report-to wandb: .*\(Descriptors cannot be created directly\)"):
        start(tmp_path, "--report-to", "wandb")
