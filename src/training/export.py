"""A trained model as files that other libraries open: ``python -m training.export``.

    python -m training.export --checkpoint logs/my_run --out my_model
    python -m training.export --checkpoint logs/my_run/checkpoints/epoch_37.pt --out my_model --format transformers

The model is built as the checkpoint says; ``--model`` is needed only for files that do not say it. Exit code 0:
all is done, 2: it is not, for the reason that is printed.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence

from training.machine import console
from training.machine.prepare import prepare
from training.machine.shortage import shortage

FORMATS = ("hf", "safetensors", "onnx", "timm", "transformers")


@console.lasting_streams()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Returns the exit code."""
    given = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        prepare()
        # Imported here: torch does not load everywhere, and ``prepare`` says why.
        from training.exporting import hub
        from training.exporting.formats import check_folder, export
        from training.exporting.subject import open_subject
        from training.models.saved import find_checkpoint

        check_folder(given.out)
        if given.license and not re.fullmatch(r"[A-Za-z0-9.+-]+", given.license):
            raise ValueError(f"--license {given.license}: give an identifier, such as mit or cc-by-4.0")
        checkpoint = find_checkpoint(given.checkpoint, given.epoch)
        if given.push:
            hub.check_login(given.push)
        subject = open_subject(checkpoint, given.model, given.precision, given.license)
        names = export(subject, given.format, given.out)
        console.show(f"{checkpoint}: {subject.built.name} is in {given.out} ({', '.join(names)})")
        if given.push:
            console.show(f"sent to {hub.push(given.out, given.push)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if (reason := shortage(error)) is None:
            raise
        print(f"error: {reason}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="training.export", description="Write a trained model as files that other libraries open."
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="RUN_DIR|FILE|NAME:TAG",
        help="the folder of a run (its newest checkpoint), a checkpoint, or a pretrained tag of open_clip",
    )
    parser.add_argument("--epoch", type=int, help="the epoch of a run's folder, in place of its newest checkpoint")
    parser.add_argument(
        "--model",
        default="",
        metavar="ARCH|JSON",
        help="the architecture, for checkpoints that do not say it: published ones and bare weights",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write, new or empty")
    parser.add_argument("--format", choices=FORMATS, default="hf", help="default: hf, which open_clip opens")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the weights")
    parser.add_argument("--license", default="", metavar="ID", help="licence of the weights, for the model card")
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="also send the folder to this repository of the Hugging Face hub"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
