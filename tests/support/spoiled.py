"""Bad input, one fault at a time: samples and shards that are spoiled, and what is to become of them.

members = sample(3); SAMPLES["missing text"].spoil(members)       # reason: what it is counted as, None: usable
SHARDS["cut inside a header"].make(path, keys)                    # writes what shall stand at ``path``
"""

from __future__ import annotations

import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.support.shards import encode, picture, sample, write_tar


class Fault(NamedTuple):
    """``spoil`` changes the members of a sample; ``reason`` is what it is then counted as, None: still usable."""

    spoil: Callable[[dict], object]
    reason: str | None


class BrokenShard(NamedTuple):
    """``make(path, keys)`` writes a shard of small samples with these keys, three at least, with a fault.

    Of the samples the first ``whole`` are usable; ``reasons`` are the faults that are counted.
    """

    make: Callable[[Path, Sequence[int]], object]
    whole: int
    reasons: dict[str, int]


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size, as far as its header says; the pixels are missing."""

    def chunk(kind: bytes, data: bytes = b"") -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT")


def jpeg_header(width: int, height: int) -> bytes:
    """A sound small JPEG whose frame header claims another size."""
    data = bytearray(encode(picture(0)))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def _set(**members) -> Callable[[dict], object]:
    return lambda s: s.update(members)


def _key(key) -> Callable[[dict], object]:
    return _set(json={"key": key})


_NOISE = np.random.default_rng(0).bytes(3000)

SAMPLES: dict[str, Fault] = {
    "corrupt image": Fault(_set(jpg=b"\xff\xd8\xff\xe0" + _NOISE), "undecodable image"),
    "truncated image": Fault(lambda s: s.update(jpg=s["jpg"][: len(s["jpg"]) * 2 // 3]), "undecodable image"),
    "cut inside the image's header": Fault(lambda s: s.update(jpg=s["jpg"][:100]), "undecodable image"),
    "zero-byte image": Fault(_set(jpg=b""), "undecodable image"),
    "page instead of an image": Fault(_set(jpg=b"<html>404</html>" * 9), "undecodable image"),
    "image of 1 x 1": Fault(lambda s: s.update(jpg=encode(picture(3, (1, 1)))), None),
    "JPEG bomb": Fault(_set(jpg=jpeg_header(30_000, 30_000)), "image too large"),
    "PNG bomb": Fault(lambda s: (s.pop("jpg"), s.update(png=png_header(30_000, 30_000))), "image too large"),
    "missing image": Fault(lambda s: s.pop("jpg"), "missing image"),
    "missing text": Fault(lambda s: s.pop("txt"), "missing text"),
    "missing json": Fault(lambda s: s.pop("json"), "missing json"),
    "json that is no json": Fault(_set(json="{key: 3"), "json is not valid"),
    "json in latin-1": Fault(_set(json=b'{"caption": "caf\xe9", "key": 3}'), "json is not valid"),
    "endless json": Fault(_set(json="[" * 100_000), "json is not valid"),
    "zero-byte json": Fault(_set(json=b""), "json is not valid"),
    "json without key": Fault(_set(json={"caption": "x"}), "json without key"),
    "json list": Fault(_set(json=[1, 2]), "json without key"),
    "negative key": Fault(_key(-1), "key out of range"),
    "negative key of digits": Fault(_key("-1"), "key out of range"),
    "key that is too large": Fault(_key(10**6), "key out of range"),
    "key beyond 64 bits": Fault(_key(2**80), "key out of range"),
    "key of 5,000 digits": Fault(_set(json='{"key": ' + "9" * 5000 + "}"), "json is not valid"),
    "float key": Fault(_key(3.0), "key is not an integer"),
    "nan key": Fault(_set(json='{"key": NaN}'), "key is not an integer"),
    "true as key": Fault(_key(True), "key is not an integer"),
    "null as key": Fault(_key(None), "key is not an integer"),
    "list as key": Fault(_key([1]), "key is not an integer"),
    "word as key": Fault(_key("three"), "key is not an integer"),
    "empty caption": Fault(_set(txt=""), None),
    "caption of 100 kB": Fault(_set(txt="a word " * 14_300), None),
    "caption of one word of 100 kB": Fault(_set(txt=_NOISE.hex()[:5000] * 20), None),
    "caption in invalid UTF-8": Fault(_set(txt=b"caf\xe9 au lait"), "text is not utf-8"),
    "member name with spaces and umlauts": Fault(lambda s: s.update(__key__="böse 名前 %s {0}"), None),
    "member name with quotes and a tab": Fault(lambda s: s.update(__key__="a'b\"c\td"), None),
    "member name in a folder": Fault(lambda s: s.update(__key__="./x/../y//z"), None),
    "member name of 180 characters": Fault(lambda s: s.update(__key__="n" * 180), None),
}


def _tar(path: Path, keys: Sequence[int]) -> bytes:
    data = write_tar(path, [sample(key) for key in keys]).read_bytes()
    path.unlink()
    return data


def _cut(member: str, add: int) -> Callable[[Path, Sequence[int]], object]:
    """Cut ``add`` bytes behind the start of the header of the third sample's ``member``."""

    def make(path: Path, keys: Sequence[int]) -> None:
        data = _tar(path, keys)
        path.write_bytes(data)
        with tarfile.open(path) as tar:
            offset = tar.getmember(f"{keys[2]:06d}.{member}").offset
        path.write_bytes(data[: offset + add])

    return make


def _over(member: str, fault: bytes) -> Callable[[Path, Sequence[int]], object]:
    """Write ``fault`` over the beginning of the header of the third sample's ``member``."""

    def make(path: Path, keys: Sequence[int]) -> None:
        data = _tar(path, keys)
        path.write_bytes(data)
        with tarfile.open(path) as tar:
            offset = tar.getmember(f"{keys[2]:06d}.{member}").offset
        path.write_bytes(data[:offset] + fault + data[offset + len(fault) :])

    return make


def _behind(fault: bytes) -> Callable[[Path, Sequence[int]], object]:
    return lambda path, keys: path.write_bytes(_tar(path, keys) + fault)


SHARDS: dict[str, BrokenShard] = {
    "cut inside a member": BrokenShard(_cut("json", 512 + 3), 2, {"unreadable shard": 1, "missing json": 1}),
    "cut inside an image": BrokenShard(_cut("jpg", 512 + 300), 2, {"unreadable shard": 1}),
    "cut inside a header": BrokenShard(_cut("txt", 100), 2, {"unreadable shard": 1, "missing text": 1}),
    "cut behind a sample": BrokenShard(_cut("jpg", 0), 2, {"unreadable shard": 1}),
    "header of zeros": BrokenShard(_over("jpg", bytes(512)), 2, {"unreadable shard": 1}),
    "header with a wrong byte": BrokenShard(_over("jpg", b"\xff"), 2, {"unreadable shard": 1}),
    "data behind its end": BrokenShard(_behind(b"x" * 700), 4, {"unreadable shard": 1}),
    "zero bytes": BrokenShard(lambda path, keys: path.write_bytes(b""), 0, {"unreadable shard": 1}),
    "folder": BrokenShard(lambda path, keys: path.mkdir(), 0, {"unreadable shard": 1}),
    "page": BrokenShard(lambda path, keys: path.write_bytes(b"<html>404</html>" * 99), 0, {"unreadable shard": 1}),
    "not there": BrokenShard(lambda path, keys: None, 0, {"unreadable shard": 1}),
    "tar of nothing": BrokenShard(lambda path, keys: write_tar(path, []), 0, {"empty shard": 1}),
}
