"""scripts/scaling_law.py: laws that are known are found again."""

from __future__ import annotations

import csv
import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = [1000.0 * 2**k for k in range(6)]


@pytest.fixture(scope="module")
def scaling_law():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield importlib.import_module("scaling_law")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def power_law(scaling_law):
    return importlib.import_module("study.power_law")


def errors(alpha, beta, floor):
    return [alpha * (budget / BUDGETS[0]) ** beta + floor for budget in BUDGETS]


@pytest.mark.parametrize("alpha, beta, floor", [(0.6, -0.4, 0.3), (0.9, -0.1, 0.0), (0.5, -1.2, 0.45)])
def test_exact_data(power_law, alpha, beta, floor):
    law = power_law.fit(BUDGETS, errors(alpha, beta, floor))
    assert (law.alpha, law.beta, law.floor) == pytest.approx((alpha, beta, floor), abs=1e-4)
    assert law(np.array(BUDGETS)) == pytest.approx(errors(alpha, beta, floor), rel=1e-5)


def test_how_far_runs_are_off_their_law(power_law):
    exact = errors(1.0, -0.5, 0.1)
    law = power_law.fit(BUDGETS, exact)
    runs = {budget: [error, error] for budget, error in zip(BUDGETS, exact)}
    assert power_law.largest_deviation(law, runs) < 1e-3
    runs[BUDGETS[1]] = [exact[1] - 0.08, exact[1]]
    assert power_law.largest_deviation(law, runs) == pytest.approx(0.04, abs=1e-3)


def test_floor_is_not_negative(power_law):
    line = [1.0 - 0.15 * k for k in range(6)]  # falls ever faster in log(budget), as no law with a floor does
    law = power_law.fit(BUDGETS, line)
    assert law.floor == 0 and law.beta < 0


def test_intervals_cover_the_truth_and_shrink_with_noise(power_law):
    rng = np.random.default_rng(0)
    clean, widths = errors(0.6, -0.4, 0.3), {}
    for noise in (0.002, 0.01):
        runs = {b: (e * (1 + noise * rng.standard_normal(5))).tolist() for b, e in zip(BUDGETS, clean)}
        fitted = power_law.bootstrap({"x": runs}, draws=400)["x"]
        low, high = fitted.interval()
        assert low < fitted.law.beta < high and low - 0.03 < -0.4 < high + 0.03
        widths[noise] = high - low
    assert widths[0.002] < widths[0.01] / 2


def test_difference_of_two_groups_is_paired(power_law):
    """Both share the noise of their seeds: the difference of their slopes is known better than either slope."""
    rng = np.random.default_rng(1)
    noise = {b: 1 + 0.02 * rng.standard_normal(5) for b in BUDGETS}
    groups = {
        name: {b: (e * noise[b]).tolist() for b, e in zip(BUDGETS, errors(alpha, beta, 0.0))}
        for name, alpha, beta in (("a", 0.8, -0.2), ("b", 0.8, -0.3))
    }
    fitted = power_law.bootstrap(groups, draws=300)
    difference = fitted["b"].draws[:, 1] - fitted["a"].draws[:, 1]
    assert difference.std() < 0.5 * fitted["a"].draws[:, 1].std()
    assert np.median(difference) == pytest.approx(-0.1, abs=0.02)


def write(path, rows):
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]))
        out.writeheader()
        out.writerows(rows)


@pytest.fixture
def results(tmp_path):
    rng, rows = np.random.default_rng(2), []
    for method, beta in (("slow", -0.2), ("fast", -0.5)):
        for budget, error in zip(BUDGETS, errors(0.7, beta, 0.2)):
            for seed in range(3):
                top1 = 100 * (1 - error * (1 + 0.002 * rng.standard_normal()))
                rows.append(
                    {"method": method, "samples": int(budget), "test_top1": top1, "data": "b", "seed": seed}
                )
                rows.append(
                    {"method": method, "samples": int(budget), "test_top1": 5, "data": "other", "seed": seed}
                )
    write(tmp_path / "results.csv", rows)
    return tmp_path / "results.csv"


def test_program(scaling_law, results, tmp_path, capsys):
    picture = tmp_path / "made" / "law.png"
    command = [
        str(results),
        "--where",
        "data=b",
        "--only",
        "slow",
        "fast",
        "--out",
        str(picture),
        "--draws",
        "200",
    ]
    assert scaling_law.main(command) == 0
    said = capsys.readouterr().out
    found = {name: float(beta) for name, beta in re.findall(r"\| (\w+) \| (-\d\.\d+) \(", said)}
    assert found["slow"] == pytest.approx(-0.2, abs=0.03) and found["fast"] == pytest.approx(-0.5, abs=0.03)
    assert re.search(r"\| fast \|.*\| -0\.3\d? \(-0\.\d+ to -0\.\d+\) \|", said), said
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--where", "data"], "--where data: give COLUMN=VALUE"),
        (["--where", "color=red"], "no column 'color'"),
        (["--only", "none"], "there are no runs of none"),
        (["--where", "data=z"], "there are no runs with data=z"),
        (["--where", "samples=1000", "data=b"], "1 budgets"),
    ],
)
def test_refusals(scaling_law, results, words, reason, capsys):
    assert scaling_law.main([str(results), *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and reason in said


def test_no_file(scaling_law, tmp_path, capsys):
    assert scaling_law.main([str(tmp_path / "none.csv")]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_one_run_in_a_budget_gives_a_law_without_an_interval(scaling_law, power_law):
    runs = {
        budget: [error] * (1 if budget == BUDGETS[-1] else 3)
        for budget, error in zip(BUDGETS, errors(0.6, -0.4, 0.3))
    }
    fitted = power_law.bootstrap({"a": runs, "b": runs}, draws=20)
    assert fitted["a"].law.beta == pytest.approx(-0.4, abs=1e-4)
    assert fitted["a"].interval() is None and fitted["b"].steeper_than(fitted["a"]) is None
    assert "one run in a budget: no interval" in scaling_law.table(fitted)[2]
