"""The samples of a webdataset shard, with the places where they begin.

webdataset splits names into sample and extension, ``urls`` opens shards, and ``tar`` reads the members with their
offsets, so that reading a file can start at any sample.
"""

from __future__ import annotations

import os
import posixpath
import re
import tarfile
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import IO, NamedTuple

from webdataset.tariterators import base_plus_ext

from training.data.samples import Fault
from training.data.sources.fields import DEFAULT, Contents, Known
from training.data.sources.tar import (
    Links,
    Member,
    PushbackStream,
    Readable,
    check_end,
    is_file,
    open_tar,
    read_tar,
)
from training.data.sources.urls import failure_of, local_path, open_url, unpack_zstd, what_else

UNREADABLE = (OSError, ValueError, ImportError, tarfile.TarError)  # what opening and reading a shard may raise
APART = (
    "its other files are in the tar too, but not side by side: pack the samples again, sorted by name "
    "(tar --sort=name -cf NEW.tar FOLDER)"
)
_SIDE_BY_SIDE = "put the files of a sample into one folder, and pack it sorted by name"

_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset treats as metadata
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ": "lzma"}
_ZSTD = b"(\xb5/\xfd"


@dataclass(frozen=True)
class Shard:
    """One tar file. Its samples have the rows ``first_row + key`` (or position), all below ``stop_row``."""

    url: str
    first_row: int
    stop_row: int


class Group(NamedTuple):
    """One sample of a shard: its ``files``, and their common ``name`` before the extension.

    It is the sample at ``position`` of the shard, and its first header is at byte ``offset`` of the tar.
    """

    name: str
    files: Contents
    position: int
    offset: int


class Damage(NamedTuple):
    """A fault of the shard itself, found while the sample at ``position`` was read or looked for."""

    fault: Fault
    position: int


def read_shard(
    url: str, position: int = 0, offset: int = 0, known: Known = DEFAULT.known
) -> Iterator[Group | Damage]:
    """The samples of one shard from the one at ``position`` on, in the tar's order.

    ``offset``: where that sample begins. A file is read from there; commands, URLs and compressed files are read
    from their beginning. ``known``: the extensions that samples consist of. Faults of the shard come between the
    samples, and after the last complete one.
    """
    seen, stream, broken = 0, None, None
    links = Links(None)
    try:
        stream = open_url(url)
        tar, start = _tar_in(stream, offset)
        if tar is stream:
            links = Links(lambda: open_url(url))
        seen = position if start else 0
        for found in _groups(_members(tar, start, links), seen, url, known):
            seen = found.position + 1
            if found.position >= position:
                yield found
        stream.close()  # raises if a command has failed
    except UNREADABLE as error:
        broken = failure_of(stream) or error
    finally:
        links.close()
        if stream is not None:
            with suppress(OSError):  # raised for a command whose output is left unread
                stream.close()
    if broken is not None:
        why = str(broken) if seen else _what_it_is(url, broken)
        yield Damage(Fault("unreadable shard", f"{shown(url)}: {shown(why)}"), max(seen - 1, 0))
    elif not seen:
        yield Damage(Fault("empty shard", shown(url)), 0)


def count_samples(url: str, known: Known = DEFAULT.known) -> int:
    """How many samples ``read_shard`` finds in an intact shard. Where it can seek, only headers are read.

    OSError, ValueError, ImportError, tarfile.TarError: it cannot be read.
    """
    return sum(isinstance(found, Group) for found in _groups(_headers(url), 0, url, known))


def where_the_rest_is(url: str, name: str, lacks: str, known: Known, seconds: float) -> str:
    """Where a shard has the files that the sample ``name`` lacks, and what helps; '': not found.

    ``lacks``: 'image', 'text' or 'json'. The shard is searched for so many seconds.
    """
    until, runs, before = time.monotonic() + seconds, 0, False
    alike: dict[str, dict[str, str]] = {}  # of the same name in other folders: {extension: path}
    with suppress(*UNREADABLE), closing(_headers(url)) as members:
        for member in members:
            other, extension = base_plus_ext(member.name)
            runs += other == name and not before
            before = other == name
            if other is not None and not before and posixpath.basename(other) == posixpath.basename(name):
                alike.setdefault(other, {})[extension.lower()] = member.name
            if runs > 1 or time.monotonic() > until:
                break
    if runs > 1:
        return APART
    wanted = {"image": known.image, "text": known.text}.get(lacks, known.all - known.image - known.text)
    not_wanted = known.text if lacks == "image" else known.image
    for files in alike.values():
        # Without an image of its own, say, it is a caption of this image and no sample.
        if not_wanted.isdisjoint(files) and (there := next((files[e] for e in files if e in wanted), None)):
            return f"it is in another folder of the tar, as {shown(there)}: {_SIDE_BY_SIDE}"
    return ""


def shown(name: str) -> str:
    """``name`` for a message: bytes that are not UTF-8 as \\xHH."""
    return name if name.isascii() else name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _headers(url: str) -> Generator[Member, None, None]:
    """The members of a shard without their contents. ReadError: as in ``_members``."""
    with open_url(url) as stream:
        source, _ = _tar_in(stream, 0)
        with open_tar(source, "r:" if source is stream else "r|") as tar:
            try:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # typeshed lacks it; tarfile would keep all
                    if is_file(member):
                        yield Member(member.name, b"", member.offset)
                check_end(tar.fileobj)
            except Exception as error:
                raise tarfile.ReadError(str(error)) from error


def _members(tar: Readable, offset: int, links: Links) -> Iterator[Member]:
    """The files of a tar whose stream is at byte ``offset``. ReadError: whatever stops the reading."""
    try:
        yield from read_tar(tar, offset, links)
    except Exception as error:  # tarfile and decompressors may raise any exception on a broken file
        raise tarfile.ReadError(str(error)) from error


def _groups(members: Iterable[Member], position: int, url: str, known: Known) -> Iterator[Group | Damage]:
    """Consecutive members whose paths are equal up to the first dot of the file name are one sample.

    ReadError, after the last sample: whatever stopped ``members``.
    """
    name: str | None = None
    found: dict[str, Member] = {}
    same = ""  # what the paths of further files of the sample begin with; "": they have to be looked at
    broken = None
    try:
        for member in members:
            path = member.name
            if same and path.startswith(same) and "/" not in (extension := path[len(same) :]):
                extension = extension.lower()
            else:
                prefix, extension = base_plus_ext(path)
                if prefix is None or _is_no_part_of_a_sample(path):
                    continue
                extension = extension.lower()
                if prefix != name:
                    if name is not None:
                        for group in _samples_in(name, found, position, known):
                            yield group
                            position += 1
                    name, found = prefix, {}
                    same = "" if prefix.endswith("/") or prefix.startswith("__") else f"{prefix}."
            if extension in found:
                yield Damage(Fault("duplicate member", shown(f"{url}: {path}")), position)
            else:
                found[extension] = member
    except tarfile.ReadError as error:
        broken = error
    if name is not None:
        yield from _samples_in(name, found, position, known)
    if broken is not None:
        raise broken


def _is_no_part_of_a_sample(path: str) -> bool:
    """webdataset's metadata, and what macOS puts beside files."""
    return _META.match(path) is not None or "/._" in path or "__MACOSX/" in path or path.endswith("/.DS_Store")


def _samples_in(name: str, found: dict[str, Member], position: int, known: Known) -> Iterable[Group]:
    """The sample ``name``, which consists of the files ``found`` by extension.

    There are several where the names have dots: if no file has an extension that a sample consists of, the names
    are split again, before such an extension, and consecutive files of one name are a sample. At least one must
    then have an image and a caption. So no sample changes that is one by the first dots of its files.
    """
    if not known.all.isdisjoint(found):
        return (_group(name, found, position),)
    parts: list[tuple[str, dict[str, Member]]] = []
    for member in found.values():
        base, extension = _split_late(member.name, known)
        if not parts or parts[-1][0] != base:
            parts.append((base, {}))
        parts[-1][1].setdefault(extension, member)
    if any(not (known.image.isdisjoint(part) or known.text.isdisjoint(part)) for _, part in parts):
        return [_group(*part, position + i) for i, part in enumerate(parts)]
    return (_group(name, found, position),)


def _group(name: str, found: dict[str, Member], position: int) -> Group:
    members: dict[str, bytes] = {}
    links: dict[str, str] = {}
    for extension, (_, data, _) in found.items():
        if isinstance(data, bytes):
            members[extension] = data
        else:
            links[extension] = data
    return Group(name, Contents(members, links), position, next(iter(found.values())).offset)


def _split_late(path: str, known: Known) -> tuple[str, str]:
    """Name and extension: the longest ending that is ``known``, or else what comes after the last dot."""
    file = path.rpartition("/")[2]
    endings = [file[dot.end() :].lower() for dot in re.finditer(r"\.", file)]
    extension = next((ending for ending in endings if ending in known.all), endings[-1])
    return path[: len(path) - len(extension) - 1], extension


def _what_it_is(url: str, error: Exception) -> str:
    """Why nothing of a shard can be read: ``error``, and what a local file is instead of a tar."""
    path = local_path(url)
    if path is None:
        return str(error)
    if os.path.islink(path) and not os.path.exists(path):
        return f"it is a link to {os.readlink(path)}, which is not there"
    what = None
    with suppress(OSError):
        what = what_else(path)
    return f"{what} ({error})" if what else str(error)


def _seekable(stream: IO[bytes]) -> bool:
    return hasattr(stream, "seekable") and stream.seekable()


def _tar_in(stream: IO[bytes], offset: int) -> tuple[Readable, int]:
    """The tar in ``stream``, and the byte at which it stands: ``offset`` if the stream can seek to it, else 0."""
    # webdataset's wrapper of a command checks at every read whether it has failed; what was read is then lost.
    stream = getattr(stream, "stream", stream)
    source = PushbackStream(stream)
    head = source.read(6)
    source.give_back(head)
    if head.startswith(_ZSTD):
        return unpack_zstd(source), 0
    module = next((module for magic, module in _PACKED.items() if head.startswith(magic)), None)
    if module is not None:
        return import_module(module).open(source), 0
    if not _seekable(stream):
        return source, 0
    stream.seek(offset)
    return stream, offset
