"""What a run reports, and where."""

import io
import json
import logging
import re
import resource
import struct
import sys
import time

import pytest
import torch

from training.checkpoint.run_folder import RunFolder, choose_folder
from training.config.params import parse
from training.distributed.process_group import World
from training.logger import EarlyRecords, open_run
from training.loop.metrics import TrainStatus, report, train_line

MAIN = World(0, 0, 1, 1, torch.device("cpu"))
STATUS = TrainStatus(
    epoch=3,
    step=420,
    seen=1280,
    total=100000,
    eta=3725.9,
    data_time=0.01234,
    batch_time=0.5,
    rate=2560.0,
    gpus=8,
    lr=3.125e-4,
    lr_tau=7.8125e-5,
    logit_scale=14.2857,
    losses={"loss": (1.25, 2.5), "contrastive_loss": (1.0, 2.0)},
)


def start(tmp_path, *flags, world=MAIN):
    config = parse(
        ["--dataset-type", "synthetic", "--train-num-samples", "8", "--logs", str(tmp_path), "--name", "a", *flags]
    )
    folder = choose_folder(config, world) if world.is_main else RunFolder(tmp_path / "a", "a")
    return open_run(config, world, folder)


# -------------------------------------------------------------------------------------------------- lines


def test_log_file_and_scalars_go_nowhere_else(tmp_path):
    before = list(logging.getLogger().handlers)
    with start(tmp_path) as log:
        report(log, STATUS)
        logging.getLogger("open_clip").info("from a library")
        logging.getLogger(__name__).debug("for the developer")
        log.done()
    text = (tmp_path / "a" / "out.log").read_text()
    assert train_line(STATUS) in text and "from a library" in text and "for the developer" not in text
    assert (tmp_path / "a" / "job.done").exists()
    assert not (tmp_path / "a" / "tensorboard").exists()
    assert logging.getLogger().handlers == before


def test_debug_logs_more(tmp_path):
    with start(tmp_path, "--debug"):
        logging.getLogger(__name__).debug("for the developer")
    assert "DEBUG | for the developer" in (tmp_path / "a" / "out.log").read_text()


def test_other_ranks_write_nothing_but_warn_on_the_console(tmp_path, capfd):
    with start(tmp_path, "--report-to", "tensorboard", world=World(1, 1, 2, 2, torch.device("cpu"))) as log:
        log.info("a line")
        log.warning("a worry")
        report(log, STATUS)
        log.eval_result({"epoch": 1, "x": 0.5})
        log.done()
        with log.progress(3, "work", every=0.0) as progress:
            progress.update()
    assert not (tmp_path / "a").exists()
    console = capfd.readouterr().err
    assert "rank 1 | WARNING | a worry" in console
    assert "a line" not in console and "work" not in console


def test_log_local_writes_one_file_per_node(tmp_path):
    second_node = World(rank=8, local_rank=0, world_size=16, local_world_size=8, device=torch.device("cpu"))
    with start(tmp_path, "--log-local", world=second_node) as log:
        log.info("from the second node")
    with start(tmp_path, "--log-local", world=World(9, 1, 16, 8, torch.device("cpu"))) as log:
        log.info("from its second rank")
    files = {path.name: path.read_text() for path in (tmp_path / "a").iterdir()}
    assert list(files) == ["out-8.log"]
    assert "from the second node" in files["out-8.log"] and "second rank" not in files["out-8.log"]


def test_an_error_is_in_the_log_and_is_raised(tmp_path, capfd):
    with pytest.raises(ZeroDivisionError), start(tmp_path):
        _ = 1 / 0
    text = (tmp_path / "a" / "out.log").read_text()
    assert "ERROR" in text and "ZeroDivisionError" in text and "_ = 1 / 0" in text
    assert "ZeroDivisionError" not in capfd.readouterr().err  # where Python prints the traceback itself
    assert not (tmp_path / "a" / "job.done").exists()


# ---------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def limited():
    """Lets files grow no longer, as on a full disk, until it is called with None. (Those of capfd neither.)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)


def test_a_log_that_cannot_be_written_is_told_once(tmp_path, limited, capsys):
    with start(tmp_path) as log:
        log.info("at the beginning")
        limited(2000)
        for number in range(500):
            log.info(f"line {number}")
        log.eval_result({"epoch": 1, "top1": 0.25})
        limited(None)
        log.info("at the end")
        log.done()
    text, console = (tmp_path / "a" / "out.log").read_text(), capsys.readouterr().err
    assert "at the beginning" in text and "at the end" in text
    assert console.count("out.log cannot be written (File too large): lines are missing there") == 1
    assert "line 499" in console and "Traceback" not in console and "Logging error" not in console


def test_a_log_that_stays_unwritable_ends_nothing(tmp_path, limited, capsys):
    with start(tmp_path) as log:
        limited(10)
        log.info("a line")
        log.eval_result({"epoch": 1, "top1": 0.25})
        log.done()
    console = capsys.readouterr().err
    assert "Traceback" not in console
    assert 'so this result is in the log only: {"epoch": 1, "top1": 0.25}' in console
    assert "the run is complete, but" in console and "job.done cannot be written" in console


def test_names_that_are_not_text_are_escaped_in_the_log(tmp_path):
    with start(tmp_path, "--wandb-notes", "of \udcff") as log:
        log.info("shard \udce9.tar")
    assert "shard \\udce9.tar" in (tmp_path / "a" / "out.log").read_text()
    assert "wandb_notes: of \\udcff\n" in (tmp_path / "a" / "params.txt").read_text()


@pytest.mark.parametrize("name", ["groups/mine/a", "ünï code", "n" * 255, "-a"])
def test_names_that_a_folder_can_have(tmp_path, name):
    with start(tmp_path, f"--name={name}") as log:
        log.info("a line")
    assert "a line" in (tmp_path / name / "out.log").read_text()


@pytest.mark.parametrize("logs", ["file", "file/logs", "x" * 300])
def test_a_place_where_no_run_can_be(tmp_path, logs):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--logs .*: the run's folder cannot be (used|written) \("):
        start(tmp_path / logs)


# ------------------------------------------------------------------------------------------------ progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bar_and_lines_share_a_terminal(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Terminal())
        with start(tmp_path) as log, log.progress(8, "epoch 0", initial=2) as progress:
            progress.update(3)
            progress.bar.refresh()
            log.info("a line in between")
            progress.update(3)
        screen = sys.stderr.getvalue()
    assert re.search(r"epoch 0: *62%.*5\.?0*/8", screen)
    line = next(part for part in re.split(r"[\r\n]", screen) if "a line in between" in part)
    assert line.endswith("INFO | a line in between") and "%" not in line
    assert "epoch 0" not in (tmp_path / "a" / "out.log").read_text()


def test_off_a_terminal_slow_work_says_where_it_is(tmp_path, capfd):
    with start(tmp_path) as log:
        with log.progress(4, "validation", unit="batch", every=0.05) as progress:
            for _ in range(4):
                time.sleep(0.03)
                progress.update()
        with log.progress(4, "quick", every=60.0) as progress:
            progress.update(4)
    text = (tmp_path / "a" / "out.log").read_text()
    told = re.findall(r"validation: (\d)/4 batch", text)
    assert told and told == sorted(set(told))  # how many there are depends on how long a sleep takes
    assert "quick" not in text
    assert "%|" not in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------- reports


def test_eval_results_are_lines_of_strict_json(tmp_path):
    with start(tmp_path) as log:
        log.eval_result({"epoch": 1, "num_samples": 3, "image_to_text_R@1": 0.25})
        log.eval_result({"epoch": 2, "clip_val_loss": float("nan")})
    lines = (tmp_path / "a" / "eval_results.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"epoch": 1, "num_samples": 3, "image_to_text_R@1": 0.25},
        {"epoch": 2, "clip_val_loss": None},
    ]


def test_a_continued_run_replaces_the_scalars_of_the_steps_that_it_takes_again(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    # Files of one second and one process are read in the order of their numbers as text: 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    with start(tmp_path, "--report-to", "tensorboard") as log:
        for step in range(1, 6):
            log.scalars(step, {"train/loss": 10.0 + step})
    with start(tmp_path, "--report-to", "tensorboard") as log:
        log.goes_on(3)
        for step in (4, 5, 6):
            log.scalars(step, {"train/loss": 20.0 + step})
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload().Scalars("train/loss")
    assert [(e.step, e.value) for e in events] == [(1, 11), (2, 12), (3, 13), (4, 24), (5, 25), (6, 26)]


def test_tensorboard_events_are_read_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with start(tmp_path, "--report-to", "tensorboard") as log:
        report(log, STATUS)
        log.eval_result({"epoch": 4, "num_samples": 3, "imagenet-zeroshot-val-top1": 0.25})
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found["train/loss"] == [(420, 1.25)]
    assert found["train/samples_per_second_per_gpu"] == [(420, 320.0)]
    assert found["train/lr_tau"] == [(420, pytest.approx(7.8125e-5))]
    assert found["val/imagenet-zeroshot-val-top1"] == [(4, 0.25)]
    assert "val/num_samples" not in found


def wandb_records(file):
    """The records of an offline run: LevelDB's log format (blocks of 32 KiB) behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def test_wandb_offline_run_is_read_back(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    flags = ("--report-to", "wandb", "--wandb-notes", "a note", "--wandb-project-name", "a project")
    model = torch.nn.Linear(2, 2)
    try:
        with start(tmp_path, *flags, "--log-every-n-steps", "1") as log:
            log.watch(model)
            model(torch.ones(1, 2)).sum().backward()
            report(log, STATUS)
            log.eval_result({"epoch": 4, "clip_val_loss": 0.75})
    finally:
        wandb.teardown()
    (file,) = (tmp_path / "a" / "wandb").glob("offline-run-*/*.wandb")
    records = list(wandb_records(file))
    (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert (run.display_name, run.project, run.notes) == ("a", "a project", "a note")
    assert json.loads(next(u.value_json for u in run.config.update if u.key == "train_num_samples")) == 8
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert any(row.get("train/loss") == 1.25 and row.get("step") == 420 for row in rows)
    assert any(row.get("val/clip_val_loss") == 0.75 and row.get("epoch") == 4 for row in rows)
    assert any("gradients" in key for row in rows for key in row)


def test_a_report_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"--report-to wandb.*pip install wandb"):
        start(tmp_path, "--report-to", "wandb")


def test_what_is_logged_before_the_run_has_a_folder_waits_for_its_log():
    seen = []

    class Later(logging.Handler):
        def emit(self, record):
            seen.append(record.getMessage())

    root, later = logging.getLogger(), Later()
    with EarlyRecords() as early:
        logging.getLogger("training.early").info("one")
        logging.getLogger("training.early").warning("two")
        root.addHandler(later)
        early.hand_over()
        logging.getLogger("training.early").info("three")
    root.removeHandler(later)
    assert seen == ["one", "two", "three"]
