"""Opens what ``--train-data`` and ``--val-data`` name: local files, commands and URLs.

webdataset's ``gopen`` runs commands (``pipe:``) and the programs that read http, hf, gs and others. URLs of other
schemes (s3, az, hdfs, ...) are read by fsspec, where the package that it needs is installed.

Whatever a library raises when it opens or reads a URL becomes an OSError, as each has exceptions of its own. An
attempt to open a file or URL is repeated, unless it is known that the shard is not there or not allowed; a command
is run again if it has failed before it wrote anything. The first shard that meets an outage waits longer, so that
the lane does not run through its list while the storage is away.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import IO, Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import fsspec
import webdataset as wds
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations
from webdataset.gopen import Pipe, gopen_schemes, rewrite_url

from training.data.sources.commands import end_with_reader

WAITS = (1.0, 3.0)  # seconds before the second and the third attempt to open a shard or to run a command
OUTAGE = (10.0, 30.0)  # before further attempts, for the first shard that a folder or server does not give
_BUFFER = 2**16
_LONGEST = 300  # characters of a library's message

_REMOTE = re.compile(r"pipe:|file:|([a-zA-Z][a-zA-Z0-9+.-]*)://")
_BROKEN_PIPE = -13  # exit code of a command whose output nobody reads any more
_CURL = {
    6: ": the host is not known",
    7: ": there is no connection",
    22: ": the server has no such file, or does not give it",
    28: ": the server does not answer in time",
}
# Exit codes that another attempt would not change; curl itself repeats what its server may give later. 6 is not
# among them: the name server may be away.
_FINAL_OF_CURL = (1, 2, 3, 4, 9, 22, 67, 78)
_FINAL_OF_SHELL = (126, 127)  # there is no such program, or it cannot be run
_PROGRAMS = {"gs": "gsutil", "ais": "ais"}  # with which gopen reads a scheme, where that is not curl
_PACKAGES = {"hdfs": "pyarrow", "arrow_hdfs": "pyarrow"}  # that fsspec imports when it connects
# What writes an object to its output, for a ``pipe:``.
_COMMANDS = {
    "s3": "aws s3 cp {} -",
    "gs": "gcloud storage cat {}",
    "gcs": "gcloud storage cat {}",
    "oss": "ossutil cat {}",
    "hdfs": "hdfs dfs -cat {}",
    "http": "curl -fsSL {}",
    "https": "curl -fsSL {}",
}
_UNPACK = {"zst": "zstd -dc", "tzst": "zstd -dc", "lz4": "lz4 -dc", "br": "brotli -dc", "z": "uncompress -c"}
_ZSTD = ("compression.zstd", "backports.zstd", "zstandard")

_OTHERS = {
    b"versio": "it is a pointer of Git LFS and not the file itself: git lfs pull fetches it",
    b"PK\x03\x04": "it is a zip archive: pack its files into a tar",
    b"Rar!": "it is a rar archive: pack its files into a tar",
    b"7z\xbc\xaf": "it is a 7z archive: pack its files into a tar",
    b"PAR1": "it is a parquet file: pack its samples into a tar",
    b"\x89HDF": "it is an HDF5 file: pack its samples into a tar",
    b"<!DOCT": "it is a web page: download the shard itself",
    b"<!doct": "it is a web page: download the shard itself",
    b"<html": "it is a web page: download the shard itself",
    b"<?xml": "it is the answer of a server that did not give the file: download it again",
}

_down: set[str] = set()  # folders and servers whose outage has been waited for: further shards wait less


def is_local(url: str) -> bool:
    """Whether ``url`` is the path of a file (which may contain colons), not a command or a URL."""
    return not _REMOTE.match(url)


def local_path(url: str) -> str | None:
    """The path that ``url`` is, or that it names as a file: URL; None for a command or another URL."""
    if is_local(url):
        return url
    return url2pathname(urlparse(url).path) if _scheme(url) == "file" else None


def open_url(url: str) -> IO[bytes]:
    """The bytes of ``url``. NotOpened, ValueError: they cannot be had, at the last attempt either."""
    url = rewrite_url(url)
    if (path := local_path(url)) is not None:
        return _patiently(os.path.dirname(path), lambda: _open(path), told=str)
    scheme, server = _scheme(url), "/".join(url.split("/")[:3])
    if scheme == "pipe":  # its exit code does not tell an outage from one shard that is not there
        return _patiently(server, lambda: _run(url), through_outages=False)
    if _program_for(scheme):
        return _patiently(server, lambda: _run(url))
    if fault := _fault_of_fsspec(scheme):
        raise NotOpened(fault)
    return _patiently(server, lambda: io.BufferedReader(_Guarded(_by_fsspec(url)), _BUFFER))


def failure_of(stream: IO[bytes] | None) -> OSError | None:
    """How the command that wrote ``stream`` has failed, to be read no more; None: it has not, or it is none."""
    if not isinstance(stream, Pipe):
        return None
    with suppress(OSError):  # raised for a command that has failed
        stream.close()
    return _fault_of(stream)


def is_known(scheme: str) -> bool:
    """Whether there are URLs of this scheme."""
    return scheme.lower() in gopen_schemes or scheme.lower() in known_implementations


def cannot_be_read(url: str) -> str | None:
    """Why nothing like ``url`` can be read on this machine, and what to do. None: it may be readable."""
    url = rewrite_url(url)
    scheme = "file" if is_local(url) else _scheme(url)
    if scheme == "pipe":
        program = re.match(r"pipe:\s*([\w./+-]+)(\s|$)", url)
        if program is None or _is_command(program[1]):
            return None
        return f"there is no program {program[1]} on this machine; install it, or correct the command"
    command = _command_for(scheme, url)
    ending = re.search(r"\.(\w+)$", url if scheme == "file" else url.split("?")[0])
    unpack = _UNPACK.get(ending[1].lower()) if ending else None
    if unpack and ending and not ("zst" in unpack and _zstd_module()):
        install = "install the package zstandard, or " if "zst" in unpack else ""
        command = f"{unpack} {shlex.quote(url)}" if scheme == "file" else f"{command} | {unpack}"
        return f"Python cannot unpack .{ending[1]} here; {install}let a command do it: {_pipe(command)}"
    if "*" in url.split("?")[0] and scheme != "file":
        return "patterns with * are for local files; name remote shards by a range such as {00000..00099}"
    if scheme == "file" or _program_for(scheme):
        return None
    fault = _fault_of_fsspec(scheme)
    return fault and f"{fault}; a command may read it: {_pipe(command)}"


def what_else(path: str) -> str | None:
    """What a local file is instead of a tar, as a sentence. None: it may be one. OSError: it cannot be read."""
    with open(path, "rb") as file:
        head = file.read(8)
    return next((what for magic, what in _OTHERS.items() if head.startswith(magic)), None)


def unpack_zstd(source: Any) -> IO[bytes]:
    """The unpacked bytes of ``source``. OSError: no package for it is installed."""
    name = _zstd_module()
    if name is None:
        raise OSError(
            "it is compressed with zstd, which Python cannot unpack here; install the package zstandard, or let a "
            "command do it: 'pipe:zstd -dc FILE'"
        )
    module = import_module(name)
    if name == "zstandard":
        return module.ZstdDecompressor().stream_reader(source, read_across_frames=True)
    return module.open(source)


class NotOpened(OSError):
    """A shard cannot be opened; what another attempt could change has been tried."""


class _Final(OSError):
    """A fault that another attempt would not change."""


_PERMANENT = (
    _Final,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    ImportError,
    NotImplementedError,
    ValueError,
    TypeError,
)


class _Guarded(io.RawIOBase):
    """A file of fsspec. OSError: whatever its library raises when it reads."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def readinto(self, buffer: Any, /) -> int:
        try:
            data = self._file.read(len(buffer))
        except Exception as error:
            raise OSError(_told(error)) from error
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


def _patiently(
    place: str,
    attempt: Callable[[], IO[bytes]],
    *,
    through_outages: bool = True,
    told: Callable[[Exception], str] | None = None,
) -> IO[bytes]:
    """What ``attempt`` returns, at the second or a later time if need be. NotOpened: it has failed, as ``told``.

    ``place``: the folder or server. An outage of it is waited for once, until it gives a shard again.
    """
    longer = OUTAGE if through_outages and place not in _down else ()
    for wait in (*WAITS, *longer, None):
        try:
            opened = attempt()
        except Exception as error:  # each library has exceptions of its own
            final = isinstance(error, _PERMANENT)
            if final or wait is None:
                if not final:
                    _down.add(place)
                raise NotOpened((told or _told)(error)) from error
            time.sleep(wait)
        else:
            _down.discard(place)
            return opened
    raise AssertionError("the last attempt returns or raises")


def _open(path: str) -> IO[bytes]:
    """The file at ``path``. FileNotFoundError: its folder is there, and it is not."""
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        if os.path.isdir(os.path.dirname(os.path.realpath(path))):
            return open(path, "rb")  # the folder may have come back since
        raise OSError(str(error)) from error  # as while a file system is not mounted


def _run(url: str) -> IO[bytes]:
    """The output of a command, or of the program that reads ``url``. OSError: it failed before it wrote any."""
    stream = end_with_reader(wds.gopen(url))
    if isinstance(stream, Pipe) and not stream.stream.peek(1):
        stream.proc.wait()
        if fault := _fault_of(stream):
            with suppress(OSError):  # as it has failed
                stream.close()
            raise fault
    return stream


def _fault_of(stream: Pipe) -> OSError | None:
    """How the command has failed; None: it has not, or it is still running."""
    code = stream.proc.poll()
    if code in (None, _BROKEN_PIPE, *stream.ignore_status):
        return None
    words = stream.proc.args
    program = "the command" if isinstance(words, str) else str(words[0])
    final = code in (_FINAL_OF_CURL if program == "curl" else _FINAL_OF_SHELL)
    meaning = _CURL.get(code, "") if program == "curl" else ""
    return (_Final if final else OSError)(f"{program} has failed with exit {code}{meaning}")


def _by_fsspec(url: str) -> IO[bytes]:
    files, path = url_to_fs(url)
    return files.open(path, "rb")


def _told(error: Exception) -> str:
    """What a library says, in one line, with the kind of its error."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return text if type(error) in (OSError, _Final) else f"{type(error).__name__}: {text}".removesuffix(": ")


def _pipe(command: str) -> str:
    """``command`` as the value of a flag, in quotes for a shell."""
    quote = '"' if "'" in command else "'"
    return f"{quote}pipe:{command}{quote}"


def _command_for(scheme: str, url: str) -> str:
    """A command that writes what is at ``url`` to its output, for a ``pipe:``."""
    if scheme in ("s3a", "s3n"):
        url, scheme = f"s3{url[3:]}", "s3"
    place = urlparse(url)
    if scheme in ("ssh", "sftp", "scp") and place.hostname:
        user = f"{place.username}@" if place.username else ""
        port = f"-p {place.port} " if place.port else ""
        return f"ssh {port}{user}{place.hostname} cat {shlex.quote(place.path)}"
    return _COMMANDS.get(scheme, "COMMAND {}").format(shlex.quote(url))


def _scheme(url: str) -> str:
    return url.split(":", 1)[0].lower()


@cache
def _program_for(scheme: str) -> str | None:
    """The path of the program with which ``gopen`` reads this scheme; None: it cannot."""
    if scheme not in gopen_schemes:
        return None
    by_ais = scheme in os.environ.get("USE_AIS_FOR", "").split(":")
    program = shutil.which("ais" if by_ais else _PROGRAMS.get(scheme, "curl"))
    if program and scheme in ("sftp", "scp", "ftps"):  # not every curl was built with them
        version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
        return program if re.search(rf"^Protocols:.* {scheme}\b", version, re.MULTILINE) else None
    return program


@cache
def _fault_of_fsspec(scheme: str) -> str | None:
    """What fsspec would need to read this scheme, in a clause that begins with it. None: it can."""
    programs = f" or the program {_PROGRAMS.get(scheme, 'curl')}" if scheme in gopen_schemes else ""
    if scheme not in known_implementations:
        return (
            f"{scheme}:// needs {programs.removeprefix(' or ')}" if programs else f"nothing here reads {scheme}://"
        )
    known = known_implementations[scheme]
    package = _PACKAGES.get(scheme, known["class"].split(".")[0])
    try:
        fsspec.get_filesystem_class(scheme)
        import_module(package)
    except Exception:  # also a package that is there and cannot be imported
        needs = f"the Python package {package} (pip install {package})"
        if package == "fsspec":
            needs = f"another Python package ({known.get('err', 'see the documentation of fsspec')})"
        return f"{scheme}:// needs {needs}{programs}"
    return None


@cache
def _zstd_module() -> str | None:
    """The installed module that unpacks zstd; None: there is none."""
    for name in _ZSTD:
        try:
            if find_spec(name) is not None:
                return name
        except ModuleNotFoundError:  # the package that it would be in
            continue
    return None


@cache
def _is_command(word: str) -> bool:
    """Whether the shell knows ``word``."""
    known = subprocess.run(["sh", "-c", 'command -v "$0"', word], capture_output=True, check=False)
    return known.returncode == 0
