"""Image folders for zero-shot classification."""

from __future__ import annotations

from tests.support import shards


def write_folders(path, names, pictures=1):
    for label, name in enumerate(names):
        (path / name).mkdir(parents=True)
        for i in range(pictures):
            shards.picture(label * pictures + i, (8, 8)).save(path / name / f"{i}.png")
    return str(path)
