"""A batch is cut into micro-batches of equal size, or not at all."""

import pytest
import torch

from drrho_clip.batch import Batch


def batch(b: int) -> Batch:
    return Batch(torch.zeros(b, 3, 2, 2), torch.arange(4 * b).view(b, 4), torch.arange(b))


def test_micro_batches_are_equal_and_in_order():
    parts = batch(6).chunk(3)
    assert [part.index.tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert torch.equal(torch.cat([part.text for part in parts]), batch(6).text)
    assert all(part.ref_image is None for part in parts)


@pytest.mark.parametrize(("b", "k"), [(7, 3), (6, 4), (2, 3), (4, 0)])
def test_what_has_no_equal_parts_is_refused(b, k):
    with pytest.raises(ValueError, match=f"a batch of {b} samples has no {k} parts"):
        batch(b).chunk(k)
