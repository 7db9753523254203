"""Opening shards elsewhere: faults are repeated, then told in one line, and count as one unreadable shard."""

from __future__ import annotations

import errno
import io
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from types import SimpleNamespace

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.support.shards import sample, write_tar
from training.data.bad_samples import Skips, usable
from training.data.lanes import Part
from training.data.sources import urls
from training.data.sources.shards import Shard, read_shard
from training.data.sources.urls import is_local, open_url
from training.data.sources.webdataset import ShardSource


class StrangeError(Exception):
    """As libraries have them: no OSError."""


class Remote(MemoryFileSystem):
    """Files of the scheme far://, whose server fails as often as ``faults`` says, at opening or at reading."""

    protocol = "far"
    faults: list[Exception] = []  # noqa: RUF012
    breaks_at: int | None = None
    store: dict = {}  # noqa: RUF012

    def open(self, path, mode="rb", **options):
        if self.faults:
            raise self.faults.pop(0)
        data = self.store[path.removeprefix("far://").strip("/")]
        return Breaking(data, self.breaks_at) if self.breaks_at is not None else io.BytesIO(data)


class Breaking(io.BytesIO):
    def __init__(self, data: bytes, end: int) -> None:
        super().__init__(data)
        self.end = end

    def read(self, size: int = -1, /) -> bytes:
        if self.tell() >= self.end:
            raise StrangeError("the connection\nis gone")
        return super().read(min(size, self.end - self.tell()))


@pytest.fixture
def far(tmp_path, monkeypatch):
    """The class ``Remote`` with a shard of three samples at far://h/0.tar; waits are noted and not waited."""
    data = write_tar(tmp_path / "0.tar", [sample(i, (8, 8)) for i in range(3)]).read_bytes()
    monkeypatch.setattr(Remote, "store", {"h/0.tar": data})
    monkeypatch.setattr(Remote, "faults", [])
    monkeypatch.setattr(Remote, "waits", [], raising=False)
    monkeypatch.setattr(urls, "_down", set())
    monkeypatch.setattr(urls, "time", SimpleNamespace(sleep=Remote.waits.append))
    monkeypatch.setitem(urls.known_implementations, "far", {"class": "fsspec.far"})
    fsspec.register_implementation("far", Remote, clobber=True)
    return Remote


def rows(url: str) -> tuple[list[int], Skips]:
    skips = Skips()
    source = ShardSource([Shard(url, 0, 100)], 0)
    return [raw.row for raw in usable(source.in_order(Part(0, 1)), skips)], skips


def test_what_is_local():
    assert all(is_local(path) for path in ("0.tar", "a:b/0.tar", "C:/0.tar", "me@box:0.tar", "2026-01-01T10:30"))
    assert not any(is_local(url) for url in ("pipe:cat 0.tar", "file:0.tar", "s3://b/0.tar", "HTTP://h/0.tar"))


def test_a_server_that_answers_at_the_third_attempt(far):
    far.faults[:] = [StrangeError("busy"), OSError("busy")]
    found, skips = rows("far://h/0.tar")
    assert found == [0, 1, 2] and not skips.counts and far.waits == [*urls.WAITS]


def test_a_server_that_does_not_answer_is_one_unreadable_shard(far):
    patience = [*urls.WAITS, *urls.OUTAGE]
    far.faults[:] = [StrangeError("no\n  answer")] * 6
    found, skips = rows("far://h/0.tar")
    assert found == [] and skips.counts == {"unreadable shard": 1} and far.waits == patience
    assert skips.examples["unreadable shard"] == "far://h/0.tar: StrangeError: no answer"
    far.faults[:] = [StrangeError("no")] * 3
    assert rows("far://h/0.tar")[0] == []  # its outage has been waited for: the usual waits, until it answers
    assert far.waits == [*patience, *urls.WAITS]
    far.faults[:] = [StrangeError("no")] * 2
    assert rows("far://h/0.tar")[0] == [0, 1, 2] and far.waits == [*patience, *urls.WAITS, *urls.WAITS]
    far.faults[:] = [StrangeError("no")] * len(patience)
    assert rows("far://h/0.tar")[0] == [0, 1, 2]
    assert far.waits == [*patience, *urls.WAITS, *urls.WAITS, *patience]


@pytest.mark.parametrize("error", [FileNotFoundError("h/0.tar"), PermissionError("no"), ValueError("no URL")])
def test_a_shard_that_is_not_there_or_not_allowed_is_asked_for_once(error, far):
    far.faults[:] = [error]
    found, skips = rows("far://h/0.tar")
    assert found == [] and skips.counts == {"unreadable shard": 1} and not far.waits
    assert not urls._down


def test_a_folder_that_comes_back(tmp_path, far, monkeypatch):
    """As a file system that is mounted again: no shard is lost."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    write_tar(folder / "0.tar", [sample(3, (8, 8))])

    def sleep(seconds):
        far.waits.append(seconds)
        if len(far.waits) == 4:
            (tmp_path / "gone").rename(folder)

    monkeypatch.setattr(urls, "time", SimpleNamespace(sleep=sleep))
    for url in (f"{folder}/0.tar", f"file://{folder}/0.tar"):
        far.waits.clear()
        folder.rename(tmp_path / "gone")
        found, skips = rows(url)
        assert found == [3] and not skips.counts and far.waits == [*urls.WAITS, *urls.OUTAGE][:4]


def test_a_file_whose_handle_is_stale(tmp_path, far, monkeypatch):
    path = write_tar(tmp_path / "0.tar", [sample(3, (8, 8))])
    faults = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")]

    def opened(*args):
        if faults:
            raise faults.pop()
        return open(*args)

    monkeypatch.setattr(urls, "open", opened, raising=False)
    assert rows(str(path))[0] == [3] and far.waits == [*urls.WAITS]


def test_a_file_that_is_not_there_is_opened_without_waits(tmp_path, far):
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "link.tar").symlink_to("nowhere.tar")
    for name, told in (
        ("1.tar", f"{tmp_path}/1.tar: [Errno 2] No such file or directory: '{tmp_path}/1.tar'"),
        ("folder.tar", f"{tmp_path}/folder.tar: [Errno 21] Is a directory: '{tmp_path}/folder.tar'"),
        ("link.tar", f"{tmp_path}/link.tar: it is a link to nowhere.tar, which is not there"),
    ):
        assert rows(f"{tmp_path}/{name}")[1].examples == {"unreadable shard": told}
    assert not far.waits and not urls._down


def test_a_connection_that_breaks(far, monkeypatch):
    """What was read is used."""
    monkeypatch.setattr(urls, "_BUFFER", 512)
    end = next(group.offset for group in read_shard("far://h/0.tar") if group.position == 2)
    monkeypatch.setattr(far, "breaks_at", end)
    found, skips = rows("far://h/0.tar")
    assert found == [0, 1]
    assert skips.examples == {"unreadable shard": "far://h/0.tar: StrangeError: the connection is gone"}


def test_a_remote_file_is_entered_where_it_can_be(far):
    groups = list(read_shard("far://h/0.tar"))
    assert [group.name for group in read_shard("far://h/0.tar", 2, groups[2].offset)] == ["000002"]


def test_a_command_that_fails_before_its_output_is_run_again(tmp_path, far):
    path, tries = write_tar(tmp_path / "1.tar", [sample(7, (8, 8))]), tmp_path / "tries"
    count = f"echo >> {tries}; test $(wc -l < {tries}) -ge 3 && cat {path}"
    assert rows(f"pipe:{count}")[0] == [7] and far.waits == [*urls.WAITS]
    found, skips = rows("pipe:exit 4")
    assert found == [] and skips.examples == {
        "unreadable shard": "pipe:exit 4: the command has failed with exit 4"
    }
    assert far.waits == [*urls.WAITS] * 2
    assert rows("pipe:no-such-program-at-all 2>/dev/null")[0] == [] and far.waits == [*urls.WAITS] * 2


@pytest.mark.skipif(urls._program_for("http") is None, reason="needs curl")
def test_http(tmp_path, far):
    """curl repeats what a server may give later; no connection at all is repeated here."""
    data = write_tar(tmp_path / "0.tar", [sample(i, (8, 8)) for i in range(3)]).read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/0.tar" else 404)
            self.end_headers()
            self.wfile.write(data if self.path == "/0.tar" else b"")

        def log_message(self, *words):
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    assert rows(f"{address}/0.tar")[0] == [0, 1, 2]
    found, skips = rows(f"{address}/1.tar")
    assert found == [] and "curl has failed with exit 22: the server has no such" in str(skips) and not far.waits
    server.shutdown()
    server.server_close()
    assert "exit 7: there is no connection" in str(rows(f"{address}/0.tar")[1])
    assert far.waits == [*urls.WAITS, *urls.OUTAGE]


@pytest.mark.skipif(urls._program_for("http") is None, reason="needs curl")
def test_a_name_server_that_is_away(tmp_path, far, monkeypatch):
    """curl's exit 6, which is also that of a host that does not exist."""
    (tmp_path / "curl").write_text("#!/bin/sh\nexit 6\n")
    (tmp_path / "curl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert "exit 6: the host is not known" in str(rows("http://h/0.tar")[1])
    assert far.waits == [*urls.WAITS, *urls.OUTAGE]


def test_hf_without_a_network(far, monkeypatch):
    """The hub's library has errors of its own, which are no OSErrors."""
    import huggingface_hub

    def resolve_path(self, url):
        raise StrangeError("offline")

    monkeypatch.setattr(huggingface_hub.HfFileSystem, "resolve_path", resolve_path)
    assert "StrangeError: offline" in str(rows("hf://datasets/some/set/0.tar")[1])
    assert far.waits == [*urls.WAITS, *urls.OUTAGE]


def test_other_schemes_are_told(far):
    with pytest.raises(OSError, match="nothing here reads tape://"):
        open_url("tape://h/0.tar")


@pytest.mark.skipif(find_spec("zstandard") is None, reason="needs zstandard")
def test_zstd(tmp_path):
    import zstandard

    path = write_tar(tmp_path / "0.tar", [sample(i, (8, 8)) for i in range(3)])
    packed = zstandard.compress(path.read_bytes())
    (tmp_path / "0.tar.zst").write_bytes(packed)
    assert rows(f"{tmp_path}/0.tar.zst")[0] == [0, 1, 2] == rows(f"pipe:cat {tmp_path}/0.tar.zst")[0]
    (tmp_path / "cut.tar.zst").write_bytes(packed[:-100])
    assert rows(f"{tmp_path}/cut.tar.zst")[1].counts == {"unreadable shard": 1}
