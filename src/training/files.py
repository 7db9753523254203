"""Files that are written completely or not at all, and checksums that show whether a file has changed since."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_BLOCK = 1 << 20  # bytes that are read at a time


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which becomes ``path`` when the body has ended.

    At any moment, even after a crash of the machine, ``path`` is the old file or the whole new one. If the body
    raises, it is the old one.
    """
    temporary = _beside(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # half a file would only fill the disk
        raise
    sync_folder(path.parent)


def link(existing: Path, path: Path) -> None:
    """Make ``path`` another name of the file ``existing``, or a copy of it where the file system has no links."""
    temporary = _beside(path)
    try:
        os.link(existing, temporary)
    except OSError:
        shutil.copyfile(existing, temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` survive a crash of the machine, on file systems that support it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def checksum(path: Path) -> int:
    """CRC-32 of a file's content: finds damage, and takes no longer than reading the file."""
    crc = 0
    for block in _blocks(path):
        crc = zlib.crc32(block, crc)
    return crc


def digest(path: Path, size: int = 16) -> str:
    """BLAKE2b of a file's content, ``size`` bytes in hexadecimal: different for different contents."""
    found = hashlib.blake2b(digest_size=size)
    for block in _blocks(path):
        found.update(block)
    return found.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _beside(path: Path) -> Path:
    """A hidden name in the same folder that no other process uses, on any machine."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
