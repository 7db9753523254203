"""Training on cached reference features equals training on the live reference, or ends with an error message."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tests.support import shards
from tests.support.lab import Lab
from training.cache.features import PublishedFeatures, open_features, published_files
from training.config.params import parse
from training.data.bad_samples import WrongRow
from training.main import main

REFERENCE = "--ref_model @reference --ref_model_pretrained @reference_weights"
WRITE = f"{REFERENCE} --cache_ref_model_features --train-data @squares --cached_ref_features_dir @features"
# One fixed view of square images; plain SGD, under which rounding stays rounding.
SGD = "--optimizer sgd --lr 0.01 --epochs 1"
FIXED = f"--train-data @squares --train-num-samples 16 --aug-cfg scale=(1.0,1.0) {SGD} --fastclip"
CACHED = "--cached_ref_features_dir @features"


class CacheLab(Lab):
    """A lab with square pictures, their features, and other files that a few commands need."""

    @property
    def squares(self) -> str:
        if not (self.root / "squares").exists():
            shards.write_shards(self.root / "squares", 16, per_shard=[5, 4, 7], size=(48, 48))
        return str(self.root / "squares/{00000..00002}.tar")

    @property
    def more_squares(self) -> str:
        """Eight others, whose keys start at 0 again."""
        if not (self.root / "more").exists():
            samples = [shards.sample(100 + i, (48, 48), key=i) for i in range(8)]
            shards.write_shards(self.root / "more", samples, per_shard=4)
        return str(self.root / "more/{00000..00001}.tar")

    @property
    def features(self) -> str:
        folder = self.root / "features"
        if not folder.exists():
            folder.mkdir()
            assert main([*self.words(WRITE), "--name", "write"]) == 0
        return str(folder)


@pytest.fixture(scope="module")
def lab(one_thread, tmp_path_factory) -> CacheLab:
    return CacheLab(tmp_path_factory.mktemp("lab"))


def trained(lab: Lab, line: str) -> dict[str, torch.Tensor]:
    """The weights after a run."""
    run = lab.run(lab.words(line))
    assert run.code == 0, line
    return run.saved["state_dict"]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-6)


def fails(lab: Lab, line: str, capsys) -> str:
    """The sentence with which a run ends."""
    capsys.readouterr()
    assert main([*lab.words(line), "--name", f"fails{next(lab.numbers)}"]) == 2
    return capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------------------ as the live reference


@pytest.mark.parametrize(
    "use",
    [
        "--gamma 0.5",
        "--multiply_tau --batch-size 4 --accum-freq 2",
        "--gamma 1.0 --ref_features_usage ref,distill",
        "--ref_features_usage select --batch-size 8 --ref_filter_ratio 0.5",
        "--gamma 0.5 --workers 1",
        "--temperature_scheme individual_learnable",
    ],
)
def test_as_with_the_live_reference(lab, use):
    live, cached = (trained(lab, f"{FIXED} {use} {source}") for source in (REFERENCE, CACHED))
    assert_same(cached, live)


def test_the_features_matter(lab):
    with pytest.raises(AssertionError, match="not close"):
        assert_same(trained(lab, f"{FIXED} --gamma 0.5 {CACHED}"), trained(lab, f"{FIXED} --gamma 0.5"))


def test_the_reference_is_not_built(lab):
    """Whether the flags name it or not."""
    for line in (CACHED, f"{CACHED} {REFERENCE}"):
        run = lab.run(lab.words(f"{FIXED} --gamma 0.5 {line}"))
        assert "reference tiny-vit-reference" not in run.log
        assert "features are read from disk: 16 rows of 2 x 24 float32" in run.log
        assert "one fixed view of each image, whatever augmentation" in run.log
    assert "reference tiny-vit-reference" in lab.run(lab.words(f"{FIXED} --gamma 0.5 {REFERENCE}")).log


def test_the_distillation_baseline(lab):
    flags = "--distill-model @reference --distill-pretrained @reference_weights"
    line = FIXED.replace("--fastclip", flags)
    assert_same(trained(lab, f"{line} {CACHED}"), trained(lab, line))
    named = FIXED.replace("--fastclip", "--loss distill")
    assert_same(trained(lab, f"{named} {CACHED}"), trained(lab, line))


def test_half_precision_is_close(lab, tmp_path):
    """Written under bfloat16 and stored as float16: as close to float32 as bfloat16 is."""
    half = f"{WRITE.replace('@features', str(tmp_path / 'half'))} --precision amp_bf16"
    assert main([*lab.words(half), "--name", "half"]) == 0
    config = f"{FIXED} --cached_ref_features_dir"
    found = [
        next(iter(features_of(lab, f"{config} {folder}"))) for folder in (lab.features, str(tmp_path / "half"))
    ]
    assert found[1].dtype == torch.float16
    assert (found[0] - found[1].float()).abs().max() < 0.02
    assert (found[0] * found[1].float()).sum(-1).min() > 0.999


def features_of(lab: Lab, line: str) -> torch.Tensor:
    """The features of the 16 samples by row, as training gets them. [1, 16, 2, d]"""
    features = open_features(parse(lab.words(line)))
    rows = list(range(16))
    return features(rows, [shards.caption(i) for i in rows], [f"sample {i}" for i in rows])[None]


# ------------------------------------------------------------------------------------------------------------ rows


def test_rows_by_position(lab, tmp_path):
    """The keys are of no use here: by position, features belong to the position in the list."""
    samples = [shards.sample(i, (48, 48), key=900 - i) for i in range(8)]
    data = shards.write_shards(tmp_path / "data", samples, per_shard=[3, 5])
    where = f"--train-data {data} --sample_index position"
    line = f"{FIXED} {where} --gamma 0.5 --train-num-samples 8"
    write = f"{WRITE} {where} --cached_ref_features_dir {tmp_path}/features"
    assert main([*lab.words(write), "--name", "position"]) == 0
    cached = trained(lab, f"{line} --cached_ref_features_dir {tmp_path}/features")
    assert_same(cached, trained(lab, f"{line} {REFERENCE}"))


def test_sources_with_rows_of_their_own(lab, tmp_path):
    """Two sets whose keys both start at 0; then the second alone, whose rows are found by the offset."""
    both = "--train-data @squares::@more_squares --data_size 16::8 --train-num-samples 24"
    write = f"{WRITE} {both} --cached_ref_features_dir {tmp_path}/features"
    assert main([*lab.words(write), "--name", "both"]) == 0
    cached = f"--cached_ref_features_dir {tmp_path}/features"
    line = f"{FIXED} --gamma 0.5 {both}"
    assert_same(trained(lab, f"{line} {cached}"), trained(lab, f"{line} {REFERENCE}"))
    alone = f"{FIXED} --gamma 0.5 --train-data @more_squares --train-num-samples 8"
    shifted = trained(lab, f"{alone} {cached} --ref_features_offset -16")
    assert_same(shifted, trained(lab, f"{alone} {REFERENCE}"))


def test_features_of_other_rows_are_noticed(lab, capsys):
    """Without the offset, rows 0 to 7 exist too, but belong to other samples: their captions differ."""
    line = f"{FIXED} --train-data @more_squares --train-num-samples 8 {CACHED} --workers 1"
    sentence = fails(lab, line, capsys)
    assert re.search(r"sample \S+more/0000\d\.tar/0001\d\d \(row \d of the cache\) has another caption", sentence)


def test_csv_rows(lab, tmp_path):
    data = shards.write_csv(tmp_path / "csv", 6, size=(48, 48))
    where = f"--train-data {data} --dataset-type csv --train-num-samples 6"
    write = f"{WRITE} {where} --cached_ref_features_dir {tmp_path}/features"
    assert main([*lab.words(write), "--name", "csv"]) == 0
    line = f"{FIXED} {where} --gamma 0.5"
    cached = trained(lab, f"{line} --cached_ref_features_dir {tmp_path}/features")
    assert_same(cached, trained(lab, f"{line} {REFERENCE}"))


def test_a_missing_row_ends_the_run_before_the_loss(lab, tmp_path, capsys):
    write = (
        f"{WRITE} --train-data {lab.root}/squares/{{00000..00001}}.tar --cached_ref_features_dir {tmp_path}/part"
    )
    lab.path("squares")
    assert main([*lab.words(write), "--name", "part"]) == 0
    sentence = fails(lab, f"{FIXED} --cached_ref_features_dir {tmp_path}/part --workers 2", capsys)
    pattern = (
        r"error: --cached_ref_features_dir: sample \S+squares/00002\.tar/0000(\d\d) \(row (\d+) of the cache\) "
    )
    found = re.fullmatch(pattern + rf"is not in {tmp_path}/part", sentence)
    assert int(found[1]) == int(found[2]) >= 9


# ------------------------------------------------------------------------------------------------ published layout


def publish(folder, rows: dict[int, np.ndarray], per_shard: int, width: int = 24) -> None:
    """Files as the published code writes them: rows that it did not see are zeros."""
    folder.mkdir(exist_ok=True)
    for shard in {row // per_shard for row in rows}:
        tensor = torch.zeros(per_shard, 2, width)
        for row in [row for row in rows if row // per_shard == shard]:
            tensor[row % per_shard] = torch.as_tensor(rows[row])
        torch.save(tensor, folder / f"{shard:08d}.pt")


@pytest.fixture(scope="module")
def published(lab) -> str:
    """The features of all squares but row 11, five rows per file. (Tar shards have 5, 4 and 7 samples.)"""
    found = features_of(lab, f"{FIXED} {CACHED}")[0].numpy()
    publish(lab.root / "published", {row: found[row] for row in range(16) if row != 11}, per_shard=5)
    return str(lab.root / "published")


def test_published_files_are_found_by_key_and_not_by_file_name(lab, published):
    """The same rows find features and sample state, whatever the names of the samples and of their shards."""
    samples = [shards.sample(i, (48, 48)) | {"__key__": f"{777 - i}"} for i in range(8)]
    data = shards.write_shards(lab.root / "renamed", samples, per_shard=8)
    line = f"{FIXED} --gamma 0.5 --train-data {data} --train-num-samples 8"
    live = trained(lab, f"{line} {REFERENCE}")
    for given in (published, f"{published}/{{00000000..00000003}}.pt", f"{published}/*.pt"):
        cached = f"--cached_ref_features_dir {given} --num_samples_per_shard 5"
        assert_same(trained(lab, f"{line} {cached}"), live)


def test_a_row_of_zeros_is_missing(lab, published, capsys):
    line = f"{FIXED} --cached_ref_features_dir {published} --num_samples_per_shard 5 --workers 1"
    sentence = fails(lab, line, capsys)
    assert "squares/00002.tar/000011 (row 11 of the cache): its features in " in sentence
    assert sentence.endswith("published/00000002.pt are zero: they were never cached")


def test_rows_beyond_published_files(tmp_path):
    publish(tmp_path, {row: np.ones((2, 3)) for row in range(4)}, per_shard=4, width=3)
    features = PublishedFeatures(published_files(str(tmp_path)), per_shard=6, offset=100)
    assert features([103, 100], ["", ""], ["a", "b"]).tolist() == np.ones((2, 2, 3)).tolist()
    with pytest.raises(WrongRow, match=r"sample b \(row 5 of the cache\) is beyond the end of .*00000000\.pt"):
        features([103, 105], ["", ""], ["a", "b"])
    with pytest.raises(WrongRow, match=r"sample b \(row 6 of the cache\) should be in 00000001\.pt, which is"):
        features([103, 106], ["", ""], ["a", "b"])
    with pytest.raises(WrongRow, match=r"sample a \(row -1 of the cache\)"):
        features([99, 100], ["", ""], ["a", "b"])


def test_what_is_no_published_cache_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"neither an index\.json nor files like 00000012\.pt"):
        published_files(str(tmp_path))
    torch.save(torch.zeros(4, 3), tmp_path / "00000000.pt")
    with pytest.raises(ValueError, match=r"00000000\.pt holds \[4, 3\] of torch.float32, .* tensor \[n, 2, d\]"):
        PublishedFeatures(published_files(str(tmp_path)), 4)
    torch.save(torch.zeros(4, 2, 3, dtype=torch.bfloat16), tmp_path / "00000000.pt")
    with pytest.raises(
        ValueError, match=r"holds \[4, 2, 3\] of torch.bfloat16, .* of float16 or float32 was expected"
    ):
        PublishedFeatures(published_files(str(tmp_path)), 4)
    torch.save({"features": torch.zeros(4, 2, 3)}, tmp_path / "00000000.pt")
    with pytest.raises(ValueError, match=r"holds a dict, where a tensor"):
        PublishedFeatures(published_files(str(tmp_path)), 4)
    (tmp_path / "00000000.pt").write_bytes(b"no tensor")
    with pytest.raises(ValueError, match=r"00000000\.pt cannot be read"):
        PublishedFeatures(published_files(str(tmp_path)), 4)
    (tmp_path / "other_features.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"the name of other_features\.pt is not the number of a shard"):
        published_files(str(tmp_path))


# -------------------------------------------------------------------------------------------------------- identity


def test_another_model_than_the_flags_name_is_refused(lab, capsys):
    other = REFERENCE.replace("@reference_weights", "@other_reference_weights")
    assert "were made with weights file " in fails(lab, f"{FIXED} {CACHED} {other}", capsys)
    model = "--ref_model @vit --ref_model_pretrained @weights"
    assert "were made with model tiny-vit-reference-" in fails(lab, f"{FIXED} {CACHED} {model}", capsys)


def test_the_teachers_widths_are_those_of_the_cache(lab, capsys):
    widths = "--ref_features_usage distill --distill_teacher_dimension 20 3"
    sentence = fails(lab, f"{FIXED} {CACHED} {widths}", capsys)
    assert sentence.endswith(
        "add up to 23, but the embeddings of --cached_ref_features_dir are 24 wide; give widths that add up to it"
    )
