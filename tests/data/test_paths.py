"""Which shards a flag names, on this machine and elsewhere, and what is refused before anything is read."""

from __future__ import annotations

import os
import re

import pytest

from tests.support.shards import sample, write_tar
from training.config.params import parse
from training.data.sources import urls
from training.data.sources.paths import expand_shards, look_for_shards


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder that is current, and the home directory ``home`` in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def write(folder: str, *names: str) -> None:
    os.makedirs(folder, exist_ok=True)
    for name in names:
        write_tar(os.path.join(folder, name), [sample(0, (8, 8))])


def found(given: str) -> list[str]:
    """The shards that a command with this ``--train-data`` would read."""
    config = parse(["--train-data", given, "--train-num-samples", "4", "--model", "RN50"])
    assert config.data.dataset_type == "webdataset"
    assert config.data.train_data is not None
    look_for_shards(config.data.train_data, "--train-data")
    (source,) = expand_shards(config.data.train_data)
    assert all(os.path.isfile(url) for url in source)
    return source


def refusal(given: str, *flags: str) -> str:
    with pytest.raises(ValueError) as caught:
        config = parse(["--train-data", given, "--train-num-samples", "4", "--model", "RN50", *flags])
        look_for_shards(config.data.train_data, "--train-data")
    return str(caught.value)


@pytest.mark.parametrize(
    "folder",
    [
        "run[1]",
        "br[0-9]/00",
        "star*",
        "what?",
        "a b",
        "a:b",
        "2026-01-01T10:30",
        "x{y}",
        "$x",
        "é",
        "pipe",
        "d.tar",
    ],
)
def test_a_folder_that_exists_is_that_folder_whatever_its_name(folder, place):
    write(folder, "0.tar", "1.tar")
    both = [f"{folder}/0.tar", f"{folder}/1.tar"]
    assert found(f"{folder}/0.tar") == both[:1]
    assert found(f"{folder}/{{0..1}}.tar") == found(f"{folder}/*.tar") == found(f"{folder}/[01].tar") == both
    assert found(folder) == both
    assert found(f"{place}/{folder}/*.tar") == found(f"{place}/{folder}/") == [f"{place}/{url}" for url in both]


def test_a_name_that_could_be_a_pattern_is_not_searched_elsewhere(place):
    write("run[1]", "0.tar")
    write("run1", "0.tar", "1.tar")
    assert found("run[1]/*.tar") == ["run[1]/0.tar"]
    assert found("run[12]/*.tar") == ["run1/0.tar", "run1/1.tar"]


def test_the_home_directory(place):
    write("home/data", "0.tar")
    assert found("~/data/*.tar") == found("~/data") == found("~/data/{0..0}.tar") == [f"{place}/home/data/0.tar"]
    config = parse(["--train-data", "~/data::~/data/0.tar", "--train-num-samples", "4", "--val-data", "~/data"])
    assert config.data.train_data == f"{place}/home/data::{place}/home/data/0.tar"
    assert config.evaluation.val_data == f"{place}/home/data"


def test_links_and_other_names(place):
    write("there", "0.tar", "B.TAR", "c.tgz", "._0.tar", "note.txt")
    os.symlink("there", "link")
    os.symlink("there/0.tar", "l.tar")
    assert found("link") == ["link/0.tar", "link/B.TAR", "link/c.tgz"]
    assert found("l.tar") == ["l.tar"] and found("there/B.TAR") == ["there/B.TAR"]


def test_a_folder_is_remarked_on_and_so_is_what_lies_deeper(place):
    write("top", "0.tar")
    write("top/in", "1.tar")
    (remark,) = look_for_shards("top", "--train-data")
    assert remark == (
        "--train-data top: all shards in this folder are used (1), but not those in folders inside it, in, which "
        "top/*/*.tar names"
    )
    write("outer/one", "0.tar")
    assert "has no shards (.tar) of its own; those inside it have, which outer/one/*.tar names" in refusal("outer")
    write("outer/two", "0.tar")
    assert "which outer/*/*.tar names" in refusal("outer")
    assert found("outer/*/*.tar") == ["outer/one/0.tar", "outer/two/0.tar"]


def test_folders_without_shards(place):
    os.makedirs("empty")
    assert refusal("empty") == "--train-data empty: it is a folder without shards (.tar); check the path"
    assert "the folder empty has no shards (.tar)" in refusal("empty", "--dataset-type", "webdataset")
    os.makedirs("empty.tar")
    assert "the folder empty.tar has no shards (.tar)" in refusal("empty.tar")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("x/*.tar", "no shard matches 'x/*.tar'; check the path"),
        ("x/{0..3}.tar", "there is no x/0.tar, and no other shard of this source; check the path"),
        ("x/{0-3}.tar", "write a range as {00000..00099}"),
        ("x/{0..3.tar", "Unbalanced braces"),
        ("'x/*.tar'", "take off the quotes"),
        ("${NOT_SET}/{0..3}.tar", "WDS_NOT_SET is not set"),
        ("file:///nowhere/0.tar", "there is no file:///nowhere/0.tar"),
        ("lost.tar", "it is a link to nowhere.tar, which is not there"),
        ("box:/data/{0..1}.tar", "there is no box:/data/0.tar"),
        ("me@box:data/0.tar", "or give 'pipe:ssh me@box cat PATH' for another machine"),
        ("s3:/bucket/0.tar", "a URL begins with s3:// (two slashes)"),
        ("pipe:no-such-program 0.tar", "there is no program no-such-program on this machine"),
    ],
)
def test_what_leads_nowhere(given, told, place):
    os.symlink("nowhere.tar", "lost.tar")
    said = refusal(given)
    assert said.startswith(f"--train-data {given}") and told in said


def no_packages(monkeypatch, *programs: str) -> None:
    """No Python package for URLs or zstd is there, and programs only for the schemes ``programs``."""

    def get_filesystem_class(scheme):
        raise ImportError(scheme)

    monkeypatch.setattr(urls.fsspec, "get_filesystem_class", get_filesystem_class)
    monkeypatch.setattr(urls, "_fault_of_fsspec", urls._fault_of_fsspec.__wrapped__)  # not what it remembers
    monkeypatch.setattr(urls, "_program_for", lambda scheme: "there" if scheme in programs else None)
    monkeypatch.setattr(urls, "_zstd_module", lambda: None)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("s3://b/{0..1}.tar", "s3://b/0.tar: s3:// needs the Python package s3fs (pip install s3fs)"),
        ("s3://b/{0..1}.tar", "'pipe:aws s3 cp s3://b/0.tar -'"),
        ("s3a://b/a b.tar", "\"pipe:aws s3 cp 's3://b/a b.tar' -\""),
        ("gs://b/0.tar", "gs:// needs the Python package gcsfs (pip install gcsfs) or the program gsutil"),
        ("gs://b/0.tar", "'pipe:gcloud storage cat gs://b/0.tar'"),
        ("az://b/0.tar", "the Python package adlfs"),
        ("hdfs://n/0.tar", "'pipe:hdfs dfs -cat hdfs://n/0.tar'"),
        ("sftp://me@box:22/d/0.tar", "'pipe:ssh -p 22 me@box cat /d/0.tar'"),
        ("https://h/0.tar", '"requests" and "aiohttp" to be installed) or the program curl; a command may'),
        ("tape://h/0.tar", "nothing here reads tape://; a command may read it: 'pipe:COMMAND tape://h/0.tar'"),
        ("s3://b/*.tar", "patterns with * are for local files; name remote shards by a range"),
        ("https://h/0.tar.zst?a=b", "\"pipe:curl -fsSL 'https://h/0.tar.zst?a=b' | zstd -dc\""),
        ("s3://b/0.tar.lz4", "'pipe:aws s3 cp s3://b/0.tar.lz4 - | lz4 -dc'"),
        ("0.tar.zst", "install the package zstandard, or let a command do it: 'pipe:zstd -dc 0.tar.zst'"),
        ("0.tar.Z", "Python cannot unpack .Z here; let a command do it: 'pipe:uncompress -c 0.tar.Z'"),
    ],
)
def test_what_nothing_here_can_read_is_refused_with_what_can(given, told, place, monkeypatch):
    no_packages(monkeypatch)
    write(".", "0.tar.zst", "0.tar.Z")
    said = refusal(given)
    assert said.startswith("--train-data ") and told in said


def test_what_can_be_read_is_not_refused(place, monkeypatch):
    no_packages(monkeypatch, "http", "https", "hf", "gs")
    for given in ("https://h/{0..1}.tar?x=*", "hf://datasets/o/s/0.tar", "gs://b/0.tar"):
        assert look_for_shards(given, "--train-data") == []
    assert look_for_shards("pipe:cat *.tar::pipe:KEY=1 cat 0.tar::pipe:(cat 0.tar)", "--train-data") == []


@pytest.mark.parametrize(
    ("start", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS and not the file itself: git lfs"),
        (b"PK\x03\x04....", "a zip archive: pack its files into a tar"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"PAR1....", "a parquet file"),
    ],
)
def test_files_that_are_no_tars_are_refused_if_all_are(start, told, place):
    for i in range(20):
        (place / f"{i:02d}.tar").write_bytes(start)
    assert f"00.tar: it is {told}" in refusal("{00..19}.tar")
    assert re.search("^--train-data 00.tar: it is", refusal("{00..19}.tar"))
    write(".", *(f"{i:02d}.tar" for i in range(0, 20, 2)))
    assert look_for_shards("{00..19}.tar", "--train-data") == []


def test_a_folder_that_cannot_be_listed(place, monkeypatch):
    """Its files may be readable nevertheless."""
    write("closed", "0.tar")

    def listdir(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "listdir", listdir)
    assert look_for_shards("closed/{0..1}.tar", "--train-data") == [
        "--train-data: 1 of 2 shards are missing, the first is closed/1.tar"
    ]
    assert "the folder closed cannot be listed (Permission denied)" in refusal(
        "closed", "--dataset-type", "webdataset"
    )
