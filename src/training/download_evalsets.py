"""Fetch the DataComp benchmark's sets from the Hugging Face hub: ``python -m training.download_evalsets``.

    python -m training.download_evalsets --data_dir datasets/datacomp
    python -m training.download_evalsets --data_dir datasets/datacomp --tasks imagenet1k,vtab/pcam

Files whose size is right are not fetched again, and an interrupted download goes on. Exit code 0: all sets are
there, 1: some could not be had, which is said at the end, 2: the command is wrong. ``HF_ENDPOINT`` names another
server.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from training.machine import console
from training.machine.prepare import Unfit, prepare


@console.lasting_streams()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="training.download_evalsets", description="Fetch the DataComp benchmark's sets from the hub."
    )
    parser.add_argument(
        "--data_dir", "--data-dir", required=True, help="the folder that gets a folder for each set"
    )
    parser.add_argument("--tasks", default="all", help="keys or names, joined with commas (default: all)")
    given = parser.parse_args(argv)
    try:
        prepare()
        # Imported here: it takes a while, and ``prepare`` says what is wrong with the machine.
        from training.evaluation.benchmark.download import fetch

        failed = fetch(given.data_dir, given.tasks)
    except (Unfit, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    for name, why in failed.items():
        print(f"could not be had: {name}: {why}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
