"""One page about one run or several: ``python -m training.report RUN_DIR [RUN_DIR ...] [--out report.html]``.

The page holds curves, metrics, pictures of evaluation sets and what is said about them, the samples with the
largest u, samples left out, restarts and flags, and opens without a network; a summary and each chart are also
PNGs in a folder beside it. ``--serve`` shows it at http://127.0.0.1:PORT while the runs go on. Exit code 0: it is
written, 2: the command is wrong.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.machine import console
from training.machine.prepare import Unfit, prepare
from training.machine.shortage import shortage

if TYPE_CHECKING:
    from training.run_report.build import RunReport

PORT = 8008


@console.lasting_streams()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Returns the exit code."""
    given = _parser().parse_args(argv)
    try:
        prepare()
        # Imported here: torch does not load everywhere, and ``prepare`` says why.
        from training.evaluation.benchmark.sets import read_picture
        from training.run_report.build import RunReport

        report = RunReport(
            given.runs, given.samples, given.seconds, given.train_data, given.gpu_hour_price, read_picture
        )
        if given.serve is not None:
            return _serve(report, given.serve)
        out = given.out or given.runs[0] / "report.html"
        if out.is_dir():
            raise ValueError(f"--out {out}: is a folder; give a file, such as {out / 'report.html'}")
        written = _write(report, out)
    except (ValueError, Unfit) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if (reason := shortage(error)) is None:
            raise
        print(f"error: {reason}", file=sys.stderr)
        return 2
    console.show(f"{written[0]}\nsummary.png and {len(written) - 2} charts in {written[1].parent}")
    return 0


def _write(report: RunReport, out: Path) -> list[Path]:
    read = report.read()
    try:
        return report.write(out, *read)
    except OSError as error:
        raise ValueError(
            f"--out {out}: cannot be written ({error.strerror or error}); name a file in a folder that can be"
        ) from error


def _serve(report: RunReport, port: int) -> int:
    from training.run_report.server import HOST, open_server

    report.served()
    try:
        server = open_server(report, port)
    except OSError as error:
        raise ValueError(
            f"--serve {port}: the port cannot be used ({error.strerror}); give another one"
        ) from error
    console.show(f"http://{HOST}:{server.server_address[1]}/ (Ctrl-C ends it)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="training.report", description="One page about one run or several.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="a run's folder, LOGS/NAME")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the first RUN_DIR)")
    parser.add_argument(
        "--samples", type=_count, default=24, help="how many samples with the largest u are shown (default 24)"
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=60.0,
        help="how long they are looked for in the shards, and pictures of evaluation sets read (default 60)",
    )
    parser.add_argument(
        "--train-data",
        "--train_data",
        help="where the training data are now (default: as in the runs' params.txt)",
    )
    parser.add_argument(
        "--gpu_hour_price", "--gpu-hour-price", type=_seconds, help="price of a GPU for an hour, to show the cost"
    )
    parser.add_argument(
        "--serve", nargs="?", type=_port, const=PORT, metavar="PORT",
        help=f"serve the page on 127.0.0.1, which refreshes while the runs go on (default port {PORT})",
    )  # fmt: skip
    return parser


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of samples: give 0 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number that is 0 or more")
    return value


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: give 0 to 65535, where 0 is any free one")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
