"""What a process finds where it runs: folders for temporary files and caches, a user's name, open files."""

from __future__ import annotations

import getpass
import os
import pwd
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from training.machine import prepare
from training.machine.prepare import Unfit

SRC = Path(__file__).parents[2] / "src"
NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path):
    """Changes of the environment end with the test, and temporary files are its own."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "HF_HOME"):
        os.environ.pop(name, None)


def unknown(_: int) -> pwd.struct_passwd:
    raise KeyError("getpwuid(): uid not found: 4242")


def test_a_user_without_a_name_and_a_home_gets_both(monkeypatch, tmp_path):
    for name in (*NAMES, "HOME"):
        os.environ.pop(name, None)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    prepare.prepare()
    assert getpass.getuser() == f"uid{os.getuid()}"
    assert Path("~").expanduser().parent == tmp_path
    (remark,) = prepare.remarks()
    assert str(Path("~").expanduser()) in remark and "HF_HOME" in remark
    home = os.environ["HOME"]
    del os.environ["HOME"]
    prepare.prepare()  # another process of the same user
    assert os.environ["HOME"] == home


def test_a_usual_home_stays_as_it_is(tmp_path):
    os.environ |= {"HOME": str(tmp_path), "USER": "somebody"}
    before = dict(os.environ)
    prepare.prepare()
    assert dict(os.environ) == before
    assert prepare.remarks() == []


def test_caches_move_where_a_home_takes_none(tmp_path):
    os.environ["HOME"] = str(tmp_path / "missing")
    prepare.prepare()
    assert Path(os.environ["XDG_CACHE_HOME"]).parent == tmp_path
    assert len(prepare.remarks()) == 1


def test_a_home_with_caches_stays(tmp_path):
    """Others may have put weights there for all to read."""
    (tmp_path / ".cache").mkdir()
    os.environ["HOME"] = str(tmp_path)
    prepare.prepare()
    assert "XDG_CACHE_HOME" not in os.environ


def test_a_folder_that_others_have_put_there_is_not_used(monkeypatch, tmp_path):
    os.environ.pop("HOME", None)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    taken = tmp_path / f"drrho-clip-home-{os.getuid()}"
    taken.write_text("of somebody else")
    prepare.prepare()
    assert Path(os.environ["HOME"]).is_dir() and Path(os.environ["HOME"]) != taken


def test_no_folder_for_temporary_files_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "missing")])
    with pytest.raises(Unfit, match="set TMPDIR to a folder with free space"):
        prepare.prepare()


def test_open_files_are_raised_to_what_is_permitted():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        prepare.prepare()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(hard, 65536) if hard > 0 else 65536
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    "command",
    ["main --dataset-type synthetic --train-num-samples 8", "check_data --train-data x.tar", "check_cache x"],
)
def test_each_command_says_that_the_current_folder_is_gone(tmp_path, command):
    """In a process of its own: torch cannot be imported there."""
    gone = tmp_path / "gone"
    gone.mkdir()
    line = f"cd {gone}; rmdir {gone}; {sys.executable} -m training.{command}"
    done = subprocess.run(
        ["bash", "-c", line], env={"PYTHONPATH": str(SRC)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "error: the current folder cannot be used" in done.stderr and "Traceback" not in done.stderr
