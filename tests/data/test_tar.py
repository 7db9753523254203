"""Our reader of plain tars compared with Python's ``tarfile``, on intact archives and on damaged ones."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterable

import pytest

from training.data.sources.tar import read_tar


def archive(names: Iterable[str], format: int = tarfile.PAX_FORMAT, mtime: float = 0, end: bool = True) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.mtime = mtime
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            elif name.startswith("link"):
                info.type, info.linkname = tarfile.SYMTYPE, "x"
            else:
                info.size = 37 * i % 1100
            tar.addfile(info, io.BytesIO(bytes(range(256)) * 5))
        length = tar.offset
    return file.getvalue() if end else file.getvalue()[:length]


def by_tarfile(data: bytes) -> tuple[list[tuple[str, bytes]], bool]:
    """(name, content) of the files that ``tarfile`` finds, and whether the archive is damaged.

    It is damaged if ``tarfile`` raises an error, or takes something other than zeros for the archive's end.
    """
    found = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as tar:
            for member in tar:
                if member.isreg():
                    found.append((member.name, tar.extractfile(member).read()))
            rest = data[tar.offset :]
    except Exception:
        return found, True
    return found, len(rest) < 512 or rest.count(0) < len(rest)


class Pipe:
    """A stream with nothing but what ``read_tar`` may use."""

    def __init__(self, data: bytes) -> None:
        self.read = io.BytesIO(data).read


def ours(data: bytes, offset: int = 0) -> tuple[list[tuple[str, bytes]], bool, list[int]]:
    found, offsets = [], []
    try:
        for member in read_tar(Pipe(data[offset:]), offset):
            found.append((member.name, member.data))
            offsets.append(member.offset)
    except Exception:
        return found, True, offsets
    return found, False, offsets


NAMES = [f"some/where/{i:05d}.{e}" for i in range(4) for e in ("jpg", "txt", "json")]
ARCHIVES = {
    "plain": archive(NAMES),
    "unfinished": archive(NAMES, end=False),
    "times": archive(NAMES, mtime=1234.5678),
    "gnu": archive(NAMES, tarfile.GNU_FORMAT),
    "ustar, long": archive([f"{'d' * 90}/{name}" for name in NAMES], tarfile.USTAR_FORMAT),
    "pax, long": archive([*NAMES[:5], "n" * 300 + ".jpg", *NAMES[5:]], mtime=0.5),
    "gnu, long": archive([*NAMES[:5], "n" * 300 + ".jpg", *NAMES[5:]], tarfile.GNU_FORMAT),
    "others": archive([*NAMES[:3], "folder/", *NAMES[3:6], "link", *NAMES[6:]]),
    "unicode": archive([*NAMES[:3], "ü/ö.jpg", *NAMES[3:]]),
    "empty": archive([]),
    "nothing": b"",
    "no tar": b"<html>" * 1000,
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_the_same_files_as_tarfile_from_every_member_on(kind):
    data = ARCHIVES[kind]
    found, failed, offsets = ours(data)
    assert (found, failed) == by_tarfile(data)
    for i, offset in enumerate(offsets):
        assert ours(data, offset) == (found[i:], failed, offsets[i:])


@pytest.mark.parametrize("kind", ["plain", "times", "pax, long", "gnu, long"])
def test_the_same_of_a_tar_that_is_cut_anywhere(kind):
    data = ARCHIVES[kind]
    cuts = {n + d for n in range(0, len(data), 512) for d in (0, 1, 100, 511)}
    for cut in cuts:
        assert ours(data[:cut])[:2] == by_tarfile(data[:cut]), cut


@pytest.mark.parametrize("kind", ["plain", "times", "gnu, long"])
def test_the_same_of_a_tar_with_a_wrong_byte(kind):
    rng = random.Random(0)
    data = ARCHIVES[kind].rstrip(b"\0") + bytes(1024)
    for _ in range(400):
        block = rng.randrange(len(data) // 512) * 512
        at = min(block + rng.choice([rng.randrange(512), 0, 124, 130, 148, 156, 257, 345]), len(data) - 1)
        spoiled = data[:at] + bytes([rng.choice([0, 1, 48, 57, 120, 255])]) + data[at + 1 :]
        assert ours(spoiled)[:2] == by_tarfile(spoiled), at


@pytest.mark.parametrize("kind", ["plain", "times", "gnu, long", "others"])
@pytest.mark.parametrize("fault", [bytes(512), b"x" * 512, bytes(100)], ids=["zeros", "noise", "holes"])
def test_a_damaged_header_is_not_taken_for_the_end(kind, fault):
    data = ARCHIVES[kind]
    whole, _, offsets = ours(data)
    for i, offset in enumerate(offsets):
        spoiled = data[:offset] + fault + data[offset + len(fault) :]
        found, failed, _ = ours(spoiled)
        assert failed and found == whole[:i]


@pytest.mark.parametrize("kind", ["plain", "gnu, long"])
def test_what_is_behind_the_end(kind):
    data = ARCHIVES[kind]
    assert ours(data + bytes(3_000_000))[1] is False
    for rest in (b"x", bytes(70_000) + b"x", data):
        assert ours(data + rest)[:2] == (ours(data)[0], True)


@pytest.mark.parametrize("kind", ["plain", "gnu, long"])
def test_members_come_before_what_follows_them_is_there(kind):
    data = ARCHIVES[kind]
    sizes = []

    class Slow(Pipe):
        def read(self, size):
            sizes.append(size)
            return stream.read(size)

        def __init__(self):
            pass

    stream = io.BytesIO(data)
    members = read_tar(Slow())
    first = next(members)
    assert (first.name, first.data) == ours(data)[0][0] and sum(sizes) <= 10240
