"""The csv files of results: one row for each finished run, appended at once, by whichever process finished it."""

from __future__ import annotations

import csv
import fcntl
import io
import os
from dataclasses import dataclass
from pathlib import Path

COLUMNS = (
    *("id", "kind", "method", "data", "samples", "batch", "seed", "model", "reference", "settings"),
    *("steps", "samples_read", "epochs"),
    *("test_top1", "test_top5", "val_top1", "val_top5", "test_recall1", "val_recall1"),
    *("b_first", "b_loss_spread"),  # of a reference, by training.check_reference on the set b
    *("seconds", "cpu_seconds", "resumed", "device", "torch", "revision", "date", "flags"),
)


@dataclass(frozen=True)
class Table:
    """A csv file with ``COLUMNS``. ``kind`` of a row: cell, tuning or reference."""

    path: Path

    def rows(self) -> dict[str, dict[str, str]]:
        """id -> row, in the file's order. A file that does not exist holds none."""
        if not self.path.exists():
            return {}
        with self.path.open(newline="", encoding="utf-8") as file:
            return {row["id"]: row for row in csv.DictReader(file)}

    def append(self, row: dict[str, object]) -> None:
        """Add one row; several processes may do so at a time."""
        assert row.keys() == set(COLUMNS), row.keys() ^ set(COLUMNS)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            text = io.StringIO()
            writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            file.write(text.getvalue())
            file.flush()
            os.fsync(file.fileno())
