"""Which shards a flag names: brace ranges, patterns, folders, URLs, commands; several sources joined with ``::``.

A path that exists is that path, whatever characters are in it. Braces are expanded first; then what exists is
taken as it is, and a pattern is searched in the longest part of its path that is a folder.
"""

from __future__ import annotations

import glob
import os
import re
from contextlib import suppress

from webdataset.shardlists import expand_urls

from training.config.data import SHARD_NAME, advice, folders_with_shards, shards_in, sources_of
from training.data.sources.urls import cannot_be_read, is_known, is_local, local_path, what_else

_TRIED = 8  # shards of a source of which the first bytes are read at the start


def expand_shards(shards: str, flag: str = "--train-data") -> list[list[str]]:
    """The urls of each ``::`` source in the value of ``flag``: sources in the given order, globs sorted.

    ValueError: no shard matches a source.
    """
    sources = []
    for source in sources_of(shards):
        urls = _shards_of(source, f"{flag} {shards}")
        if not urls:
            raise ValueError(f"{flag} {shards}: no shard matches {source!r}; {advice(source)}")
        sources.append(urls)
    return sources


def look_for_shards(shards: str, flag: str, allowed: float = 1.0) -> list[str]:
    """Remarks on the sources: of which some shards are missing (training counts them as unreadable), or a folder.

    ValueError: all shards of a source are missing, or more than the share ``allowed``; or nothing on this machine
    can open them. Whether there is a shard at a URL is only known when it is opened.
    """
    remarks = []
    for source, urls in zip(sources_of(shards), expand_shards(shards, flag)):
        kinds: dict[tuple[str, str], str] = {}
        for url in urls:
            kinds.setdefault(_kind(url), url)
        for url in kinds.values():
            if fault := cannot_be_read(url):
                raise ValueError(f"{flag} {url}: {fault}")
        missing = _missing(urls)
        if len(missing) == len(urls):
            raise ValueError(
                f"{flag} {shards}: there is no {missing[0]}, and no other shard of this source; {_cure(source)}"
            )
        if len(missing) > allowed * len(urls):
            raise ValueError(
                f"{flag} {shards}: {len(missing)} of {len(urls)} shards are missing, the first is {missing[0]}; "
                f"that is more than --max_bad_fraction {allowed:g} allows: correct the pattern, or raise the "
                "fraction"
            )
        if fault := _no_tars(urls, missing):
            raise ValueError(f"{flag} {fault}")
        if missing:
            remarks.append(f"{flag}: {len(missing)} of {len(urls)} shards are missing, the first is {missing[0]}")
        if is_local(source) and os.path.isdir(source):
            remarks.append(f"{flag} {source}: all shards in this folder are used ({len(urls)}){_left_out(source)}")
        remarks += [f"{flag}: no shard matches {pattern}" for pattern in _empty_patterns(source)]
    return remarks


def _shards_of(source: str, said: str) -> list[str]:
    if is_local(source) and os.path.isdir(source):
        return _in_folder(source, said)
    if is_local(source) and os.path.exists(source):
        return [source]
    names = [url for name in _without_braces(source, said) for url in _matches(name)]
    return [url for name in names for url in (_shards_inside(name) or [name])]


def _shards_inside(name: str) -> list[str]:
    """The shards in ``name``, where it is a folder. What is called like a shard is not asked: they may be many."""
    with suppress(OSError):
        if is_local(name) and not SHARD_NAME.search(name) and os.path.isdir(name):
            return shards_in(name)
    return []


def _in_folder(folder: str, said: str) -> list[str]:
    """The shards in ``folder``. ValueError: it has none."""
    try:
        urls, inner = shards_in(folder), folders_with_shards(folder)
    except OSError as error:
        raise ValueError(f"{said}: the folder {folder} cannot be listed ({error.strerror})") from None
    if not urls:
        names = os.path.join(folder, "*" if len(inner) > 1 else inner[0] if inner else "*", "*.tar")
        cure = f"those inside it have, which {names} names" if inner else "give a folder that has, or a pattern"
        raise ValueError(f"{said}: the folder {folder} has no shards (.tar) of its own; {cure}")
    return urls


def _left_out(folder: str) -> str:
    """The end of a remark on the shards in ``folder``: that there are more in folders inside it."""
    inner = folders_with_shards(folder)
    if not inner:
        return ""
    names = os.path.join(folder, "*", "*.tar")
    more = f" and {len(inner) - 1} more" if len(inner) > 1 else ""
    return f", but not those in folders inside it, {inner[0]}{more}, which {names} names"


def _without_braces(source: str, said: str) -> list[str]:
    try:
        return expand_urls(source)
    except AssertionError:
        name = re.search(r"\$\{(\w+)\}", source)
        variable = f"WDS_{name[1]}" if name else "a variable"
        raise ValueError(
            f"{said}: ${{...}} stands for an environment variable, and {variable} is not set; set it, or give the "
            "path itself"
        ) from None
    except ValueError as error:
        raise ValueError(f"{said}: {error}; give a range such as {{00000..00099}}") from None


def _matches(url: str) -> list[str]:
    """The shards that one name without braces stands for. A file that is missing stands for itself."""
    if not url or not is_local(url) or not glob.has_magic(url) or os.path.lexists(url):
        return [url] if url else []
    folder, rest = _split(url)
    if not glob.has_magic(rest):
        return [url]
    return sorted(glob.glob(glob.escape(folder) + rest)) or sorted(glob.glob(url))


def _split(pattern: str) -> tuple[str, str]:
    """The longest beginning of ``pattern`` that is a folder as it is written, and the rest."""
    end = 0
    for slash in re.finditer("/+", pattern):
        if not os.path.isdir(pattern[: slash.end()]):
            break
        end = slash.end()
    return pattern[:end], pattern[end:]


def _cure(source: str) -> str:
    """What to do about a source of which there is nothing on this machine."""
    scheme = re.match(r"([a-zA-Z][\w+.-]*):/(?!/)", source)
    if scheme and is_known(scheme[1]):
        return f"a URL begins with {scheme[1]}:// (two slashes)"
    if source.startswith("file:"):
        return "check the path, which is absolute in a URL: file:///PATH"
    host = re.match(r"[\w.-]+@[\w.-]+:|[\w.-]{2,}:(?=/)", source)
    if host:
        return f"check the path, or give 'pipe:ssh {host[0][:-1]} cat PATH' for another machine"
    return advice(source)


def _no_tars(urls: list[str], missing: list[str]) -> str:
    """Why none of the local shards can be read, by a few of them; '': one of these may be a tar."""
    gone = set(missing)
    local = [(url, path) for url in urls if url not in gone and (path := local_path(url)) is not None]
    faults = []
    for url, path in local[:: max(len(local) // _TRIED, 1)]:
        try:
            fault = what_else(path)
        except OSError as error:
            fault = f"it cannot be read ({error.strerror})"
        if fault is None:
            return ""
        faults.append(f"{url}: {fault}")
    return faults[0] if faults else ""


def _empty_patterns(source: str) -> list[str]:
    """Patterns among the alternatives in the braces of ``source`` that nothing matches."""
    if "{" not in source or os.path.exists(source):
        return []
    return [name for name in expand_urls(source) if name and not _matches(name)]


def _kind(url: str) -> tuple[str, str]:
    """URLs of one kind can all be read, or none of them: what they begin and end with."""
    return re.match(r"(pipe:\s*\S*|[^/:]*:)?", url)[0], url.rpartition(".")[2]  # type: ignore[index]  # it matches


def _missing(urls: list[str]) -> list[str]:
    """The local files that do not exist. Folders are listed, since asking for each of 30,000 files takes long."""
    listed: dict[str, set[str] | None] = {}
    missing = []
    for url in urls:
        if (path := local_path(url)) is None:
            continue
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = _names_in(folder or ".")
        names = listed[folder]
        if (name not in names) if names is not None else not os.path.lexists(path):
            missing.append(url)
    return missing


def _names_in(folder: str) -> set[str] | None:
    """The names in ``folder``, none if there is no such folder; None: it cannot be listed."""
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError:
        return None
