"""Webdataset shards: which ones a flag names, and the samples of one, with the places where they begin.

webdataset opens shards (``gopen``: files, URLs, ``pipe:`` commands) and splits names into sample and extension;
``tar`` reads the members with their offsets, so that a file can be entered at any sample.
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

_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset takes for metadata
_REMOTE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ": "lzma", b"(\xb5/\xfd": "compression.zstd"}


@dataclass(frozen=True)
class Shard:
    """One tar file. Its samples have rows ``first_row + key`` (or position), all below ``stop_row``."""

    url: str
    first_row: int
    stop_row: int


class Group(NamedTuple):
    """One sample of a shard: ``members`` {extension: bytes}, and the common ``name`` before the extension.

    It is the one at ``position``, and its first header is at byte ``offset`` of the tar.
    """

    name: str
    members: dict[str, bytes]
    position: int
    offset: int


class Damage(NamedTuple):
    """A fault of the shard itself, met while the sample at ``position`` was read or looked for."""

    fault: Fault
    position: int


def expand_shards(shards: str, flag: str = "--train-data") -> list[list[str]]:
    """The urls of each ``::`` source of ``flag``'s value, in order: sources as given, globs sorted.

    ValueError: a source without any shard.
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
    """A sentence on each source of which some shards are not there; training counts them as unreadable.

    ValueError: a source of which none is there, or more than the share ``allowed`` is missing. Of URLs and
    commands this is known when they are opened.
    """
    remarks = []
    for urls in expand_shards(shards, flag):
        missing = _missing(urls)
        if len(missing) == len(urls):
            raise ValueError(f"{flag} {shards}: there is no {missing[0]}, nor another shard of it; check the path")
        if len(missing) > allowed * len(urls):
            raise ValueError(
                f"{flag} {shards}: {len(missing)} of {len(urls)} shards are not there, {missing[0]} first, more "
                f"than --max_bad_fraction {allowed:g} allows; correct the pattern, or allow more"
            )
        if missing:
            remarks.append(f"{flag}: {len(missing)} of {len(urls)} shards are not there, {missing[0]} first")
    return remarks


def _missing(urls: list[str]) -> list[str]:
    """The local ones that are not there. Folders are listed, since to ask for each of 30,000 files takes long."""
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

    ``offset``: where that one begins. A file is entered there; commands, URLs and compressed files are read from
    their beginning. Between them, and behind the last one that is whole, comes what is wrong with the shard.
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
        stream.close()  # raises where a command has failed
    except UNREADABLE as error:
        broken = error
    finally:
        if stream is not None:
            with suppress(OSError):  # of a command whose output is left unread
                stream.close()
    if broken is not None:
        yield Damage(Fault("unreadable shard", f"{url}: {broken}"), max(seen - 1, 0))
    elif not seen:
        yield Damage(Fault("empty shard", url), 0)


def count_samples(url: str) -> int:
    """How many samples ``read_shard`` finds in a sound shard; reads headers only where it can seek."""
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
    """The files of a tar that is at byte ``offset``. ReadError: what stops it."""
    try:
        yield from read_tar(tar, offset)
    except Exception as error:  # tarfile and decompressors raise anything on a broken file
        raise tarfile.ReadError(str(error)) from error


def _groups(members: Iterator[Member], position: int, url: str) -> Iterator[Group | Damage]:
    """Members in a row with the same name up to the first dot of the file's name are one sample.

    ReadError, behind the last sample: what stops ``members``.
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
    """The tar in ``stream``, entered at byte ``offset`` if it can be, and the byte at which it stands then."""
    # webdataset's wrapper of a command asks at every read whether it has failed, and then what was read is lost.
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
