"""Which checkpoints are complete, which one is the newest, which are removed."""

from __future__ import annotations

import errno
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import ranks
from tests.support.small_runs import RUN, Run, flip, names, run_by_flags, save
from training import files
from training.checkpoint import pt_file, sample_state_io
from training.checkpoint import saver as saving
from training.checkpoint.catalog import find_latest
from training.checkpoint.saver import Saver
from training.distributed import collectives

pytestmark = pytest.mark.usefixtures("one_thread")


def test_latest_goes_by_content_and_skips_what_is_not_complete(tmp_path, caplog):
    assert find_latest(tmp_path) is find_latest(tmp_path / "nowhere") is None
    run = Run(0)
    for epoch in range(1, 13):
        run.epochs(1)
        if epoch in (9, 10, 11, 12):
            save([tmp_path / f"epoch_{epoch}.pt"], run.state)
    assert find_latest(tmp_path) == tmp_path / "epoch_12.pt"  # by name, epoch_9 would come last
    (tmp_path / "epoch_12.pt").rename(tmp_path / "a_copy.pt")
    assert find_latest(tmp_path) == tmp_path / "a_copy.pt"

    whole = (tmp_path / "a_copy.pt").read_bytes()
    (tmp_path / "a_copy.pt").write_bytes(whole[: len(whole) // 2])
    shard = next((tmp_path / "epoch_11.state").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (tmp_path / "epoch_99.pt").write_bytes(b"")
    torch.save({"w": torch.ones(1)}, tmp_path / "weights.pt")
    with caplog.at_level(logging.WARNING):
        assert find_latest(tmp_path) == tmp_path / "epoch_10.pt"
    assert all(
        name in caplog.text for name in ("a_copy.pt", "epoch_11.pt", shard.name, "epoch_99.pt", "weights.pt")
    )

    (tmp_path / "epoch_10.state" / ".metadata").unlink()
    assert find_latest(tmp_path) == tmp_path / "epoch_9.pt"


def test_nothing_is_deleted_while_a_file_cannot_be_read(tmp_path, caplog):
    run_by_flags(tmp_path, 1)
    (tmp_path / "broken.pt").write_bytes(b"?")
    shutil.copytree(tmp_path / "epoch_1.state", tmp_path / "epoch_7.state")
    run_by_flags(tmp_path, 1)
    assert "epoch_7.state" in names(tmp_path)
    (tmp_path / "broken.pt").unlink()
    run_by_flags(tmp_path, 1)
    assert "epoch_7.state" not in names(tmp_path)


def damage_and_find(folder: str) -> list[tuple[str, str]]:
    """Flip a bit in each part of the newest checkpoint in turn: (part, the checkpoint that is then the latest)."""
    found = []
    newest = Path(folder, "epoch_2.pt")
    weights = pt_file.read(newest)["state_dict"]["tower.0.weight"].numpy().tobytes()
    rank = dist.get_rank() if dist.is_initialized() else 0
    collectives.barrier()
    for file in [newest, *sorted(Path(folder, "epoch_2.state").iterdir())]:
        if rank == 0:
            content = file.read_bytes()
            flip(file, content.index(weights) + 3 if file == newest else len(content) // 2)
        collectives.barrier()
        found.append((file.name, find_latest(Path(folder)).name))
        collectives.barrier()
        if rank == 0:
            file.write_bytes(content)
        collectives.barrier()
    return [*found, ("nothing", find_latest(Path(folder)).name)]


@pytest.mark.parametrize("size", [1, 2])
def test_a_flipped_bit_anywhere_is_noticed_and_the_one_before_is_taken(tmp_path, size):
    def all_ranks(function, *args):
        return ranks(size).run(function, *args) if size > 1 else [function(*args)]

    all_ranks(save_two, str(tmp_path))
    for found in all_ranks(damage_and_find, str(tmp_path)):
        assert len(found) == 1 + 1 + size + 1  # the .pt, the metadata, each rank's rows, and no damage
        assert dict(found) == {name: "epoch_1.pt" for name, _ in found[:-1]} | {"nothing": "epoch_2.pt"}


def save_two(folder: str) -> None:
    run = Run(0)
    for epoch in (1, 2):
        save([Path(folder, f"epoch_{epoch}.pt")], run.epochs(1).state)


def test_newest_is_what_was_saved_last_even_if_an_earlier_save_was_further(tmp_path):
    """After a resume from an older checkpoint, the steps that the run took after it do not count."""
    save([tmp_path / "epoch_2.pt"], Run(0).epochs(2).state)
    save([tmp_path / "epoch_1.pt"], Run(0).epochs(1).state)
    assert find_latest(tmp_path) == tmp_path / "epoch_1.pt"


def test_a_clock_that_goes_back_does_not_make_a_new_checkpoint_an_old_one(tmp_path, monkeypatch):
    run = Run(0)
    save([tmp_path / "step_1.pt"], run.train(1).state)
    save([tmp_path / "step_2.pt"], run.train(1).state)
    monkeypatch.setattr(saving.time, "time", lambda: 1000.0)
    save([tmp_path / "step_3.pt"], run.train(1).state)
    with Saver(tmp_path, RUN) as other:
        other.save(run.train(1).state, ["step_4"])
    assert find_latest(tmp_path) == tmp_path / "step_4.pt"
    assert names(tmp_path) == ["step_3.pt", "step_3.state", "step_4.pt", "step_4.state"]


def test_a_damaged_file_keeps_its_own_rows_and_no_others(tmp_path):
    run = Run(0)
    for step in (1, 2, 3, 4):
        save([tmp_path / f"step_{step}.pt"], run.train(1).state)
        if step == 1:
            (tmp_path / "step_1.pt").write_bytes(b"?")
            torch.save({"w": torch.ones(1)}, tmp_path / "bare.pt")
    kept = [f"step_{step}.{kind}" for step in (1, 3, 4) for kind in ("pt", "state")]
    assert names(tmp_path) == ["bare.pt", *kept]


def test_a_state_that_cannot_be_read_is_a_reason_to_take_the_one_before(tmp_path, monkeypatch, caplog):
    save_two(str(tmp_path))
    checksum = files.checksum

    def broken(file: Path) -> int:
        if "epoch_2" in str(file):
            raise OSError(errno.EIO, "Input/output error")
        return checksum(file)

    monkeypatch.setattr(sample_state_io, "checksum", broken)
    assert find_latest(tmp_path) == tmp_path / "epoch_1.pt"
    assert "Input/output error" in caplog.text


@pytest.mark.parametrize("keep_last", [1, 3])
def test_the_newest_steps_are_kept_and_all_epochs(tmp_path, keep_last):
    run = Run(0)
    with Saver(tmp_path, replace(RUN, keep_last=keep_last)) as saver:
        saver.save(run.epochs(1).state, ["epoch_1"])
        for _ in range(4):
            saver.save(run.train(1).state, [f"step_{run.state.step}"])
    kept = [f"step_{step}" for step in (4, 5, 6, 7)[-keep_last:]]
    assert names(tmp_path) == sorted(f"{f}.{kind}" for f in ["epoch_1", *kept] for kind in ("pt", "state"))
