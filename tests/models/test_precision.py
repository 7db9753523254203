"""Pixels in autocast's type from the start give what autocast makes of float32 ones."""

import pytest
import torch

from drrho_clip.normalize import normalize
from tests.support import tiny_models
from training.models.precision import resolve


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["tiny-vit", "tiny-resnet"])
def test_pixels_in_autocasts_type(name, dtype):
    model = tiny_models.build(name).eval()
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    pixels = torch.randint(256, (3, 3, height, width), dtype=torch.uint8)
    whole = normalize(pixels, (0.48, 0.45, 0.4), (0.26, 0.26, 0.27))
    narrow = normalize(pixels, (0.48, 0.45, 0.4), (0.26, 0.26, 0.27), dtype)
    assert narrow.dtype == dtype
    assert torch.equal(narrow, whole.to(dtype))
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        assert torch.equal(model.encode_image(narrow), model.encode_image(whole))


def test_which_type_the_pixels_have():
    cpu = torch.device("cpu")
    assert resolve("fp32", cpu).pixel_dtype == resolve("amp", cpu).pixel_dtype == torch.float32
    assert resolve("amp_bf16", cpu).pixel_dtype == resolve("pure_bf16", cpu).pixel_dtype == torch.bfloat16
    assert resolve("amp", torch.device("cuda")).pixel_dtype == resolve("fp16", cpu).pixel_dtype == torch.float16
