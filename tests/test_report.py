"""The command line of ``python -m training.report``: what it refuses, in one sentence, and what it writes."""

from __future__ import annotations

import pytest

from tests.run_report.test_log_lines import FIRST
from training import report


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
