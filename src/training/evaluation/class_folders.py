"""Which folders in a folder of pictures are classes, what these are called, and which files are their pictures."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os.path import splitext
from pathlib import Path

from open_clip import IMAGENET_CLASSNAMES

PICTURES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".avif"),
    *(".bmp", ".ppm", ".pgm", ".tif", ".tiff"),
)
_OTHER_PICTURES = (
    *(".heic", ".heif", ".jxl", ".jp2", ".jpe", ".pbm", ".pnm"),
    *(".tga", ".ico", ".psd", ".svg", ".dng", ".npy"),
)
FIRST_SYNSET, LAST_SYNSET = "n01440764", "n15075141"  # of ImageNet's 1000, in the order of their names

_SPLITS = ("val", "validation", "valid", "test", "testing", "dev", "train", "training")
# What operating systems and programs leave in folders, besides what begins with a dot.
_STRAY = (
    *("__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found"),
    "system volume information",
)
# Names of folders with pictures that are no classes: prompts with them, "a photo of a thumbs", would count as any.
_NO_CLASS = re.compile(
    r"images?|imgs?|pictures?|photos?|jpegimages|data|dataset|thumb(nail)?s?|annotations?|labels?|masks?|splits?"
    r"|unlabell?ed|misc|tmp|temp|old|bak|backups?|trash|cache|outputs?|(new|untitled)[ _]folder"
    r"|.*(\(\d+\)|[ _-]copy)",  # cat (1), cat - copy
    re.IGNORECASE,
)
_NUMBER = re.compile(r"[\W\d_]+")
_LABEL = re.compile(r"(class|category|label|cls|id)[\W_]*\d+", re.IGNORECASE)
_SYNSET = re.compile(r"n\d{8}")
_PREFIXES = (re.compile(r"n\d{8}[-_. ]+(?=\S)"), re.compile(r"\d+[-_. ]+(?=[^\W\d_])"))  # n02110958-pug, 001.pug
_GIVE_NAMES = "put the class names into a classnames.txt there, one per line, in the order of the folders"
_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class ClassFolders:
    """Classes in the order of their labels: their ``names``, and the paths of the ``pictures`` of each."""

    names: list[str]
    pictures: list[list[str]]
    remarks: tuple[str, ...] = ()


@dataclass
class _Folder:
    """The ``pictures`` in a folder and below it; ``places``: in which of its folders they are, '' for itself.

    ``hidden``: how many files that end like pictures have names that begin with a dot, such as the ``._`` files of
    macOS, which hold none. ``others``: how many pictures of other kinds there are, by the ends of their names.
    """

    pictures: list[str] = field(default_factory=list)
    places: set[str] = field(default_factory=set)
    hidden: int = 0
    others: Counter[str] = field(default_factory=Counter)


def find_classes(path: Path, said: str, names: list[str] | None = None) -> ClassFolders:
    """The classes in ``path``; ``names``: what they are called, in the order of their folders.

    The order is numerical where all folders are numbers. Without ``names``, classes have open_clip's names where
    the folders are ImageNet's 1000, and else the names of the folders that have pictures. ValueError, beginning
    with ``said``: it is not certain which folders are classes, or what they are called.
    """
    inner = next(os.walk(path, onerror=_refusing(said)))[1]
    folders = {name: _look_into(path / name, said) for name in sorted(inner) if not _is_stray(name)}
    if not folders:
        raise ValueError(f"{said}: {_without_folders(path)}")
    filled = [name for name, folder in folders.items() if folder.pictures]
    _refuse_splits(path, list(folders), filled, said)
    if names is None:
        classes, names, remarks = _named(path, folders, filled, said)
    else:
        classes, remarks = _given(path, folders, filled, said, names), []
    remarks += _remarks(folders, filled, classes)
    pictures = [folders[name].pictures for name in classes]
    return ClassFolders(names, pictures, tuple(f"{said}: {remark}" for remark in remarks))


def _remarks(folders: dict[str, _Folder], filled: list[str], classes: list[str]) -> list[str]:
    """What is not used, although somebody might think that it is."""
    remarks = []
    if others := [name for name in folders if name not in set(classes)]:
        remarks.append(f"folders without pictures are not taken as classes: {_some(others)}")
    if empty := [name for name in classes if name not in set(filled)]:
        remarks.append(f"{len(empty)} of {len(classes)} classes have no pictures: {_some(empty)}")
    if hidden := sum(folder.hidden for folder in folders.values()):
        remarks.append(f"{hidden} files whose names begin with a dot are not taken as pictures")
    if kinds := sum((folder.others for folder in folders.values()), Counter()):
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        remarks.append(f"pictures of other kinds are not used ({listed}); convert them to jpg or png")
    return remarks


# ------------------------------------------------------------------------------------------------------- classes


def _given(path: Path, folders: dict[str, _Folder], filled: list[str], said: str, names: list[str]) -> list[str]:
    """The folders of the classes that ``classnames.txt`` names, in the order of ``names``."""
    if len(names) == len(folders):
        classes = list(folders)
    elif len(names) == len(filled):
        classes = filled
        _refuse_no_class(path, classes, said)
    else:
        _refuse_deeper(path, folders, said)
        raise ValueError(
            f"{said}: classnames.txt has {len(names)} lines for {len(folders)} class folders, of which "
            f"{len(filled)} have pictures; write one line per folder"
        )
    by_name = {_comparable(name): name for name in classes}
    if len(by_name) == len(names) and by_name.keys() == {_comparable(name) for name in names}:
        return [by_name[_comparable(name)] for name in names]  # in whatever order the lines are
    return _in_order(classes)


def _named(
    path: Path, folders: dict[str, _Folder], filled: list[str], said: str
) -> tuple[list[str], list[str], list[str]]:
    """The folders that are classes, the names of the classes, and remarks on these."""
    synsets = [name for name in folders if _SYNSET.fullmatch(name)]
    for some in (_in_order([name for name in folders if name.isdecimal()]), synsets):
        if _are_imagenets(some):
            if others := [name for name in filled if name not in set(some)]:
                raise ValueError(
                    f"{said}: folders beside ImageNet's 1000 have pictures, too: {_some(others)}; move them to "
                    "another place"
                )
            return some, list(IMAGENET_CLASSNAMES), []
    _refuse_deeper(path, folders, said)
    numbers = [name for name in filled if _NUMBER.fullmatch(name)]
    for some, what in ((synsets, "WordNet numbers"), (numbers, "numbers")):
        if some:
            raise ValueError(
                f"{said}: {len(some)} class folders are named by {what} ({_some(some)}), but are not ImageNet's "
                f"1000; {_GIVE_NAMES}"
            )
    _refuse_no_class(path, filled, said)
    if unreadable := [name for name in filled if readable(name) != name]:
        raise ValueError(
            f"{said}: the names of {_some(unreadable)} are not utf-8; rename these folders, or {_GIVE_NAMES}"
        )
    if len(filled) == 1:
        raise ValueError(
            f"{said}: {filled[0]} is its only folder with pictures, and with one class every answer is right; "
            "give a folder with a folder for each class"
        )
    prefixes = {name: _prefix(name) for name in filled}
    short = [name.removeprefix(prefix) for name, prefix in prefixes.items()]
    if filled and all(prefixes.values()) and len(set(short)) == len(short):
        names = [name.replace("_", " ") for name in short]
        return filled, names, [f"class names are those of the folders without their numbers: {_some(names)}"]
    remarks = []
    if labels := [name for name in filled if _LABEL.fullmatch(name)]:
        remarks.append(f"models will hardly know classes called {_some(labels)}; {_GIVE_NAMES}")
    return filled, [name.replace("_", " ") for name in filled], remarks


def _in_order(folders: list[str]) -> list[str]:
    return sorted(folders, key=int if all(name.isdecimal() for name in folders) else None)


def _are_imagenets(folders: Sequence[str]) -> bool:
    """Whether these are ImageNet's 1000 classes, as WordNet numbers or as 0 to 999."""
    if len(folders) != len(IMAGENET_CLASSNAMES):
        return False
    if folders[0].isdecimal():
        return [int(name) for name in folders] == list(range(len(folders)))
    return (folders[0], folders[-1]) == (FIRST_SYNSET, LAST_SYNSET)


def _comparable(name: str) -> str:
    return name.replace("_", " ").strip().casefold()


def _prefix(name: str) -> str:
    """The number with which the name of a folder begins, as in 001.pug, with what is behind it."""
    return next((found[0] for pattern in _PREFIXES if (found := pattern.match(name))), "")


def _is_stray(name: str) -> bool:
    return name.startswith(".") or name.lower() in _STRAY


# ------------------------------------------------------------------------------------------------------- folders


def _look_into(path: Path, said: str) -> _Folder:
    """What is in a folder, and below it."""
    found, root = _Folder(), os.fspath(path)
    for place, folders, files in os.walk(root, onerror=_refusing(said)):
        folders[:] = [name for name in folders if not _is_stray(name)]
        before = len(found.pictures)
        for file in files:
            kind = splitext(file)[1].lower()
            if kind not in PICTURES:
                if kind in _OTHER_PICTURES and not file.startswith("."):
                    found.others[kind] += 1
            elif file.startswith("."):
                found.hidden += 1
            else:
                found.pictures.append(os.path.join(place, file))
        if len(found.pictures) > before:
            found.places.add(place[len(root) + 1 :].split(os.sep)[0])
    found.pictures.sort()
    return found


def _refusing(said: str) -> Callable[[OSError], None]:
    def refuse(error: OSError) -> None:
        raise ValueError(f"{said}: {error.filename} cannot be listed ({error.strerror}); check its permissions")

    return refuse


def _refuse_splits(path: Path, folders: list[str], filled: list[str], said: str) -> None:
    """ValueError: the folder holds the parts of a data set, such as train and val."""
    splits = [name for name in folders if name.lower() in _SPLITS]
    # A class may be called train, but not val, and neither if both are there.
    no_classes = [name for name in splits if name in filled and not name.lower().startswith("train")]
    if not no_classes and len(splits) < len(folders):
        return
    likely = min(no_classes or splits, key=lambda name: _SPLITS.index(name.lower()))
    verb = "is a part" if len(splits) == 1 else "are parts"
    raise ValueError(
        f"{said}: it has {' and '.join(splits)}, which {verb} of a data set, no class; give {path / likely}, or "
        "move it to another place"
    )


def _refuse_deeper(path: Path, folders: dict[str, _Folder], said: str) -> None:
    """ValueError: folders with pictures are themselves folders of folders with pictures."""
    outer = [name for name, folder in folders.items() if "" not in folder.places and len(folder.places) > 1]
    if not outer:
        return
    inner = sorted(folders[outer[0]].places)
    alone = len([name for name, folder in folders.items() if folder.pictures]) == 1
    cure = "give that folder" if alone else "give one of them, or name the classes in a classnames.txt"
    raise ValueError(
        f"{said}: the class folders seem to be one level further down, as {path / outer[0] / inner[0]}: {cure}"
    )


def _refuse_no_class(path: Path, filled: list[str], said: str) -> None:
    """ValueError: pictures are in folders whose names are no classes."""
    if found := [name for name in filled if _NO_CLASS.fullmatch(name)]:
        raise ValueError(
            f"{said}: it has pictures in {_some(found)}, which looks like no class; move them to another place, "
            f"or {_GIVE_NAMES}"
        )


def _without_folders(path: Path) -> str:
    """What is wrong with a folder that has no class folders."""
    names = os.listdir(path)
    pictures = [name for name in names if splitext(name)[1].lower() in PICTURES and not name.startswith(".")]
    if "nshards.txt" in names:
        return f"it is the inner folder of DataComp's webdataset; give {path.absolute().parent}"
    if pictures:
        return f"its {len(pictures)} pictures are not in a folder per class; move each into that of its class"
    if packed := [name for name in names if name.endswith((".tar", ".tgz", ".tar.gz", ".zip"))]:
        return f"it has no folder per class, but {_some(packed)}; unpack it"
    return (
        "it has neither a folder per class nor the files of DataComp's webdataset (classnames.txt, "
        "test/nshards.txt)"
    )


def readable(path: str) -> str:
    """A path as text that can be printed; in Linux, names of files need not be utf-8."""
    return path if path.isascii() else os.fsencode(path).decode(errors="backslashreplace")


def _some(names: list[str]) -> str:
    shown = ", ".join(map(readable, names[:_SHOWN]))
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
