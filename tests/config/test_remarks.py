"""Flags without an effect are named, and flags at their default are not."""

from __future__ import annotations

import pytest
import torch

from tests.support.commands import DATA, FASTCLIP, REFERENCE, config


@pytest.mark.parametrize(
    "line, remark",
    [
        (f"{DATA} --temperature 0.05", "--temperature: no effect without --fastclip"),
        (f"{DATA} --rho 8 --gamma 0.5", "--gamma, --rho: no effect without --fastclip"),
        (f"{FASTCLIP} --rho 8", "--rho: no effect without --multiply_tau or individual temperatures"),
        (
            f"{FASTCLIP} --temperature_scheme individual_learnable --multiply_tau",
            "--multiply_tau: no effect with individual temperatures, whose objective has its own form",
        ),
        (
            f"{FASTCLIP} --gamma 1 --sample_state_device cpu",
            "--sample_state_device: no effect with a loss that keeps nothing per sample",
        ),
        (
            f"{FASTCLIP} --gamma 1 --temperature_scheme individual_learnable --sample_state_dtype bound",
            "--sample_state_dtype: no effect with a loss that keeps no u, as with --gamma 1",
        ),
        (
            f"{DATA} --requeue_on_preempt",
            "--requeue_on_preempt: no effect outside of a Slurm job",
        ),
        (
            f"{DATA} --csv_quoting none --csv_encoding latin-1",
            "--csv_quoting, --csv_encoding: no effect without csv data",
        ),
        (
            f"{DATA} --precision pure_bf16 --grad_compression bf16",
            "--grad_compression: no effect with this --precision, whose gradients have this type",
        ),
        (
            f"{DATA} --precision amp_bf16 --grad_compression fp16",
            "--grad_compression fp16: gradients below 6e-8 become 0, as --precision amp alone scales them; bf16 "
            "keeps them",
        ),
        (f"{DATA} --eps 1e-8 --optimizer lion", "--eps: no effect with this optimizer"),
        (f"{DATA} --json_key json:id", "--json_key: no effect where rows do not go by key"),
        (f"{DATA} --lock-text-unlocked-layers 1", "--lock-text-unlocked-layers: no effect without --lock-text"),
        (
            f"{DATA} --local-loss",
            "--local-loss without --gather-with-grad: the gradient through other ranks' pairs is dropped",
        ),
        (
            f"{DATA} --loss distill {REFERENCE} --ref_features_usage ref,distill",
            "--ref_features_usage ref: no effect with this loss, which has a teacher and no margins",
        ),
    ],
)
def test_flags_without_effect_are_named(line, remark):
    assert config(line).remarks == (remark,)


def test_a_tag_beside_a_checkpoint_brings_no_weights(tmp_path):
    torch.save({}, tmp_path / "epoch_1.pt")
    beside = f"{REFERENCE} --ref_model_checkpoint {tmp_path}/epoch_1.pt"
    (remark,) = config(f"{FASTCLIP} {beside}").remarks
    assert remark.startswith(
        "--ref_model_pretrained beside --ref_model_checkpoint: the weights are the checkpoint's, and the tag only"
    )
    for alone in (REFERENCE, beside.replace("--ref_model_pretrained openai", "")):
        assert config(f"{FASTCLIP} {alone}").remarks == ()


def test_published_defaults_are_no_flags_without_effect():
    assert config(DATA).remarks == ()
    assert config(FASTCLIP).remarks == ()


def test_a_flag_that_only_the_loss_takes_has_an_effect():
    """Individual temperatures take Adam steps of their own."""
    individual = f"{FASTCLIP} --temperature_scheme individual_learnable"
    assert config(f"{individual} --optimizer sgd --beta1 0.8 --beta2 0.9 --eps 1e-6").remarks == ()
    assert config(f"{FASTCLIP} --optimizer sgd --beta1 0.8 --eps 1e-6").remarks == (
        "--beta1, --eps: no effect with this optimizer",
    )
