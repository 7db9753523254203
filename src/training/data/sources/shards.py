"""Webdataset shards: which ones a flag names, and the samples of a shard with the places where they begin.

webdataset opens shards (``gopen``: files, URLs, ``pipe:`` commands) and splits names into sample and extension;
``tar`` reads the members with their offsets, so that reading a file can start at any sample.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import IO, NamedTuple

import webdataset as wds
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from training.data.samples import Fault
from training.data.sources.tar import Member, PushbackStream, Readable, check_end, open_tar, read_tar

UNREADABLE = (OSError, ValueError, ImportError, tarfile.TarError)  # what opening and reading a shard may raise

_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset treats as metadata
_REMOTE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ": "lzma", b"(\xb5/\xfd": "compression.zstd"}


@dataclass(frozen=True)
class Shard:
    """One tar file. Its samples have the rows ``first_row + key`` (or position), all below ``stop_row``."""

    url: str
    first_row: int
    stop_row: int


class Group(NamedTuple):
    """One sample of a shard: ``members`` {extension: bytes}, and their common ``name`` before the extension.

    It is the sample at ``position`` of the shard, and its first header is at byte ``offset`` of the tar.
    """

    name: str
    members: dict[str, bytes]
    position: int
    offset: int


class Damage(NamedTuple):
    """A fault of the shard itself, found while the sample at ``position`` was read or looked for."""

    fault: Fault
    position: int


def expand_shards(shards: str, flag: str = "--train-data") -> list[list[str]]:
    """The urls of each ``::`` source in the value of ``flag``: sources in the given order, globs sorted.

    ValueError: no shard matches a source.
    """
    sources = []
    for source in shards.split("::"):
        urls = []
        for url in expand_urls(source):
            is_pattern = glob.has_magic(url) and not _REMOTE.match(url)
            urls.extend(sorted(glob.glob(url)) if is_pattern else [url] if url else [])
        if not urls:
            raise ValueError(f"{flag} {shards}: no shard matches {source!r}; check the path")
        sources.append(urls)
    return sources


def look_for_shards(shards: str, flag: str, allowed: float = 1.0) -> list[str]:
    """A remark on each source of which some shards are missing; training counts them as unreadable.

    ValueError: all shards of a source are missing, or more than the share ``allowed``. For URLs and commands this
    is only known when they are opened.
    """
    remarks = []
    for urls in expand_shards(shards, flag):
        missing = _missing(urls)
        if len(missing) == len(urls):
            raise ValueError(
                f"{flag} {shards}: there is no {missing[0]}, and no other shard of this source; check the path"
            )
        if len(missing) > allowed * len(urls):
            raise ValueError(
                f"{flag} {shards}: {len(missing)} of {len(urls)} shards are missing, the first is {missing[0]}; "
                f"that is more than --max_bad_fraction {allowed:g} allows: correct the pattern, or raise the "
                "fraction"
            )
        if missing:
            remarks.append(f"{flag}: {len(missing)} of {len(urls)} shards are missing, the first is {missing[0]}")
    return remarks


def _missing(urls: list[str]) -> list[str]:
    """The local files that do not exist. Folders are listed, since asking for each of 30,000 files takes long."""
    listed: dict[str, set[str]] = {}
    missing = []
    for url in urls:
        if _REMOTE.match(url):
            continue
        folder, name = os.path.split(url)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
        if name not in listed[folder]:
            missing.append(url)
    return missing


def read_shard(url: str, position: int = 0, offset: int = 0) -> Iterator[Group | Damage]:
    """The samples of one shard from the one at ``position`` on, in the tar's order.

    ``offset``: where that sample begins. A file is read from there; commands, URLs and compressed files are read
    from their beginning. Faults of the shard come between the samples, and after the last complete one.
    """
    seen, stream, broken = 0, None, None
    try:
        stream = wds.gopen(url)
        tar, start = _tar_in(stream, offset)
        seen = position if start else 0
        for found in _groups(_members(tar, start), seen, url):
            seen = found.position + 1
            if found.position >= position:
                yield found
        stream.close()  # raises if a command has failed
    except UNREADABLE as error:
        broken = error
    finally:
        if stream is not None:
            with suppress(OSError):  # raised for a command whose output is left unread
                stream.close()
    if broken is not None:
        yield Damage(Fault("unreadable shard", f"{url}: {broken}"), max(seen - 1, 0))
    elif not seen:
        yield Damage(Fault("empty shard", url), 0)


def count_samples(url: str) -> int:
    """How many samples ``read_shard`` finds in an intact shard. Where it can seek, only headers are read."""
    with wds.gopen(url) as stream, open_tar(stream, "r:*" if _seekable(stream) else "r|*") as tar:
        names = (member.name for member in tar if member.isreg() and not _META.match(member.name))
        prefixes = (base_plus_ext(name)[0] for name in names)
        samples, last = 0, None
        for prefix in prefixes:
            if prefix is not None and prefix != last:
                samples, last = samples + 1, prefix
        check_end(tar.fileobj)
    return samples


def _members(tar: Readable, offset: int) -> Iterator[Member]:
    """The files of a tar whose stream is at byte ``offset``. ReadError: whatever stops the reading."""
    try:
        yield from read_tar(tar, offset)
    except Exception as error:  # tarfile and decompressors may raise any exception on a broken file
        raise tarfile.ReadError(str(error)) from error


def _groups(members: Iterator[Member], position: int, url: str) -> Iterator[Group | Damage]:
    """Consecutive members whose paths are equal up to the first dot of the file name are one sample.

    ReadError, after the last sample: whatever stopped ``members``.
    """
    name: str | None = None
    found: dict[str, bytes] = {}
    begin, broken = 0, None
    try:
        for path, data, offset in members:
            prefix, extension = base_plus_ext(path)
            if prefix is None or _META.match(path):
                continue
            if prefix != name:
                if name is not None:
                    yield Group(name, found, position, begin)
                    position += 1
                name, found, begin = prefix, {}, offset
            if (extension := extension.lower()) in found:
                yield Damage(Fault("duplicate member", f"{url}: {path}"), position)
            else:
                found[extension] = data
    except tarfile.ReadError as error:
        broken = error
    if name is not None:
        yield Group(name, found, position, begin)
    if broken is not None:
        raise broken


def _seekable(stream: IO[bytes]) -> bool:
    return hasattr(stream, "seekable") and stream.seekable()


def _tar_in(stream: IO[bytes], offset: int) -> tuple[Readable, int]:
    """The tar in ``stream``, and the byte at which it stands: ``offset`` if the stream can seek to it, else 0."""
    # webdataset's wrapper of a command checks at every read whether it has failed; what was read is then lost.
    stream = getattr(stream, "stream", stream)
    source = PushbackStream(stream)
    head = source.read(6)
    source.give_back(head)
    module = next((module for magic, module in _PACKED.items() if head.startswith(magic)), None)
    if module is not None:
        return import_module(module).open(source), 0
    if not _seekable(stream):
        return source, 0
    stream.seek(offset)
    return stream, offset
