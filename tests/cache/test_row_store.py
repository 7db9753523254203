"""Values per sample on disk: what is written is found by row, and nothing else is."""

import json
import mmap
import re
import resource
import time

import numpy as np
import pytest

from tests.support.page_cache import forget, in_memory
from training.cache.row_store import StoreWriter, caption_checksum, damaged, open_store
from training.check_cache import main as check_cache
from training.data.bad_samples import WrongRow

MADE = {"model": "m", "weights": "w"}


def checksums(rows: np.ndarray) -> np.ndarray:
    return np.array([caption_checksum(f"caption {row}") for row in rows.tolist()], np.uint32)


def values(rows: np.ndarray) -> np.ndarray:
    """What row r has: r, -r and 2 r."""
    return np.stack([rows, -rows, 2 * rows], 1).astype(np.float32)


def write(folder, parts: dict[int, list[int]]) -> StoreWriter:
    """A store with a part per shard number, with these rows."""
    writer = StoreWriter(folder, "things", MADE)
    for number, held in parts.items():
        rows = np.array(held)
        writer.write([(number, f"{number}.tar")], rows, checksums(rows), things=values(rows))
    writer.index()
    return writer


def read(store, rows: list[int]) -> np.ndarray:
    rows = np.array(rows)
    return store.gather("things", store.find(rows, checksums(rows), lambda i: f"sample {rows[i]}"))


def test_rows_come_back_in_any_order_from_any_part(tmp_path):
    """Parts with gaps, out of order, and overlapping ranges; a batch with repeated rows."""
    write(tmp_path, {0: [7, 3, 1000], 1: [5, 2, 999_999], 2: [4]})
    store = open_store(tmp_path, "things", "--flag")
    assert len(store) == 7
    rng = np.random.default_rng(0)
    there = np.array([7, 3, 1000, 5, 2, 999_999, 4])
    for size in (1, 3, 50):
        rows = rng.choice(there, size)
        assert np.array_equal(read(store, rows.tolist()), values(rows))
    assert store.one("things", int(store.find(np.array([5]), checksums(np.array([5])), str)[0])).tolist() == [
        5,
        -5,
        10,
    ]


@pytest.mark.parametrize("row", [-1, 0, 6, 1001, 10**9])
def test_a_row_that_is_not_there_is_named(tmp_path, row):
    write(tmp_path, {0: [3, 1000], 1: [5]})
    with pytest.raises(WrongRow, match=f"^sample {row} is not in "):
        read(open_store(tmp_path, "things", "--flag"), [3, row, 5])


def test_a_row_with_another_caption_is_refused(tmp_path):
    write(tmp_path, {0: [3, 5]})
    wrong = checksums(np.array([3, 4]))
    with pytest.raises(WrongRow, match=r"^sample 1 has another caption than in "):
        open_store(tmp_path, "things", "--flag").find(np.array([3, 5]), wrong, lambda i: f"sample {i}")


def test_a_row_in_two_parts_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"row 5 occurs twice, the second time in 4\.tar"):
        write(tmp_path, {0: [3, 5], 4: [5, 6]})


@pytest.mark.parametrize(
    "parts, surplus, left",
    [([[0, 1], [1, 3], [2, 3]], [1], {0, 1, 2, 3}), ([[0, 1], [1, 2]], [1], {0, 1})],
    ids=["whose shards are all in others", "the later one"],
)
def test_a_shard_in_two_parts_is_named_with_the_parts_to_delete(tmp_path, parts, surplus, left):
    """As two jobs write that share a folder and have other numbers of ranks."""
    writer = StoreWriter(tmp_path, "things", MADE)
    for held in parts:
        rows = np.array(held)
        writer.write([(n, f"{n}.tar") for n in held], rows, checksums(rows), things=values(rows))
    for ask in (writer.index, writer.done):
        with pytest.raises(ValueError, match=r"shards are in two parts, the first is 1\.tar") as caught:
            ask()
    named = re.findall(r"parts/(\d+)\.\*", str(caught.value))
    assert [int(name) for name in named] == surplus
    for name in named:
        for file in tmp_path.glob(f"parts/{name}.*"):
            file.unlink()
    assert set(writer.done()) == left
    assert writer.index() == len(left)


def test_writers_that_finish_one_after_the_other_are_all_indexed(tmp_path):
    write(tmp_path, {0: [1]})
    before = open_store(tmp_path, "things", "--flag")
    write(tmp_path, {3: [2]})
    store = open_store(tmp_path, "things", "--flag")
    assert (len(before), len(store)) == (1, 2)
    assert StoreWriter(tmp_path, "things", MADE).done() == {0: "0.tar", 3: "3.tar"}
    assert len(list(tmp_path.glob("table-*"))) == 1


def test_a_part_appears_whole_or_not_at_all(tmp_path):
    """Its json is written last: without it the shards count as missing, and their rows are not read."""
    write(tmp_path, {0: [1], 1: [2]})
    (tmp_path / "parts/00000001.json").unlink()
    writer = StoreWriter(tmp_path, "things", MADE)
    assert writer.done() == {0: "0.tar"}
    assert writer.index() == 1


def test_another_identity_or_kind_does_not_mix(tmp_path):
    write(tmp_path, {0: [1]})
    with pytest.raises(ValueError, match="was begun with weights w, and this run has weights v"):
        StoreWriter(tmp_path, "things", MADE | {"weights": "v"}).done()
    with pytest.raises(ValueError, match="holds things, not others"):
        open_store(tmp_path, "others", "--flag")


def test_a_file_that_is_cut_or_gone_is_named(tmp_path):
    write(tmp_path, {0: [1, 2]})
    file = tmp_path / "parts/00000000.things.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"things.npy has {len(whole) - 1} bytes instead of {len(whole)}"):
        open_store(tmp_path, "things", "--flag")
    file.unlink()
    with pytest.raises(ValueError, match=r"things\.npy is missing"):
        open_store(tmp_path, "things", "--flag")


def test_check_cache_finds_a_changed_byte(tmp_path, capsys):
    write(tmp_path, {0: [1, 2]})
    assert check_cache([str(tmp_path)]) == 0
    file = tmp_path / "parts/00000000.things.npy"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    capsys.readouterr()
    assert check_cache([str(tmp_path)]) == 1
    assert "parts/00000000.things.npy" in capsys.readouterr().out


def test_what_is_no_store_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"--flag .*there is no index\.json$"):
        open_store(tmp_path, "things", "--flag")
    (tmp_path / "parts").mkdir()
    with pytest.raises(ValueError, match="begun and not finished"):
        open_store(tmp_path, "things", "--flag")
    (tmp_path / "index.json").write_text(json.dumps({"format": 99, "kind": "things"}))
    with pytest.raises(ValueError, match="another version"):
        open_store(tmp_path, "things", "--flag")
    with pytest.raises(ValueError, match="another version"):
        StoreWriter(tmp_path, "things", MADE).done()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(ValueError, match=rf"^{folder} cannot be written \("):
            StoreWriter(folder, "things", MADE).done()


def test_a_disk_that_becomes_full_keeps_the_complete_parts(tmp_path):
    write(tmp_path, {0: [1, 2]})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        with pytest.raises(ValueError, match=rf"^{tmp_path} cannot be written \(File too large\): make room"):
            write(tmp_path, {1: list(range(1000, 3000))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(open_store(tmp_path, "things", "--flag")) == 2
    assert not damaged(open_store(tmp_path, "things", "--flag"))


@pytest.mark.parametrize("content", [None, "[]", "{}", "not json"])
def test_check_cache_of_something_else(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    assert check_cache([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(tmp_path) in line


def test_files_are_plain_npy_whose_rows_do_not_straddle_pages(tmp_path):
    rows = np.arange(4)
    writer = StoreWriter(tmp_path, "things", MADE)
    writer.write([(0, "0.tar")], rows, checksums(rows), things=np.ones((4, 2, 512), np.float16))
    file = tmp_path / "parts/00000000.things.npy"
    assert np.load(file).shape == (4, 2, 512)
    assert file.stat().st_size == 4096 + 4 * 2048


@pytest.mark.parametrize("which", [None, np.array([1, 3, 0])])
def test_announced_rows_are_fetched_from_the_disk(tmp_path, which):
    """Of rows with several values, the one that is wanted."""
    rows, several = np.arange(300), () if which is None else (4,)
    writer = StoreWriter(tmp_path, "things", MADE)
    writer.write([(0, "0.tar")], rows, checksums(rows), things=np.zeros((300, *several, mmap.PAGESIZE), np.uint8))
    writer.index()
    file = tmp_path / "parts/00000000.things.npy"
    forget(file)
    if in_memory(file)[1:].any():
        pytest.skip("files here cannot leave memory")
    store = open_store(tmp_path, "things", "--flag")
    chosen = np.array([7, 150, 290])
    store.expect(chosen, ("things",), {} if which is None else {"things": which})
    store.expect(np.array([10**9, -1]), ("things",))  # what is not there is left to the lookup
    end = time.monotonic() + 20
    pages = 1 + (chosen if which is None else 4 * chosen + which)
    while not in_memory(file)[pages].all() and time.monotonic() < end:
        time.sleep(0.01)
    assert in_memory(file)[pages].all() and in_memory(file)[1:].sum() < 30
    store.expect(np.array([3]), ("things",))
    assert np.array_equal(store.find(chosen, checksums(chosen), str), chosen)
