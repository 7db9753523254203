"""What a data set contains, and whether training on it would be safe: ``python -m training.check_data``.

    python -m training.check_data --train-data 'cc3m/{00000..00331}.tar' --data_size 2876999

Every shard is read as training reads it and every image is decoded, in ``--workers`` processes. The program prints
samples per shard, missing parts, range and duplicates of keys, image sizes, caption lengths, bad samples, and the
values of ``--train-num-samples`` and ``--data_size`` that fit. Exit code 0: training would be safe, 1: it would
not, 2: the command is wrong.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from training.config.flags import ALL
from training.config.parser import parse_sizes
from training.machine import console
from training.machine.limits import check_open_files, cores
from training.machine.prepare import Unfit, prepare
from training.machine.shortage import shortage


@console.lasting_streams()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Returns the exit code."""
    given = _parser().parse_args(argv)
    sizes = given.data_size if isinstance(given.data_size, list) else [given.data_size]
    sizes = [] if sizes == [-1] else sizes
    try:
        prepare()
        # Imported here: torch does not load everywhere, and ``prepare`` says why.
        from training.data.audit import check
        from training.data.sources import reinforcement
        from training.data.sources.fields import sample_fields
        from training.data.sources.paths import expand_shards, look_for_shards
        from training.distributed.failures import lost_loader

        if re.search(r"\.(csv|tsv)(\.\w+)?(::|$)", given.train_data, re.IGNORECASE):
            raise ValueError(f"--train-data {given.train_data}: this checks webdataset shards, not csv files")
        fields = sample_fields(given.image_key, given.text_key, given.json_key)
        if given.dataset_reinforcement:
            fields = replace(fields, extras=reinforcement.EXTENSIONS)
        for remark in look_for_shards(given.train_data, "--train-data"):
            print(f"remark: {remark}", file=sys.stderr)
        sources = expand_shards(given.train_data)
        if len(sizes) > 1 and len(sizes) != len(sources):
            raise ValueError(f"--data_size: {len(sizes)} sizes for {len(sources)} sources; give one per :: source")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        check_open_files(given.workers)
        summary = check(
            sources,
            sizes,
            sample_index=given.sample_index,
            fields=fields,
            max_bad_fraction=given.max_bad_fraction,
            workers=given.workers,
        )
        console.show("\n".join(summary.lines()))
    except Exception as error:
        reason = error if isinstance(error, Unfit) else lost_loader(error) or shortage(error)
        if reason is None:
            raise
        print(f"error: {reason}", file=sys.stderr)
        return 2
    return 1 if summary.problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="training.check_data", description="What a data set contains, and whether it is safe to train on it."
    )

    def add(key: str, **options: Any) -> None:
        name = ALL[key].name
        options.setdefault("help", ALL[key].help.split(" or csv files")[0])
        spellings = dict.fromkeys([name, f"--{key}", f"--{key.replace('_', '-')}"])
        parser.add_argument(*spellings, dest=key, **options)

    add("train_data", required=True)
    add("data_size", type=parse_sizes, default=-1)
    add(
        "sample_index",
        choices=("key", "position", "none"),
        default="key",
        help="as in training; none: for a loss that keeps no values per sample, whose shards need no json",
    )
    for key in ("image_key", "text_key", "json_key"):
        add(key, default=ALL[key].default)
    add("dataset_reinforcement", action="store_true", help="check what shards hold beside samples too")
    add("max_bad_fraction", type=float, default=ALL["max_bad_fraction"].default)
    add("workers", type=int, default=cores(), help="processes that read")
    return parser


if __name__ == "__main__":
    sys.exit(main())
