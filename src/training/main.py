"""The program: parse the flags, then print the plan or run it.

``python src/training/main.py``, ``python -m training.main``, ``torchrun ... -m training.main`` and
``srun python -u src/training/main.py`` are the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    # Run as a script, Python searches this file's folder first, where `data`, `logger`, ... would shadow packages.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from training.config.given import Refusal
from training.config.params import parse
from training.distributed import launcher, once
from training.machine import console
from training.machine.prepare import Unfit, prepare
from training.machine.shortage import shortage


@console.lasting_streams()
def main(argv: list[str] | None = None) -> int:
    """Run what ``argv`` (default: the command line) asks for; returns the exit code."""
    try:
        config = parse(argv)
        prepare()
    except (Refusal, Unfit) as refusal:
        once.say(f"error: {refusal}")
        return 2
    except OSError as error:
        if (reason := shortage(error)) is None:
            raise
        once.say(f"error: {reason}")
        return 2
    # Imported after the flags have been checked: --help and refusals do not wait for torch.
    from training import dry_run, run
    from training.distributed import failures

    def program() -> int:
        if not config.run.dry_run:
            run.launch(config)
        elif launcher.rank() == 0:
            console.show(dry_run.describe(config))
        return 0

    return failures.run(program, interrupted="nothing more is saved")


if __name__ == "__main__":
    sys.exit(main())
