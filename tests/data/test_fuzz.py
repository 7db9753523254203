"""Hundreds of mutated shards: no crash, no hang, and no sample with parts of another one.

Python's own ``tarfile`` decides what may come out of a mutated tar: it lists the members that can still be found,
and each sample that is read has to consist of consecutive members of that list with one name. Where a mutation
moves no data, the parts also have to contain the sample's own number.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import signal
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.shards import encode, picture, write_tar
from training.data.bad_samples import Skips, usable
from training.data.lanes import Part
from training.data.samples import RawSample
from training.data.sources.fields import DEFAULT
from training.data.sources.shards import Shard
from training.data.sources.webdataset import ShardSource

SAMPLES, BLOCK, ROWS = 5, 512, 64
SECONDS = 60  # for one example that takes a millisecond
fuzz = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


def original() -> list[dict]:
    """Every part contains its sample's number; the texts have different sizes, and some fill several blocks."""
    return [
        {
            "__key__": f"{i:03d}",
            "jpg": encode(picture(i, (8, 8))) + f"image {i}".encode(),
            "txt": f"text {i} " + "x" * (i * 290),
            "json": {"key": i, "caption": "y" * (i * 170)},
        }
        for i in range(SAMPLES)
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    return write_tar(tmp_path_factory.mktemp("fuzz") / "whole.tar", original()).read_bytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "mutated.tar"


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read(path: Path, data: bytes) -> tuple[list[RawSample], Skips]:
    path.write_bytes(data)
    skips = Skips()
    source = ShardSource([Shard(str(path), 0, ROWS)], 0)
    with time_limit():
        return list(usable(source.in_order(Part(0, 1)), skips)), skips


def members(data: bytes) -> list[tuple[str, bytes]]:
    """What ``tarfile`` finds, up to where it gives up."""
    found = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as tar:
            for member in tar:
                if member.isreg():
                    content = tar.extractfile(member).read()
                    if len(content) == member.size:
                        found.append((member.name, content))
    except (tarfile.TarError, OSError, ValueError):
        pass
    return found


def damaged(data: bytes) -> bool:
    """Whether the place where ``tarfile`` stops is not a valid end of a tar."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as tar:
            for member in tar:
                if member.isreg():
                    tar.extractfile(member).read()
            rest = data[tar.offset :]
    except (tarfile.TarError, OSError, ValueError):
        return True
    return len(rest) < BLOCK or rest.strip(b"\0") != b""


def groups(data: bytes) -> list[list[tuple[str, bytes]]]:
    """(extension, content) of consecutive members with one name: up to the first dot, or else up to the last."""
    split = [
        (*re.fullmatch(r"((?:.*/)?[^/.]*)(?:\.(.*))?", name, re.DOTALL).groups(), c) for name, c in members(data)
    ]
    named = itertools.groupby([s for s in split if s[1]], key=lambda s: s[0])
    early = [[(extension.lower(), content) for _, extension, content in group] for _, group in named]
    return [part for group in early for part in _split_late(group)]


def _split_late(group: list[tuple[str, bytes]]) -> list[list[tuple[str, bytes]]]:
    if any(extension in ("jpg", "txt", "json") for extension, _ in group):
        return [group]
    split = [(*("." + extension).rpartition(".")[::2], content) for extension, content in group]
    parts = [[s[1:] for s in part] for _, part in itertools.groupby(split, key=lambda s: s[0])]
    return parts if any({"jpg", "txt"} <= {e for e, _ in part} for part in parts) else [group]


def triples(data: bytes) -> list[tuple[int, str, bytes]]:
    """(key, text, image) of the complete groups, with the first member of each kind."""
    found = []
    for group in groups(data):
        parts = dict(reversed(group))
        image = next((parts[e] for e in DEFAULT.image if e in parts), None)
        try:
            key, text = json.loads(parts["json"])["key"], parts["txt"].decode()
        except (KeyError, TypeError, ValueError, RecursionError):
            continue
        if image is not None and type(key) is int and 0 <= key < ROWS:
            found.append((key, text, image))
    return found


def faults(data: bytes) -> int:
    """The number of faults: incomplete samples, members that occur twice, a bad end, an empty shard."""
    found = groups(data)
    twice = sum(len(group) - len(dict(group)) for group in found)
    return len(found) - len(triples(data)) + twice + (damaged(data) or not found)


def blocks(data: bytes) -> list[bytes]:
    return [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)]


def _move(data: bytes, start: int, stop: int, to: int) -> bytes:
    b = blocks(data)
    moved, rest = b[start:stop], b[:start] + b[stop:]
    return b"".join(rest[:to] + moved + rest[to:])


def _copy(data: bytes, start: int, stop: int, to: int) -> bytes:
    b = blocks(data)
    return b"".join(b[:to] + b[start:stop] + b[to:])


def _drop(data: bytes, start: int, stop: int, to: int) -> bytes:
    b = blocks(data)
    return b"".join(b[:start] + b[stop:])


def _overwrite(data: bytes, start: int, stop: int, to: int) -> bytes:
    fill = bytes((start * 31 + stop * 17 + to * i) % 256 for i in range(to))
    at = start * BLOCK + stop
    return data[:at] + fill + data[at + len(fill) :]


def _zero(data: bytes, start: int, stop: int, to: int) -> bytes:
    b = blocks(data)
    return b"".join(bytes(BLOCK) if start <= i < stop else block for i, block in enumerate(b))


def _cut(data: bytes, start: int, stop: int, to: int) -> bytes:
    return data[: start * BLOCK + stop * 9]


def _insert(data: bytes, start: int, stop: int, to: int) -> bytes:
    return data[: start * BLOCK] + bytes(i * to % 251 for i in range(stop * 13)) + data[start * BLOCK :]


numbers = st.integers(0, 60)
mutation = st.tuples(
    st.sampled_from([_move, _copy, _drop, _overwrite, _zero, _cut, _insert]), numbers, numbers, numbers
)


@fuzz
@given(st.lists(mutation, min_size=1, max_size=3))
def test_mutated_tars_give_what_stands_together_in_them(whole, path, mutations):
    data = whole
    for change, *where in mutations:
        data = change(data, *where)
    raws, skips = read(path, data)
    assert [(raw.row, raw.text, raw.image) for raw in raws] == triples(data)
    assert skips.counts.total() == faults(data)


def _is_own(raw: RawSample) -> bool:
    return raw.text.split()[1] == str(raw.row) and raw.image.endswith(f"image {raw.row}".encode())


@fuzz
@given(st.sampled_from([_cut, _zero, _overwrite]), numbers, numbers, st.integers(1, 60))
def test_faults_that_move_nothing_mix_nothing(whole, path, change, start, stop, to):
    raws, _ = read(path, change(whole, start, stop, to))
    assert len({raw.row for raw in raws}) == len(raws)
    # The fault may lie in a text or an image, whose number is then gone; no other sample's is in its place.
    for raw in raws:
        told = re.findall(r"text (\d) ", raw.text[:8]) + re.findall(rb"image (\d)$", raw.image)
        assert {int(n) for n in told} <= {raw.row}


@fuzz
@given(st.permutations([(i, e) for i in range(3) for e in ("jpg", "txt", "json")]), st.integers(0, 9))
def test_members_in_any_order(path, order, missing):
    """Parts that are not consecutive are no sample, and no part comes under another name."""
    parts = original()
    write_tar(
        path, [{"__key__": parts[i]["__key__"], e: parts[i][e]} for i, e in order[: len(order) - missing // 3]]
    )
    data = path.read_bytes()
    raws, _ = read(path, data)
    assert [(raw.row, raw.text, raw.image) for raw in raws] == triples(data)
    assert all(_is_own(raw) for raw in raws)


@fuzz
@given(st.dictionaries(st.sampled_from(["key", "caption", "Key", "url"]), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6,
)), st.binary(max_size=40))  # fmt: skip
def test_any_json_and_any_text(path, meta, text):
    parts = original()[1] | {"json": meta, "txt": text}
    write_tar(path, [parts, original()[2]])
    raws, skips = read(path, path.read_bytes())
    assert raws[-1].row == 2 and len(raws) + skips.counts.total() == 2
    if len(raws) == 2:
        assert 0 <= raws[0].row < ROWS and int(meta["key"]) == raws[0].row
        assert not isinstance(meta["key"], (bool, float)) and raws[0].text.encode() == text


@fuzz
@given(st.binary(max_size=3000))
def test_anything_named_tar(path, data):
    raws, skips = read(path, data)
    assert not raws and skips.counts.total() >= 1


@fuzz
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=120))
def test_any_member_name(path, name):
    write_tar(path, [original()[0] | {"__key__": f"a{name}"}, original()[1]])
    raws, _ = read(path, path.read_bytes())
    assert [(raw.row, raw.text, raw.image) for raw in raws] == triples(path.read_bytes())
    assert all(_is_own(raw) for raw in raws) and raws[-1].row == 1
