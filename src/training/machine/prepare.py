"""Adapts a process to where it runs: its home, its temporary files, its user, how many files it may open."""

from __future__ import annotations

import os
import pwd
import resource
import tempfile
from contextlib import suppress
from pathlib import Path

_OPEN_FILES = 65536  # enough for many loader processes, and few enough for programs that close every number
_USER = ("LOGNAME", "USER", "LNAME", "USERNAME")  # where getpass.getuser() looks


class Unfit(ValueError):
    """What a program needs from the machine is not there; the message is one sentence that says what helps."""


def prepare() -> None:
    """Adapt this process to where it runs. Call it before torch and others have looked for their folders.

    Unfit: the current folder is gone, or no folder takes temporary files.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise Unfit(
            f"the current folder cannot be used ({error.strerror}), and torch does not load without one: change "
            "to a folder that is there (cd)"
        ) from error
    temporary_folder()
    _raise_open_files()
    _name_user()
    _find_a_place_for_caches()


def remarks() -> list[str]:
    """What the log should say about what ``prepare`` has changed."""
    place = str(_substitute())
    if place not in (os.environ.get("HOME"), os.environ.get("XDG_CACHE_HOME")):
        return []
    return [
        f"the home folder is not known or cannot be written, so caches (downloaded weights, compiled kernels) go "
        f"to {place}: set HOME, or HF_HOME and XDG_CACHE_HOME, to a folder that can be written to keep them"
    ]


def temporary_folder() -> Path:
    """The folder for temporary files. Unfit: there is none that can be written."""
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        raise Unfit(
            "no folder takes temporary files, as those that TMPDIR and the system name are missing, full or "
            "read-only: set TMPDIR to a folder with free space"
        ) from error


def _raise_open_files() -> None:
    """Allow as many open files as the administrator permits: loader processes and shards take several each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _name_user() -> None:
    """Give the user a name where only a number is known, as in containers: torch.compile asks for one."""
    if not any(os.environ.get(name) for name in _USER) and _passwd() is None:
        os.environ["USER"] = f"uid{os.getuid()}"


def _find_a_place_for_caches() -> None:
    """Let caches be in the temporary folder where there is no home, or one that holds none and takes none.

    A home that cannot be written but holds caches stays: weights may have been put there for all to read.
    """
    home = os.environ.get("HOME") or ((user := _passwd()) and user.pw_dir)
    if not home:
        os.environ["HOME"] = str(_make_substitute())
    elif "XDG_CACHE_HOME" not in os.environ:
        caches = Path(home, ".cache")
        if not caches.is_dir() and not os.access(home, os.W_OK | os.X_OK):
            os.environ["XDG_CACHE_HOME"] = str(_make_substitute())


def _substitute() -> Path:
    return temporary_folder() / f"drrho-clip-home-{os.getuid()}"


def _make_substitute() -> Path:
    """The folder that stands in for a home, the same for all processes of this user on this machine."""
    folder = _substitute()
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid == os.getuid():  # what others have put there could be anything
            return folder
    return Path(tempfile.mkdtemp(prefix="drrho-clip-home-"))


def _passwd() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(os.getuid())
    except KeyError:
        return None
