"""Writing a cache: each sample once, however the work is shared, and an interrupted run can be finished."""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from tests.support import shards, tiny_models
from tests.support.lab import CPU, Lab
from tests.support.ranks import free_port, ranks
from training.cache import precompute
from training.cache.producers import FeatureWork
from training.cache.row_store import StoreWriter, open_store
from training.checkpoint.run_folder import choose_folder
from training.config.params import parse
from training.data.decode import decode
from training.data.transforms import eval_transform
from training.distributed import process_group
from training.distributed.process_group import World
from training.logger import open_run
from training.main import main
from training.models import frozen

WRITE = "--ref_model @reference --ref_model_pretrained @reference_weights --cache_ref_model_features"


def words(lab: Lab, folder: Path, line: str = "") -> list[str]:
    return [*lab.words(f"{WRITE} --cached_ref_features_dir {folder} {line}"), "--name", f"run{next(lab.numbers)}"]


def held(folder: Path) -> tuple[list[int], np.ndarray]:
    """The rows of a store, and all values in their order."""
    store = open_store(folder, "reference features", "DIR")
    rows = np.concatenate([np.load(file)[:, 0] for file in sorted(folder.glob("parts/*.rows.npy"))])
    values = np.concatenate([np.load(file) for file in sorted(folder.glob("parts/*.features.npy"))])
    assert len(store) == len(rows)
    return sorted(rows.tolist()), values[np.argsort(rows)]


@pytest.fixture(scope="module")
def whole(lab) -> tuple[list[int], np.ndarray]:
    """What one run writes of the lab's four shards."""
    assert main(words(lab, lab.root / "whole")) == 0
    return held(lab.root / "whole")


def test_values_are_the_references_under_its_evaluation_transform(lab, whole):
    """Compared with open_clip's transform and model: pictures are 48 x 40, the reference's view is 48 x 48."""
    rows, values = whole
    assert rows == list(range(16))
    module = tiny_models.build("tiny-vit-reference").eval()
    built = frozen.build_reference(parse(words(lab, lab.root / "x")), World(0, 0, 1, 1, CPU))
    transform = eval_transform(built.preprocess)
    pixels = torch.stack([transform(decode(shards.sample(i)["jpg"])) for i in rows])
    with torch.no_grad():
        image = module.encode_image(pixels, normalize=True)
        text = module.encode_text(built.tokenizer([shards.caption(i) for i in rows]), normalize=True)
    torch.testing.assert_close(torch.from_numpy(values[:, 1]), text, rtol=0, atol=1e-6)
    assert (torch.from_numpy(values[:, 0]) * image).sum(1).min() > 0.9999  # one is cropped, then resized


def _write(argv: list[str]) -> None:
    config, rank = parse(argv), torch.distributed.get_rank()
    world = World(rank, rank, 2, 2, CPU)
    with open_run(config, world, choose_folder(config, world)) as log:
        precompute.write(config, world, log)


def test_two_ranks_share_the_work_and_one_reads_it(lab, whole, tmp_path):
    """Two ranks write the same values as one run, and training reads them."""
    ranks(2).run(_write, words(lab, tmp_path / "two", "--workers 0"))
    assert len(list(tmp_path.glob("two/parts/*.json"))) == 2
    rows, values = held(tmp_path / "two")
    assert rows == whole[0]
    np.testing.assert_allclose(values, whole[1], atol=1e-6)
    train = f"--fastclip --gamma 0.5 --cached_ref_features_dir {tmp_path}/two"
    assert lab.run(lab.words(train)).code == 0


def _write_slowly(argv: list[str], port: int) -> int:
    """Rank 1 takes several times as long as a collective may, which is 8 s and not 30 minutes."""
    forward = FeatureWork.__call__

    def slow(*args):
        time.sleep(1.5 * torch.distributed.get_rank())
        return forward(*args)

    with (
        mock.patch.dict(os.environ, MASTER_PORT=str(port)),
        mock.patch.object(process_group, "TIMEOUT", timedelta(seconds=8)),
        mock.patch.object(precompute, "MEET_SECONDS", 0.1),
        mock.patch.object(FeatureWork, "__call__", slow),
    ):
        return main(argv)


def test_a_rank_may_be_done_long_before_another(lab, whole, tmp_path):
    argv = words(lab, tmp_path / "store", "--workers 0 --batch-size 1")
    assert ranks(2, joined=False).run(_write_slowly, argv, free_port()) == [0, 0]
    assert held(tmp_path / "store")[0] == whole[0]


def test_jobs_of_a_group_share_the_shards(lab, whole, tmp_path):
    for rank, so_far in ((1, 8), (0, 16)):
        group = f"--cache_group_size 2 --cache_rank {rank}"
        assert main(words(lab, tmp_path / "group", group)) == 0
        rows, values = held(tmp_path / "group")
        assert len(rows) == so_far
    np.testing.assert_allclose(values, whole[1], atol=1e-6)


@pytest.mark.parametrize("limit", ["PART_BYTES", "PART_SECONDS"])
def test_an_interrupted_run_goes_on(lab, whole, tmp_path, monkeypatch, limit):
    """Each part has one shard, and the third forward pass fails. The next run only processes what is missing."""
    monkeypatch.setattr(precompute, limit, 0)
    forward, calls = FeatureWork.__call__, []

    def failing(work, images, texts, rows):
        calls.append(len(images))
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return forward(work, images, texts, rows)

    monkeypatch.setattr(FeatureWork, "__call__", failing)
    argv = words(lab, tmp_path / "halves", "--batch-size 4")
    with pytest.raises(RuntimeError, match="power cut"):
        main(argv)
    assert len(list(tmp_path.glob("halves/parts/*.json"))) == 1  # the second one's end comes with the third chunk
    assert main(argv) == 0
    assert sum(calls) == 4 * 3 + 4 * 3
    np.testing.assert_allclose(held(tmp_path / "halves")[1], whole[1], atol=1e-6)
    assert main(words(lab, tmp_path / "halves")) == 0
    assert sum(calls) == 4 * 3 + 4 * 3  # nothing is left to do


def test_an_unreadable_shard_is_named_and_can_be_mended(lab, tmp_path, capsys):
    """Its samples before the fault are not kept, so that they do not come twice."""
    pattern = shards.write_shards(tmp_path / "data", 12, per_shard=4)
    sound = (tmp_path / "data/00001.tar").read_bytes()
    (tmp_path / "data/00001.tar").write_bytes(sound[: len(sound) // 2 + 600])
    argv = words(lab, tmp_path / "store", f"--train-data {pattern} --batch-size 1")
    assert main(argv) == 2
    assert "1 of 3 shards cannot be read, the first is 00001.tar" in capsys.readouterr().err
    assert held(tmp_path / "store")[0] == [0, 1, 2, 3, 8, 9, 10, 11]
    (tmp_path / "data/00001.tar").write_bytes(sound)
    assert main(argv) == 0
    assert held(tmp_path / "store")[0] == list(range(12))


def test_bad_samples_are_left_out(lab, tmp_path):
    argv = words(lab, tmp_path / "store", "--train-data @spoiled".replace("@spoiled", lab.path("spoiled")))
    assert main(argv) == 0
    assert held(tmp_path / "store")[0] == [0, 2, 3]


def test_a_shard_without_usable_samples_is_done_too(lab, tmp_path):
    samples = [shards.sample(i) for i in range(6)]
    for members in samples[:2]:
        del members["txt"]
    pattern = shards.write_shards(tmp_path / "data", samples, per_shard=2)
    argv = words(lab, tmp_path / "store", f"--train-data {pattern} --cache_group_size 3")
    for rank in range(3):
        assert main([*argv, "--cache_rank", str(rank), "--name", f"job{rank}"]) == (2 if rank == 0 else 0)
    assert held(tmp_path / "store")[0] == [2, 3, 4, 5]
    assert open_store(tmp_path / "store", "reference features", "DIR").shape("features")[1] == (2, 24)


def test_parts_that_rank_0_cannot_see_are_noticed(tmp_path):
    """As if each node had its own folder of that name."""
    writer = StoreWriter(tmp_path, "things", {})
    writer.write([(0, "0.tar")], np.array([3]), np.array([1], np.uint32), things=np.ones((1, 2)))
    with pytest.raises(ValueError, match="1 of 3 shards are missing, though other ranks"):
        precompute._index(writer, {0, 1, 2}, ["2.tar"])
    assert precompute._index(writer, {0, 2}, ["2.tar"]) == 1


def test_another_list_of_shards_is_refused_and_a_longer_one_goes_on(lab, tmp_path, capsys):
    first = shards.write_shards(tmp_path / "data", 12, per_shard=4)
    other = first.replace("{00000..00002}", "{00001..00002}")
    assert main(words(lab, tmp_path / "store", f"--train-data {tmp_path}/data/00000.tar")) == 0
    assert main(words(lab, tmp_path / "store", f"--train-data {other}")) == 2
    assert "shard number 0 is 00000.tar there, and 00001.tar in --train-data" in capsys.readouterr().err
    assert main(words(lab, tmp_path / "store", f"--train-data {first}")) == 0
    assert held(tmp_path / "store")[0] == list(range(12))


def test_another_reference_is_refused_before_it_is_built(lab, whole, capsys, monkeypatch):
    monkeypatch.setattr("training.cache.producers.build_reference", lambda *_: pytest.fail("built"))
    argv = words(lab, lab.root / "whole")
    argv[argv.index("--ref_model_pretrained") + 1] = lab.path("other_reference_weights")
    assert main(argv) == 2
    assert "was begun with weights file" in capsys.readouterr().err


def test_a_table_of_several_blocks(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(precompute, "BLOCK", 2)
    data = shards.write_csv(tmp_path / "csv", 5)
    argv = words(lab, tmp_path / "store", f"--train-data {data} --dataset-type csv --workers 2")
    assert main(argv) == 0
    assert held(tmp_path / "store")[0] == list(range(5))
    names = json.loads((tmp_path / "store/parts/00000000.json").read_text())["shards"]
    assert names == [[0, "rows 0-1"], [1, "rows 2-3"], [2, "rows 4-4"]]


def test_rows_whose_pictures_are_away_are_written_when_they_are_back(lab, tmp_path, capsys, monkeypatch):
    """Four blocks of 5 rows: no picture is missing, one, which is allowed, three, and one that cannot be read."""
    monkeypatch.setattr(precompute, "BLOCK", 5)
    data = shards.write_csv(tmp_path / "csv", 20)
    away = [tmp_path / f"csv/{i:06d}.jpg" for i in (7, 10, 11, 12)]
    for file in away:
        file.rename(file.with_suffix(".away"))
    (tmp_path / "csv/000017.jpg").rename(tmp_path / "csv/kept")
    (tmp_path / "csv/000017.jpg").symlink_to("/proc/self/mem")  # EIO, for whoever asks
    line = f"--train-data {data} --dataset-type csv --batch-size 4 --max_bad_fraction"
    assert main(words(lab, tmp_path / "store", f"{line} 0.2")) == 2
    told = capsys.readouterr().err
    assert "2 of 4 shards cannot be read, the first is rows 10-14; all others are written" in told
    assert "rows 10-14: 3 of 5 pictures are not there, more than --max_bad_fraction 0.2" in told
    assert "5 undecodable image" in told
    assert held(tmp_path / "store")[0] == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    (tmp_path / "csv/000017.jpg").unlink()
    (tmp_path / "csv/kept").rename(tmp_path / "csv/000017.jpg")
    for file in away[1:3]:
        file.with_suffix(".away").rename(file)
    assert main(words(lab, tmp_path / "store", f"{line} 0.2")) == 0
    assert held(tmp_path / "store")[0] == [i for i in range(20) if i not in (7, 12)]


def test_pictures_that_are_gone_for_good_can_be_left_out(lab, tmp_path):
    data = shards.write_csv(tmp_path / "csv", 4)
    for i in (0, 2, 3):
        (tmp_path / f"csv/{i:06d}.jpg").unlink()
    line = f"--train-data {data} --dataset-type csv --max_bad_fraction"
    assert main(words(lab, tmp_path / "store", f"{line} 0.5")) == 2
    assert main(words(lab, tmp_path / "store", f"{line} 1")) == 0
    assert held(tmp_path / "store")[0] == [1]


def test_the_plan_of_a_run_that_writes(lab, capsys):
    assert main([*words(lab, lab.root / "none", "--cache_group_size 3 --cache_rank 1"), "--dry_run"]) == 0
    plan = capsys.readouterr().out
    assert plan.startswith("Caching on 1 rank")
    assert f"the reference's features of each sample to {lab.root}/none/, as job 2 of 3" in plan
    assert not (lab.root / "none").exists()


@pytest.mark.parametrize(
    "flags, form",
    [
        ("--ref_features_error_bound 0.002", " with errors of at most 0.002"),
        ("--ref_features_dtype int8", " in int8"),
    ],
)
def test_the_plan_says_how_features_are_stored(lab, capsys, flags, form):
    assert main([*words(lab, lab.root / "none", flags), "--dry_run"]) == 0
    assert f"the reference's features{form} of each sample to {lab.root}/none/" in capsys.readouterr().out
