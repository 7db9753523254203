"""Csv files as the flags name and describe them: which files, and how they are written."""

from __future__ import annotations

import codecs
import glob
import os.path
import re

from braceexpand import braceexpand

from training.config.given import Given, Refusal


def csv_files(value: str, flag: str) -> list[str]:
    """The paths and URLs that the value of ``flag`` names: sources joined with ::, files of a pattern by name.

    A path that exists is itself, whatever signs are in its name. Refusal: a local file does not exist.
    """
    if os.path.exists(os.path.expanduser(value)):
        return [os.path.expanduser(value)]
    return [file for source in value.split("::") for file in _files_of(source, f"{flag} {value}", value)]


def _files_of(source: str, said: str, value: str) -> list[str]:
    if source.startswith("pipe:"):
        raise Refusal(f"{said}: csv files are not read from commands; write its output into a file")
    if "://" in source:
        return [source]
    path, missing = os.path.expanduser(source), "there is no such file on this machine; check the path"
    if not path:
        raise Refusal(f"{said}: there is nothing before or behind a '::'; remove it")
    if os.path.exists(path):
        return [path]
    try:
        names = list(braceexpand(path))
    except ValueError:  # a brace that is part of the name
        names = [path]
    found: list[str] = []
    for name in names:
        files = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not files and glob.has_magic(name):
            missing = (
                f"there is no such file on this machine, and none matches the pattern {name!r}; check the path"
            )
        elif not files and name != value:
            missing = f"there is no file {name!r} on this machine; check the path"
        if not files:
            raise Refusal(f"{said}: {missing}")
        found += files
    return found


def resolve_separator(given: Given) -> str:
    """``--csv-separator``, in which '\\t', '\\x01' and '\\u00a6' are one character: shells pass them on as typed.

    Refusal: no csv file can have such a separator.
    """

    def character(escape: re.Match[str]) -> str:
        code = escape[1]
        if code[0] in "xu" and len(code) > 1:
            return chr(int(code[1:], 16))
        return "\t" if code == "t" else chr(int(code, 8)) if code.isdecimal() else code

    separator = re.sub(r"\\+(t|x[\da-fA-F]{2}|u[\da-fA-F]{4}|[0-7]{3}|\W)", character, given.csv_separator)
    if not separator or re.search(r'["\r\n\0]', separator):
        raise Refusal(
            f"{given.say('csv_separator')}: a separator is one or more characters, but no quote sign and no line "
            "break; give e.g. ',' or '\\t'"
        )
    return separator


def resolve_encoding(given: Given) -> str:
    """``--csv_encoding``. Refusal: Python knows no such encoding of text."""
    try:
        "".encode(given.csv_encoding)  # not for base64 and others that are no encodings of text
        if codecs.lookup(given.csv_encoding).name in ("idna", "punycode", "unicode-escape", "raw-unicode-escape"):
            raise LookupError
    except (LookupError, ValueError):
        raise Refusal(
            f"{given.say('csv_encoding')}: there is no such encoding; give e.g. utf-8, utf-16, cp1252, latin-1, "
            "gb18030 or shift_jis"
        ) from None
    return given.csv_encoding
