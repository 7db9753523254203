"""The data path as a run sees it: flags in, batches out."""

from __future__ import annotations

import logging
import math
import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.shards import caption, picture, sample, write_csv, write_shards, write_tar
from tests.support.streams import Letters, config, flat, global_batches, model, rows, text_of, train
from training.data.bad_samples import NothingUsable
from training.data.build import same_tokens, steps_per_epoch


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (1, 6)])
@pytest.mark.parametrize("per_shard", [12, (5, 1, 6), (7, 5)])
def test_set_of_one_global_batch_is_seen_once_per_epoch(tmp_path, per_shard, ranks, workers):
    pattern = write_shards(tmp_path, 12, per_shard)
    c = config(pattern, samples=12, batch=12 // ranks, workers=workers)
    data = [train(c, rank, ranks) for rank in range(ranks)]
    for epoch in range(2):
        (step,) = zip(*(rows(d.epoch(epoch)) for d in data), strict=True)
        assert sorted(flat(step)) == list(range(12))
        assert {len(part) for part in step} == {12 // ranks}


@pytest.mark.parametrize("kind", ["webdataset", "csv"])
def test_small_sets_have_one_order_whatever_ranks_and_workers(tmp_path, kind):
    data = write_shards(tmp_path, 22, (9, 2, 11)) if kind == "webdataset" else write_csv(tmp_path, 22)

    def order(ranks, workers, epoch=1):
        c = config(data, samples=22, batch=8 // ranks, workers=workers)
        return global_batches(c, ranks, epoch)

    alone = order(1, 0)
    assert len(alone) == 3 and all(len(step) == 8 for step in alone)
    places = Counter(flat(alone))
    assert set(places) == set(range(22)) and sum(places.values()) == 24  # all 22, two of them once more
    assert order(1, 1) == order(1, 3) == order(2, 0) == order(2, 2) == order(4, 1) == alone
    assert order(1, 0, epoch=2) != alone


def test_order_depends_on_seed_and_epoch_alone(tmp_path):
    pattern = write_shards(tmp_path, 24, 5)
    c = config(pattern, samples=24, workers=2)
    flowing = train(c)
    epochs = [rows(flowing.epoch(e)) for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert rows(train(c).epoch(2)) == epochs[2]  # started there, as after a resume
    assert rows(flowing.epoch(1)) == epochs[1]  # and going back
    assert rows(train(config(pattern, "--seed", "1", samples=24, workers=2)).epoch(0)) != epochs[0]


def test_epoch_left_early_starts_again(tmp_path):
    data = train(config(write_shards(tmp_path, 16, 4), samples=16, workers=1))
    whole = rows(data.epoch(0))
    for _ in data.epoch(1):
        break
    assert rows(data.epoch(0)) == whole


def test_steps_are_known_without_data_and_kept(tmp_path):
    c = config(str(tmp_path / "nowhere-{000..999}.tar"), samples=1001, batch=10)
    assert steps_per_epoch(c, 1) == 101 and steps_per_epoch(c, 3) == math.ceil(1001 / 30)
    data = train(config(write_shards(tmp_path, 10, 3), samples=10, batch=4), 0, 2)
    assert (data.steps_per_epoch, data.samples_per_epoch) == (2, 16)
    assert rows(data.epoch(0)) and all(len(batch) == 4 for batch in data.epoch(0))


def test_what_an_epoch_is_stands_in_the_log(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    pattern = write_shards(tmp_path, [sample(i, (8, 8)) for i in range(30)], 5)

    def told(*flags: str, ranks: int = 1, **options) -> str:
        caplog.clear()
        train(config(pattern, *flags, batch=4, **options), 0, ranks)
        (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("training data: ")]
        return line.removeprefix("training data: ")

    assert told(samples=30, workers=2) == (
        "6 shards, read by all 2 lanes and dealt by sample; lanes 1,2 (virtual ranks, workers); "
        "an epoch has 30 samples in 8 steps of 4, 2 repeated to fill the last batch"
    )
    assert told("--epoch_policy", "exact", samples=30).endswith(
        "30 samples in 7 steps of 4, 2 left out (different ones in each epoch)"
    )
    assert told(samples=24, ranks=2).endswith("24 samples in 3 steps of 8, none repeated, none left out")
    monkeypatch.setattr("training.data.sources.webdataset.SPLIT_BY_SAMPLE", 0)
    assert told("--lanes", "2,2", samples=30).startswith("6 shards, 1.5 for each of 4 lanes; lanes 2,2 ")
    drawn = told("--dataset-resampled", samples=30, workers=3)
    assert drawn.startswith("6 shards, drawn with replacement by each of 3 lanes; lanes 1,3 ")


def test_views_are_the_samples_own_whatever_the_workers(tmp_path):
    pattern = write_shards(tmp_path, 12, 4)

    def views(ranks, workers, epoch=0):
        c = config(pattern, "--aug-cfg", "scale=(0.2,1.0)", samples=12, batch=12 // ranks, workers=workers)
        batches = [b for rank in range(ranks) for b in train(c, rank, ranks).epoch(epoch)]
        return {int(i): image for b in batches for i, image in zip(b.index, b.image)}

    alone = views(1, 0)
    assert alone[0].dtype == torch.uint8 and alone[0].shape == (3, 16, 16)
    for ranks, workers in ((1, 2), (2, 0), (2, 1)):
        again = views(ranks, workers)
        assert all(torch.equal(alone[i], again[i]) for i in range(12))
    other = views(1, 0, epoch=1)
    assert not any(torch.equal(alone[i], other[i]) for i in range(12))


@pytest.mark.parametrize("workers", [0, 1])
def test_random_state_of_the_run_is_left_alone(tmp_path, workers):
    data = train(config(write_shards(tmp_path, 8, 4), "--rand_augment", samples=8, workers=workers))

    def state():
        return torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002

    def seed():
        torch.manual_seed(5), random.seed(5), np.random.seed(5)  # noqa: NPY002

    seed()
    expected = [state() for _ in range(3)]
    seed()
    assert [state() for _ in data.epoch(0)] == expected[:2] and state() == expected[2]


def test_image_text_and_row_belong_together(tmp_path):
    samples = [sample(i, key=100 + i) for i in range(8)]
    c = config(write_shards(tmp_path, samples, 3), "--aug-cfg", "scale=(1.0,1.0)", samples=8, batch=8)
    target, reference = model(20), model(24, Letters(12))
    (batch,) = train(c, target=target, reference=reference).epoch(0)
    assert batch.ref_image.shape == (8, 3, 24, 24) and batch.ref_text.shape == (8, 12)
    assert batch.index.dtype == torch.int64 and batch.text.dtype == torch.int64
    whole = np.stack([np.asarray(picture(i).resize((20, 20)), dtype=float) for i in range(8)])
    for k, row in enumerate(batch.index.tolist()):
        assert text_of(batch.text[k]) == caption(row - 100)
        assert text_of(batch.ref_text[k]) == caption(row - 100)[:12]
        seen = batch.image[k].permute(1, 2, 0).numpy()
        assert np.abs(seen - whole).mean((1, 2, 3)).argmin() == row - 100


def test_one_view_and_one_text_serve_both_models_where_they_can(tmp_path):
    c = config(write_shards(tmp_path, 4, 4), samples=4)
    (batch,) = train(c, target=model(16), reference=model(16, mean=(0, 0, 0), std=(1, 1, 1))).epoch(0)
    assert batch.ref_image is None and batch.ref_text is None
    assert same_tokens(Letters(), Letters()) and not same_tokens(Letters(), Letters(41))


def test_resampling_follows_the_upsampling_factors(tmp_path):
    a = write_shards(tmp_path / "a", [sample(i, (8, 8)) for i in range(6)], 2)
    b = write_shards(tmp_path / "b", [sample(100 + i, (8, 8)) for i in range(6)], 2)
    flags = ("--dataset-resampled", "--train-data-upsampling-factors", "1::3")
    c = config(f"{a}::{b}", *flags, samples=120, batch=60)
    seen = Counter(row >= 100 for row in flat(rows(train(c).epoch(0))))
    assert seen[True] / 120 == pytest.approx(0.75, abs=0.13)  # 60 draws of a shard: 2.3 standard deviations
    assert rows(train(c).epoch(0)) == rows(train(c).epoch(0)) != rows(train(c).epoch(1))
    halves = [flat(rows(train(config(f"{a}::{b}", *flags, samples=120, batch=30), r, 2).epoch(0))) for r in (0, 1)]
    assert halves[0] != halves[1]  # each rank draws for itself


def test_sources_with_ranges_and_with_shared_rows(tmp_path):
    a = write_shards(tmp_path / "a", [sample(i) for i in range(4)], 2)
    b = write_shards(tmp_path / "b", [sample(i) for i in range(4)], 3)
    own = config(f"{a}::{b}", samples=8, batch=8, rows="6::4")
    assert sorted(rows(train(own).epoch(0))[0]) == [0, 1, 2, 3, 6, 7, 8, 9]
    c = write_shards(tmp_path / "c", [sample(4 + i) for i in range(4)], 4)
    shared = config(f"{a}::{c}", samples=8, batch=8, rows=8)
    assert sorted(rows(train(shared).epoch(0))[0]) == list(range(8))
    short = config(f"{a}::{b}", samples=6, batch=6, rows="2::9")
    data = train(short)
    assert sorted(rows(data.epoch(0))[0]) == [0, 1, 2, 3, 4, 5]
    assert data.skips.total.counts == {"key out of range": 2}


def test_rows_by_position_need_no_json(tmp_path):
    samples = [sample(i) for i in range(10)]
    for s in samples:
        del s["json"]
    pattern = write_shards(tmp_path, samples, (3, 5, 2))
    c = config(pattern, "--sample_index", "position", samples=10, batch=10, rows=10)
    (batch,) = train(c).epoch(0)
    assert sorted(batch.index.tolist()) == list(range(10))
    assert all(text_of(text) == caption(int(row)) for text, row in zip(batch.text, batch.index))
    a, b = write_shards(tmp_path / "a", samples, 4), write_shards(tmp_path / "b", samples, 6)
    two = config(f"{a}::{b}", "--sample_index", "position", samples=20, batch=20, rows="11::10")
    assert sorted(rows(train(two).epoch(0))[0]) == [*range(10), *range(11, 21)]
    one = config(f"{a}::{b}", "--sample_index", "position", samples=20, batch=20, rows=20)
    assert sorted(rows(train(one).epoch(0))[0]) == list(range(20))


def test_without_rows_the_index_still_tells_samples_apart(tmp_path):
    samples = [sample(i) for i in range(6)]
    for s in samples:
        del s["json"]
    c = config(write_shards(tmp_path, samples, 3), samples=6, batch=6, rows=-1)
    data = train(c)
    (first,), (second,) = data.epoch(0), data.epoch(1)
    assert len(set(first.index.tolist())) == 6 and first.index.max() < 0
    assert set(first.index.tolist()) == set(second.index.tolist())


def test_ranks_read_all_shards_where_nodes_have_their_own(tmp_path):
    pattern = write_shards(tmp_path, 8, 2)
    c = config(pattern, "--skip_webdataset_split_by_node", samples=16, batch=8)
    assert steps_per_epoch(c, 2) == 1
    orders = [rows(train(c, rank, 2).epoch(0))[0] for rank in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(8))
    assert orders[0] != orders[1]


BAD = {
    "missing image": lambda s: s.pop("jpg"),
    "missing text": lambda s: s.pop("txt"),
    "missing json": lambda s: s.pop("json"),
    "text is not utf-8": lambda s: s.update(txt=b"\xff\xfe"),
    "json is not valid": lambda s: s.update(json="{key"),
    "json without key": lambda s: s.update(json={"id": 3}),
    "key is not an integer": lambda s: s.update(json={"key": 3.5}),
    "key out of range": lambda s: s.update(json={"key": "-1"}),
    "undecodable image": lambda s: s.update(jpg=s["jpg"][:200]),
}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_left_out_and_counted_by_reason(tmp_path, workers, caplog):
    samples = [sample(i) for i in range(24)]
    planted = Counter()
    for i, (reason, spoil) in enumerate(BAD.items()):
        for j in {i, 23 - i} if i < 3 else {i}:
            spoil(samples[j])
            planted[reason] += 1
    pattern = write_shards(tmp_path, samples, 5)
    good = 24 - planted.total()
    # more than one turn, so that every lane has met all its samples
    data = train(config(pattern, samples=good + 10, batch=good + 10, workers=workers, rows=24))
    with caplog.at_level(logging.WARNING):
        (batch,) = data.epoch(0)
    assert set(batch.index.tolist()) == set(range(9, 21))
    assert data.skips.total.counts.keys() == planted.keys()
    for reason, n in planted.items():  # more than one turn, less than two, but for lanes that are ahead of others
        assert n <= data.skips.total.counts[reason] <= (3 if workers else 2) * n, reason
    assert "undecodable image" in caplog.text and "00001.tar/000008" in caplog.text


@pytest.mark.parametrize("kind", ["missing files", "bad samples", "empty tar", "broken images", "csv"])
@pytest.mark.parametrize("workers", [0, 3])
def test_data_in_which_nothing_is_usable_stops(tmp_path, kind, workers):
    if kind == "missing files":
        data = str(tmp_path / "{000..123}.tar")
    elif kind == "empty tar":
        data = str(write_tar(tmp_path / "0.tar", []))
    elif kind == "csv":
        data = write_csv(tmp_path, 5)
        for file in tmp_path.glob("*.jpg"):
            file.unlink()
    else:
        samples = [sample(i) for i in range(5)]
        for s in samples:
            s.update(json="no json" if kind == "bad samples" else s["json"], jpg=b"no image")
        data = write_shards(tmp_path, samples, 2)
    with pytest.raises(NothingUsable, match="usable"):
        next(train(config(data, samples=5, batch=5, workers=workers)).epoch(0))


def test_one_good_sample_among_many_lanes_is_enough(tmp_path):
    samples = [sample(i) for i in range(7)]
    for s in samples[1:]:
        s["jpg"] = b"no image"
    c = config(write_shards(tmp_path, samples, 2), samples=7, batch=7, workers=3)
    assert rows(train(c).epoch(0)) == [[0] * 7]


def test_csv(tmp_path):
    path = write_csv(tmp_path, 9, separator=",")
    c = config(path, "--csv-separator", ",", batch=4, rows=9)
    assert steps_per_epoch(c, 1) == 3
    batches = list(train(c).epoch(0))
    assert set(flat(rows(batches))) == set(range(9))
    assert all(text_of(t) == caption(int(i)) for b in batches for t, i in zip(b.text, b.index))
    (tmp_path / "000004.jpg").write_bytes(b"no image")
    data = train(c)
    assert set(flat(rows(data.epoch(0)))) == set(range(9)) - {4}
    assert 1 <= data.skips.total.counts["undecodable image"] <= 2  # the epoch's 12 samples end in a second turn
    with pytest.raises(ValueError, match="--data_size 8"):
        train(config(path, "--csv-separator", ",", rows=8))
    with pytest.raises(ValueError, match=r"--csv-img-key.*filepath|filepath.*--csv-img-key"):
        train(config(path, "--csv-separator", ";", rows=9))


def test_synthetic():
    c = config(None, "--dataset-type", "synthetic", samples=10, batch=4, workers=1)
    (first, *_), (again, *_) = train(c).epoch(0), train(c).epoch(0)
    assert first.image.shape == (4, 3, 16, 16) and first.image.dtype == torch.uint8 and first.text.shape == (4, 40)
    assert torch.equal(first.image, again.image) and first.image.float().std() > 10
    assert len({text_of(t) for t in first.text}) == 4
    seen = Counter(flat(rows(train(c).epoch(0))))
    assert set(seen) == set(range(10)) and seen.total() == 12 and max(seen.values()) == 2


def test_loader_processes_need_no_fork(tmp_path):
    c = config(write_shards(tmp_path, 8, 4), samples=8, workers=1)
    data = train(c)
    stream = pickle.loads(pickle.dumps(data._stream))  # what spawn and forkserver send to a process
    first = next(iter(stream)).batch
    again = next(data.epoch(0))
    assert torch.equal(first.image, again.image) and torch.equal(first.index, again.index)


@pytest.mark.parametrize("reference", [None, model(24, Letters(12))])
def test_batches_of_loader_processes_are_kept(tmp_path, reference):
    """All tensors of them, however long they are held on to."""
    pattern = write_shards(tmp_path, 24, 5)
    alone, by_others = (
        list(train(config(pattern, samples=24, batch=2, workers=w), reference=reference).epoch(0)) for w in (0, 1)
    )
    assert len(alone) == 12
    for a, b in zip(alone, by_others, strict=True):
        for name, tensor in vars(a).items():
            other = getattr(b, name)
            assert (tensor is None and other is None) or torch.equal(tensor, other), name
            assert tensor is None or tensor.stride() == other.stride()


LEFT = """
import sys
sys.path.insert(0, {root!r})
from tests.support.streams import config, train
data = train(config(None, "--dataset-type", "synthetic", samples=64, batch=2, workers=1))
batches = data.epoch(0)
print(len(next(batches)))
"""


def test_a_program_ends_though_its_loader_is_in_use():
    code = LEFT.format(root=str(Path(__file__).parents[2]))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert (ended.returncode, ended.stdout) == (0, "2\n"), ended.stderr
