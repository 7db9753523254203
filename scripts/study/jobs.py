"""What is to be done, in which order, and doing it: references, stored features, tuning, cells."""

from __future__ import annotations

import math
import shutil
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from study import sets, tuning
from study.cells import Cell, Plan, Reference, Wanted
from study.methods import METHODS
from study.runs import RunFailed, Studio, measures_of
from study.table import Table

CACHE = "--cache_ref_model_features --batch-size 1024"


@dataclass(frozen=True)
class Desk:
    """A study under way: its plan, where it computes, its tables."""

    plan: Plan
    studio: Studio
    results: Table
    tuned: Table

    def settings(self, cell: Cell) -> dict[str, str]:
        """The tuned settings of a cell's method. Untuned: they are not known yet."""
        if cell.settings is not None:
            return dict(cell.settings)
        return tuning.settings(cell.method, self.plan, self.tuned.rows(), epochs=self.spans_epochs(cell))

    def spans_epochs(self, cell: Cell) -> bool:
        return self.studio.epochs(cell) > 1


@dataclass(frozen=True)
class Tune:
    """Choose a method's settings; ``epochs``: those that act from the second epoch on, too."""

    method: str
    epochs: bool

    def needs(self, desk: Desk) -> tuple[Job, ...]:
        first = (Tune(self.method, False),) if self.epochs else ()
        data = tuning.GAMMA_DATA if self.epochs else "b"
        return (*first, Features(desk.plan.reference, data)) if METHODS[self.method].reference else first

    def done(self, desk: Desk) -> bool:
        try:
            tuning.settings(self.method, desk.plan, desk.tuned.rows(), epochs=self.epochs)
        except tuning.Untuned:
            return False
        return True

    def samples(self, desk: Desk) -> int:
        axes = [axis for axis in METHODS[self.method].axes if axis.needs_epochs == self.epochs]
        runs = sum(len(axis.values) for axis in axes) - (0 if self.epochs else len(axes) - 1)
        return runs * desk.plan.tuning

    def run(self, desk: Desk, slot: int) -> None:
        def trial(cell: Cell) -> tuning.Row:
            row = desk.studio.train("tuning", cell, dict(cell.settings or ()), slot)
            desk.tuned.append(row)
            desk.studio.discard_checkpoints(str(row["id"]))
            return row

        tuning.settings(self.method, desk.plan, desk.tuned.rows(), epochs=self.epochs, trial=trial)

    def __str__(self) -> str:
        return f"tune {self.method}" + (" (gamma)" if self.epochs else "")


@dataclass(frozen=True)
class TrainReference:
    """Train a reference once and keep its checkpoints, each with its row."""

    last: Reference
    at: tuple[int, ...]

    def needs(self, desk: Desk) -> tuple[Job, ...]:
        return (Tune(self.last.method, False),)

    def checkpoints(self) -> list[Reference]:
        return [replace(self.last, at=at) for at in self.at]

    def done(self, desk: Desk) -> bool:
        rows = desk.results.rows()
        return all(
            desk.studio.checkpoint(one).exists() and f"reference_{one.name}" in rows for one in self.checkpoints()
        )

    def samples(self, desk: Desk) -> int:
        return self.last.samples

    def run(self, desk: Desk, slot: int) -> None:
        cell, studio = self.last.cell, desk.studio
        settings = desk.settings(replace(cell, samples=desk.plan.tuning))  # OpenCLIP has none for later epochs
        every = math.gcd(*self.at) // cell.batch
        more = ("--save_every_n_steps", str(every), "--keep_last", str(len(self.at) + cell.samples // cell.batch))
        row = studio.train("reference", cell, settings, slot, more)
        made = studio.folder(str(row["id"])) / "checkpoints"
        for one in self.checkpoints():
            steps, target = one.at // cell.batch, studio.checkpoint(one)
            target.parent.mkdir(parents=True, exist_ok=True)
            saved = made / f"step_{steps}.pt"
            if one.at == cell.samples:
                saved = max(made.glob("*.pt"), key=lambda path: path.stat().st_mtime)
            part = target.with_suffix(".part")
            shutil.copyfile(saved, part)
            part.rename(target)
            self._evaluate(desk, one, {**row, "steps": steps, "samples_read": one.at}, slot)
        studio.discard_checkpoints(str(row["id"]))

    def _evaluate(self, desk: Desk, one: Reference, row: dict, slot: int) -> None:
        if f"reference_{one.name}" in desk.results.rows():
            return
        studio, share = desk.studio, one.at / one.samples
        out = studio.out / "references" / f"{one.name}.jsonl"
        flags = ["--checkpoint", str(studio.checkpoint(one)), "--data_dir", str(studio.data), "--out", str(out)]
        studio.start(
            "training.evaluate",
            [*flags, "--tasks", sets.TASKS, "--workers", str(studio.workers)],
            f"reference_{one.name}",
            slot,
        )
        desk.results.append(
            {
                **row,
                **measures_of(out),
                **studio.known(one, slot),
                "id": f"reference_{one.name}",
                "samples": one.at,
                "epochs": round(row["epochs"] * share, 3),
                **{key: round(row[key] * share, 1) for key in ("seconds", "cpu_seconds")},
            }
        )

    def __str__(self) -> str:
        return f"reference {self.last.name}, {len(self.at)} checkpoints"


@dataclass(frozen=True)
class Features:
    """Store what a reference says of a training set."""

    reference: Reference
    data: str
    store: str = ""

    def needs(self, desk: Desk) -> tuple[Job, ...]:
        return (trains(self.reference, desk.plan),)

    def done(self, desk: Desk) -> bool:
        return (self._folder(desk) / "complete").exists()

    def samples(self, desk: Desk) -> int:
        return 50_000

    def run(self, desk: Desk, slot: int) -> None:
        studio, folder = desk.studio, self._folder(desk)
        studio.make_set(self.data)
        data = studio.training_set(self.data)
        name = f"features_{folder.name}"
        flags = [
            *("--train-data", data.pattern, "--data_size", data.data_size, "--precision", "fp32"),
            *(
                "--ref_model_checkpoint",
                str(studio.checkpoint(self.reference)),
                *CACHE.split(),
                *self.store.split(),
            ),
            *(
                "--workers",
                str(studio.workers),
                "--cached_ref_features_dir",
                str(folder),
                "--logs",
                str(studio.out / "runs"),
                "--name",
                name,
            ),
        ]
        studio.start("training.main", flags, name, slot)
        (folder / "complete").touch()

    def _folder(self, desk: Desk) -> Path:
        return desk.studio.features(self.reference, self.data, self.store)

    def __str__(self) -> str:
        return " ".join([f"features of {self.reference.name} on {self.data}", *self.store.split()])


@dataclass(frozen=True)
class Train:
    """Train a cell and write its row."""

    cell: Cell
    claims: frozenset[str] = frozenset()

    def needs(self, desk: Desk) -> tuple[Job, ...]:
        name = METHODS[self.cell.method].tuned_as or self.cell.method
        gamma = any(axis.needs_epochs for axis in METHODS[name].axes) and desk.spans_epochs(self.cell)
        tuned = Tune(name, gamma)
        if self.cell.reference is None:
            return (tuned,)
        return tuned, Features(self.cell.reference, self.cell.data, METHODS[self.cell.method].store)

    def done(self, desk: Desk) -> bool:
        try:
            return self.cell.id(tuning.shown(desk.settings(self.cell))) in desk.results.rows()
        except tuning.Untuned:
            return False

    def samples(self, desk: Desk) -> int:
        return self.cell.samples * (3 if self.cell.model == "large" else 1) * METHODS[self.cell.method].super_batch

    def run(self, desk: Desk, slot: int) -> None:
        row = desk.studio.train("cell", self.cell, desk.settings(self.cell), slot)
        desk.results.append(row)
        desk.studio.discard_checkpoints(str(row["id"]))

    def __str__(self) -> str:
        cell = self.cell
        words = [
            cell.method,
            cell.data,
            f"{cell.samples:,}",
            f"batch {cell.batch}",
            f"seed {cell.seed}",
            cell.model,
        ]
        return " ".join([*words, *([f"under {cell.reference_name}"] if cell.reference else [])])


Job = Tune | TrainReference | Features | Train


def trains(reference: Reference, plan: Plan) -> TrainReference:
    """The job that trains ``reference``; the plan's own is kept at all its strengths."""
    of_plan = replace(reference, at=reference.samples) == plan.reference
    return TrainReference(
        replace(reference, at=reference.samples), plan.strengths if of_plan else (reference.samples,)
    )


def agenda(desk: Desk, wanted: Iterable[Wanted]) -> list[Job]:
    """All jobs for the cells that are ``wanted``, each after what it needs.

    What a finished cell needed is not among them: its row may come from another machine.
    """
    found: dict[Job, None] = {}

    def add(job: Job) -> None:
        if job not in found:
            if not (isinstance(job, Train) and job.done(desk)):
                for need in job.needs(desk):
                    add(need)
            found[job] = None

    for one in wanted:
        add(Train(one.cell, one.claims))
    return list(found)


def work(desk: Desk, jobs: list[Job], slots: int) -> int:
    """Do ``jobs``, ``slots`` at a time, the first that can be done first. Returns how many could not be done."""
    waiting, running, failed = [job for job in jobs if not job.done(desk)], set[Job](), set[Job]()
    changed = threading.Condition()

    def next_job() -> Job | None:
        """The next one to do; None: nothing is left for this worker."""
        while waiting and not desk.studio.stopping.is_set():
            for job in list(waiting):
                needs = job.needs(desk)
                if any(need in failed for need in needs):
                    waiting.remove(job)
                    failed.add(job)
                elif not any(need in running or need in waiting for need in needs):
                    waiting.remove(job)
                    running.add(job)
                    return job
            if not running:
                return None
            changed.wait()
        return None

    def worker(slot: int) -> None:
        while True:
            with changed:
                job = next_job()
                changed.notify_all()
            if job is None:
                return
            left = len(waiting) + len(running)
            print(f"{job} ({left} left)", flush=True)
            problem = None
            try:
                if not job.done(desk):
                    job.run(desk, slot)
            except RunFailed as error:
                problem = str(error)
            except BaseException as error:  # the other workers must not wait for this one
                problem = repr(error)
                raise
            finally:
                with changed:
                    running.discard(job)
                    if problem is not None:
                        failed.add(job)
                        if not desk.studio.stopping.is_set():
                            print(f"error: {problem}", file=sys.stderr, flush=True)
                    changed.notify_all()

    threads = [threading.Thread(target=worker, args=(slot,)) for slot in range(slots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(failed)
