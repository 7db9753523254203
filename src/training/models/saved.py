"""The checkpoint that ``--checkpoint`` and ``--epoch`` name: a file, the folder of a run, or ``NAME:TAG``."""

from __future__ import annotations

from pathlib import Path

from training.checkpoint import catalog


def find_checkpoint(given: str, epoch: int | None) -> str:
    """``given`` as the path of a file, or as open_clip's ``NAME:TAG``.

    Of a run's folder it is the newest checkpoint, or that of ``epoch``. ValueError: there is no such thing.
    """
    path, said = Path(given), f"--checkpoint {given}"
    if not path.exists():
        if ":" in given and "/" not in given.partition(":")[2]:
            return given
        raise ValueError(
            f"{said}: there is no such file or folder on this machine, and it is no NAME:TAG of open_clip; check "
            "the path"
        )
    if not path.is_dir():
        if epoch is not None:
            raise ValueError(
                f"--epoch {epoch} chooses among the files of a run, but {said} is one file: leave it out"
            )
        return given
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    files = sorted(file.name for file in folder.glob("*.pt"))
    if epoch is not None:
        file = folder / f"epoch_{epoch}.pt"
        if not file.is_file():
            raise ValueError(
                f"--epoch {epoch}: {folder} has no {file.name}; it holds {', '.join(files) or 'no .pt'}"
            )
        return str(file)
    found, unreadable = catalog.contents(folder)
    if found:
        return str(max(found, key=lambda each: each.order).path)
    if unreadable:
        raise ValueError(f"{said}: {unreadable[0]} cannot be read, and there is no other checkpoint in {folder}")
    if files or folder != path:
        raise ValueError(f"{said}: {folder} has no checkpoint of a run; give a file")
    return given
