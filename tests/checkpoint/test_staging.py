"""Copies in host memory: exact, reused, in few blocks, and each a tensor of its own in a file."""

from __future__ import annotations

import io
from itertools import pairwise

import torch

from training.checkpoint import staging
from training.checkpoint.staging import Staging, pack


def tree(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weights": {
            "a": torch.randn(3, 5, generator=generator),
            "b": torch.randn(7, generator=generator).bfloat16(),
        },
        "moments": [torch.randn(4, generator=generator), torch.tensor(float(seed)), torch.empty(0)],
        "mask": torch.tensor([True, False]),
        "step": seed,
    }


def test_the_copy_is_of_the_moment_and_its_memory_is_used_again():
    copies, live = Staging(), tree(1)
    first = copies.copy(live)
    for value in (live["weights"]["a"], live["moments"][0]):
        value.zero_()
    expected = tree(1)
    assert first["step"] == 1 and torch.equal(first["mask"], expected["mask"])
    assert torch.equal(first["weights"]["a"], expected["weights"]["a"])
    assert torch.equal(first["weights"]["b"], expected["weights"]["b"])
    assert [v.shape for v in first["moments"]] == [v.shape for v in expected["moments"]]
    second = copies.copy(tree(2))
    assert second["weights"]["a"].data_ptr() == first["weights"]["a"].data_ptr()
    assert torch.equal(second["moments"][0], tree(2)["moments"][0]) and second["moments"][1] == 2
    other = copies.copy({"a": torch.ones(2)})
    assert torch.equal(other["a"], torch.ones(2))


def test_a_file_holds_nothing_but_the_tensors(monkeypatch):
    monkeypatch.setattr(staging, "BLOCK", 1 << 20)
    copied = Staging().copy({"small": torch.ones(3), "large": torch.ones(100_000)})
    file = io.BytesIO()
    torch.save({"small": copied["small"]}, file)
    assert file.tell() < 10_000
    file.seek(0)
    assert torch.load(file, weights_only=True)["small"].untyped_storage().nbytes() == 12


def test_pieces_share_blocks_and_do_not_overlap():
    sizes = [100, 64, 5000, 900, 24, 0, 1000, 3]
    places, blocks = pack(sizes, 1024)
    assert sum(blocks) < sum(sizes) + 64 * len(sizes) and len(blocks) == 5
    taken = sorted((number, offset, offset + size) for (number, offset), size in zip(places, sizes, strict=True))
    for (number, _, end), (following, begin, _) in pairwise(taken):
        assert number < following or end <= begin
    assert all(end <= blocks[number] and begin % 64 == 0 for number, begin, end in taken)
