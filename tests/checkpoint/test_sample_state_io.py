"""A sample state on disk, read in blocks: whichever ranks wrote it, and whatever is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from drrho_clip.sample_state import SampleState, StateUpdate
from drrho_clip.state.fixed_point import FixedPoint
from tests.support.ranks import ranks
from training.checkpoint import sample_state_io

ROWS, COLUMNS = 29, ("log_u_image", "log_u_text")
VALUES = torch.randn(2, ROWS, generator=torch.Generator().manual_seed(0))
VALUES[:, ::5] = torch.nan


CODES = {"log_u_text": FixedPoint.of_bound(1e-3, -33, 89)}


def write(folder: Path, codes=None) -> None:
    state = SampleState(ROWS, [*COLUMNS, "tau_image"], codes=codes)
    state.commit(StateUpdate(torch.arange(ROWS), {**dict(zip(COLUMNS, VALUES)), "tau_image": VALUES[0] + 1}))
    sample_state_io.write(folder, state.state_dict())


@pytest.fixture(scope="module", params=[1, 2])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / f"of_{request.param}"
    write(path) if request.param == 1 else ranks(request.param).run(write, path)
    return path


@pytest.mark.parametrize("rows", [1, 4, ROWS, 100])
def test_blocks_are_the_columns_in_their_order(folder, rows):
    found = list(sample_state_io.blocks(folder, COLUMNS, rows))
    assert [len(block["log_u_text"]) for block in found[:-1]] == [rows] * (len(found) - 1)
    for name, values in zip(COLUMNS, VALUES):
        read = torch.cat([block[name] for block in found])
        torch.testing.assert_close(read, values, rtol=0, atol=0, equal_nan=True)
    assert all(block.keys() == set(COLUMNS) for block in found)


@pytest.mark.parametrize("size", [1, 2])
def test_blocks_of_columns_in_16_bits_are_their_values(tmp_path, size):
    write(tmp_path / "x", CODES) if size == 1 else ranks(size).run(write, tmp_path / "x", CODES)
    found = list(sample_state_io.blocks(tmp_path / "x", COLUMNS, 4))
    image, text = (torch.cat([block[name] for block in found]) for name in COLUMNS)
    torch.testing.assert_close(image, VALUES[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(text, CODES["log_u_text"].rounded(VALUES[1]), rtol=0, atol=0, equal_nan=True)


def test_an_index_of_16_bits_without_a_code_is_refused(tmp_path):
    """As int16 columns alone would be: nothing says what the integers mean."""
    dcp.save({"log_u_text": torch.zeros(4, dtype=torch.int16)}, checkpoint_id=tmp_path / "x")
    with pytest.raises(ValueError, match=r"\.metadata is the index of something else"):
        list(sample_state_io.blocks(tmp_path / "x", COLUMNS, 4))
    held = {"log_u_text": torch.zeros(4, dtype=torch.int16), "log_u_text.code": torch.tensor([torch.nan, 0.0])}
    dcp.save(held, checkpoint_id=tmp_path / "y")
    with pytest.raises(ValueError, match=r"log_u_text\.code is no code"):
        list(sample_state_io.blocks(tmp_path / "y", COLUMNS, 4))


def test_columns_that_are_not_there(folder):
    assert list(sample_state_io.blocks(folder, ["other"], 4)) == []
    found = sample_state_io.blocks(folder, ["tau_image", "other"], 4)
    assert all(block.keys() == {"tau_image"} for block in found)


def test_what_is_no_column_is_told(folder, tmp_path):
    (file, *_) = sorted(folder.glob("*.distcp"))
    whole = file.read_bytes()
    try:
        for content in (b"", whole[: len(whole) // 2], bytes(len(whole))):
            file.write_bytes(content)
            with pytest.raises(ValueError, match=r"sample state .* cannot be read"):
                list(sample_state_io.blocks(folder, COLUMNS, 4))
    finally:
        file.write_bytes(whole)
    with pytest.raises(ValueError, match="index cannot be read"):
        list(sample_state_io.blocks(tmp_path, COLUMNS, 4))
