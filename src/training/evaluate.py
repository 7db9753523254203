"""How good is a checkpoint? The DataComp benchmark's 38 sets, and further ones: ``python -m training.evaluate``.

    python -m training.evaluate --checkpoint logs/my-run --data_dir evalsets
    torchrun --nproc_per_node=8 -m training.evaluate --checkpoint ViT-B-32:openai --data_dir sets --out b32.jsonl

Every set that is found below ``--data_dir`` is evaluated with the metrics of the benchmark, and each result is
written at once, so that an interrupted evaluation goes on with the next set. Exit code 0: all sets have results,
1: some could not be evaluated, 2: the command is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from training.config.flags import ALL
from training.distributed import once
from training.machine import console
from training.machine.limits import cores
from training.machine.prepare import Unfit, prepare


@console.lasting_streams()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Returns the exit code."""
    given = parser().parse_args(argv)
    try:
        prepare()
    except Unfit as error:
        once.say(f"error: {error}")
        return 2
    # Imported here: torch does not load everywhere, and ``prepare`` says why.
    from training.distributed import failures
    from training.evaluation.benchmark.program import evaluate

    return failures.run(lambda: evaluate(given), interrupted="the same command goes on with the next set")


def parser() -> argparse.ArgumentParser:
    """The command line of the program."""
    found = argparse.ArgumentParser(
        prog="training.evaluate",
        description="Evaluate a checkpoint on the DataComp benchmark's sets, and on further ones.",
    )

    def add(name: str, **options: object) -> None:
        hyphens = f"--{name.replace('_', '-')}"
        found.add_argument(*dict.fromkeys([f"--{name}", hyphens]), dest=name, **options)  # type: ignore[arg-type]

    add("checkpoint", required=True, help="a run's folder, a checkpoint file, or open_clip's NAME:TAG")
    add("data_dir", required=True, help="the folder that holds the sets, such as wds_imagenet1k_test/")
    add("model", default=None, help="open_clip name or model config JSON (default: that of the run)")
    add("epoch", type=int, default=None, help="which of the run's epochs (default: where it ended)")
    add(
        "tasks",
        default="all",
        help="keys or names of tasks or folders, joined with commas (default: all there are)",
    )
    add("precision", choices=ALL["precision"].choices, default="fp32", help="as in training")
    add("batch_size", type=int, default=64, help="pictures that each rank embeds at once")
    add("workers", type=int, default=min(4, cores()), help="processes of each rank that decode pictures")
    add("out", default=None, help="the file of results (default: in eval_results/ of the run's folder)")
    return found


if __name__ == "__main__":
    sys.exit(main())
