"""``python -m training.check_cache DIR``: what a store of cached values contains, and whether it is intact."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from training.cache.row_store import damaged, open_store


def main(argv: list[str] | None = None) -> int:
    """Print the result. Returns 0 if all files are intact, 1 if a file is damaged, 2 if there is no store."""
    parser = argparse.ArgumentParser(prog="training.check_cache", description=__doc__.split(":", 1)[1].strip())
    parser.add_argument("folder", help="the folder that --cached_ref_features_dir or --cached_syn_texts_dir names")
    folder = Path(parser.parse_args(argv).folder)
    try:
        kind = json.loads((folder / "index.json").read_text())["kind"]
        store = open_store(folder, kind, "DIR")
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    made = ", ".join(f"{key} {value}" for key, value in store.identity.items())
    print(f"{folder}: {kind} of {len(store):,} samples in {len(store.parts)} parts ({made})")
    bad = damaged(store)
    print(f"damaged: {', '.join(bad)}" if bad else f"all {len(store.files)} files are as they were written")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
