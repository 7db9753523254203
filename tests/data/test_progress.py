"""Every launch has the same order, and a stream can be resumed anywhere in it."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.support import tiny_models
from tests.support.ranks import ranks
from tests.support.shards import sample, write_csv, write_shards
from tests.support.streams import config, flat, model, world
from training.checkpoint.pt_file import load_weights, read
from training.data import bad_samples
from training.data import worker as stream_module
from training.data.build import build_train
from training.data.loader import TrainData
from training.data.progress import pack
from training.data.sources import webdataset
from training.data.sources.shards import count_samples
from training.main import main

LAUNCHES = [(1, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
BATCH, SAMPLES = 8, 61
KINDS = {
    "dealt": ["--lanes", "2,2"],
    "by sample": ["--lanes", "2,2"],
    "exact": ["--lanes", "2,2", "--epoch_policy", "exact"],
    "resample": ["--lanes", "2,2", "--epoch_policy", "resample"],
    "csv": ["--lanes", "2,2"],
    "synthetic": ["--lanes", "2,2", "--dataset-type", "synthetic"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """Shards of unequal sizes, one sample of them bad and one image broken; and a csv file."""
    folder = tmp_path_factory.mktemp("data")
    samples = [sample(i, (20, 16)) for i in range(SAMPLES + 2)]
    del samples[20]["txt"]
    samples[33]["jpg"] = b"no image"
    pattern = write_shards(folder, samples, (3, 17, 1, 12, 8, 9, 13))
    return dict.fromkeys(KINDS, pattern) | {
        "csv": write_csv(folder / "csv", SAMPLES, size=(20, 16)),
        "synthetic": None,
    }


@pytest.fixture(autouse=True)
def small_windows(monkeypatch, request):
    """Windows of 5, so that every lane goes through some; sets of this size count as large ones.

    The ranks of a launch are built one after the other here, so each counts the shards by itself.
    """
    monkeypatch.setattr(webdataset, "count_all", lambda urls, *_: [count_samples(url) for url in urls])
    monkeypatch.setattr(webdataset.ShardSource.__init__, "__kwdefaults__", _defaults(window=5))
    kind = getattr(request.node, "callspec", None)
    if kind is None or kind.params.get("kind") != "by sample":
        monkeypatch.setattr(webdataset, "SPLIT_BY_SAMPLE", 0)


def _defaults(**changes):
    return webdataset.ShardSource.__init__.__kwdefaults__ | changes


def launch(data, kind: str, ranks: int, workers: int, flags=None) -> list[TrainData]:
    """The streams of all ranks."""
    given = KINDS[kind] if flags is None else flags
    augmented = [*given, "--aug-cfg", "scale=(0.3,1.0)"]
    c = config(data[kind], *augmented, samples=SAMPLES, batch=BATCH // ranks, workers=workers)
    return [build_train(c, world(r, ranks), model(8), None) for r in range(ranks)]


def state_of(streams: list[TrainData]):
    """What ``state_dict`` gathers from real ranks."""
    return pack(streams[0]._identity(), [stream._progress for stream in streams])


def run(streams, epoch: int, step: int, steps: int):
    """Per step, the rows and pixels of the global batch, in the order in which ranks gather them."""
    out = []
    iterators = [itertools.islice(stream.epoch(epoch, step), steps) for stream in streams]
    for batches in zip(*iterators, strict=True):
        out.append((flat(b.index.tolist() for b in batches), torch.cat([b.image for b in batches])))
    return out


def same(a, b) -> bool:
    return len(a) == len(b) and all(i == j and torch.equal(x, y) for (i, x), (j, y) in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def whole(data):
    """Two epochs of one process, by kind; made when first asked for."""
    made = {}

    def of(kind: str):
        if kind not in made:
            streams = launch(data, kind, 1, 0)
            made[kind] = [run(streams, e, 0, streams[0].steps_per_epoch) for e in range(2)]
        return made[kind]

    return of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "workers"), LAUNCHES[1:])
def test_every_launch_has_the_same_global_batches(data, whole, kind, ranks, workers):
    streams = launch(data, kind, ranks, workers)
    for epoch, expected in enumerate(whole(kind)):
        assert same(run(streams, epoch, 0, len(expected)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_hold_what_their_policy_says(whole, kind):
    first, second = whole(kind)
    assert len(first) == (SAMPLES // BATCH if kind == "exact" else -(-SAMPLES // BATCH))
    assert [rows for rows, _ in first] != [rows for rows, _ in second]
    seen = Counter(row for rows, _ in first for row in rows)
    assert seen.total() == len(first) * BATCH
    if kind == "exact":
        assert seen.total() - len(seen) <= 2  # no sample twice, but in the places of the two bad ones
    elif kind in ("by sample", "csv", "synthetic"):
        assert len(seen) == SAMPLES and max(seen.values()) == 2
    else:
        assert max(seen.values()) >= 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stop", "launches"), enumerate(zip(LAUNCHES, LAUNCHES[1:] + LAUNCHES[:1])))
def test_a_stopped_stream_goes_on_exactly_under_another_launch(data, whole, kind, stop, launches):
    """After the first step, inside windows, at the epoch's end, inside the next one."""
    epochs = whole(kind)
    per_epoch = len(epochs[0])
    steps = (1, 3, 6, per_epoch, per_epoch + 2)[stop]
    streams = launch(data, kind, *launches[0])
    if steps > per_epoch:
        run(streams, 0, 0, per_epoch)
    run(streams, (steps - 1) // per_epoch, 0, (steps - 1) % per_epoch + 1)
    state, (epoch, step) = state_of(streams), divmod(steps, per_epoch)
    assert (state["epoch"], state["step"]) == (epoch, step)

    streams = launch(data, kind, *launches[1], flags=[f for f in KINDS[kind] if f not in ("--lanes", "2,2")])
    assert {stream.resume(state, epoch, step) for stream in streams} == {step}
    assert same(run(streams, epoch, step, per_epoch - step), epochs[epoch][step:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_may_be_stopped_after_every_step(data, whole, kind):
    """Every rank resumes after its own last batch, though other ranks only know an earlier place of its lanes."""
    (expected, _), state = whole(kind), None
    for step in range(len(expected)):
        streams = launch(data, kind, *((2, 0), (2, 0), (1, 0))[step % 3])
        for stream in streams if state else ():
            stream.resume(state, 0, step)
        assert same(run(streams, 0, step, 1), expected[step : step + 1])
        state = state_of(streams)


def test_resuming_reads_files_from_the_window_on_and_commands_without_decoding(data, whole, monkeypatch):
    """What comes before the window is not read if the file can be read from there, and is never decoded."""
    opened = []
    read = webdataset.read_shard
    monkeypatch.setattr(webdataset, "read_shard", lambda *a, **known: opened.append(a) or read(*a, **known))
    streams = launch(data, "dealt", 1, 0)
    run(streams, 0, 0, 5)
    state = state_of(streams)
    assert any(place["offset"] > 0 and place["position"] > 0 for place in state["places"])
    opened.clear()
    (stream,) = launch(data, "dealt", 1, 0)
    stream.resume(state, 0, 5)
    assert same(run([stream], 0, 5, 1), whole("dealt")[0][5:6])
    resumed = [(position, offset) for _, position, offset in opened if position]
    assert resumed and all(offset > 0 for _, offset in resumed)

    pipes = dict(data, dealt=f"pipe:cat {data['dealt']}")
    (piped,) = launch(pipes, "dealt", 1, 0)
    state["source"] = piped._identity().source
    piped.resume(state, 0, 5)
    decoded = []
    decode = stream_module.decode_or_skip
    monkeypatch.setattr(stream_module, "decode_or_skip", lambda raw, *a: decoded.append(raw) or decode(raw, *a))
    assert same(run([piped], 0, 5, 1), whole("dealt")[0][5:6])
    assert BATCH <= len(decoded) <= BATCH + 1  # one image is broken


def test_a_launch_that_the_lanes_do_not_fit_goes_on_with_a_warning(data, caplog):
    streams = launch(data, "dealt", 2, 1)
    run(streams, 0, 0, 3)
    state = state_of(streams)
    c = config(data["dealt"], samples=SAMPLES, batch=2, workers=0)
    others = [build_train(c, world(r, 4), model(8), None) for r in range(4)]
    assert {other.resume(state, 0, 3) for other in others} == {3}
    assert "the lanes 2,2 of the checkpoint do not fit: 4 ranks do not divide 2 virtual ranks" in caplog.text
    assert "some samples come twice in this epoch" in caplog.text
    assert len(run(others, 0, 3, others[0].steps_per_epoch)) == others[0].steps_per_epoch - 3

    caplog.clear()
    half = config(data["dealt"], "--lanes", "2,2", samples=SAMPLES, batch=4, workers=0)
    other = build_train(half, world(), model(8), None)
    assert other.resume(state, 0, 3) == 6  # as many samples in half the batches
    assert "global batch (8 then, 4 now)" in caplog.text


def test_places_of_shards_drawn_with_other_weights_are_not_used(tmp_path, caplog):
    a, b = (write_shards(tmp_path / name, 12, per_shard=4, size=(8, 8)) for name in "ab")

    def drawn(*factors):
        flags = ["--epoch_policy", "resample", "--data_size", "12::12"]
        c = config(f"{a}::{b}", *flags, *factors, samples=24, batch=4)
        return build_train(c, world(), model(8), None)

    equal, other = drawn(), drawn("--train-data-upsampling-factors", "1::3")
    run([equal], 0, 0, 2)
    state = state_of([equal])
    other.resume(state, 0, 2)
    assert "the order of samples is different now: source" in caplog.text
    assert not other._progress.places

    caplog.clear()
    same_weights = drawn("--train-data-upsampling-factors", "1::1")  # earlier versions named no weights
    same_weights.resume(state, 0, 2)
    assert not caplog.records and same_weights._progress.places


def test_rows_by_position_are_those_of_the_same_samples(tmp_path, caplog):
    """A shard that was packed again with another number of samples moves all later rows."""

    def opened(sizes, *flags):
        data = write_shards(tmp_path / "-".join(map(str, sizes)), sum(sizes), sizes, size=(8, 8))
        return build_train(config(data, *flags, samples=12, batch=4), world(), model(8), None)

    by_position = ("--sample_index", "position")
    first = opened((4, 5, 3), *by_position)
    list(first.epoch(0))
    state = first.state_dict()
    for sizes in ((4, 5, 3), (4, 5, 3, 2)):
        opened(sizes, *by_position).check_rows(state)
    for sizes, row in (((5, 5, 3), 4), ((4, 4, 4), 9), ((4, 5, 2), 12)):
        with pytest.raises(ValueError, match=f"--sample_index position: .* at row {row}, and now none does"):
            opened(sizes, *by_position).check_rows(state)
    with pytest.raises(ValueError, match="give --sample_index position"):
        opened((4, 5, 3)).check_rows(state)
    opened((4, 4, 4), *by_position).check_rows({name: state[name] for name in state if name != "bounds"})

    same_shards, others = opened((4, 5, 3), *by_position), opened((4, 4, 4), *by_position)
    same_shards.resume(state, 1, 0)
    assert not caplog.records
    others.resume(state, 1, 0)  # a loss without a sample state: only the places are others
    assert "differs from that of the checkpoint's run: samples per shard" in caplog.text


def test_lanes_that_a_launch_cannot_have_are_refused(data):
    for lanes, k, workers, why in (("3,2", 2, 0, "2 ranks"), ("2,3", 2, 2, "2 workers"), ("16,1", 2, 0, "16")):
        c = config(data["dealt"], "--lanes", lanes, samples=SAMPLES, batch=4, workers=workers)
        with pytest.raises(ValueError, match=f"--lanes {lanes}: .*{why}"):
            build_train(c, world(0, k), model(8), None)


def test_a_key_in_two_shards_is_an_error_that_names_both(tmp_path):
    samples = [sample(i, (8, 8)) for i in range(9)]
    samples[7] = sample(2, (8, 8))
    pattern = write_shards(tmp_path, samples, 3)
    for workers in (0, 1):
        stream = build_train(config(pattern, samples=9, batch=9, workers=workers), world(), model(8), None)
        with pytest.raises(bad_samples.WrongRow, match=r"key 2 is in .*0000[02]\.tar and in .*0000[02]\.tar"):
            list(stream.epoch(0))
    list(
        build_train(config(f"{pattern}", "--sample_index", "position", samples=9), world(), model(8), None).epoch(
            0
        )
    )


def test_training_stopped_inside_an_epoch_is_the_uninterrupted_run(tmp_path):
    """Bit for bit, through the program; the state travels in the checkpoint in plain values."""
    pattern = write_shards(tmp_path, 26, (9, 2, 15))
    flags = ["--model", tiny_models.path("tiny-vit", tmp_path), "--train-data", pattern, "--data_size", "30"]
    flags += ["--train-num-samples", "26", "--batch-size", "4", "--epochs", "2", "--warmup", "1", "--lr", "1e-3"]
    flags += ["--fastclip", "--gamma", "0.6", "--precision", "fp32", "--logs", str(tmp_path / "logs")]
    assert main([*flags, "--workers", "0", "--lanes", "1,2", "--name", "whole"]) == 0
    assert main([*flags, "--workers", "2", "--name", "parts", "--stop_iters", "3"]) == 0
    step = tmp_path / "logs/parts/checkpoints/step_3.pt"
    assert read(step)["stream"]["lanes"] == [1, 2] and len(read(step)["stream"]["places"]) == 2
    assert main([*flags, "--workers", "1", "--name", "parts", "--resume", "latest", "--stop_iters", "9"]) == 0
    assert main([*flags, "--workers", "0", "--name", "parts", "--resume", "latest"]) == 0
    whole, parts = (Path(tmp_path, "logs", name, "checkpoints/epoch_2.pt") for name in ("whole", "parts"))
    a, b = load_weights(whole), load_weights(parts)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert read(whole)["step"] == read(parts)["step"] == 14


def stop_on_ranks(pattern: str) -> dict:
    """The state of two real ranks after three steps."""
    rank = torch.distributed.get_rank()
    c = config(pattern, *KINDS["by sample"], "--aug-cfg", "scale=(0.3,1.0)", samples=SAMPLES, batch=4, workers=0)
    stream = build_train(c, world(rank, 2), model(8), None)
    run([stream], 0, 0, 3)
    return stream.state_dict()


@pytest.mark.parametrize("kind", ["by sample"])
def test_the_state_of_all_ranks_is_gathered(data, kind, monkeypatch):
    monkeypatch.setattr(webdataset.ShardSource.__init__, "__kwdefaults__", _defaults(window=webdataset.WINDOW))
    first, second = ranks(2).run(stop_on_ranks, data[kind])
    assert first == second and [held["lane"] for held in first["places"]] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    expected = run(launch(data, kind, 1, 0), 0, 0, 4)[3:]
    resumed = launch(data, kind, 1, 0)
    assert resumed[0].resume(first, 0, 3) == 3
    assert same(run(resumed, 0, 3, 1), expected)


@pytest.mark.parametrize("kind", ["dealt", "by sample", "resample"])
def test_every_launch_counts_the_same_bad_samples_stopped_or_not(tmp_path, kind):
    """What was read ahead when a run stops does not count twice, nor does a window that is read again."""
    samples = [sample(i, (8, 8)) for i in range(SAMPLES)]
    for i in range(0, SAMPLES, 6):
        del samples[i]["txt"]
        samples[(i + 3) % SAMPLES]["jpg"] = b"no image"
    pattern = {kind: write_shards(tmp_path, samples, (3, 17, 1, 12, 8, 9, 11))}
    flags = [*KINDS[kind], "--max_bad_fraction", 1]

    def counts(streams) -> Counter:
        return sum((stream.skips.take_epoch().counts for stream in streams), Counter())

    alone = launch(pattern, kind, 1, 0, flags)
    whole = []
    for epoch in range(2):
        run(alone, epoch, 0, alone[0].steps_per_epoch)
        whole.append(counts(alone))
    assert set(whole[0]) == {"missing text", "undecodable image"} and min(whole[0].values()) > 5
    for stop, first, second in ((1, (2, 1), (1, 0)), (4, (1, 0), (2, 0)), (6, (1, 2), (2, 1))):
        streams = launch(pattern, kind, *first, flags)
        run(streams, 0, 0, stop)
        before, state = counts(streams), state_of(streams)
        assert before.total() < whole[0].total()
        streams = launch(pattern, kind, *second, flags)
        assert {stream.resume(state, 0, stop) for stream in streams} == {stop}
        run(streams, 0, stop, streams[0].steps_per_epoch - stop)
        assert before + counts(streams) == whole[0]
        run(streams, 1, 0, streams[0].steps_per_epoch)
        assert counts(streams) == whole[1]


def test_a_run_whose_rows_would_move_does_not_resume(tmp_path, capsys):
    flags = ["--model", tiny_models.path("tiny-vit", tmp_path), "--data_size", "12", "--sample_index", "position"]
    flags += ["--train-num-samples", "12", "--batch-size", "4", "--epochs", "2", "--fastclip", "--workers", "0"]
    flags += ["--logs", str(tmp_path / "logs"), "--name", "run", "--precision", "fp32"]
    flags += ["--train-data", write_shards(tmp_path, 12, (4, 5, 3))]
    assert main([*flags, "--stop_iters", "1"]) == 0
    write_shards(tmp_path, 12, (4, 4, 4))
    assert main([*flags, "--resume", "latest"]) == 2
    assert "at row 9, and now none does" in "".join(capsys.readouterr())
