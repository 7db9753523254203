"""The files in a tar, one after the other, with the byte at which each one's header begins.

``tarfile`` reads any tar, but takes about 25 µs per member, and a sample has three members. What shards consist
of, regular files under plain headers (POSIX ustar, with or without times in pax headers), is read here directly,
in a quarter of that time. At the first member of another kind ``tarfile`` takes over.

``tarfile`` treats anything that is not a header as the end of the archive. Here an archive must end with the
marker that the format defines, a block of zeros, with nothing but zeros after it. Anything else is damage: there
may be samples after it, or there may have been some.
"""

from __future__ import annotations

import posixpath
import re
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import IO, Literal, NamedTuple, Protocol

_BLOCK = 512
_FILE, _PAX = ord("0"), ord("x")
_TIMES = re.compile(rb"(\d+ (mtime|atime|ctime)=[-+.\de]+\n)*\0*")  # pax records that do not matter here
_LARGEST_PAX = 2**16
_LONGEST_CHAIN = 8  # links that lead to links
_CHUNK = 2**20
_ZEROS = bytes(_BLOCK)


class Readable(Protocol):
    """The stream of bytes that a tar is read from."""

    def read(self, size: int, /) -> bytes:
        """The next ``size`` bytes; fewer only at the end."""


class Member(NamedTuple):
    """A file: its name, its content, and the byte at which its first header begins.

    ``data`` of a link is the content of the file that it leads to, or else why that cannot be had.
    """

    name: str
    data: bytes | str
    offset: int


Follow = Callable[[tarfile.TarInfo], bytes | str]  # a link's ``Member.data``


class Header(NamedTuple):
    """A plain header: ``_FILE`` or ``_PAX``, the name, and the size of the content in bytes."""

    kind: int
    name: str
    size: int


def read_tar(stream: Readable, offset: int = 0, follow: Follow | None = None) -> Iterator[Member]:
    """The files of a tar from byte ``offset`` on. ``stream`` is at that byte, and a header begins there.

    They are the regular files and, with ``follow``, hard and symbolic links. Only ``read`` of ``stream`` is used,
    up to its end. tarfile.TarError and whatever else ``tarfile`` raises: the archive is damaged there.
    """
    source = PushbackStream(stream)
    handed_over = yield from _plain(source, offset)
    if handed_over is None:
        check_end(source)
    else:
        yield from _by_tarfile(source, handed_over, follow)


def is_file(member: tarfile.TarInfo) -> bool:
    """Whether it is a regular file or a link."""
    return member.isreg() or member.islnk() or member.issym()


class Links:
    """Follows the links of a tar, which ``reopen`` opens a second time; None: it can only be read once.

    All headers are read when the first link is followed.
    """

    def __init__(self, reopen: Callable[[], IO[bytes]] | None) -> None:
        self._reopen = reopen
        self._tar: tarfile.TarFile | None = None
        self._members: dict[str, list[tarfile.TarInfo]] = {}

    def __call__(self, link: tarfile.TarInfo) -> bytes | str:
        """The content of the file that ``link`` leads to, or why that cannot be had: a clause about the link."""
        hard = link.islnk()
        what = f"a {'hard' if hard else 'symbolic'} link to {link.linkname}"
        cure = f"pack the files themselves (tar --{'hard-' if hard else ''}dereference)"
        if self._reopen is None:
            return f"{what}, and links cannot be followed in a compressed shard, a command or a URL: {cure}"
        # What is damaged is reported when the reading gets there.
        with suppress(Exception):
            if self._tar is None:
                self._tar = open_tar(self._reopen(), "r:")
                for member in self._tar:
                    self._members.setdefault(posixpath.normpath(member.name), []).append(member)
        with suppress(Exception):
            if self._tar is not None and (found := self._target(link)) is not None:
                file = self._tar.extractfile(found)
                assert file is not None  # it is None for other kinds of members only
                return file.read()
        return f"{what}, which is not in the tar: {cure}"

    def close(self) -> None:
        """Close what was opened."""
        if self._tar is not None:
            assert self._tar.fileobj is not None  # it is open
            self._tar.fileobj.close()

    def _target(self, link: tarfile.TarInfo) -> tarfile.TarInfo | None:
        """The regular file to which ``link`` leads, over further links."""
        member = link
        for _ in range(_LONGEST_CHAIN):
            folder = "" if member.islnk() else posixpath.dirname(member.name)
            there = self._members.get(posixpath.normpath(posixpath.join(folder, member.linkname)), [])
            if member.islnk():  # to a member before it, as in extracting
                there = [other for other in there if other.offset < member.offset]
            if not there:
                return None
            member = there[-1]
            if member.isreg():
                return member
        return None


def open_tar(stream: Readable, mode: Literal["r:", "r|"]) -> tarfile.TarFile:
    """``tarfile``'s reader of ``stream``; it raises ReadError at anything that is neither a header nor the end."""
    # typeshed asks for a whole file, though tarfile only reads from a stream.
    return tarfile.open(fileobj=stream, mode=mode, tarinfo=_StrictInfo)  # type: ignore[call-overload]


def check_end(stream: Readable) -> None:
    """ReadError: there is something other than zeros after the end of an archive."""
    while data := stream.read(_CHUNK):
        if data.count(0) != len(data):
            raise tarfile.ReadError("there is data after the end of the archive")


class PushbackStream:
    """A stream that takes back bytes, to return them at the next read."""

    def __init__(self, stream: Readable) -> None:
        self._read, self._back = stream.read, b""

    def read(self, size: int, /) -> bytes:
        if not self._back:
            return self._read(size)
        data, self._back = self._back[:size], self._back[size:]
        return data + self._read(size - len(data)) if len(data) < size else data

    def give_back(self, data: bytes) -> None:
        self._back = data + self._back


class _StrictInfo(tarfile.TarInfo):
    """A member's header. Anything that is not a header is an error, and not the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictInfo:
        """See ``tarfile``, which takes a HeaderError for the end of the archive."""
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf == _ZEROS:
                raise
            raise tarfile.ReadError(str(error) if buf else "the end of the archive is missing") from None


def _by_tarfile(source: Readable, offset: int, follow: Follow | None) -> Iterator[Member]:
    with open_tar(source, "r|") as tar:
        for member in tar:
            if member.isreg():
                file = tar.extractfile(member)
                assert file is not None  # it is None for other kinds of members only
                yield Member(member.name, file.read(), offset + member.offset)
            elif follow is not None and is_file(member):
                member.offset += offset
                yield Member(member.name, follow(member), member.offset)
            tar.members = []  # type: ignore[attr-defined]  # typeshed lacks it; tarfile would keep all
        check_end(tar.fileobj)


def _plain(source: PushbackStream, start: int) -> Generator[Member, None, int | None]:
    """Members up to the archive's end, or up to one that ``tarfile`` has to read, whose offset is returned."""
    here = first = start
    times = b""  # pax headers of the member at ``first``
    while True:
        block = source.read(_BLOCK)
        if block == _ZEROS and not times:
            return None
        header = parse_header(block)
        if header is None or (header.kind == _PAX and header.size > _LARGEST_PAX):
            source.give_back(times + block)
            return first
        padding = -header.size % _BLOCK
        data = source.read(header.size)
        if header.kind == _PAX:
            times += block + data + source.read(padding)
            if first != here or not _TIMES.fullmatch(data) or len(data) < header.size:
                source.give_back(times)
                return first
            here += _BLOCK + header.size + padding
            continue
        if len(data) < header.size:
            raise tarfile.ReadError("unexpected end of data")
        yield Member(header.name, data, first)
        if len(source.read(padding)) < padding:
            raise tarfile.ReadError("unexpected end of data")
        here += _BLOCK + header.size + padding
        first, times = here, b""


def parse_header(block: bytes) -> Header | None:
    """A plain header of a file or of pax records; None for anything else, which ``tarfile`` may still read."""
    if len(block) < _BLOCK or block[156] not in (_FILE, _PAX) or not block.isascii():
        return None
    try:
        size = int(block[124:136].rstrip(b"\0 "), 8)
        checksum = int(block[148:156].rstrip(b"\0 "), 8)
    except ValueError:
        return None
    # The lower half of Adler-32 is 1 + the sum of the bytes; 512 ASCII bytes do not reach its modulus.
    total = (zlib.adler32(block) & 0xFFFF) - 1
    if size < 0 or total - sum(block[148:156]) + 8 * 32 != checksum:
        return None
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0]
    return Header(block[156], (prefix + b"/" + name if prefix else name).decode("ascii"), size)
