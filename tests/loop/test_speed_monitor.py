"""The warning about a loader that is too slow: when it is logged, how often, and with which advice."""

from __future__ import annotations

import logging

import pytest

from training.loop.speed_monitor import DataWait


def warnings(wait: DataWait, lines: list[tuple[float, float, bool]], caplog) -> list[int]:
    """Which of the log lines (waited, total, first) came with a warning."""
    warned = []
    for number, line in enumerate(lines):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            wait.update(*line)
        if caplog.records:
            warned.append(number)
    return warned


def test_a_slow_loader_is_warned_about_at_intervals(caplog):
    slow, fast, filling = (0.3, 1.0, False), (0.1, 1.0, False), (0.9, 1.0, True)
    assert warnings(DataWait(4, 1, 8), [fast, filling, fast], caplog) == []
    assert warnings(DataWait(4, 1, 8), [filling, slow, *[slow] * 9, slow], caplog) == [1, 11]
    assert warnings(DataWait(4, 1, 8), [slow, fast, slow, *[fast] * 20, slow], caplog) == [0, 23]
    DataWait(4, 1, 8).update(0.25, 0.5)
    assert "50%" in caplog.text


@pytest.mark.parametrize(
    ("workers", "ranks", "cores", "advice"),
    [
        (0, 1, 8, "--workers 0"),
        (4, 1, 8, "raise --workers 4"),
        (2, 3, 8, "raise --workers 2: 3 rank"),
        (4, 2, 8, "all 8 cores"),
        (9, 1, 8, "all 8 cores"),
    ],
)
def test_advice_fits_the_machine(workers, ranks, cores, advice):
    assert advice in DataWait(workers, ranks, cores).advice
