"""Stored views: training on the embeddings of random views equals training on a live reference that sees them."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from tests.cache.test_features import assert_same, trained
from tests.support.lab import Lab
from training.data.transforms import TrainView
from training.main import main
from training.rng import sample_seed, seed_of

REFERENCE = "--ref_model @reference --ref_model_pretrained @reference_weights"
AUGMENT = "--aug-cfg scale=(0.2,1.0)"
WRITE = f"{REFERENCE} --cache_ref_model_features --ref_features_views 3 --seed 5 {AUGMENT}"
STORED = "--cached_ref_features_dir @features"
TRAIN = "--train-num-samples 16 --optimizer sgd --lr 0.01 --epochs 2 --seed 1 --fastclip --gamma 0.5"


class ViewLab(Lab):
    """A lab whose features are of three views of each image: its pictures are not square."""

    @property
    def features(self) -> str:
        return self.written("features", "")

    @property
    def captioned(self) -> str:
        """With embeddings of two synthetic captions of each image."""
        return self.written("captioned", "--cached_syn_texts_dir @captions --num_syn_texts 2")

    def written(self, name: str, line: str) -> str:
        folder = self.root / name
        if not folder.exists():
            words = self.words(f"{WRITE} {line} --cached_ref_features_dir {folder}")
            assert main([*words, "--name", name]) == 0
        return str(folder)


@pytest.fixture(scope="module")
def lab(one_thread, tmp_path_factory) -> ViewLab:
    return ViewLab(tmp_path_factory.mktemp("lab"))


def view_of(epoch: int, turn: int, row: int) -> int:
    """The number of the view, by the formula in ``rng``: in turn, from a start that follows from (seed, row)."""
    return (seed_of(1, -1, row) + epoch + turn) % 3


def live(lab: Lab, line: str) -> dict[str, torch.Tensor]:
    """The weights after a run with a live reference whose crops are those of the store with seed 5."""
    replayed = {
        sample_seed(1, epoch, turn, row): seed_of(5, -1, view_of(epoch, turn, row), row)
        for epoch in range(2)
        for turn in range(3)
        for row in range(16)
    }
    call = TrainView.__call__
    with mock.patch.object(TrainView, "__call__", lambda self, image, seed: call(self, image, replayed[seed])):
        return trained(lab, f"{line} {REFERENCE} --name live{next(lab.numbers)}")


@pytest.mark.parametrize(
    "use",
    [
        AUGMENT,
        f"{AUGMENT} --workers 1 --batch-size 4 --accum-freq 2 --ref_features_usage ref,distill",
    ],
)
def test_as_with_a_live_reference_that_sees_the_same_views(lab, use):
    line = f"{TRAIN} {use}"
    stored = trained(lab, f"{line} {STORED}")
    assert_same(stored, live(lab, line))
    with pytest.raises(AssertionError, match="not close"):  # the crops matter
        assert_same(stored, trained(lab, f"{line} {REFERENCE}"))
