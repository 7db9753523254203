"""What a reference knows of the data that a target is to be trained on: ``python -m training.check_reference``.

    python -m training.check_reference --ref_model ViT-B-32 --ref_model_pretrained openai \\
        --train-data 'cc3m/{00000..00331}.tar' --samples 4096

The program embeds the first ``--samples`` pairs that training would see and prints how many of them the reference
ranks first among others, its margins and its losses. It costs one forward pass over them.
Exit code 0: done, 2: the command is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.config.flags import ALL
from training.config.given import Refusal
from training.config.params import parse
from training.distributed import once
from training.files import replacing
from training.machine import console
from training.machine.limits import cores
from training.machine.prepare import Unfit, prepare

# Of the trainer's flags, those that choose the reference and how the data is read.
TAKEN = (
    *("ref_model", "ref_model_pretrained", "ref_model_checkpoint"),
    *("train_data", "dataset_type", "image_key", "text_key", "aug_cfg"),
    *("csv_separator", "csv_img_key", "csv_caption_key", "csv_quoting", "csv_encoding"),
    *("max_bad_fraction", "batch_size", "workers", "precision", "seed"),
)
DEFAULTS = {"batch_size": 256, "workers": min(4, cores()), "precision": "fp32"}
# A loss that takes a reference and keeps nothing per sample, so that the data needs no rows.
LOSS = ("--fastclip", "--temperature_scheme", "global_constant", "--gamma", "1.0", "--sample_index", "position")


@console.lasting_streams()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Returns the exit code."""
    given = _parser().parse_args(argv)
    try:
        if not (given.ref_model or given.ref_model_checkpoint):
            raise Refusal(
                "--ref_model is missing: give the reference, or its checkpoint with --ref_model_checkpoint"
            )
        if given.samples < 2:
            raise Refusal(f"--samples {given.samples}: give at least 2, since pairs are compared with each other")
        if given.out is not None and not given.out.absolute().parent.is_dir():
            raise Refusal(f"--out {given.out}: there is no folder {given.out.absolute().parent}; make it first")
        config = parse(_flags(given))
        prepare()
    except (Refusal, Unfit) as error:
        once.say(f"error: {error}")
        return 2
    # Imported here: torch does not load everywhere, and ``prepare`` says why.
    from training import preflight
    from training.distributed import failures, process_group
    from training.evaluation.reference_check import check_reference

    def program() -> int:
        world = process_group.start(config.distributed)
        preflight.check(config, world)
        found = check_reference(config, world, given.samples)
        if world.is_main:
            if given.out is not None:
                with replacing(given.out) as file:
                    file.write(json.dumps(asdict(found), indent=1).encode())
            console.show("\n".join(found.lines()))
        return 0

    return failures.run(program, interrupted="nothing is kept")


def _flags(given: argparse.Namespace) -> list[str]:
    """The trainer's command line for what ``given`` says."""
    flags = [*LOSS, "--train-num-samples", str(given.samples), "--model", given.ref_model or "RN50"]
    for key in TAKEN:
        value = getattr(given, key)
        value = min(value, given.samples) if key == "batch_size" else value  # else the only batch has repeats
        if value is not None:
            flags += [ALL[key].name, *(value if isinstance(value, list) else [str(value)])]
    return flags


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="training.check_reference",
        description="What a reference knows of the data that a target is to be trained on.",
    )

    def add(key: str, **options: Any) -> None:
        name = ALL[key].name
        options.setdefault("help", ALL[key].help)
        spellings = dict.fromkeys([name, f"--{key}", f"--{key.replace('_', '-')}"])
        parser.add_argument(*spellings, dest=key, **options)

    for key in TAKEN:
        flag = ALL[key]
        kind = {"int": int, "float": float}.get(flag.kind, str)
        options: dict[str, Any] = {"nargs": "*"} if flag.kind == "pairs" else {"type": kind}
        add(key, default=DEFAULTS.get(key), choices=flag.choices, required=key == "train_data", **options)
    parser.add_argument("--samples", type=int, default=4096, help="pairs to measure it on (default: 4096)")
    parser.add_argument("--out", type=Path, default=None, help="a file for the numbers, as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
