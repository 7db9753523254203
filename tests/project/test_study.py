"""The study: its smoke run from end to end, stopped and gone on with; its grid, its search, its statistics."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import math
import multiprocessing
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import scipy.stats

from training.evaluation import reference_check

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "analysis",
    "cells",
    "comparisons",
    "jobs",
    "methods",
    "pictures",
    "program",
    "report",
    "runs",
    "sets",
    "smoke",
    "table",
    "tuning",
)


@pytest.fixture(scope="module")
def study():
    """The modules of scripts/study, imported as scripts/study.py imports them."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(f"study.{name}") for name in MODULES})
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def row(study, **values):
    """A row of the table, of an OpenCLIP cell unless ``values`` say otherwise."""
    found = dict.fromkeys(study.table.COLUMNS, "0")
    found |= {"kind": "cell", "method": "openclip", "data": "b", "samples": "256", "batch": "64", "model": "small"}
    found |= {"reference": "", "settings": "", "date": "2026-01-02T00:00:00Z", "device": "CPU"}
    found |= {key: str(value) for key, value in values.items()}
    return found | {
        "id": "-".join(map(str, (found["method"], found["samples"], found["reference"], found["seed"])))
    }


# The whole


def smoke(out: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "scripts" / "study.py"),
        "--smoke",
        "--device",
        "cpu",
        "--out",
        str(out),
        *more,
    ]


def rows_of(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a smoke run that was stopped after its first cell and started again."""
    out = tmp_path_factory.mktemp("study")
    with (out / "first.txt").open("w") as said:
        first = subprocess.Popen(smoke(out), stdout=said, stderr=subprocess.STDOUT)
        end = time.monotonic() + 300
        while not rows_of(out / "results.csv") and first.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        first.send_signal(signal.SIGTERM)
        assert first.wait(120) == 1, (out / "first.txt").read_text()
    assert "stopped; the same command goes on" in (out / "first.txt").read_text()
    begun = rows_of(out / "results.csv")
    assert begun
    second = subprocess.run(smoke(out), capture_output=True, text=True, timeout=600)
    assert second.returncode == 0, second.stdout + second.stderr
    assert rows_of(out / "results.csv")[: len(begun)] == begun, "what was finished is kept"
    return out


def test_every_cell_is_trained_once(finished, study):
    rows = rows_of(finished / "results.csv")
    assert len({one["id"] for one in rows}) == len(rows)
    wanted = study.cells.grid(study.cells.SMOKE)
    trained = [
        (one["method"], int(one["samples"]), one["data"], int(one["seed"]))
        for one in rows
        if one["kind"] == "cell"
    ]
    assert sorted(trained) == sorted((w.cell.method, w.cell.samples, w.cell.data, w.cell.seed) for w in wanted)
    assert {one["reference"] for one in rows if one["method"] == "drrho_fixed"} == {"a-256@256"}
    assert {one["id"] for one in rows if one["kind"] == "reference"} == {
        "reference_a-256@128",
        "reference_a-256@256",
    }
    assert {one["method"] for one in rows_of(finished / "tuning.csv")} == {"openclip", "drrho_fixed"}
    for one in rows:
        assert 0 <= float(one["test_top1"]) <= float(one["test_top5"]) <= 100
        assert float(one["cpu_seconds"]) > 0 and "--seed" in one["flags"]
        assert bool(one["b_first"]) == bool(one["b_loss_spread"]) == (one["kind"] == "reference")
    assert not list((finished / "runs").glob("*/checkpoints/*.pt")), "no checkpoint is left that nothing needs"


@pytest.mark.parametrize("elsewhere", [False, True])
def test_nothing_is_left_where_all_rows_are_there(finished, tmp_path, elsewhere):
    """Nor of the references and features that finished cells needed, which another machine may have had."""
    command = smoke(tmp_path, "--results", str(finished)) if elsewhere else smoke(finished)
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True, timeout=120)
    *jobs, total = listed.stdout.splitlines()
    assert len(jobs) == 8 and all(line.split()[0] == "done" for line in jobs), listed.stdout + listed.stderr
    assert total.startswith("0.0 hours")


def test_page_and_pictures(finished, study):
    page = (finished / "study.md").read_text()
    assert "8 cells, 2 runs for tuning and 2 checkpoints of references" in page
    assert "| 192: DRRho-CLIP, fixed τ − OpenCLIP |" in page
    for name in ("scaling_law.png", "weak_to_strong.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_methods_of_a_seed_differ_in_their_own_flags_alone(finished):
    """So that runs of one seed are paired: the trainer's initial weights and order follow from the flags."""

    def flags(method, seed):
        (line,) = [
            one["flags"]
            for one in rows_of(finished / "results.csv")
            if (one["method"], one["samples"], one["seed"], one["data"]) == (method, "192", str(seed), "b")
        ]
        switches = ("--fastclip", "--multiply_tau", "--channels_last")
        words = [word for word in shlex.split(line) if word not in switches]
        return dict(itertools.zip_longest(*[iter(words)] * 2))

    ours, theirs = flags("drrho_fixed", 1), flags("openclip", 1)
    differing = {flag for flag in ours | theirs if ours.get(flag) != theirs.get(flag)}
    assert differing <= {
        "--name",
        "--lr_tau",
        "--temperature",
        "--temperature_scheme",
        "--fastclip_eps",
        "--cached_ref_features_dir",
    }
    assert ours["--seed"] == theirs["--seed"] == "1"


# The grid


def test_grid_has_five_seeds_of_the_main_methods_and_all_claims(study):
    wanted = study.cells.grid(study.cells.ICONS)
    assert len({one.cell for one in wanted}) == len(wanted)
    assert set().union(*(one.claims for one in wanted)) == set(study.cells.CLAIMS)
    budgets = study.cells.ICONS.budgets
    assert len(budgets) >= 4 and budgets[-1] >= 16 * budgets[0]
    for method, samples in itertools.product(study.cells.MAIN, budgets):
        seeds = {
            one.cell.seed
            for one in wanted
            if (one.cell.method, one.cell.samples, one.cell.data, one.cell.model)
            == (method, samples, "b", "small")
        }
        assert len(seeds) >= (5 if samples < budgets[-1] else 3), (method, samples)
    assert {one.cell.method for one in wanted} == set(study.methods.METHODS)
    for one in wanted:
        assert one.cell.samples % one.cell.batch == 0, one
        assert (one.cell.reference is not None) == study.methods.METHODS[one.cell.method].reference, one


def test_what_check_reference_says_of_the_study_is_what_the_study_found(study):
    plan, rows = study.cells.ICONS, study.table.Table(ROOT / "assets/study/results.csv").rows()
    results = study.analysis.Results.of(rows.values())
    (samples,) = plan.middle
    alone = study.cells.Cell("openclip", samples)
    assert results.mean(alone).mean == pytest.approx(8, abs=1)
    assert len(reference_check.STUDIED) == len(plan.strengths)
    for (share, gain), at in zip(reference_check.STUDIED, plan.strengths):
        reference = replace(plan.reference, at=at)
        found = results.difference(study.cells.Cell("drrho_fixed", samples, reference=reference), alone)
        assert float(results.references[reference.name]["b_first"]) == pytest.approx(share, abs=0.05)
        assert found.mean == pytest.approx(gain, abs=0.051), at
    for data, told in (("emoji", reference_check.STUDIED_ELSEWHERE), ("b", reference_check.STUDIED_ON_TARGET)):
        (reference,) = (one for one in plan.other_references if one.data == data)
        found = results.difference(study.cells.Cell("drrho_fixed", samples, reference=reference), alone)
        assert (float(results.references[reference.name]["b_first"]), found.mean) == pytest.approx(told, abs=0.051)


def test_laws_leave_budgets_with_one_run_out_where_others_suffice(study):
    plan = study.cells.ICONS

    def laws(seeds: int, last: int) -> dict:
        counts = [seeds] * (len(plan.budgets) - 1) + [last]
        rows = [
            row(study, samples=samples, batch=plan.batch, seed=seed, test_top1=10 + seed)
            for samples, count in zip(plan.budgets, counts)
            for seed in range(count)
        ]
        return study.report.laws(study.analysis.Results.of(rows), plan)

    assert laws(2, 2) == {"OpenCLIP": {float(at): [0.9, 0.89] for at in plan.budgets}}
    assert list(laws(2, 1)["OpenCLIP"]) == list(plan.budgets[:-1])
    assert laws(1, 1) == {"OpenCLIP": {float(at): [0.9] for at in plan.budgets}}


def test_every_cell_is_compared_and_every_comparison_is_trained(study):
    plan = study.cells.ICONS
    items = [item for make in study.comparisons.COMPARISONS.values() for item in make(plan)]
    compared = {replace(cell, seed=0) for item in items for cell in (item.ours, item.theirs) if cell is not None}
    assert compared == {replace(one.cell, seed=0) for one in study.cells.grid(plan)}


def test_grid_of_some_claims_has_what_they_are_compared_with(study):
    plan = study.cells.ICONS
    whole = study.cells.grid(plan)
    assert study.comparisons.wanted(plan, frozenset(study.cells.CLAIMS)) == whole
    for claim, make in study.comparisons.COMPARISONS.items():
        wanted = study.comparisons.wanted(plan, frozenset(claim))
        assert {one.cell for one in wanted} >= {one.cell for one in whole if claim in one.claims}
        needed = {cell for item in make(plan) for cell in (item.ours, item.theirs) if cell is not None}
        assert {replace(one.cell, seed=0) for one in wanted} == {replace(cell, seed=0) for cell in needed}
        assert len(wanted) < len(whole)


def test_flags_of_every_cell_are_accepted(study, tmp_path, monkeypatch):
    from training.config.params import parse

    study.smoke.make(tmp_path / "data", train=16, test=30)
    studio = study.runs.Studio(tmp_path / "data", tmp_path)
    kinds = {
        (one.cell.method, one.cell.batch, one.cell.model): one.cell for one in study.cells.grid(study.cells.ICONS)
    }
    for cell in kinds.values():
        method = study.methods.METHODS[study.methods.METHODS[cell.method].tuned_as or cell.method]
        for choose in (min, max):
            settings = {axis.flag: choose(axis.values) for axis in method.axes}
            if cell.reference is not None:
                store = study.methods.METHODS[cell.method].store
                studio.features(cell.reference, cell.data, store).mkdir(parents=True, exist_ok=True)
            config = parse(studio.flags(cell, settings, "run"))
            assert config.run.seed == cell.seed
            assert not [remark for remark in config.remarks if "no effect" in remark], (cell, config.remarks)


def test_a_run_that_was_begun_with_other_flags_is_not_gone_on_with(study, tmp_path):
    studio = study.runs.Studio(tmp_path, tmp_path)
    assert not studio._begun("run", ["--lr", "1"])
    (studio.folder("run") / "checkpoints").mkdir(parents=True)
    assert studio._begun("run", ["--lr", "1"])
    assert not studio._begun("run", ["--lr", "2"]) and not studio.folder("run").exists()


def test_jobs_come_after_what_they_need(study, tmp_path):
    study.smoke.make(tmp_path / "data", train=16, test=30)
    studio = study.runs.Studio(tmp_path / "data", tmp_path)
    tables = study.table.Table(tmp_path / "r.csv"), study.table.Table(tmp_path / "t.csv")
    desk = study.jobs.Desk(study.cells.ICONS, studio, *tables)
    agenda = study.jobs.agenda(desk, study.cells.grid(desk.plan))
    place = {job: i for i, job in enumerate(agenda)}
    assert len(place) == len(agenda)
    for job in agenda:
        assert all(place[need] < place[job] for need in job.needs(desk)), job


def test_what_needs_a_failed_job_is_not_tried(study, tmp_path, capsys):
    tried = []

    class Job(SimpleNamespace):
        __hash__ = object.__hash__

        def needs(self, desk):
            return self.after

        def done(self, desk):
            return self.already

        def run(self, desk, slot):
            tried.append(self.name)
            if self.name == "broken":
                raise study.runs.RunFailed("it broke")

    done = Job(name="done", after=(), already=True)
    broken = Job(name="broken", after=(done,), already=False)
    after = Job(name="after", after=(broken,), already=False)
    other = Job(name="other", after=(done,), already=False)
    desk = SimpleNamespace(studio=study.runs.Studio(tmp_path, tmp_path))
    assert study.jobs.work(desk, [done, broken, after, other], slots=2) == 2
    assert sorted(tried) == ["broken", "other"]
    assert "error: it broke" in capsys.readouterr().err


PROGRAM = """
import os, signal, sys

def main(flags):
    print("said", *flags, "to", os.environ["WHERE"], sys.argv[1:] == flags)
    if flags == ["die"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return 3
"""


@pytest.mark.parametrize("flag, code", [("end", 3), ("die", -signal.SIGKILL)])
def test_program_ends_with_its_code_and_its_output_in_the_log(study, tmp_path, monkeypatch, flag, code):
    (tmp_path / "a_program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("study.program._IMPORTED", ())
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    log = tmp_path / "log.txt"
    log.write_text("earlier\n")
    ended, seconds = study.program.Program("a_program", [flag], log, {"WHERE": "here"}).wait()
    assert ended == code and math.isnan(seconds) == (code < 0)
    if code > 0:
        assert log.read_text() == f"earlier\nsaid {flag} to here True\n"


# Choosing settings


def test_search_keeps_the_best_of_each_axis_and_runs_nothing_twice(study):
    best = {"--lr": "4e-3", "--temperature": "0.05", "--gamma": "0.6"}
    tried = []

    def trial(cell):
        settings = dict(cell.settings)
        tried.append((cell.data, tuple(settings.items())))
        assert cell.seed == study.cells.TUNING_SEED and cell.reference is not None
        return {"val_top5": sum(settings.get(flag) == value for flag, value in best.items())}

    plan = study.cells.ICONS
    assert study.tuning.settings("drrho_fixed", plan, {}, epochs=True, trial=trial) == best
    assert len(set(tried)) == len(tried) == 3 + 3 + 3
    assert {data for data, settings in tried if "--gamma" in dict(settings)} == {study.tuning.GAMMA_DATA}
    with pytest.raises(study.tuning.Untuned):
        study.tuning.settings("drrho_fixed", plan, {}, epochs=False)


def test_a_method_may_have_entries_of_its_own_in_the_model_config(study, tmp_path):
    studio = study.runs.Studio(tmp_path, tmp_path)
    plain, other = (
        json.loads(studio.model(study.cells.Cell(name, 256)).read_text()) for name in ("openclip", "openclip_tau")
    )
    assert math.exp(-other.pop("init_logit_scale")) == pytest.approx(0.03)
    assert other == plain
    assert "`init_logit_scale` 3.51" in study.report._methods()


def test_what_has_one_value_is_not_searched(study):
    chosen = study.tuning.settings("openclip_2e-3", study.cells.ICONS, {}, epochs=True)
    assert chosen == {"--lr": "2e-3", "--lr_tau": "2e-3"}


def test_a_stop_that_comes_while_a_run_is_being_started_reaches_it(study, tmp_path, monkeypatch):
    studio = study.runs.Studio(tmp_path, tmp_path)

    class Starting:
        """A program during whose start the study is asked to stop."""

        stopped = False

        def __init__(self, *_):
            studio.stop()

        def stop(self):
            self.stopped = True

        def wait(self):
            return (1 if self.stopped else 0), 0.0

    monkeypatch.setattr(study.runs, "Program", Starting)
    with pytest.raises(study.runs.RunFailed, match="with code 1"):
        studio.start("training.evaluate", [], "one", 0)


def test_checkpoints_of_one_reference_count_once(study):
    """Each has a share of the same run: 300 samples in an hour, of which 200 took 40 minutes."""
    rows = {}
    for at, seconds in ((200, 2400), (300, 3600)):
        one = row(study, kind="reference", samples=at, samples_read=at * 10**4, cpu_seconds=seconds)
        rows[f"reference_a-300@{at}"] = one | {"id": f"reference_a-300@{at}"}
    told = study.report.blocks(rows, {}, study.cells.ICONS)["runs"]
    assert "2 checkpoints of references" in told and "3.0 million samples in at least 1.0 hours" in told


def test_cells_that_a_second_device_trained_again(study):
    """Each is compared with the first device's run of the same cell; what that has not run is left out."""
    rows, again = {}, {}
    for seed, there in enumerate((12, 9, 30)):
        one = row(study, seed=seed, device="a processor", test_top1=10, test_recall1=1)
        second = one | {"device": "a GPU", "test_top1": str(there), "test_recall1": "2"}
        again[one["id"]] = second
        if there < 30:
            rows[one["id"]] = one
    told = study.report.blocks(rows, {}, study.cells.ICONS, again)["devices"]
    assert "| a GPU − a processor | 2 | +0.5 ± 19.1 | +2.0 | +1.0 ± 0.0 |" in told
    assert study.report.blocks(rows, {}, study.cells.ICONS)["devices"] == study.report.NOTHING


def test_search_goes_on_from_its_rows(study):
    plan, rows = study.cells.ICONS, {}

    def trial(cell):
        found = {"val_top5": len(rows)}
        rows[cell.id(study.tuning.shown(dict(cell.settings)))] = found
        return found

    chosen = study.tuning.settings("openclip", plan, {}, epochs=False, trial=trial)
    assert len(rows) == 5
    assert study.tuning.settings("openclip", plan, rows, epochs=False) == chosen
    rows.pop(next(iter(rows)))
    with pytest.raises(study.tuning.Untuned):
        study.tuning.settings("openclip", plan, rows, epochs=False)


# Sets


def test_derived_sets(study, tmp_path):
    study.smoke.make(tmp_path, train=40, test=30)

    def content(name):
        study.sets.make(tmp_path, name)
        found = study.sets.find(tmp_path, name)
        folder = Path(found.pattern).parent
        return found.samples, [(one["png"], one["txt"]) for one in study.sets._read(folder)]

    size, whole = content("b")
    assert size == len(whole) == 40
    quarter, half = content("b-quarter"), content("b-half")
    assert (quarter[0], half[0]) == (10, 20)
    assert set(quarter[1]) < set(half[1]) < set(whole)
    noisy = content("b-noise40")
    assert [png for png, _ in noisy[1]] == [png for png, _ in whole]
    assert sorted(text for _, text in noisy[1]) == sorted(text for _, text in whole), "captions are only exchanged"
    assert 10 <= sum(a != b for a, b in zip(noisy[1], whole, strict=True)) <= 16
    about = Path(study.sets.find(tmp_path, "b-half").pattern).parent / "set.json"
    about.write_text(json.dumps({"shards": 9, "samples": 20}))
    assert content("b-half") == half, "shards of another size are written again"
    assert json.loads(about.read_text()) == {"shards": 1, "samples": 20}
    both = study.sets.find(tmp_path, "a+b")
    assert both.data_size == "40::40" and both.samples == 80
    with pytest.raises(ValueError, match="b-third: no such set"):
        study.sets.make(tmp_path, "b-third")


# The table and its statistics


def append_rows(module, path, name):
    for i in range(20):
        module.Table(path).append(dict.fromkeys(module.COLUMNS, "") | {"id": f"{name}-{i}", "flags": "a,b\n'c'"})


def test_several_processes_append(study, tmp_path):
    context = multiprocessing.get_context("fork")
    path = tmp_path / "deep" / "results.csv"
    writers = [context.Process(target=append_rows, args=(study.table, path, name)) for name in "xyz"]
    for one in writers:
        one.start()
    for one in writers:
        one.join(60)
    assert {one["id"] for one in rows_of(path)} == {f"{name}-{i}" for name in "xyz" for i in range(20)}
    assert study.table.Table(path).rows()["x-3"]["flags"] == "a,b\n'c'"


@pytest.mark.parametrize("values", [[1.0, 2.5], [3.1, -0.4, 1.7], [float(i**2) for i in range(9)]])
def test_intervals_are_those_of_students_t(study, values):
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = study.analysis.estimate(values)
    assert (found.low, found.high) == (pytest.approx(low, rel=1e-3), pytest.approx(high, rel=1e-3))


def test_verdicts(study):
    estimate = study.analysis.estimate
    assert estimate([1.0, 1.1, 0.9]).verdict == "holds"
    assert estimate([-1.0, -1.1, -0.9]).verdict == "does not hold"
    assert estimate([1.0, -1.1, 0.9]).verdict == "undecided"
    assert estimate([5.0]).verdict == "one seed" and math.isinf(estimate([5.0]).half)
    assert estimate([]).verdict == "not run"


def test_differences_are_paired_and_the_newest_row_counts(study):
    ref = study.cells.SMOKE.reference
    rows = [row(study, seed=seed, test_top1=10 * seed) for seed in range(4)]
    rows += [
        row(study, method="drrho_fixed", reference=ref.name, seed=seed, test_top1=10 * seed + 2)
        for seed in range(3)
    ]
    rows.append(row(study, seed=2, test_top1=19.7))
    found = study.analysis.Results.of(rows)
    ours = study.cells.Cell("drrho_fixed", 256, batch=64, reference=ref)
    difference = found.difference(ours, study.cells.Cell("openclip", 256, batch=64))
    assert difference.n == 3 and difference.mean == pytest.approx((2 + 2 + 2.3) / 3)
    assert difference.verdict == "holds", "although the runs of each method differ by 20 points"
    rows.append(row(study, kind="reference", samples=256, test_top1=30) | {"id": f"reference_{ref.name}"})
    beyond = study.analysis.Results.of(rows).beyond_reference(ours)
    assert beyond.mean == pytest.approx(-18)


def test_times_are_of_runs_that_were_not_interrupted(study):
    rows = [row(study, seed=seed, cpu_seconds=100 + seed, resumed=int(seed == 2)) for seed in range(3)]
    found, cell = study.analysis.Results.of(rows), study.cells.Cell("openclip", 256, batch=64)
    assert found.seeds(cell, "cpu_seconds") == {0: 100.0, 1: 101.0}
    assert set(found.seeds(cell, "test_top1")) == {0, 1, 2}


def test_costs_are_of_one_device_and_accuracies_of_all(study):
    """A GPU's run takes other processor time: the least of both devices would compare methods across them."""
    budget = study.cells.ICONS.middle[0]
    common = {"samples": budget, "batch": study.cells.ICONS.batch}
    rows = [row(study, seed=seed, cpu_seconds=100, test_top1=10, **common) for seed in range(2)]
    rows.append(row(study, seed=2, cpu_seconds=7, test_top1=40, device="GPU", **common))
    found = study.analysis.Results.of([one | {"resumed": "0"} for one in rows])
    (line,) = study.report._costs(found, study.cells.ICONS).splitlines()[2:]
    assert "20.0" in line and "100 s" in line and line.split("|")[-2].strip() == "2"


@pytest.mark.parametrize(
    ("lost", "lost_recall", "verdict"),
    [
        (2.0, 0.0, "**does not hold**: of 2, 1 lie below 0 in top-1 and 0 in recall@1"),
        (-0.1, 0.0, "**no loss seen**: of 2, 0 lie below 0 in top-1 and 0 in recall@1"),
        (-0.1, 1.0, "**mixed**: of 2, 0 lie below 0 in top-1 and 1 in recall@1"),
    ],
)
def test_what_compression_costs(study, lost, lost_recall, verdict):
    """Five seeds: one kind of compression loses so many points in each, another as much as it gains."""
    rows = {}
    for seed in range(5):
        base = 10 + seed
        tops = {"drrho_fixed": base, "drrho_stored1e-3": base + (-1) ** seed, "drrho_stored2e-3": base - lost}
        for method, top1 in tops.items():
            more = {"samples": 43008, "batch": 128, "seed": seed, "reference": "a-1376256@1376256"}
            more["test_recall1"] = 5 + seed - (method == "drrho_stored2e-3") * (lost_recall + 0.01 * seed - 0.02)
            one = row(study, method=method, test_top1=top1 + 0.01 * seed * (method != "drrho_fixed"), **more)
            rows[one["id"]] = one
    made = study.report.blocks(rows, {}, study.cells.ICONS)
    assert f"| 8 | compression costs nothing | {verdict} |" in made["verdicts"]


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([1, 1, 1], "**holds**: 3 above 0"),
        ([1, 0, 0], "**undecided**: 1 above 0, 2 undecided"),
        ([1, 1, 0], "**holds**: 2 above 0, 1 undecided"),
        ([1, 1, -1], "**mixed**: 2 above 0, 1 below 0"),
        ([-1, -1, None], "**does not hold**: 2 below 0, 1 not run yet"),
        ([None, None], "2 not run yet"),
    ],
)
def test_a_claim_holds_where_most_comparisons_do_and_none_fails(study, gains, verdict):
    noise = (-0.1, 0.0, 0.1)
    found = [study.analysis.estimate([] if gain is None else [gain + x for x in noise]) for gain in gains]
    assert study.report._in_all(one.verdict for one in found) == verdict
    assert study.report._in_all([study.analysis.estimate([1.0]).verdict]) == "1 of one seed"


@pytest.mark.parametrize("alone, verdict", [(8, "also without it"), (5, "holds")])
def test_who_passes_a_weak_reference_without_its_help_shows_nothing(study, alone, verdict):
    """A target of 8 % under a reference of 2 %."""
    plan = study.cells.ICONS
    weak = replace(plan.reference, at=plan.strengths[0])
    about = {"samples": plan.middle[0], "batch": plan.batch}
    rows = [row(study, kind="reference", test_top1=2) | {"id": f"reference_{weak.name}"}]
    for seed in range(3):
        noise = 0.2 * seed
        more = {"method": "drrho_fixed", "reference": weak.name, "test_top1": 8 + noise}
        rows += [
            row(study, seed=seed, **about, **more),
            row(study, seed=seed, test_top1=alone + 2 * noise, **about),
        ]
    results = study.analysis.Results.of(rows)
    items = [item for item in study.comparisons.COMPARISONS["2"](plan) if item.estimate(results).n]
    assert [(item.estimate(results).verdict, item.verdict(results)) for item in items] == [("holds", verdict)]


def test_what_every_reference_gives_does_not_say_that_it_decides(study):
    """All references give as much: claim 7 is undecided, whatever stands beside OpenCLIP."""
    plan, rows = study.cells.ICONS, {}
    about = {"samples": plan.middle[0], "batch": plan.batch}
    for seed, at in itertools.product(range(3), (None, *plan.strengths)):
        noise = math.sin(seed + (at or 0))
        more = {"method": "drrho_fixed", "reference": replace(plan.reference, at=at).name} if at else {}
        one = row(study, seed=seed, test_top1=(18 if at else 8) + 0.3 * noise, **about, **more)
        rows[one["id"]] = one
    made = study.report.blocks(rows, {}, plan)
    assert "under a reference of 86k: DRRho-CLIP, fixed τ − OpenCLIP | 18." in made["claim_7"]
    assert "| 7 | the reference decides | **undecided**: 4 undecided, 2 not run yet |" in made["verdicts"]


def test_a_page_is_not_emptied(study, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("kept")
    command = [sys.executable, str(ROOT / "scripts/study.py"), "--out", str(tmp_path), "--report", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (
        done.returncode == 2
        and "there are no results yet" in done.stderr
        and "--results assets/study" in done.stderr
    )
    assert page.read_text() == "kept"


@pytest.mark.parametrize("ours, verdict", [(-0.6, "holds"), (-0.2, "does not hold"), (-0.3, "undecided")])
def test_scaling_of_a_steeper_law_holds(study, ours, verdict):
    rows = {}
    for method, reference, beta in (
        ("openclip", "", -0.3),
        ("drrho_fixed", study.cells.SMOKE.reference.name, ours),
    ):
        for samples, seed in itertools.product(study.cells.SMOKE.budgets, range(3)):
            error = 0.8 * (samples / 64) ** beta * (1 + 0.005 * math.sin(samples + 5 * seed + 10 * beta))
            values = {"samples": samples, "seed": seed, "test_top1": 100 * (1 - error)}
            one = row(study, method=method, reference=reference, **values)
            rows[one["id"]] = one
    made = study.report.blocks(rows, {}, study.cells.SMOKE)
    assert f"| 4 | scaling | **{verdict}** for DRRho-CLIP, fixed τ" in made["verdicts"]
    assert "| OpenCLIP | -0.3" in made["scaling"] and "assets/scaling_law.png" in made["scaling"]


def test_a_law_that_misses_its_means_decides_nothing(study):
    """Accuracies that begin at chance and then rise: far steeper than OpenCLIP's, and no power law."""
    rows, plan = {}, study.cells.SMOKE
    for method, reference, tops in (
        ("openclip", "", (20, 30, 36, 40)),
        ("drrho_fixed", plan.reference.name, (0, 1, 40, 60)),
    ):
        for (samples, top1), seed in itertools.product(zip(plan.budgets, tops), range(3)):
            values = {"samples": samples, "seed": seed, "test_top1": top1 + 0.1 * seed}
            one = row(study, method=method, reference=reference, **values)
            rows[one["id"]] = one
    made = study.report.blocks(rows, {}, plan)["verdicts"]
    assert "| 4 | scaling | **undecided** for DRRho-CLIP, fixed τ" in made and "; no law fits " in made


def test_the_page_has_what_the_results_say(study):
    """To bring it in line: python scripts/study.py --out assets/study --report docs/study.md."""
    kept = ROOT / "assets" / "study"
    results, tuned, again = (
        study.table.Table(kept / f"{name}.csv").rows() for name in ("results", "tuning", "again")
    )
    page = (ROOT / "docs" / "study.md").read_text()
    assert study.report.fill(page, results, tuned, study.cells.ICONS, again) == page
    assert {match[1] for match in study.report.BLOCK.findall(page)} == set(
        study.report.blocks({}, {}, study.cells.ICONS)
    )


def test_blocks_of_a_page(study):
    ref = study.cells.SMOKE.reference
    rows = {}
    for seed in range(3):
        for method, reference, top1 in (("openclip", "", 10), ("drrho_fixed", ref.name, 14)):
            one = row(
                study,
                method=method,
                reference=reference,
                seed=seed,
                test_top1=top1 + seed + 0.1 * seed * (top1 > 10),
            )
            rows[one["id"]] = one
    page = "# Title\n<!-- study: claim_1 -->\nbygone\n<!-- end -->\ntext\n<!-- study: verdicts -->\n<!-- end -->\n"
    filled = study.report.fill(page, rows, {}, study.cells.SMOKE)
    assert "| 256: DRRho-CLIP, fixed τ − OpenCLIP | 15.1 ± 2.7 | +4.1 ± 0.2 | +0.0 ± 0.0 | 3 | holds |" in filled
    missing = len(list(study.comparisons.COMPARISONS["1"](study.cells.SMOKE))) - 1
    assert f"| 1 | a reference helps | **holds**: 1 above 0, {missing} not run yet |" in filled
    assert "| 4 | scaling | not run yet |" in filled
    assert "bygone" not in filled and "# Title" in filled and "\ntext\n" in filled
    assert study.report.fill(filled, rows, {}, study.cells.SMOKE) == filled
    with pytest.raises(ValueError, match="no block 'nonsense'"):
        study.report.fill("<!-- study: nonsense -->\n<!-- end -->", rows, {}, study.cells.SMOKE)
