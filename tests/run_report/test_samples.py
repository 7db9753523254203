"""The samples with the largest u are found in a checkpoint and in the data, whichever way rows are given."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from drrho_clip.sample_state import StateUpdate
from tests.support import shards, small_runs
from training.checkpoint import published
from training.run_report import samples
from training.run_report.samples import largest_u

ROWS = small_runs.ROWS
LOG_U = {0: 1.0, 3: 7.0, 4: math.nan, 7: 5.0, 9: 6.0}  # row -> log u of both directions; others have -1


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run whose checkpoint has these values."""
    folder = tmp_path_factory.mktemp("run")
    made = small_runs.Run(0).epochs(1)
    values = torch.tensor([LOG_U.get(row, -1.0) for row in range(ROWS)])
    made.state.sample_state.commit(
        StateUpdate(torch.arange(ROWS), {"log_u_image": values + 0.5, "log_u_text": values - 0.5})
    )
    (folder / "checkpoints").mkdir()
    small_runs.save([folder / "checkpoints/epoch_1.pt"], made.state)
    return folder


def shown(found):
    return [(hard.row, hard.caption) for hard in found.samples]


EXPECTED = [(row, shards.caption(row)) for row in (3, 9, 7, 0)]


def by_key(folder):
    return {"train_data": shards.write_shards(folder, 11, per_shard=3), "data_size": "11"}


def keys_in_any_order(folder):
    order = [9, 1, 8, 3, 10, 5, 0, 7, 2, 4, 6]
    return {
        "train_data": shards.write_shards(folder, [shards.sample(i) for i in order], per_shard=2),
        "data_size": "11",
    }  # fmt: skip


def by_position(folder):
    made = [{k: v for k, v in shards.sample(i).items() if k != "json"} for i in range(11)]
    data = shards.write_shards(folder, made, per_shard=4)
    return {"train_data": data, "data_size": "11", "sample_index": "position"}


def several_sources(folder):
    first = shards.write_shards(folder / "a", [shards.sample(i) for i in range(6)], per_shard=3)
    second = shards.write_shards(folder / "b", [shards.sample(i, key=i - 6) for i in range(6, 11)], per_shard=3)
    return {"train_data": f"{first}::{second}", "data_size": "(6, 5)"}


def csv_file(folder):
    return {"train_data": shards.write_csv(folder, 11), "csv_separator": "\t", "dataset_type": "auto"}


@pytest.mark.parametrize("data", [by_key, keys_in_any_order, by_position, several_sources, csv_file])
def test_rows_become_samples(run, data, tmp_path):
    found = largest_u(run, data(tmp_path), 4, 60)
    assert found.remark == ""
    assert shown(found) == EXPECTED
    assert (found.rows, found.seen) == (11, 10)
    assert found.samples[0].log_u == {"log_u_image": 7.5, "log_u_text": 6.5}
    picture = Image.open(io.BytesIO(base64.b64decode(found.samples[0].picture.partition(",")[2])))
    original = shards.picture(3)
    assert picture.size == original.size
    difference = torch.tensor(list(picture.tobytes())).float() - torch.tensor(list(original.tobytes())).float()
    assert difference.abs().mean() < 8


@pytest.mark.parametrize("rows", [1, 3])
def test_a_table_is_read_in_blocks(run, tmp_path, monkeypatch, rows):
    whole = largest_u(run, by_key(tmp_path), 4, 60)
    monkeypatch.setattr(samples, "_BLOCK", rows)
    assert largest_u(run, by_key(tmp_path), 4, 60) == whole
    assert sum(whole.spread["log_u_text"][1]) == 10


def test_a_published_checkpoint(run, tmp_path):
    values = torch.tensor([LOG_U.get(row, -1.0) for row in range(ROWS)])
    held = {"epoch": 1, "name": "a", "state_dict": {}, **published.to_published(
        {"log_u_image": values, "log_u_text": values}, 0.07
    )}  # fmt: skip
    (tmp_path / "checkpoints").mkdir()
    torch.save(held, tmp_path / "checkpoints/epoch_1.pt")
    assert shown(largest_u(tmp_path, by_key(tmp_path), 4, 60)) == EXPECTED


def test_broken_pictures_are_shown_without_one(run, tmp_path):
    made = [shards.sample(i) for i in range(11)]
    made[3]["jpg"] = b"no picture"
    data = shards.write_shards(tmp_path, made, per_shard=11)
    first, second, *_ = largest_u(run, {"train_data": data, "data_size": "11"}, 4, 60).samples
    assert (first.row, first.caption, first.picture) == (3, shards.caption(3), "")
    assert second.picture.startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"train_data": "gone/{0..3}.tar", "data_size": "11"}, ("cannot be opened", "--train-data")),
        ({"train_data": "gone.csv"}, ("cannot be opened", "gone.csv")),
        ({"train_data": "None", "dataset_type": "synthetic"}, ("synthetic",)),
        ({}, ("no data",)),
    ],
)
def test_rows_remain_where_the_data_are_gone(run, flags, words):
    found = largest_u(run, flags, 4, 60)
    assert [hard.row for hard in found.samples] == [3, 9, 7, 0]
    assert all(word in found.remark for word in words), found.remark


def test_the_search_ends_in_time(run, tmp_path):
    found = largest_u(run, by_key(tmp_path), 4, 1e-9)
    assert "of 4 samples were not found" in found.remark and "--seconds 1e-09" in found.remark
    assert len(found.samples) == 4
    assert "--seconds 0" in largest_u(run, by_key(tmp_path), 4, 0).remark


def test_samples_that_are_not_in_the_data(run, tmp_path):
    data = shards.write_shards(tmp_path, [shards.sample(i) for i in range(8)], per_shard=3)
    found = largest_u(run, {"train_data": data, "data_size": "11"}, 4, 60)
    assert shown(found) == [(3, shards.caption(3)), (9, ""), *EXPECTED[2:]]
    assert "1 of 4 samples were not found" in found.remark and "they are not there" in found.remark


def test_runs_without_u(tmp_path):
    assert "no checkpoint here keeps u" in largest_u(tmp_path, {}, 4, 60).remark


def test_few_shards_are_read_where_keys_rise():
    made = [samples.Shard(f"{i}.tar", 0, 1_000_000) for i in range(1000)]
    left = {123_456}
    read = 0
    for number, _, tell in samples._guessed(made, left):
        read += 1
        first = 600 * number if number < 500 else 300_000 + 1400 * (number - 500)  # shards of unequal size
        if first <= 123_456 < first + 600:
            break
        tell(number, first + 300)
    assert read < 10
