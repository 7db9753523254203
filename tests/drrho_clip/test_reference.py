"""The reference's features against open_clip's own, and device-side normalization against torchvision's."""

from __future__ import annotations

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import nn
from torchvision.transforms import functional as tvf

from drrho_clip.batch import Batch
from drrho_clip.normalize import normalize
from drrho_clip.reference import Reference
from tests.support import tiny_models
from training.data.transforms import TrainView
from training.models.pretrained import open_clip_name

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OTHER_MEAN, OTHER_STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
CAPTIONS = ["a red square", "Two BLUE circles, one above the other and a third one at the left", "noise", ""]


def pictures() -> list[Image.Image]:
    """Four square pictures of 64 pixels: what a crop of the whole image leaves alone."""
    pixels = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [tvf.to_pil_image(p) for p in pixels]


def views(target: PreprocessCfg, reference: PreprocessCfg) -> tuple[torch.Tensor, torch.Tensor | None]:
    view = TrainView(target, reference, {"scale": (1.0, 1.0)})
    pairs = [view(view.decode(picture), seed) for seed, picture in enumerate(pictures())]
    own = None if pairs[0].reference is None else torch.stack([p.reference for p in pairs])
    return torch.stack([p.target for p in pairs]), own


def tokens(context_length: int) -> torch.Tensor:
    return open_clip.SimpleTokenizer(context_length=context_length)(CAPTIONS)


@torch.no_grad()
def by_open_clip(module: nn.Module, preprocess: PreprocessCfg) -> tuple[torch.Tensor, torch.Tensor]:
    transform = image_transform_v2(preprocess, is_train=False)
    images = torch.stack([transform(picture) for picture in pictures()])
    module.eval()
    return module.encode_image(images, normalize=True), module.encode_text(
        tokens(module.context_length), normalize=True
    )


def test_reference_that_differs_from_the_target_in_everything():
    """Image size, normalization, interpolation, context length, embedding width, activation: all its own."""
    target = PreprocessCfg(size=32, mean=MEAN, std=STD)
    own = PreprocessCfg(size=48, mean=OTHER_MEAN, std=OTHER_STD, interpolation="bilinear")
    module = tiny_models.build("tiny-vit-reference")
    image, ref_image = views(target, own)
    batch = Batch(image, tokens(16), torch.arange(4), ref_image, tokens(24))
    features = Reference(module, OTHER_MEAN, OTHER_STD).features(batch)
    assert [f.shape for f in features] == [(4, 24), (4, 24)]
    for ours, theirs in zip(features, by_open_clip(module, own), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # The published code gave the reference the target's pixels with the target's normalization. The test sees
    # that.
    resized = F.interpolate(image.float(), 48).to(torch.uint8)
    wrong = Reference(module, MEAN, STD).features(Batch(resized, tokens(24), torch.arange(4)))
    assert (wrong[0] - features[0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-resnet", "tiny-coca"])
def test_reference_that_shares_pixels_and_tokens(name):
    """The batch has no ``ref_image`` and ``ref_text``; only the normalization differs. All kinds of model."""
    preprocess = PreprocessCfg(size=32, mean=OTHER_MEAN, std=OTHER_STD)
    module = tiny_models.build(name)
    image, ref_image = views(PreprocessCfg(size=32, mean=MEAN, std=STD), preprocess)
    assert ref_image is None
    features = Reference(module, OTHER_MEAN, OTHER_STD).features(Batch(image, tokens(16), torch.arange(4)))
    for ours, theirs in zip(features, by_open_clip(module, preprocess), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # a pixel here and there is one level off


def batch() -> Batch:
    image, _ = views(PreprocessCfg(size=32), PreprocessCfg(size=32))
    return Batch(image, tokens(16), torch.arange(4))


def test_it_stays_frozen_whatever_the_module_that_holds_it_does():
    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.target = nn.Linear(2, 2)
            self.reference = Reference(tiny_models.build("tiny-resnet").train(), MEAN, STD)

    task = Task()
    running = {k: v.clone() for k, v in task.reference.module.state_dict().items()}
    before = task.reference.features(batch())
    task.train()
    after = task.reference.features(batch())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(m.training for m in task.reference.module.modules())
    assert all(torch.equal(v, running[k]) for k, v in task.reference.module.state_dict().items())
    assert not any(p.requires_grad for p in task.reference.module.parameters())
    assert {name for name, _ in task.named_parameters()} == {"target.weight", "target.bias"}
    assert set(task.state_dict()) == {"target.weight", "target.bias"}


def test_features_are_constants_that_autograd_may_save():
    image, text = Reference(tiny_models.build("tiny-vit"), MEAN, STD).features(batch())
    assert not image.requires_grad and not text.requires_grad
    leaf = torch.ones(4, 32, requires_grad=True)
    (leaf * image * text).sum().backward()  # an inference tensor could not be saved for this
    assert torch.equal(leaf.grad, image * text)


@pytest.mark.parametrize("outer", [False, True])
def test_autocast_is_the_references_own(outer):
    """The model runs in bfloat16 only if asked to. The unit norm is exact in float32 in both cases."""
    seen = []

    def build(dtype: torch.dtype | None) -> Reference:
        module = tiny_models.build("tiny-vit")
        module.visual.transformer.resblocks[0].mlp.c_fc.register_forward_hook(lambda m, x, y: seen.append(y.dtype))
        return Reference(module, MEAN, STD, dtype)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
        exact = build(None).features(batch())
        rounded = build(torch.bfloat16).features(batch())
    assert seen == [torch.float32, torch.bfloat16]
    for a, b in zip(exact, rounded, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=0.05, rtol=0)
        assert not torch.equal(a, b)
        torch.testing.assert_close(b.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
@pytest.mark.parametrize("name", ["tiny-vit", "tiny-resnet"])
def test_low_precision_weights_take_pixels_of_their_type(precision, name, tmp_path):
    registered = open_clip_name(tiny_models.path(name, tmp_path), "--ref_model")
    module = open_clip.create_model(registered, precision=precision)
    image, text = Reference(module, MEAN, STD).features(batch())
    assert image.dtype == text.dtype == torch.float32
    torch.testing.assert_close(image.norm(dim=1), torch.ones(4))


def test_compiled_features_are_the_same(monkeypatch):
    module = tiny_models.build("tiny-vit")
    eager = Reference(module, MEAN, STD).features(batch())
    compiled, compile_ = [], torch.compile

    def trace_only(function):
        compiled.append(function)
        return compile_(function, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", trace_only)
    features = Reference(module, MEAN, STD).compile().features(batch())
    assert compiled == [module.encode_image, module.encode_text]
    for a, b in zip(eager, features, strict=True):
        torch.testing.assert_close(a, b)


def test_normalize_is_torchvisions():
    pixels = torch.randint(0, 256, (2, 3, 8, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = torch.stack(
        [tvf.normalize(tvf.to_tensor(tvf.to_pil_image(p)), OTHER_MEAN, OTHER_STD) for p in pixels]
    )
    torch.testing.assert_close(normalize(pixels, OTHER_MEAN, OTHER_STD), expected, rtol=1e-6, atol=1e-6)
    low = normalize(pixels, OTHER_MEAN, OTHER_STD, torch.bfloat16)
    torch.testing.assert_close(low, expected.bfloat16())


def test_normalize_leaves_floating_point_alone_and_refuses_the_rest():
    done = torch.randn(2, 3, 4, 4)
    assert torch.equal(normalize(done, MEAN, STD), done)
    assert torch.equal(normalize(done, MEAN, STD, torch.bfloat16), done.bfloat16())
    with pytest.raises(ValueError, match=r"uint8.*int64"):
        normalize(torch.zeros(1, 3, 2, 2, dtype=torch.int64), MEAN, STD)
