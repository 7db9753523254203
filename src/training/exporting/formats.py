"""The formats of ``--format``, and how a folder of one of them comes to be."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from training.exporting import onnx_files, open_clip_folder, timm_folder, transformers_folder
from training.exporting.subject import CannotExport, Subject

WRITERS: dict[str, Callable[[Subject, Path], None]] = {
    "hf": open_clip_folder.write_folder,
    "safetensors": open_clip_folder.write_weights,
    "onnx": onnx_files.write_graphs,
    "timm": timm_folder.write_folder,
    "transformers": transformers_folder.write_folder,
}


def check_folder(out: str) -> None:
    """ValueError: ``out`` cannot become the folder of an export, because there is something."""
    path = Path(out)
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"--out {out}: this folder is not empty; give a new one")
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {out}: there is a file of this name; give a new folder")


def export(subject: Subject, kind: str, out: str) -> list[str]:
    """Write ``subject`` as ``kind`` to the folder ``out``, which is there whole or not at all; the names in it.

    ValueError: the model has no such form, or the folder cannot be written.
    """
    folder = Path(out)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        temporary.mkdir(parents=True)
        WRITERS[kind](subject, temporary)
        for file in filter(Path.is_file, temporary.iterdir()):
            file.chmod(temporary.stat().st_mode & 0o666)  # safetensors makes files for their owner alone
        if folder.is_dir():
            folder.rmdir()
        os.rename(temporary, folder)
    except CannotExport as reason:
        raise ValueError(f"--format {kind}: {subject.built.name} cannot be written so: {reason}") from reason
    except OSError as error:
        raise ValueError(f"--out {out}: it cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted(file.name for file in folder.iterdir())
