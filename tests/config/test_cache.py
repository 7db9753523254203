"""Flags of cached features and captions: bad combinations are refused with one sentence."""

import pytest

from tests.support.commands import DATA, FASTCLIP, REFERENCE, config, refusal

CAPTION = f"{DATA} --data_size 2000 --cap_model coca_ViT-B-32 --cap_model_pretrained some --cache_syn_texts"
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
        (
            f"{WRITE} --ref_features_dtype int8 --ref_features_error_bound 0.001",
            "--ref_features_error_bound 0.001 decides how features are stored, and so does --ref_features_dtype",
        ),
        (f"{WRITE} --ref_features_error_bound 1e-6", "--ref_features_error_bound 1e-06: the value must lie in"),
        (f"{CAPTION} --ref_features_dtype int8", "--ref_features_dtype int8: --cache_syn_texts writes captions"),
        (f"{WRITE} --cache_rank 1", "--cache_rank 1: jobs are numbered from 0 to"),
        (f"{WRITE} --resume latest", "--resume latest: --cache_ref_model_features continues by itself"),
        (f"{WRITE} --skip_webdataset_split_by_node", "--skip_webdataset_split_by_node: "),
        (f"{WRITE} --cached_ref_features_dir f/{{0..3}}.pt", "a cache is written into one local folder"),
        (f"{WRITE} --cached_ref_features_dir s3://bucket/f", "a cache is written into one local folder"),
        (f"{FASTCLIP} --cached_ref_features_dir nowhere", "there is no such folder on this machine"),
        (
            f"{DATA} --fastclip --gamma 1.0 --cached_ref_features_dir .",
            "--cached_ref_features_dir . needs --data_size",
        ),
        (
            f"{DATA} --data_size 9 --cached_ref_features_dir .",
            "--cached_ref_features_dir .: the loss 'clip' does not use",
        ),
        (f"{FASTCLIP} --cached_ref_features_dir . --ref_model_pretrained x", "no effect without --ref_model"),
        (f"{FASTCLIP} --num_samples_per_shard 0", "--num_samples_per_shard 0: the value must lie in"),
        (f"{FASTCLIP} --cache_group_size 0", "--cache_group_size 0: the value must lie in"),
        (f"{FASTCLIP} --cache_rank -1", "--cache_rank -1: the value must lie in"),
        (
            f"{CAPTION} --cache_ref_model_features {REFERENCE}",
            "need two runs, each of which reads all images once",
        ),
        (f"{CAPTION} --cap_model ''", "--cache_syn_texts needs --cap_model"),
        (f"{CAPTION} --cap_model ViT-B-32", "--cap_model ViT-B-32: it has no caption decoder"),
        (f"{CAPTION} --cap_model coca_ViT", "--cap_model coca_ViT: open_clip has no such model"),
        (f"{CAPTION} --cap_model_pretrained ''", "--cap_model coca_ViT-B-32 has no weights"),
        (f"{CAPTION} --precision bf16", "--precision bf16: open_clip casts only a part of CoCa's decoder"),
        (f"{CAPTION} --num_syn_texts 0", "--num_syn_texts 0: the value must lie in"),
        (f"{FASTCLIP} --cap_model coca_ViT-B-32", "run once with --cache_syn_texts, then train with"),
        (f"{FASTCLIP} --cached_syn_texts_dir nowhere", "there is no such folder on this machine"),
        (f"{DATA} --cached_syn_texts_dir .", "--cached_syn_texts_dir . needs --data_size"),
        (f"{WRITE} --dataset_reinforcement", "--dataset_reinforcement with --cache_ref_model"),
        (
            f"{FASTCLIP} --dataset_reinforcement --cached_ref_features_dir .",
            "--cached_ref_features_dir . with --dataset_reinforcement: the shards hold such values themselves",
        ),
        (
            f"{FASTCLIP} --dataset_reinforcement --dataset-type synthetic",
            "--dataset_reinforcement: only shards hold features beside samples",
        ),
        (
            f"{FASTCLIP} --dataset_reinforcement --aug-cfg use_timm=True",
            "--aug-cfg use_timm=True with --dataset_re",
        ),
        (f"{DATA} --dataset_reinforcement", "--dataset_reinforcement: the loss 'clip' does not use"),
        (f"{FASTCLIP} --syn_texts_ratio 1.5", "--syn_texts_ratio 1.5: the value must lie in [0, 1]"),
        (f"{WRITE} --cached_syn_texts_dir nowhere", "--cached_syn_texts_dir nowhere: there is no such folder"),
        (f"{FASTCLIP} --ref_features_cache_mb -1", "--ref_features_cache_mb -1: the value must lie in"),
        (f"{WRITE} --ref_features_views -1", "--ref_features_views -1: the value must lie in"),
        (f"{CAPTION} --ref_features_views 2", "--ref_features_views 2: --cache_syn_texts writes captions"),
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
    """They are used like a live reference; the model that computed them need not be named."""
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
    remarks = config(f"{FASTCLIP} --ref_features_offset 5 --cache_rank 0 --num_samples_per_shard 9").remarks
    assert "--ref_features_offset, --num_samples_per_shard: no effect without --cached_ref_features_dir" in remarks
    assert "--cache_rank: no effect in a run that writes no cache" in remarks
    (remark,) = config(f"{FASTCLIP} --ref_features_cache_mb 9").remarks
    assert remark == "--ref_features_cache_mb: no effect without --cached_ref_features_dir"
    (remark,) = config(f"{WRITE} --ref_features_cache_mb 9").remarks
    assert remark == "--ref_features_cache_mb: no effect when a cache is written"
    (remark,) = config(f"{FASTCLIP} --ref_features_error_bound 0.01").remarks
    assert remark == "--ref_features_error_bound: no effect when features are read: they are as they were written"
    assert config(f"{WRITE} --ref_features_offset 5").remarks == (
        "--ref_features_offset: no effect when a cache is written; rows keep their numbers",
    )


def test_what_the_shards_hold_stands_for_a_reference():
    drawn = "--num_syn_texts 3 --syn_texts_ratio 0.5"
    c = config(f"{DATA} --dataset_reinforcement --ref_features_usage distill {drawn}")
    assert c.reads_features and c.reference.usage == {"distill"} and not c.remarks
    assert (c.cache.num_syn_texts, c.cache.syn_texts_ratio) == (3, 0.5)
    (remark,) = config(f"{FASTCLIP} {drawn}").remarks
    assert remark == "--num_syn_texts, --syn_texts_ratio: no effect without synthetic captions"


def test_captions_are_written_or_drawn_from(tmp_path):
    c = config(f"{CAPTION} --logs here {REFERENCE}")
    assert (c.cache.writes, c.trains, c.reference.ref_model) == ("captions", False, "")
    assert (c.cache.cached_syn_texts_dir, c.cache.num_syn_texts) == ("here/syn_texts", 5)
    drawn = config(f"{FASTCLIP} --cached_syn_texts_dir {tmp_path}")
    assert (drawn.cache.writes, drawn.trains, drawn.cache.num_syn_texts) == ("", True, None)
    assert config(f"{FASTCLIP} --cached_syn_texts_dir {tmp_path} --num_syn_texts 2").cache.num_syn_texts == 2
