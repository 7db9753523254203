"""The two columns of a csv file, so that no row is lost, cut, or joined with another one unnoticed.

Python's csv module reads the rows, and finds the same values as pandas, with which most files are written: a field
that begins with a double quote sign ends at the next one, two in a row stand for one, and what is between them may
contain separators and line breaks. Blank lines are not rows. What pandas reads without a complaint, although it
may not be what was meant, is refused with its line: rows with more or fewer fields than the header, text behind a
closing quote sign, and quote signs that are never closed or enclose what looks like other rows.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from os.path import splitext
from string import whitespace
from typing import IO

from training.data.sources.strings import Strings
from training.data.sources.text_file import open_text

SEPARATORS = ("\t", ",", ";", "|")  # those that are suggested where another one was given
LONGEST_FIELD = 2**24  # characters; an unclosed quote sign would otherwise take the rest of the file into memory

_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
# Noncharacters, which are in no text. The csv module takes separators of one character only, and takes a carriage
# return inside a line for the end of a row. If it were one, the line would have too many fields, and is refused.
_LONG_SEPARATOR, _CARRIAGE_RETURN = "\U0010fffe", "\U0010ffff"
_MIXED_ENDS = (
    "carriage returns (\\r) are in it, as if some lines end with \\r and others with \\n; let all end alike"
)
_SHOWN, _LONGEST_NAME = 20, 60  # names of columns in a message, and their characters
_KEY_FLAGS = ("--csv-img-key", "--csv-caption-key")


@dataclass(frozen=True)
class CsvFormat:
    """How files are written: ``--csv-separator``, ``--csv_quoting`` and ``--csv_encoding``."""

    separator: str = "\t"
    quoting: str = "auto"
    encoding: str = "utf-8"


def read_pairs(file: str, keys: tuple[str, str], form: CsvFormat, said: str) -> tuple[Strings, Strings]:
    """The columns with these names, image paths and captions, of a path or URL.

    ValueError, which begins with ``said`` and names the line: the file cannot be read, lacks a column or has no
    rows, or it is not certain what a row is.
    """
    with open_text(file, said, form.encoding, "--csv_encoding") as text:
        return _Reader(text, keys, form, said).read()


class _Lines:
    """The lines of ``text``, with ``replacements`` for what the csv module does not read as text.

    ``row``: the lines of the row that is being read, until it is cleared.
    """

    def __init__(self, text: IO[str], separator: str, said: str) -> None:
        self.text, self.said = text, said
        self.row: list[str] = []
        self.replacements = {separator: _LONG_SEPARATOR} if len(separator) > 1 else {}

    def __iter__(self) -> Iterator[str]:
        row, replaces = self.row, bool(self.replacements)
        for number, line in enumerate(self.text, 1):
            if "\0" in line:
                raise ValueError(
                    f"{self.said}, line {number}: it contains zero bytes, which may stand where rows were lost; "
                    "write the file again"
                )
            if replaces or "\r" in line:
                line = self._replaced(line)
            row.append(line)
            yield line

    def _replaced(self, line: str) -> str:
        text = line.rstrip("\r\n")
        end = line[len(text) :]
        if "\r" in text:
            self.replacements["\r"] = _CARRIAGE_RETURN
        for written, stand_in in self.replacements.items():
            text = text.replace(written, stand_in)
        return text + end

    def written(self, text: str) -> str:
        """``text`` as it is in the file."""
        for written, stand_in in self.replacements.items():
            text = text.replace(stand_in, written)
        return text


class _Reader:
    """Reads one file."""

    def __init__(self, text: IO[str], keys: tuple[str, str], form: CsvFormat, said: str) -> None:
        self.keys, self.form, self.said = keys, form, said
        self.lines = _Lines(text, form.separator, said)
        self.header: list[str] = []
        self.separator = form.separator if len(form.separator) == 1 else _LONG_SEPARATOR
        csv.field_size_limit(max(csv.field_size_limit(), LONGEST_FIELD))
        self.reader = csv.reader(
            self.lines,
            delimiter=self.separator,
            quoting=csv.QUOTE_NONE if form.quoting == "none" else csv.QUOTE_MINIMAL,
            strict=True,
        )

    def read(self) -> tuple[Strings, Strings]:
        """Image paths and captions of all rows."""
        images, texts = Strings(), Strings()
        lines = self.lines.row
        problem, uneven = "", 0
        try:
            self.header = header = self._header()
            width, (image, text) = len(header), self._columns(header)
            lines.clear()
            for row in self.reader:
                if len(row) == width:
                    if len(lines) > 1 and self.form.quoting == "auto":
                        self._check_lines(row, width, image)
                    images.append(row[image])
                    texts.append(row[text])
                elif not _is_blank(row):
                    problem = problem or self._uneven(row, header)
                    uneven += 1
                lines.clear()
        except csv.Error as error:
            problem = problem or self._broken(str(error))
        except ValueError:
            if not problem:  # what comes first in the file is reported
                raise
        if problem:
            raise ValueError(f"{problem} (the first of {uneven:,} such lines)" if uneven > 1 else problem)
        if not len(images):
            raise ValueError(f"{self.said}: it has no rows below its header; check how it was written")
        if self.lines.replacements:
            images, texts = (Strings(map(self.lines.written, column)) for column in (images, texts))
        return images, texts

    # ------------------------------------------------------------------------------------------------ the header

    def _header(self) -> list[str]:
        """The names of the columns, without spaces around them."""
        for row in self.reader:
            if any(not field.isspace() for field in row if field):
                return [name.strip("\ufeff" + whitespace) for name in row]
            self.lines.row.clear()
        raise ValueError(f"{self.said}: it is empty; check how it was written")

    def _columns(self, header: list[str]) -> list[int]:
        """Where the columns ``keys`` are. ValueError: one of them is missing, or there twice."""
        keys = [key.strip() for key in self.keys]
        for flag, key in zip(_KEY_FLAGS, keys, strict=True):
            if header.count(key) > 1:
                at = " and ".join(str(i + 1) for i, name in enumerate(header) if name == key)
                raise ValueError(
                    f"{self.said}, line {self._first_line}: columns {at} are both called {key!r} ({flag}); give "
                    "one of them another name"
                )
        if _CARRIAGE_RETURN in "".join(header):
            raise ValueError(f"{self.said}, line {self._first_line}: {_MIXED_ENDS}")
        if not set(keys) <= set(header):
            raise ValueError(self._missing(keys))
        return [header.index(key) for key in keys]

    def _missing(self, keys: list[str]) -> str:
        """What is wrong with a header that lacks some of ``keys``."""
        header = self.header
        if re.match(r'\[?\{"|\[$', "".join(self.lines.row).strip()):
            return f"{self.said}: it looks like JSON, not like csv; write it as csv"
        if header[0].startswith("sep="):
            return (
                f"{self.said}, line {self._first_line}: it is a note for Excel, not the header; remove that line"
            )
        flag, key = next((flag, key) for flag, key in zip(_KEY_FLAGS, keys, strict=True) if key not in header)
        begin = f"{self.said}: it has no column {key!r} ({flag}); with --csv-separator {self._shown} it has "
        begin += _listed(header)
        if better := self._better_separator():
            return f"{begin}, {better}"
        if any(_suffix(name) in _PICTURES for name in header):
            return (
                f"{begin}, which looks like a row: the first line has to name the columns, as {' and '.join(keys)}"
            )
        return f"{begin}: give the names with --csv-img-key and --csv-caption-key, or another --csv-separator"

    def _better_separator(self) -> str:
        """Another separator that the header seems to have, and what to do; empty where there is none."""
        line = self.lines.written("".join(self.lines.row))
        others = {sep: _names(line, sep) for sep in SEPARATORS if sep in line and sep != self.form.separator}
        for separator, found in others.items():
            if {key.strip() for key in self.keys} <= set(found):
                return f"with {separator!r} it has both: give --csv-separator {_typed(separator)}"
        if len(self.header) != 1 or not others:
            return ""
        separator, found = max(others.items(), key=lambda other: len(other[1]))
        return (
            f"with {separator!r} it has {_listed(found)}: give --csv-separator {_typed(separator)}, and the names "
            "with --csv-img-key and --csv-caption-key"
        )

    # -------------------------------------------------------------------------------------------------- the rows

    @property
    def _first_line(self) -> int:
        """The number of the line in which the row that is being read begins."""
        return self.reader.line_num - len(self.lines.row) + 1

    def _uneven(self, row: list[str], header: list[str]) -> str:
        fields = f"{len(row)} field{'s' if len(row) > 1 else ''}"
        problem = f"{self.said}, line {self._first_line}: {fields}, but the header has {len(header)}"
        if len(row) < len(header):
            return f"{problem}; complete the row, or put text with a line break between double quote signs"
        if _CARRIAGE_RETURN in "".join(row):
            return f"{problem}; {_MIXED_ENDS}"
        if not any(row[len(header) :]):
            return f"{problem}; remove the separator at the end of the row, or end the header with one too"
        if any(re.match(r'\s+"', field) for field in row):
            return f"{problem}; remove the spaces before the quote sign, which counts only behind a separator"
        if self.form.quoting == "none" and any(field.startswith('"') for field in row):
            return f"{problem}; with --csv_quoting auto, text between quote signs may contain the separator"
        return (
            f"{problem}; put text that contains the separator {self._shown} between double quote signs, or write "
            "the file with another --csv-separator"
        )

    def _broken(self, error: str) -> str:
        """What is wrong with a row that the csv module refuses."""
        if not self.header and (better := self._better_separator()):
            return f"{self.said}: with --csv-separator {self._shown} its header is broken, {better}"
        opened = self._first_line + self._spans()[-1][0]
        begin, text = f"{self.said}, line {opened}:", "or give --csv_quoting none if quote signs are text"
        if "new-line character" in error:
            return f"{self.said}, line {self._first_line}: {_MIXED_ENDS}"
        if "limit" in error:
            long = f"more than {LONGEST_FIELD:,} characters"
            return f"{begin} a field that begins here has {long}; close its quote sign, {text}"
        if "unexpected end" in error:
            return f"{begin} the quote sign that opens a field here is never closed; close it, {text}"
        closed = f" in line {self.reader.line_num}" if self.reader.line_num > opened else ""
        backslash = ' (\\" is not understood)' if '\\"' in "".join(self.lines.row) else ""
        return (
            f"{begin} the quote sign that opens a field here is closed{closed} before the field ends; write quote "
            f"signs inside of a field twice{backslash}, {text}"
        )

    def _check_lines(self, row: list[str], width: int, image: int) -> None:
        """ValueError: a quote sign may have taken in other rows.

        Then a line inside a field, or the lines in which the field begins and ends, are rows by themselves.
        """
        lines, path = self.lines.row, row[image]

        def is_row(line: str) -> bool:
            fields = line.split(self.separator)
            if len(fields) == width:
                return _is_like(fields[image], path)
            # Its caption may have separators, too. Then only the path's ending tells a row from other text.
            return (
                len(fields) > width
                and bool(_suffix(path))
                and any(_is_like(fields[place], path) for place in (image, image - width))
            )

        rows = {i for i, line in enumerate(lines) if is_row(line)}
        for begin, end in self._spans() if rows else ():
            taken = next((i for i in range(begin + 1, end) if i in rows), end)
            if begin < taken and (taken < end or {begin, end} <= rows):
                opened, other = self._first_line + begin, self._first_line + taken
                raise ValueError(
                    f"{self.said}, line {opened}: the quote sign that opens a field here takes in line {other}, "
                    "which looks like a row of its own; give --csv_quoting minimal if it belongs to the field, "
                    "--csv_quoting none if quote signs are text, or correct the file"
                )

    def _spans(self) -> list[tuple[int, int]]:
        """First and last line, counted from 0, of each field of the row, as far as it was read."""
        raw = "".join(self.lines.row)
        end_of_line = "\r" if raw.endswith("\r") else "\n"
        separator = re.escape(self.separator)
        field = re.compile(rf'(?:"[^"]*(?:""[^"]*)*"|(?!")[^{separator}]*){separator}')
        ends = [0]
        while found := field.match(raw, ends[-1]):
            ends.append(found.end())
        at = [raw.count(end_of_line, 0, end) for end in ends]
        return [*pairwise(at), (at[-1], len(self.lines.row) - 1)]

    @property
    def _shown(self) -> str:
        return repr(self.form.separator)


def _is_blank(row: list[str]) -> bool:
    """Whether a line has nothing but white space, which pandas leaves out too."""
    return not row or (len(row) == 1 and row[0].isspace())


def _names(line: str, separator: str) -> list[str]:
    """The names of the columns in a header."""
    row = next(csv.reader(line.splitlines(keepends=True), delimiter=separator), [])
    return [name.strip("\ufeff" + whitespace) for name in row]


def _listed(names: list[str]) -> str:
    """Names of columns, as many and as much of them as a message can hold."""
    shown = [repr(name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}...") for name in names[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _typed(separator: str) -> str:
    """As it is typed in a shell."""
    return "'\\t'" if separator == "\t" else f"'{separator}'"


def _suffix(path: str) -> str:
    return splitext(path.strip(whitespace + '"').split("?")[0])[1].lower()


def _is_like(field: str, path: str) -> bool:
    """Whether ``field`` may be another image path of a file that has ``path``."""
    if _suffix(path):
        return _suffix(field) in (_suffix(path), *_PICTURES)
    if "/" in path:
        return "/" in field
    return re.search(r"\S\s+\S", field) is None
