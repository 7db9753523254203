"""Which sets are found below a folder, and what is read of them."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest

from tests.support import evalsets, shards
from tests.support.pictures import write_folders
from training.evaluation.benchmark.associations import AssociationSet
from training.evaluation.benchmark.classification import LabelledSet, MultilabelSet
from training.evaluation.benchmark.retrieval_sets import CaptionedSet
from training.evaluation.benchmark.sets import find_sets, read_picture
from training.evaluation.benchmark.tasks import TASKS, WITH_MAIN_METRIC

FLICKR = "nlphuji/flickr_1k_test_image_text_retrieval"


def find(folder, words="all"):
    return find_sets(str(folder), words, "--data_dir", "--tasks")


def only(folder, words="all"):
    (one,) = find(folder, words).found
    return one.open()


def jpg(i):
    return evalsets.encoded(i, "jpg")


def test_the_table_is_that_of_the_benchmark():
    assert (len(TASKS), len(WITH_MAIN_METRIC)) == (40, 38)
    assert len({task.name for task in TASKS}) == len({task.folders[0] for task in TASKS}) == 40
    by_group = [
        sum(task.group == group for task in TASKS) for group in ("ImageNet", "ImageNet dist. shifts", "VTAB")
    ]
    assert by_group == [1, 6, 13]


def test_sets_of_the_benchmark_and_further_ones(tmp_path):
    evalsets.write_classification(tmp_path / "wds_mnist_test", [0, 1], ["a", "b"])
    evalsets.write_classification(tmp_path / "wds_geode_test", [0, 1], ["a", "b"], [[0, 1], [1, 0]])
    evalsets.write_classification(tmp_path / "wds_mine_test", [0, 1], ["a", "b"])
    write_folders(tmp_path / "animals", ["ant", "bee"])
    shards.write_shards(tmp_path / "pairs", 3, per_shard=2)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    catalog = find(tmp_path)
    assert [one.key for one in catalog.found] == ["mnist", "fairness/geode", "animals", "pairs", "mine"]
    assert len(catalog.missing) == 38
    kinds = [type(one.open()) for one in catalog.found]
    assert kinds == [LabelledSet, LabelledSet, LabelledSet, CaptionedSet, LabelledSet]
    for words in ("MNIST,animals", "wds_mnist_test,animals", "mnist , animals"):
        assert [one.key for one in find(tmp_path, words).found] == ["mnist", "animals"]
    assert [one.key for one in find(tmp_path / "wds_mnist_test").found] == ["mnist"]  # the folder of one set


def test_folders_that_may_be_no_sets_are_not_sure(tmp_path):
    evalsets.write_classification(tmp_path / "wds_mine_test", [0, 1], ["a", "b"])
    (tmp_path / "other/inner").mkdir(parents=True)
    (tmp_path / "other/more").mkdir()
    assert {one.key: one.sure for one in find(tmp_path).found} == {"mine": True, "other": False}
    assert find(tmp_path, "other").found[0].sure


def test_members_are_parted_at_the_first_dot(tmp_path):
    """Further files of a sample are left alone; the first of webp, png, jpg is its picture."""
    samples = [
        {"__key__": "a/0", "cls": "1", "jpg": jpg(0), "mask.png": b"no", "png": evalsets.encoded(1)},
        {"__key__": "a/1.5", "cls": "0", "JPEG": jpg(2)},
    ]
    found = only(evalsets.write_wds(tmp_path / "wds_mnist_test", samples, ["x", "y"]).parent)
    assert found.labels.tolist() == [1, 0]
    assert [found.source.read(i) for i in range(2)] == [evalsets.encoded(1), jpg(2)]


def test_captions_in_lines_and_in_jsons(tmp_path):
    samples = [
        {"__key__": "0", "jpg": jpg(0), "txt": "one\n\ntwo \n"},
        {"__key__": "1", "jpg": jpg(1), "json": {"captions": ["three", "four"]}},
        {"__key__": "2", "jpg": jpg(2), "json": ["five"]},
        {"__key__": "3", "jpg": jpg(3)},
    ]
    found = only(evalsets.write_wds(tmp_path / "wds_mine_test", samples, kind="retrieval").parent)
    assert found.captions == [["one", "two"], ["three", "four"], ["five"]]
    assert "samples without a picture or without a caption are not used: 1" in found.remarks[0]


def test_several_labels(tmp_path):
    samples = [{"__key__": f"{i}", "jpg": jpg(i), "npy": evalsets.npy([i % 2, 1])} for i in range(3)]
    found = only(evalsets.write_wds(tmp_path / "wds_mine_test", samples, ["x", "y"], kind="multilabel").parent)
    assert isinstance(found, MultilabelSet)
    assert found.targets.tolist() == [[False, True], [True, True], [False, True]]


def association(number, cue, candidates, associations):
    """A sample of WinoGAViL: picture i of instance n is ``jpg(10 n + i)``."""
    sample = {f"{i}.jpg": jpg(10 * number + i) for i in range(len(candidates))}
    held = {"cue": cue, "candidates": candidates, "associations": associations, "num_associations": 1}
    return sample | {"__key__": f"{number:04d}", "json": held}


@pytest.mark.parametrize("folder, kind", [("wds_winogavil_test", ""), ("wds_mine_test", "winogavil")])
def test_winogavil_as_a_webdataset(tmp_path, folder, kind):
    samples = [association(0, "owl", ["a", "b", "c"], ["c"]), association(1, "Ice", ["x", "y"], ["y", "x"])]
    samples[1]["1.webp"] = evalsets.encoded(3, "webp")  # comes before the jpg, as everywhere
    found = only(evalsets.write_wds(tmp_path / folder, samples, kind=kind, per_shard=1).parent)
    assert isinstance(found, AssociationSet)
    assert [(one.cue, list(one.right)) for one in found.instances] == [
        ("owl", [False, False, True]),
        ("Ice", [True, True]),
    ]
    pictures = [[found.source.read(number) for number in one.pictures] for one in found.instances]
    assert pictures == [[jpg(0), jpg(1), jpg(2)], [jpg(10), evalsets.encoded(3, "webp")]]


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda s: s.pop("json"), "0000.* in 0.tar has no .json with cue, candidates, associations"),
        (lambda s: s["json"].update(associations=[]), "0000 in 0.tar has no .json with cue"),
        (lambda s: s.pop("1.jpg"), "0000 in 0.tar has no .1.jpg, the picture of b"),
    ],
)
def test_broken_instances_are_refused(tmp_path, spoil, says):
    sample = association(0, "owl", ["a", "b", "c"], ["c"])
    spoil(sample)
    evalsets.write_wds(tmp_path / "wds_winogavil_test", [sample])
    with pytest.raises(ValueError, match=f"--data_dir .*wds_winogavil_test: {says}"):
        only(tmp_path)


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda s: s.pop("npy"), r"s00001 has no \.npy file with region, country"),
        (lambda s: s.update(npy=b"broken"), r"s00001\.npy cannot be read"),
        (lambda s: s.update(npy=evalsets.npy([1])), r"s00001\.npy holds \[1\], not 2 numbers"),
        (lambda s: s.update(cls="7"), "s00001.cls holds '7', not a class number 0..1"),
        (lambda s: s.pop("cls"), "s00001 in 0.tar has no picture, or no .cls file"),
    ],
)
def test_broken_sets_are_refused_with_the_sample(tmp_path, spoil, says):
    samples = [{"__key__": f"s{i:05d}", "jpg": jpg(i), "cls": "1", "npy": evalsets.npy([i, 0])} for i in range(3)]
    spoil(samples[1])
    evalsets.write_wds(tmp_path / "wds_geode_test", samples, ["x", "y"])
    with pytest.raises(ValueError, match=f"--data_dir .*wds_geode_test: {says}"):
        only(tmp_path)


def test_a_csv_that_names_a_picture_which_is_not_there(tmp_path):
    rows = [{"filename": "a.jpg", "caption": ["one"]}, {"filename": "b.jpg", "caption": ["two"]}]
    evalsets.write_csv_and_zip(tmp_path / FLICKR, "test", rows, {"a.jpg": jpg(0)})
    with pytest.raises(ValueError, match=r"test\.csv names the picture b\.jpg, which no zip file there has"):
        only(tmp_path)
    shutil.rmtree(tmp_path / FLICKR)
    evalsets.write_csv_and_zip(tmp_path / FLICKR, "test", [{"path": "a.jpg", "caption": "one"}], {"a.jpg": jpg(0)})
    with pytest.raises(ValueError, match="has no columns filename and caption; its columns are path, caption"):
        only(tmp_path)


def test_parquet(tmp_path):
    """As the hub has them: structs of bytes, several files and row groups, other splits beside."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / FLICKR / "data"
    folder.mkdir(parents=True)
    for number, some in enumerate(([0, 1, 2], [3, 4])):
        rows = [
            {"image": {"bytes": jpg(i), "path": f"{i}"}, "caption": [f"a{i}", f"b{i}"][: 1 + i % 2]} for i in some
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"test-0000{number}-of-2.parquet", row_group_size=2)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-1.parquet")
    found = only(tmp_path)
    assert found.captions == [["a0"], ["a1", "b1"], ["a2"], ["a3", "b3"], ["a4"]]
    assert [found.source.read(i) for i in (4, 0, 1, 2, 3)] == [jpg(i) for i in (4, 0, 1, 2, 3)]
    assert [read_picture(found.source.place(i)) for i in (4, 0, 3)] == [jpg(i) for i in (4, 0, 3)]

    shutil.rmtree(tmp_path / "nlphuji")
    (tmp_path / "nlphuji/winogavil").mkdir(parents=True)
    rows = [
        {
            "cue": cue,
            "candidates": [f"{i}" for i in some],
            "associations": [f"{some[1]}"],
            "candidate_images": [{"bytes": jpg(i), "path": None} for i in some],
        }
        for cue, some in (("sun", [3, 1, 2]), ("ice", [5, 4]))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "nlphuji/winogavil/test.parquet")
    found = only(tmp_path)
    assert isinstance(found, AssociationSet)
    assert [list(one.right) for one in found.instances] == [[False, True, False], [False, True]]
    assert [found.source.read(n) for n in found.instances[1].pictures] == [jpg(5), jpg(4)]
    assert read_picture(found.source.place(found.instances[1].pictures[0])) == jpg(5)


def test_arrays_are_read_without_running_code(tmp_path):
    """An object array is pickled, and could run anything."""
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}, None]), allow_pickle=True)
    samples = [{"__key__": f"{i}", "jpg": jpg(i), "cls": "1", "npy": file.getvalue()} for i in range(2)]
    evalsets.write_wds(tmp_path / "wds_geode_test", samples, ["x", "y"])
    with pytest.raises(ValueError, match=r"0\.npy cannot be read"):
        only(tmp_path)
