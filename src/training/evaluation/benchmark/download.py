"""Fetches the benchmark's sets from the Hugging Face hub into the folders where ``sets`` looks for them.

Sizes are those that the hub says; a file of the right size is taken as it is.
"""

from __future__ import annotations

import os
from pathlib import Path

from training.evaluation.benchmark.tasks import BenchmarkTask, chosen, near
from training.machine import console

_OWNER = "djghosh"  # of the benchmark's webdatasets
_NOT_NEEDED = (".gitattributes", ".gitignore", "README.md")


def fetch(data_dir: str, words: str) -> dict[str, str]:
    """Fetch the tasks that ``words``, the value of ``--tasks``, names. Returns name -> why a set could not be had.

    ValueError: there is no such task, the folder cannot be written, or huggingface_hub is not installed.
    """
    tasks, unknown = chosen(words)
    if unknown:
        hint = f"; {near(unknown[0])}" if near(unknown[0]) else ""
        raise ValueError(f"--tasks {words}: {unknown[0]} is no task of the benchmark{hint}")
    folder = Path(data_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--data_dir {data_dir}: it cannot be made ({error.strerror}); give another") from error
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise ValueError("the hub's package is missing: pip install huggingface_hub") from None
    failed = {}
    for task in tasks:
        try:
            console.show(f"{task.name}: {_fetch_set(task, folder)}")
        except _NotHad as error:
            failed[task.name] = str(error)
    return failed


class _NotHad(Exception):
    """A set could not be fetched; the message says why."""


def repository(task: BenchmarkTask) -> str:
    """Where the hub has a task's files."""
    is_table = task.is_retrieval or task.is_winogavil
    return task.folders[0] if is_table else f"{_OWNER}/{task.folders[0]}"


def _fetch_set(task: BenchmarkTask, folder: Path) -> str:
    """What was done. _NotHad: it is not there, or a file is not of the size that the hub says."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    name, place, endpoint = repository(task), folder / task.folders[0], os.environ.get("HF_ENDPOINT")
    try:
        held = HfApi(endpoint=endpoint).dataset_info(name, files_metadata=True)
        sizes = {one.rfilename: one.size for one in held.siblings or [] if one.rfilename not in _NOT_NEEDED}
        fetched = 0
        for file, size in sorted(sizes.items()):
            path = place / file
            if path.is_file() and (size is None or path.stat().st_size == size):
                continue
            path.unlink(missing_ok=True)
            hf_hub_download(name, file, repo_type="dataset", revision=held.sha, local_dir=place, endpoint=endpoint)
            if size is not None and path.stat().st_size != size:
                raise _NotHad(f"{path} has {path.stat().st_size} bytes instead of {size}; run the command again")
            fetched += 1
    except HfHubHTTPError as error:
        code = getattr(error.response, "status_code", None)
        if code in (401, 403):
            raise _NotHad(
                f"the hub wants an account for {name}: accept its terms there, and hf auth login"
            ) from None
        if code == 404:
            raise _NotHad(f"the hub has no {name}; get the set from its authors and put it into {place}") from None
        raise _NotHad(f"the hub answers {code} for {name}; try again later") from None
    except OSError as error:
        raise _NotHad(f"{name} cannot be fetched ({error.strerror or error}); run the command again") from None
    except Exception as error:  # transport errors are those of the hub's own HTTP library, which changes
        if "connect" not in f"{type(error).__name__} {error}".lower() and "httpx" not in type(error).__module__:
            raise
        raise _NotHad(f"{name} cannot be fetched ({error}); is there a network? run the command again") from None
    if not sizes:
        raise _NotHad(f"the hub's {name} holds no files")
    return f"{fetched} of {len(sizes)} files fetched into {place}" if fetched else f"all there in {place}"
