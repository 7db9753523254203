"""open_clip's losses behind our gather: the gradients are open_clip's, and each rank receives its own alone."""

from __future__ import annotations

import open_clip
import pytest
import torch

from drrho_clip import collectives
from drrho_clip.losses import baselines
from tests.drrho_clip.test_fastclip import CountCollectives
from tests.support.objectives import inputs
from tests.support.ranks import ranks

B, D = 6, 16


def _gradients(kind: str, local_loss: bool, ours: bool):
    k, r = collectives.world_size(), collectives.rank()
    x = inputs(b=B, d=D, seed=10 * r)
    settings = {"local_loss": local_loss, "gather_with_grad": True}
    if kind == "distill":
        own = baselines.Distill(weight=1.0, teacher_scale=50.0, **settings).contrastive
        theirs = open_clip.DistillClipLoss(rank=r, world_size=k, **settings)
        more = (x.ref_image, x.ref_text, 50.0)
    else:
        own, more = baselines.Clip(**settings).contrastive, ()
        theirs = open_clip.ClipLoss(rank=r, world_size=k, **settings)
    values = (own if ours else theirs)(x.image, x.text, x.logit_scale, *more)
    value = sum(values) if isinstance(values, tuple) else values
    with CountCollectives() as backward:
        value.backward()
    return value.detach(), x.image.grad, x.text.grad, x.logit_scale.grad, backward.calls


@pytest.mark.parametrize("local_loss", [True, False], ids=["local", "whole"])
@pytest.mark.parametrize("kind", ["clip", "distill"])
def test_gradients_are_open_clips_in_one_exchange(kind, local_loss):
    ours, theirs = (ranks(2).run(_gradients, kind, local_loss, mine) for mine in (True, False))
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found[:4], expected[:4], rtol=1e-5, atol=1e-6)
        assert [name for name, _ in found[4]] == ["_reduce_scatter_base_"]
