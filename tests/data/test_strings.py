"""Strings are those that were given, and a forked process that reads them all goes on sharing their memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.sources.strings import Strings

ANY = st.text(st.characters(exclude_categories=()))  # halves of surrogate pairs too, which are in no UTF-8


@given(st.lists(ANY), st.lists(ANY))
def test_strings_survive(first, second):
    strings = Strings(first)
    strings.extend(second)
    assert list(strings) == first + second and len(strings) == len(first + second)
    joined = Strings(second)
    joined.extend(strings)
    joined.extend(Strings(first))
    assert [joined[i] for i in range(len(joined))] == second + first + second + first


def test_unusual_strings_survive():
    odd = ["", "a\nb\r\n", "", "é 🙂 \U0010ffff", "\udc80", "\ud83d\ude42", "\0", ""]
    strings = Strings(odd)
    assert list(strings) == odd and strings[3] == odd[3]
    for number in (-1, len(odd)):
        with pytest.raises(IndexError):
            strings[number]
    assert list(Strings()) == [] and len(Strings()) == 0


READER = """
import gc, os
from training.data.lanes import Lane
from training.data.sources.tables import CsvSource

ROWS = 200_000
images, texts = (f"/images/{i:09d}.jpg" for i in range(ROWS)), (f"a picture of thing {i}" for i in range(ROWS))
source = CsvSource(list(images), list(texts), 0)

def private():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_Dirty")) / 1024

if os.fork() == 0:
    gc.disable()  # it would write to whatever else the process has
    order = source._order(0, 0)
    before = private()
    for row in order.tolist():
        source.sample(row, 0)
    print(private() - before, flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_loader_process_that_reads_all_rows_shares_their_memory():
    """As lists of str, of which every use writes a count, 200,000 rows became 33 MB of its own."""
    ended = subprocess.run([sys.executable, "-c", READER], capture_output=True, text=True, check=True)
    assert float(ended.stdout) < 12  # MB; 9 are the order, where it takes new memory
