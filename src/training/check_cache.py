"""``python -m training.check_cache DIR``: what a store of cached values contains, and whether it is intact."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from training.machine import console
from training.machine.prepare import prepare


@console.lasting_streams()
def main(argv: list[str] | None = None) -> int:
    """Print the result. Returns 0 if all files are intact, 1 if a file is damaged, 2 if there is no store."""
    parser = argparse.ArgumentParser(prog="training.check_cache", description=__doc__.split(":", 1)[1].strip())
    parser.add_argument("folder", help="the folder that --cached_ref_features_dir or --cached_syn_texts_dir names")
    folder = Path(parser.parse_args(argv).folder)
    try:
        prepare()
        from training.cache import storage
        from training.cache.row_store import damaged, open_store

        kind = json.loads((folder / "index.json").read_text(encoding="utf-8"))["kind"]
        store = open_store(folder, kind, "DIR")
        made = ", ".join(f"{key} {value}" for key, value in store.identity.items())
        found = f"{folder}: {kind} of {len(store):,} samples in {len(store.parts)} parts ({made})"
        if change := storage.largest_changes(store):
            found += f"\n{change}"
        bad = damaged(store)
        console.show(
            f"{found}\ndamaged: {', '.join(bad)}"
            if bad
            else f"{found}\nall {len(store.files)} files are as they were written"
        )
    except OSError as error:
        print(f"error: {folder} cannot be read as a store ({error})", file=sys.stderr)
        return 2
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError):
        print(f"error: {folder}/index.json is not that of a store of this program", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
