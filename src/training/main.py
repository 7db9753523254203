"""The program: parse the flags, then plan or run.

``python src/training/main.py``, ``python -m training.main``, ``torchrun ... -m training.main`` and
``srun python -u src/training/main.py`` are the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    # Run as a script, Python searches this file's folder first, where `data`, `logger`, ... would shadow packages.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from training import launcher, params


def main(argv: list[str] | None = None) -> int:
    """Do what ``argv`` (default: the command line) asks for; the exit code."""
    config = params.parse(argv)
    # Imported when the flags are known to be sound: --help and refusals do not wait for torch.
    from training import distributed, plan, run

    rank = launcher.rank()
    try:
        if config.run.dry_run:
            if rank == 0:
                print(plan.describe(config))
            return 0
        run.launch(config)
    except ValueError as error:
        distributed.tell(error)
        return 2
    except distributed.PeerFailed:
        return 1
    except RuntimeError as error:
        if not distributed.lost_peer(error):
            raise
        print(f"rank {rank} ends, since another rank has: its own message says why", file=sys.stderr)
        return 1
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
