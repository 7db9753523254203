"""The command line of ``python -m training.report``: what it refuses, in one sentence, and what it writes."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from tests.run_report.test_log_lines import FIRST
from training import report
from training.run_report.history import read_run


@pytest.fixture
def run(tmp_path):
    """The least that a run leaves: its log."""
    (tmp_path / "logs/a").mkdir(parents=True)
    (tmp_path / "logs/a/out.log").write_text("".join(FIRST))
    return tmp_path / "logs/a"


def test_the_page_is_in_the_runs_folder_unless_it_is_named(run, capsys):
    assert report.main([str(run)]) == 0
    assert (run / "report.html").is_file() and (run / "report_png/loss.png").is_file()
    assert str(run / "report.html") in capsys.readouterr().out
    text = (run / "report.html").read_text()
    assert "there is no params.txt" in text and "still runs, or was killed" in text


def test_hours_and_price(run, tmp_path):
    assert report.main([str(run), "--out", str(tmp_path / "b.html"), "--gpu_hour_price", "900"]) == 0
    assert "0.003889 GPU hours, 3.5 at 900 an hour" in (tmp_path / "b.html").read_text()  # 7 s on 2 cards


def test_what_is_no_value_is_left_out(run):
    """Files that are cut off, of another program, or hold something else, end no report."""
    noise = bytes(range(256)) * 3
    for name in ("tensorboard/events.out.tfevents.1.x", "checkpoints/epoch_1.pt"):
        (run / name).parent.mkdir()
        (run / name).write_bytes(noise)
    (run / "params.txt").write_bytes(noise + b"\nmodel: <b>caf\xe9</b>\n")
    lines = ['{"epoch": "x"}', "[1]", '{"epoch": 2, "r_R@1": null}', '{"epoch": 3, "clip_val_loss": 1.5}', '{"e']
    (run / "eval_results.jsonl").write_text("\n".join(lines))
    (run / "eval_results").mkdir()
    lines = [
        '{"metrics": [1], "dataset": 3}',
        '{"metrics": {"main_metric": 0.625, "acc1": null}, "dataset": "Ours"}',
    ]
    (run / "eval_results/epoch_3_eval_results.jsonl").write_text("\n".join(lines))
    assert report.main([str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "<b>caf" not in text and "&lt;b&gt;caf" in text
    assert "Ours" in text and "0.625" in text and "clip_val_loss" in text
    assert "no checkpoint here keeps u" in text and "1 cannot be read, such as" in text


@pytest.mark.parametrize(
    "measured, places",
    [
        ([(1, 4), (1, 6)], [1, 1.5]),  # an epoch has 4 steps
        ([(1, 4), (2, 8), (2, 10), (1, 6)], [1, 1.5]),  # a launch went back to step 4, or to none
        ([(1, 4), (2, 8), (2, 8)], [1, 2]),
        ([(1, 16), (2, 32), (3, 12)], [1, 2, 3]),  # an epoch had 16 steps before
        ([(1, None), (2, None), (2, None)], [1, 2]),
        ([(7, 0)], [7]),
    ],
)
def test_evaluations_stand_where_they_were_made(run, measured, places):
    write_evaluations(run, measured)
    history = read_run(run)
    assert [history.place(line) for line in history.evaluations] == places
    assert history.evaluations[-1]["clip_val_loss"] == 9.0 - len(measured)


def test_checkpoints_are_evaluated_in_any_order(run):
    """In a folder that only evaluates, as with --epochs 0."""
    (run / "out.log").write_text("2026-01-01,00:00:00 | INFO | target tiny-vit: 1.0M parameters\n")
    write_evaluations(run, [(30, 120), (20, 80), (10, 40), (20, 80)])
    evaluations = read_run(run).evaluations
    assert [line["epoch"] for line in evaluations] == [10, 20, 30]
    assert [line["clip_val_loss"] for line in evaluations] == [6.0, 5.0, 8.0]


def test_an_evaluation_inside_an_epoch_is_drawn_there(run):
    write_evaluations(run, [(1, 4), (1, 6)])
    assert report.main([str(run)]) == 0
    text = (run / "report.html").read_text()
    charts = re.findall(r'<script type="application/json">(.*?)</script>', text, re.S)
    drawn = [(one["x"], one["y"]) for chart in charts for one in json.loads(chart)["series"]]
    assert ([1, 1.5], [8.0, 7.0]) in drawn
    assert "epoch 1.5</th>" in text


def write_evaluations(run, measured):
    """A line for each epoch and step, None: it has none. The losses are 8, 7, ..."""
    lines = [
        {"epoch": epoch, **({} if step is None else {"step": step}), "clip_val_loss": 8.0 - i}
        for i, (epoch, step) in enumerate(measured)
    ]
    (run / "eval_results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_runs_may_be_called_like_formulas(run):
    names = ["$lr_$x", "_second"]
    others = [run.parent / name for name in names]
    for other in others:
        shutil.copytree(run, other)
    assert report.main([*map(str, others), "--out", str(run / "both.html")]) == 0
    text = (run / "both.html").read_text()
    drawn = text[text.index('<figure id="loss">') :]
    assert all(f">{name}</text>" in drawn[: drawn.index("</svg>")] for name in names)
    assert (run / "both_png/summary.png").is_file() and (run / "both_png/loss.png").is_file()


def test_a_strangers_folder_writes_no_file_elsewhere_and_no_script(run, tmp_path):
    """Only the columns of the sample state are taken from TensorBoard's tags."""
    script = 'q"><svg onload=document.title=1>'
    with SummaryWriter(str(run / "tensorboard")) as writer:
        for column in ("log_u_image", script, "../../outside/x", str(tmp_path / "absolute")):
            writer.add_histogram(f"sample_state/{column}", torch.arange(9.0), 1)
    (tmp_path / "logs/outside").mkdir()
    before = set(tmp_path.rglob("*"))
    assert report.main([str(run)]) == 0
    written = set(tmp_path.rglob("*")) - before
    assert written and all(path.is_relative_to(run) for path in written)
    assert (run / "report_png/log-u-image-over-time.png").is_file()
    assert "onload" not in (run / "report.html").read_text()


@pytest.mark.parametrize(
    "words, told",
    [
        (["{run}/gone"], ("RUN_DIR", "gone: does not exist")),
        (["{run}/out.log"], ("RUN_DIR", "is a file: give the run's folder")),
        (["{run}/.."], ("RUN_DIR", "it is not a run's; give one of the runs in it: a")),
        (["{run}", "--out", "{run}"], ("--out", "is a folder; give a file")),
        (["{run}", "--out", "{run}/out.log/x.html"], ("--out", "cannot be written", "name a file")),
        (["{run}", "--serve", "1e9"], ("--serve", "'1e9' is not a port")),
        (["{run}", "--seconds", "nan"], ("--seconds", "'nan' is not a number")),
        (["{run}", "--samples", "-1"], ("--samples",)),
    ],
)
def test_refusals(run, words, told, capsys):
    given = [word.format(run=run) for word in words]
    try:
        code = report.main(given)
    except SystemExit as error:  # argparse
        code = error.code
    assert code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in told) and "Traceback" not in message, message
