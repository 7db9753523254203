#!/usr/bin/env python3
"""The study of docs/study.md: trains its grid of cells and says what they show.

    python scripts/icons.py --emoji --out data/icons
    python scripts/study.py --data data/icons --out logs/study --list     # what is done, what is left, how long
    python scripts/study.py --data data/icons --out logs/study            # train it, or go on with it
    python scripts/study.py --results assets/study --report docs/study.md # tables and pictures from the results

Every finished run is a row of OUT/results.csv, or of OUT/tuning.csv where it chose settings. A cell that has its
row is not trained again, and an interrupted run goes on. On a CPU one cell is trained at a time, with GPUs one on
each.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

import scaling_law
from study import cells, comparisons, jobs, pictures, report, smoke
from study.analysis import Results
from study.runs import ROOT, Studio
from study.table import Table

KEPT = str(2**30)  # bytes
PAGE = ROOT / "docs" / "study.md"


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    claims = frozenset(args.claims.split(","))
    if unknown := sorted(claims - cells.CLAIMS.keys()):
        print(
            f"error: --claims {args.claims}: there is no claim {unknown[0]}, choose from 1 to {len(cells.CLAIMS)}",
            file=sys.stderr,
        )
        return 2
    plan, data = (cells.SMOKE, args.out / "data") if args.smoke else (cells.ICONS, args.data)
    if args.smoke and not data.exists():
        smoke.make(data)
    # Read when torch is loaded, which happens in a process that all runs are forked from.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(args.threads)}
    # Else glibc hands the large blocks of a step back to the kernel, which clears their pages for the next one.
    os.environ |= {"MALLOC_TRIM_THRESHOLD_": KEPT, "MALLOC_MMAP_THRESHOLD_": KEPT}
    gpus = count_gpus() if args.device == "auto" else 0
    studio = Studio(data.absolute(), args.out.absolute(), args.threads, gpus)
    tables = args.results or args.out
    desk = jobs.Desk(plan, studio, Table(tables / "results.csv"), Table(tables / "tuning.csv"))
    try:
        if args.report:
            return report_on(desk, args.report, args.report, args.pictures)
        agenda = jobs.agenda(desk, comparisons.wanted(plan, claims))
        if args.list:
            return listing(desk, agenda)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, lambda *_: studio.stop())
    failed = jobs.work(desk, agenda, args.jobs or max(gpus, 1))
    if studio.stopping.is_set():
        print("stopped; the same command goes on")
        return 1
    if args.smoke and not failed:
        return report_on(desk, PAGE, args.out / "study.md", args.out)
    return 1 if failed else 0


def report_on(desk: jobs.Desk, page: Path, out: Path, folder: Path) -> int:
    """Write ``page`` with tables from the results to ``out``, and the pictures that the results are enough for."""
    rows = desk.results.rows()
    if not rows:
        raise ValueError(
            f"{desk.results.path}: there are no results yet, and {page} would lose its own; those of the "
            "published page are in assets/study (--results assets/study)"
        )
    again = Table(desk.results.path.with_name("again.csv")).rows()
    out.write_text(report.fill(page.read_text(), rows, desk.tuned.rows(), desk.plan, again))
    results = Results.of(rows.values())
    pictures.weak_to_strong(folder / "weak_to_strong.png", results, desk.plan)
    groups = report.laws(results, desk.plan)
    if groups:
        fitted = scaling_law.bootstrap(groups)
        scaling_law.draw(
            folder / "scaling_law.png", groups, fitted, "samples", report.errors_of(results, desk.plan)
        )
    return 0


def listing(desk: jobs.Desk, agenda: list[jobs.Job]) -> int:
    """Print all jobs in their order, those that are done, and how long the rest would take."""
    pace, total = speed(desk), 0.0
    for job in agenda:
        done = job.done(desk)
        seconds = job.samples(desk) / pace
        total += 0 if done else seconds
        claims = ",".join(sorted(job.claims)) if isinstance(job, jobs.Train) else ""
        print(f"{'done' if done else f'{seconds:5.0f} s':>8}  {claims:>5}  {job}")
    print(f"{total / 3600:.1f} hours of processor time for what is left, at {pace:.0f} samples/s")
    return 0


def speed(desk: jobs.Desk) -> float:
    """Samples per second of processor time, of the runs so far on this device; 1,000 before the first."""
    rows = [*desk.results.rows().values(), *desk.tuned.rows().values()]
    rows = [row for row in rows if row["resumed"] == "0" and row["model"] == "small"]
    rows = [row for row in rows if row["device"] == desk.studio.device]
    seconds = sum(float(row["cpu_seconds"]) for row in rows)
    return sum(float(row["samples_read"]) for row in rows) / seconds if seconds else 1000.0


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/icons"), help="folder of scripts/icons.py")
    parser.add_argument("--out", type=Path, default=Path("logs/study"), help="folder for runs, features and logs")
    parser.add_argument("--results", type=Path, help="folder of results.csv and tuning.csv (default: --out)")
    parser.add_argument(
        "--claims",
        default=",".join(cells.CLAIMS),
        help="claims to train cells for, with what they are compared with (default: all)",
    )
    parser.add_argument("--list", action="store_true", help="print what is done and what is left, then end")
    parser.add_argument("--report", type=Path, metavar="PAGE", help="bring PAGE's tables in line with the results")
    parser.add_argument("--pictures", type=Path, default=ROOT / "assets", help="folder of --report's pictures")
    parser.add_argument("--smoke", action="store_true", help="the whole machinery on tiny data, all below --out")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one, or one on each GPU)")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run on the CPU")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto: GPUs where there are any")
    return parser


if __name__ == "__main__":
    sys.exit(main())
