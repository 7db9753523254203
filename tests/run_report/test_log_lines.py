"""What a report reads from logs: of this program, of the published code, of launches that take steps again."""

from __future__ import annotations

import pytest

from training.run_report.log_file import read


def line(time: str, text: str, level: str = "INFO", origin: str = "") -> str:
    return f"2026-01-02,{time} | {origin}{level} | {text}\n"


def trained(epoch: int, seen: int, loss: float, total: int = 40) -> str:
    return (
        f"Train Epoch: {epoch} [{seen}/{total} ({100 * seen // total}%)] ETA: 0:00:01 Data (t): 0.250 "
        f"Batch (t): 0.500, 20.5/s, 10.25/s/gpu LR: 0.00050000 LR_tau: 0.00010000 Logit Scale: 14.286 "
        f"Contrastive_loss: {loss} (9.9) Loss: {loss} (9.9)"
    )


FIRST = [
    line("10:00:00", "hardware: 2 x H100 on node1; torch 2.9"),
    line("10:00:01", "target tiny: 1.7M parameters"),
    line("10:00:02", "training data: 1 shards; an epoch has 40 samples in 4 steps of 10, none repeated"),
    line("10:00:03", "loss fastclip (--fastclip); 2 x cuda, fp32, 5 samples per rank and step; adamw"),
    line("10:00:04", trained(0, 10, 4.0)),
    line("10:00:05", trained(0, 40, 3.0)),
    line(
        "10:00:05",
        "samples left out since the last epoch: 2 missing text (e.g. a.tar/1: b, c), 1 bad key (e.g. x)",
    ),
    line("10:00:06", trained(1, 10, 2.5)),
    line("10:00:07", trained(1, 20, 2.25)),
]
AGAIN = [
    line("11:00:00", "hardware: 2 x H100 on node2; torch 2.9"),
    line("11:00:01", "target tiny: 1.7M parameters"),
    line("11:00:02", "training data: 1 shards; an epoch has 40 samples in 4 steps of 10, none repeated"),
    line("11:00:03", "resumed logs/a/checkpoints/epoch_1.pt: 1 epochs, 4 steps"),
    line("11:00:04", trained(1, 10, 2.75)),
    line("11:00:05", "skipped 3 samples so far: 3 missing text (e.g. y)", "WARNING"),
    line("11:00:06", "skipped 2 (2 in all) since the last report: the loss was not finite", "WARNING"),
    line("11:00:07", "trained 5 steps"),
]


def test_numbers_of_the_line_about_training():
    log = read(FIRST)
    assert log.series("loss") == ([0.25, 1.0, 1.25, 1.5], [4.0, 3.0, 2.5, 2.25])
    assert log.series("rate")[1][0] == 20.5
    assert log.series("data_time")[1][0] == 0.25
    assert log.series("lr_tau")[1] == [1e-4] * 4
    assert log.series("lr")[1] == [5e-4] * 4
    assert log.series("scale")[1][0] == 14.286
    assert log.losses == ["contrastive_loss", "loss"]


def test_steps_that_are_taken_again_replace_the_earlier_ones():
    log = read(FIRST + AGAIN)
    assert log.series("loss") == ([0.25, 1.0, 1.25], [4.0, 3.0, 2.75])
    first, second = log.launches
    assert (first.ranks, first.device, first.hardware) == (2, "cuda", "2 x H100 on node1; torch 2.9")
    assert (first.reached, first.last_word, first.seconds) == (1.5, "", 7)
    assert (second.begun, second.reached, second.again) == (1.0, 1.25, 0.5)
    assert second.resumed == "logs/a/checkpoints/epoch_1.pt"
    assert second.last_word == "trained 5 steps"
    assert second.ranks == 2


def test_a_launch_that_begins_again_without_a_checkpoint():
    again = [*[text for text in AGAIN if "resumed" not in text][:3], line("11:00:04", trained(0, 10, 5.0))]
    log = read(FIRST + again)
    assert log.series("loss") == ([0.25], [5.0])
    assert (log.launches[1].begun, log.launches[1].again) == (0.0, 1.5)


def test_samples_left_out_by_reason_with_an_example():
    log = read(FIRST)
    assert log.left_out == {1: {"missing text": 2, "bad key": 1}}
    assert log.examples == {"missing text": "a.tar/1: b, c", "bad key": "x"}


def test_warnings_are_counted_and_skipped_samples_are_not_among_them():
    (note,) = read(AGAIN + AGAIN).notes.items()
    assert note == ("WARNING: skipped … (… in all) since the last report: the loss was not finite", 2)


@pytest.mark.parametrize("origin", ["", "node7 rank 0 | "])
def test_the_published_codes_line(origin):
    text = (
        "Train Epoch: 3 [ 512/2048 (25%)] Data (t): 0.011 Batch (t): 0.215, 2381.4/s, 297.675/s/gpu "
        "LR: 0.000100 Logit Scale: 100.000 Contrastive_loss: nan (2.9) Loss: 2.8 (2.9)"
    )
    log = read([line("10:00:00", text, origin=origin)])
    assert log.series("loss") == ([3.25], [2.8])
    assert log.series("rate") == ([3.25], [2381.4])
    assert log.series("lr_tau") == ([], [])


def test_pauses_are_within_a_launch_and_unusual():
    times = [f"10:00:{s:02d}" for s in range(0, 30, 2)] + ["10:09:00", "10:09:02"]
    lines = [line(time, trained(0, i + 1, 1.0)) for i, time in enumerate(times)]
    (pause,) = read(lines).pauses()
    assert (pause.seconds, pause.x) == (512, 15 / 40)
    assert read(FIRST + AGAIN).pauses() == []  # an hour between two launches


def test_anything_else_is_ignored():
    cut = trained(2, 10, 1.0)[:60]
    log = read(
        [
            "",
            "\x00\x01",
            "Traceback (most recent call last):",
            "2026-13-45,10:00:00 | INFO | x",
            line("1:0:0", cut),
        ]
    )
    assert log.points == []
    assert read([]).launches == []
