"""A text file, wherever it is and however it is stored: a path or URL, compressed or not, in any encoding."""

from __future__ import annotations

import codecs
import io
import lzma
import re
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape, glob
from typing import IO, Any, cast

import fsspec
from fsspec.compression import compr

URL_TIMEOUT = 60  # seconds without an answer

_REMOTE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_BOMS = {  # byte-order marks; that of utf-16 begins like one of utf-32
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_WIDE = {  # which of the first four bytes are not zero
    b"\1\0\1\0": "utf-16-le",
    b"\0\1\0\1": "utf-16-be",
    b"\1\0\0\0": "utf-32-le",
    b"\0\0\0\1": "utf-32-be",
}
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ": "xz",
    b"(\xb5/\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",  # without files
}
_NO_TEXT = {
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"\xd0\xcf\x11\xe0": "an Excel workbook",
    b"SQLite format 3": "a database",
    b"\x93NUMPY": "a NumPy file",
    b"%PDF-": "a PDF file",
    b"\x80\x04\x95": "a pickle",
    b"\x80\x05\x95": "a pickle",
    b"\xff\xd8\xff": "a picture",
    b"\x89PNG": "a picture",
    b"GIF8": "a picture",
}
_WEB_PAGE = re.compile(rb"\s*<(!doctype html|html|\?xml)", re.IGNORECASE)
GIT_LFS = b"version https://git-lfs."  # with which a file begins that Git LFS has not fetched
_UNREADABLE = (OSError, EOFError, ImportError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
_SHOWN = 60  # characters of a line in a message


@contextmanager
def open_text(file: str, said: str, encoding: str = "utf-8", flag: str | None = None) -> Iterator[IO[str]]:
    """The text of a path or URL, whose lines keep their ends; a line ends where an editor ends it.

    Lines end with \\n or \\r\\n; with \\r where the file has no \\n, as old Macintosh files. A byte-order mark
    overrides ``encoding`` (the value of ``flag``, where there is one) and is removed; compression is recognized by
    the file's first bytes. ValueError, which begins with ``said``: it cannot be read, or, also while it is being
    read, bytes are not of the encoding. Afterwards, where ``flag`` says another encoding: the file is utf-8.
    """
    with _refusing(file, said), _open(file, said) as opened, _unpacked(opened, said) as stream:
        encoding = _encoding(stream.peek(4096), encoding, said, flag)
        newline = _newline(stream.peek(4096).decode(encoding, "ignore"))
        try:
            yield io.TextIOWrapper(stream, encoding, newline=newline)
        except UnicodeDecodeError:
            with _open(file, said) as opened_again, _unpacked(opened_again, said) as again:
                where = _first_wrong_byte(again, encoding, newline, flag)
            raise ValueError(f"{said}, {where}") from None
        except UnicodeError as error:
            raise ValueError(f"{said}: it is not {encoding} ({error}); {_correct(flag)}") from None
    if flag is not None and not codecs.lookup(encoding).name.startswith("utf"):
        with _open(file, said) as opened_again, _unpacked(opened_again, said) as again:
            if _is_utf8(again):
                raise ValueError(
                    f"{said}: it is utf-8, of which {flag} {encoding} would make other characters; leave {flag} "
                    "out, and convert files of other encodings to utf-8"
                )


@contextmanager
def _refusing(file: str, said: str) -> Iterator[None]:
    """Turns what opening and reading ``file`` may raise into a sentence."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{said}: there is no such file on this machine; check the path") from None
    except IsADirectoryError:
        tables = any(glob(f"{escape(file)}/*{ending}") for ending in (".csv", ".tsv"))
        cure = f"give the files in it, as '{file}/*.csv'" if tables else "give the path of a file"
        raise ValueError(f"{said}: it is a folder, not a file; {cure}") from None
    except PermissionError:
        raise ValueError(f"{said}: this user may not read it; change its permissions") from None
    except _UNREADABLE as error:
        raise ValueError(
            f"{said}: it cannot be read to its end ({_text_of(error)}); check it, or copy it again"
        ) from error


def _text_of(error: Exception) -> str:
    return str(error) or type(error).__name__


@contextmanager
def _open(file: str, said: str) -> Iterator[IO[bytes]]:
    """The bytes of a path or URL, as they are stored."""
    if not _REMOTE.match(file):
        with open(file, "rb", buffering=0) as local:
            yield local
        return
    try:
        if file.startswith(("http://", "https://")):
            with urllib.request.urlopen(file, timeout=URL_TIMEOUT) as answer:
                remote: IO[bytes] = io.BytesIO(answer.read())
        else:
            remote = fsspec.open(file, "rb").open()
    except Exception as error:  # each protocol has its own
        raise ValueError(f"{said}: it cannot be opened ({_text_of(error)}); check the address") from error
    with remote:
        yield remote


@contextmanager
def _unpacked(opened: IO[bytes], said: str) -> Iterator[io.BufferedReader]:
    """The same without its compression."""
    stream = io.BufferedReader(cast(Any, opened), 2**16)
    head = stream.peek(512)
    for magic, what in _NO_TEXT.items():
        if head.startswith(magic):
            raise ValueError(f"{said}: it is {what}, not text; export it as csv, or check the path")
    if head.startswith(GIT_LFS):
        raise ValueError(f"{said}: it is a pointer of Git LFS, not the file; run git lfs pull")
    if _WEB_PAGE.match(head):
        raise ValueError(f"{said}: it is a web page, not the file; download it again, and check the address")
    if head[257:262] == b"ustar":
        raise ValueError(f"{said}: it is a tar archive, not text; give --dataset-type webdataset if it is a shard")
    packed = next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)
    if packed == "zip":
        with zipfile.ZipFile(stream) as archive, archive.open(_only_member(archive, said)) as member:
            yield io.BufferedReader(cast(Any, member), 2**16)
    elif packed is not None:
        if packed not in compr:
            raise ImportError(f"it is compressed with {packed}, which needs pip install zstandard")
        with compr[packed](stream, mode="rb") as plain:
            yield io.BufferedReader(plain, 2**16)
    else:
        yield stream


def _only_member(archive: zipfile.ZipFile, said: str) -> str:
    names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
    if "[Content_Types].xml" in names:
        raise ValueError(f"{said}: it is an Excel workbook, not text; export it as csv")
    if len(names) != 1:
        raise ValueError(f"{said}: it is a zip archive with {len(names)} files; unpack it and give one of them")
    return names[0]


def _encoding(head: bytes, encoding: str, said: str, flag: str | None) -> str:
    """``encoding``, or that of the byte-order mark with which the file begins."""
    for mark, name in _BOMS.items():
        if head.startswith(mark):
            return name
    likely = _WIDE.get(bytes(byte != 0 for byte in head[:4]))
    if likely is not None and codecs.lookup(encoding).name == "utf-8":
        cure = f"give {flag} {likely}" if flag else "convert it to utf-8"
        raise ValueError(f"{said}: its bytes look like {likely}, not like utf-8; {cure}")
    return encoding


def _newline(head: str) -> str:
    return "\r" if "\n" not in head and re.search(r"\r[^\n]", head) else "\n"


def _is_utf8(stream: IO[bytes]) -> bool:
    """Whether there are characters beyond ASCII in it, and all are utf-8, which no text of other encodings is."""
    decoder, beyond = codecs.getincrementaldecoder("utf-8")(), False
    try:
        while chunk := stream.read(2**16):
            beyond = beyond or not chunk.isascii()
            decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return beyond


def _first_wrong_byte(stream: IO[bytes], encoding: str, newline: str, flag: str | None) -> str:
    """The line with the first byte that is not of ``encoding``, and what to do about it."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line, more = 1, True
    try:
        while more:
            chunk = stream.read(2**16)
            more = bool(chunk)
            line += decoder.decode(chunk, final=not more).count(newline)
    except UnicodeDecodeError as error:
        line += error.object[: error.start].decode(error.encoding).count(newline)
        byte = f"line {line}: byte 0x{error.object[error.start]:02x} is not {encoding.removesuffix('-sig')}"
        if flag is None or encoding not in ("utf-8", "utf-8-sig"):
            return f"{byte}; {_correct(flag)}"
        end = newline.encode()
        first = error.object.rfind(end, 0, error.start) + 1
        text = error.object[first:].split(end)[0].decode("cp1252", "replace")[:_SHOWN]
        if not text.replace("\t", "").isprintable():
            return f"{byte}; if it is text, name its encoding with {flag}, or convert the file to utf-8"
        return (
            f"{byte}; name the file's encoding with {flag} (with cp1252 the line is {text!r}), or convert "
            "the file to utf-8"
        )
    raise AssertionError("the bytes could not be decoded before")


def _correct(flag: str | None) -> str:
    return f"correct {flag}, or convert the file to utf-8" if flag else "convert the file to utf-8"
