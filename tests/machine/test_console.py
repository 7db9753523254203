"""Standard streams that are closed, full, read by nobody, or of a small encoding, in real processes."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
# Prints on both streams more than any buffer holds, and writes a file between, as a run does.
PROGRAM = """
import sys
from training.machine import console
from training.machine.prepare import Unfit

@console.lasting_streams()
def main():
    try:
        console.show("asked for \\u00fc")
    except Unfit as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with open("result", "w") as file:
        for number in range(5000):
            print("line of stdout", number)
            print("line of stderr", number, file=sys.stderr)
        file.write("whole")
    return 0

sys.exit(main())
"""


def run(folder: Path, redirections: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    """``PROGRAM`` with a shell's ``redirections``, its exit code in the file ``code``."""
    (folder / "program.py").write_text(PROGRAM)
    command = f"({sys.executable} program.py; echo $? > code) {redirections}"
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env={"PYTHONPATH": str(SRC), **env}, capture_output=True, check=False
    )


@pytest.mark.parametrize(
    "redirections",
    [">&-", "2>&-", ">&- 2>&- <&-", "2> /dev/full", "| head -n 1", "2>&1 | head -n 1", "> >(exit) 2> >(exit)"],
)
def test_a_program_outlives_its_streams(tmp_path, redirections):
    done = run(tmp_path, redirections)
    assert (tmp_path / "code").read_text() == "0\n"
    assert (tmp_path / "result").read_text() == "whole"  # and no line of another stream
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr


def test_what_was_asked_for_and_cannot_be_written_is_an_error(tmp_path):
    done = run(tmp_path, "> /dev/full")
    assert (tmp_path / "code").read_text() == "2\n"
    assert done.stderr == b"error: standard output cannot be written (No space left on device)\n"


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", b"\\xfc"), ("latin-1", b"\xfc"), ("utf-8", b"\xc3\xbc")]
)
def test_what_an_encoding_cannot_show_is_escaped(tmp_path, encoding, shown):
    done = run(tmp_path, "2> /dev/null", PYTHONIOENCODING=encoding)
    assert done.stdout.splitlines()[0] == b"asked for " + shown


def test_a_terminal_that_is_gone_ends_nothing(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "program.py"], cwd=tmp_path, env={"PYTHONPATH": str(SRC)}, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    assert os.read(ours, 9) == b"asked for"
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "result").read_text() == "whole"
