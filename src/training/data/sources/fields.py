"""Where a sample of a shard has its image, caption and key: ``--image_key``, ``--text_key``, ``--json_key``.

What a sample lacks is looked for elsewhere in it, so that the message can name the flag that takes it.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from training.config.data import DataConfig, Field, parse_fields
from training.config.flags import ALL
from training.data.samples import Unusable

INCOMPLETE = ("missing image", "missing text", "missing json")  # reasons: a sample lacks a file

_KEY = re.compile(r"-?[0-9]{1,18}")
_ABSENT = object()

# By which names captions and keys go, and images by their extensions: for messages alone.
_CAPTIONS = ("caption", "captions", "text", "texts", "txt", "title", "prompt", "description", "alt", "alt_text",
             "sentence", "sentences", "cap")  # fmt: skip
_KEYS = ("key", "__key__", "id", "idx", "index", "uid", "image_id", "sample_id", "row")
_BY_POSITION = "--sample_index position needs no key"
_SHOWN = 8  # names in a message
_IMAGES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jp2", "ppm")


class Contents(NamedTuple):
    """The files of a sample: ``members`` {extension: bytes}; of ``links`` that lead nowhere, {extension: why}."""

    members: dict[str, bytes]
    links: dict[str, str]


class Known(NamedTuple):
    """The extensions of images, of captions, and of all that a sample consists of."""

    image: frozenset[str]
    text: frozenset[str]
    all: frozenset[str]


@dataclass(frozen=True)
class SampleFields:
    """The alternatives for each part of a sample, in the order in which they are tried.

    ``several``: a text file has a caption on each line, and where there is none, a list in a json is captions;
    otherwise a text file is one caption. ``extras``: the extensions of further files that a sample keeps.
    """

    image: tuple[str, ...]
    text: tuple[Field, ...]
    json: tuple[Field, ...]
    several: bool = False
    extras: tuple[str, ...] = ()

    @property
    def known(self) -> Known:
        """The extensions that these fields are in."""
        text, keys = ([field.extension for field in fields] for fields in (self.text, self.json))
        return Known(frozenset(self.image), frozenset(text), frozenset([*self.image, *text, *keys]))

    def image_in(self, files: Contents) -> bytes:
        """The encoded image. Unusable: there is none."""
        for extension in self.image:
            if (data := files.members.get(extension)) is not None:
                return data
        raise Unusable("missing image", self._why_no_image(files))

    def texts_in(self, files: Contents, parsed: dict[str, Any]) -> tuple[str, ...]:
        """The captions, one or more. ``parsed``: jsons of this sample, kept from call to call. Unusable: none."""
        for extension, path in self.text:
            data = files.members.get(extension)
            if data is None:
                continue
            if not path:
                try:
                    text = data.decode()
                except UnicodeDecodeError:
                    raise Unusable("text is not utf-8") from None
                lines = [line.strip() for line in text.splitlines() if line.strip()] if self.several else []
                return tuple(lines) or (text,)
            value = _find(_parse(data, extension, parsed), path)
            if value is not _ABSENT and (texts := _captions(value, f"{extension}:{path}")):
                return texts
        if self.several and (listed := _listed(files, parsed)):
            return listed
        raise Unusable("missing text", self._why_no_text(files))

    def key_in(self, files: Contents, parsed: dict[str, Any]) -> int:
        """The key. ``parsed``: as for ``texts_in``. Unusable: there is none, or none that is an integer."""
        reason = "missing json"
        for extension, path in self.json:
            data = files.members.get(extension)
            if data is None:
                continue
            key = _find(_parse(data, extension, parsed), path)
            if key is _ABSENT:
                reason = "json without key"
            elif (number := _integer(key)) is not None:
                return number
            else:
                raise Unusable(
                    "key is not an integer", self._why_not_an_integer(key, f"{extension}:{path}", files)
                )
        raise Unusable(reason, self._why_no_key(files))

    def _why_no_image(self, files: Contents) -> str:
        if why := _broken_link(self.image, files):
            return why
        found = next((e for e in files.members if _last(e) in _IMAGES and e not in self.image), None)
        if found is None:
            return _what_there_is(files)
        why = f"it has a .{found}, which --image_key {_quoted(*self.image, found)} takes"
        text = next((e for e in files.members if _last(e) == "txt"), None)
        if text is None or any(field.extension in files.members for field in self.text):
            return why
        return f"{why}, and a .{text}, which --text_key {_quoted(*self._texts(), text)} takes"

    def _why_no_text(self, files: Contents) -> str:
        if why := _broken_link([field.extension for field in self.text], files):
            return why
        known = [field.extension for field in self.text if not field.path]
        for extension in files.members:
            if _last(extension) in _CAPTIONS and extension not in known:
                return f"it has a .{extension}, which --text_key {_quoted(*self._texts(), extension)} takes"
        for extension, value in _jsons(files):
            if path := _search(value, _CAPTIONS, lambda found: bool(_texts(found))):
                wanted = _quoted(*self._texts(), f"{extension}:{path}")
                return f"its {extension} has the field {path}, which --text_key {wanted} takes"
        for extension, value in _jsons(files):
            for field in self.text:
                if field.extension == extension and field.path and _find(value, field.path) is not _ABSENT:
                    return f"{extension}:{field.path} is empty"
        return _what_there_is(files)

    def _texts(self) -> list[str]:
        """The value of ``--text_key``, in its parts."""
        return [f"{field.extension}:{field.path}" if field.path else field.extension for field in self.text]

    def _why_no_key(self, files: Contents) -> str:
        if why := _broken_link([field.extension for field in self.json], files):
            return why
        for extension, value in _jsons(files):
            # A field that was given as if it were an extension, or else one with a usual name.
            names = [field.extension for field in self.json] + list(_KEYS)
            if path := _search(value, names, lambda found: _integer(found) is not None):
                wanted = _quoted(f"{extension}:{path}")  # alone, so that keys of one kind are used
                return f"its {extension} has the number {path}, which --json_key {wanted} takes"
        return _BY_POSITION

    def _why_not_an_integer(self, key: object, where: str, files: Contents) -> str:
        other = self._why_no_key(files)
        return f"{where} is {key!r:.60}" + (f", but {other}" if "--json_key" in other else f"; {other}")


def sample_fields(image_key: str, text_key: str, json_key: str) -> SampleFields:
    """The fields that the values of these flags name. ValueError: a value is of another form."""
    return SampleFields(
        tuple(field.extension for field in parse_fields(image_key, "image_key")),
        parse_fields(text_key, "text_key"),
        tuple(Field(field.extension, field.path or "key") for field in parse_fields(json_key, "json_key")),
    )


DEFAULT = sample_fields(*(ALL[key].default for key in ("image_key", "text_key", "json_key")))


def fields_of(config: DataConfig) -> SampleFields:
    """The fields that the flags name."""
    return sample_fields(config.image_key, config.text_key, config.json_key)


def _listed(files: Contents, parsed: dict[str, Any]) -> tuple[str, ...]:
    """The captions in a json that is a list, or that has one under a name of captions; else none."""
    if "json" not in files.members:
        return ()
    held = _parse(files.members["json"], "json", parsed)
    lists = [held, *(held.get(name) for name in _CAPTIONS)] if isinstance(held, dict) else [held]
    found = next((some for some in lists if isinstance(some, list) and some), [])
    return tuple(found) if all(isinstance(text, str) and text for text in found) else ()


def _parse(data: bytes, extension: str, parsed: dict[str, Any]) -> Any:
    """The value in a json, which is parsed once per sample. Unusable: it is not valid."""
    if extension not in parsed:
        try:
            parsed[extension] = json.loads(data)
        except (ValueError, RecursionError):
            raise Unusable("json is not valid") from None
    return parsed[extension]


def _find(value: Any, path: str) -> Any:
    """The value at ``path``, ``_ABSENT`` if there is none: 'a.b' is a name, or a field inside a field.

    In a list, a number is a position, and a name stands for that field of each element.
    """
    if isinstance(value, dict) and path in value:
        return value[path]
    if isinstance(value, list):
        if path.isdecimal():
            return value[int(path)] if int(path) < len(value) else _ABSENT
        found = [inner for element in value if (inner := _find(element, path)) is not _ABSENT]
        if found:
            return found
    for dot in re.finditer(r"\.", path):
        inner = _find(value, path[: dot.start()])
        if inner is not _ABSENT and (found := _find(inner, path[dot.end() :])) is not _ABSENT:
            return found
    return _ABSENT


def _captions(value: object, where: str) -> tuple[str, ...]:
    """A caption or a list of them; empty: there are none. Unusable: it is something else, or no valid text."""
    texts = _texts(value)
    if not texts and value is not None and value != [None] * (len(value) if isinstance(value, list) else 0):
        raise Unusable("text is not a string", _what_it_is(value, where))
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which a json can hold
        raise Unusable("text is not utf-8") from None
    return texts


def _what_it_is(value: object, where: str) -> str:
    """A clause about something at ``where`` that is no caption."""
    element = value[0] if isinstance(value, list) and value else value
    if not isinstance(element, dict):
        return f"{where} is {value!r:.60}"
    kind = "an object" if element is value else "a list of objects"
    if not element:
        return f"{where} is {kind}"
    names = [str(name) for name in element]
    best = next((name for name in names if name.lower() in (*_CAPTIONS, "raw")), names[0])
    return f"{where} is {kind} with {_some(names)}: name one of them, as in --text_key {where}.{best}"


def _texts(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(text for text in value if isinstance(text, str)) if isinstance(value, list) else ()


def _integer(key: object) -> int | None:
    if isinstance(key, str) and _KEY.fullmatch(key):
        return int(key)
    return key if isinstance(key, int) and not isinstance(key, bool) else None


def _broken_link(extensions: Sequence[str], files: Contents) -> str:
    found = next((extension for extension in extensions if extension in files.links), None)
    return f"its .{found} is {files.links[found]}" if found else ""


def _jsons(files: Contents) -> Iterator[tuple[str, Any]]:
    """Extension and value of each valid json."""
    for extension, data in files.members.items():
        if _last(extension) == "json":
            try:
                yield extension, json.loads(data)
            except (ValueError, RecursionError):
                continue


def _search(value: object, names: Sequence[str], fits: Any) -> str:
    """The path of a field of one of these ``names`` whose value ``fits``, at most one object deep; '': none."""
    if not isinstance(value, dict):
        return ""
    places = [(name, found, name) for name, found in value.items()]
    for outer, inner in value.items():
        places += (
            [(name, found, f"{outer}.{name}") for name, found in inner.items()] if isinstance(inner, dict) else []
        )
    for wanted in names:
        for name, found, path in places:
            if name.lower() == wanted and fits(found):
                return path
    return ""


def _what_there_is(files: Contents) -> str:
    """Which files a sample has of which none is the one that is looked for."""
    there = {extension: f".{extension}" for extension in files.members}
    for extension, value in _jsons(files):
        if isinstance(value, dict) and value:
            there[extension] += f" (with {_some([str(name) for name in value])})"
    return f"it has {_some(list(there.values()))}" if there else ""


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:_SHOWN])}{' and more' if len(names) > _SHOWN else ''}"


def _last(extension: str) -> str:
    """'jpg' of 'input.jpg'."""
    return extension.rpartition(".")[2]


def _quoted(*fields: str) -> str:
    """The value of a flag with these ``fields``, as a shell takes it."""
    return shlex.quote(";".join(fields))
