"""Cached features on the command line: bad combinations are one sentence, good ones say what the run does."""

import pytest

from commands import DATA, FASTCLIP, REFERENCE, config, refusal

WRITE = f"{DATA} --data_size 2000 {REFERENCE} --cache_ref_model_features"


@pytest.mark.parametrize(
    "line, sentence",
    [
        (f"{WRITE} --train-data ''", "--cache_ref_model_features needs --train-data"),
        (f"{DATA} {REFERENCE} --cache_ref_model_features", "--cache_ref_model_features needs --data_size"),
        (f"{DATA} --data_size 2000 --cache_ref_model_features", "--cache_ref_model_features needs --ref_model"),
        (f"{WRITE} --ref_model_pretrained ''", "--ref_model ViT-B-32 has no weights"),
        (f"{WRITE} --dataset-type synthetic", "synthetic data is noise"),
        (f"{WRITE} --cache_group_size 4 --cache_rank 4", "--cache_rank 4: jobs are numbered from 0 to"),
        (f"{WRITE} --cache_rank 1", "--cache_rank 1: jobs are numbered from 0 to"),
        (f"{WRITE} --resume latest", "--resume latest: --cache_ref_model_features goes on by itself"),
        (f"{WRITE} --skip_webdataset_split_by_node", "--skip_webdataset_split_by_node: "),
        (f"{WRITE} --cached_ref_features_dir f/{{0..3}}.pt", "to write, give one folder"),
        (f"{WRITE} --cached_ref_features_dir s3://bucket/f", "to write, give one folder"),
        (f"{FASTCLIP} --cached_ref_features_dir nowhere", "there is no such folder on this machine"),
        (
            f"{DATA} --fastclip --gamma 1.0 --cached_ref_features_dir .",
            "--cached_ref_features_dir . needs --data_size",
        ),
        (
            f"{DATA} --data_size 9 --cached_ref_features_dir .",
            "--cached_ref_features_dir .: the loss 'clip' has no use",
        ),
        (f"{FASTCLIP} --cached_ref_features_dir . --ref_model_pretrained x", "no effect without --ref_model"),
        (f"{FASTCLIP} --num_samples_per_shard 0", "--num_samples_per_shard 0: the value must lie in"),
        (f"{FASTCLIP} --cache_group_size 0", "--cache_group_size 0: the value must lie in"),
        (f"{FASTCLIP} --cache_rank -1", "--cache_rank -1: the value must lie in"),
    ],
)
def test_refused(line, sentence, capsys):
    assert sentence in refusal(line, capsys)


def test_a_run_that_writes_neither_trains_nor_evaluates():
    c = config(f"{WRITE} --logs here")
    assert (c.cache.writes, c.trains) == ("features", False)
    assert c.cache.cached_ref_features_dir == "here/ref_features"
    assert c.reference.ref_model == "ViT-B-32"
    assert config(f"{WRITE} --cached_ref_features_dir there").cache.cached_ref_features_dir == "there"


def test_any_loss_and_usage_will_do_to_write():
    for line in ("--siglip", "--fastclip", "--ref_features_usage select", "--gamma 0.5"):
        assert config(f"{WRITE} {line}").cache.writes == "features"


def test_features_stand_for_a_reference(tmp_path):
    """Their use is as a live reference's; the model they came from need not be named."""
    cached = f"--cached_ref_features_dir {tmp_path}"
    assert config(f"{FASTCLIP} {cached}").reference.usage == {"ref"}
    assert config(
        f"{FASTCLIP} {cached} --ref_features_usage distill,select --ref_filter_ratio 0.5"
    ).reference.usage == {
        "distill",
        "select",
    }
    assert config(f"{DATA} --data_size 9 {cached} --loss distill").reference.usage == {"distill"}
    assert config(f"{FASTCLIP} {cached} --ref_model ViT-B-32").reference.ref_model == "ViT-B-32"


def test_flags_without_effect_are_named(tmp_path):
    notes = config(f"{FASTCLIP} --ref_features_offset 5 --cache_rank 0 --num_samples_per_shard 9").notes
    assert "--ref_features_offset, --num_samples_per_shard: no effect without --cached_ref_features_dir" in notes
    assert "--cache_rank: no effect without --cache_ref_model_features" in notes
    assert config(f"{WRITE} --ref_features_offset 5").notes == (
        "--ref_features_offset: no effect on what is written, rows keep their numbers",
    )
