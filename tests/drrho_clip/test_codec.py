"""The promised bound over wild inputs, compared in float64; sizes that follow from a promise; what breaks it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from drrho_clip.codec import Encoded, Format, decode, encode, measure, pack, unpack

BOUNDS = st.floats(-30, 3).map(lambda exponent: 10.0**exponent)
SHAPES = st.tuples(st.integers(0, 9), st.integers(0, 19))
# From subnormal to the largest, zeros of either sign, and values around which bounds of all sizes matter.
VALUES = st.one_of(st.floats(width=32), st.floats(-1, 1, width=32), st.sampled_from([0.0, -0.0, 1.0, 1e-45, 3e38]))


@st.composite
def rows(draw, values=VALUES) -> Tensor:
    """float32 [n, d], each row with a magnitude of its own."""
    shape = draw(SHAPES)
    x = draw(arrays.arrays(np.float32, shape, elements=values))
    scale = draw(arrays.arrays(np.int32, (shape[0], 1), elements=st.integers(-100, 100)))
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.ldexp(x, scale) if draw(st.booleans()) else x)


def below(bound: float) -> float:
    """The largest float32 that is not above ``bound``."""
    nearest = np.float32(bound)
    return float(nearest if float(nearest) <= bound else np.nextafter(nearest, np.float32(0)))


def assert_within(decoded: Tensor, x: Tensor, bound: float) -> None:
    """The bound itself, in float64 and as float32 computes it."""
    assert decoded.dtype == torch.float32 and decoded.shape == x.shape
    wrong = ~((decoded.double() - x.double()).abs() <= below(bound))
    assert not wrong.any(), (x[wrong], decoded[wrong], bound)
    assert ((decoded - x.float()).abs() <= bound).all()


def size(encoded: Encoded) -> int:
    """Bytes of what would be stored."""
    stored = (encoded.rows, encoded.offset, encoded.kept, encoded.exact)
    return sum(t.numpy().nbytes for t in stored if t is not None)


# ------------------------------------------------------------------------------------------------------ measured


@given(rows(), BOUNDS)
@settings(max_examples=100, deadline=None)
@example(torch.full((3, 5), -0.0), 1e-3)
@example(torch.tensor([[1e6, 1.0]]), 1e-3)  # float32's neighbours of 1e6 are 0.06 away
@example(torch.full((4, 9), 3e38), 1e-30)
def test_measured_rows_keep_the_bound_or_come_back_as_they_are(x, bound):
    encoded = encode(x, bound)
    decoded = decode(encoded)
    finite = torch.isfinite(x).all(1)
    assert_within(decoded[finite], x[finite], bound)
    assert torch.equal(decoded[~finite].view(torch.int32), x[~finite].view(torch.int32))
    assert encoded.nbytes == size(encoded)
    assert encoded.bits >= 2 and encoded.rows.shape == (len(x), encoded.format.row_bytes)
    assert encoded.bits * x.shape[1] <= 8 * encoded.format.row_bytes


@given(rows(st.floats(-1, 1, width=32)), BOUNDS, st.data())
@settings(max_examples=60, deadline=None)
def test_measuring_finds_nothing_larger_than_any_other_format(x, bound, data):
    """Compared with one of all formats, and rows that it cannot hold in float32."""
    reach = data.draw(st.integers(1, 15))
    zeros = data.draw(st.none() | st.just(0))
    other = Format(bound, x.shape[1], reach, reach + 1, zeros)
    packed, held = pack(x, other)
    assert encode(x, bound).nbytes <= packed.numel() + int((~held).sum()) * (4 * x.shape[1] + 8)


@pytest.mark.parametrize("spread", [1e-3, 0.05, 0.3, 20.0])
def test_measured_bell_shapes_take_what_their_entropy_says(spread):
    torch.manual_seed(0)
    x, bound = spread * torch.randn(500, 256), 2e-3
    encoded = encode(x, bound)
    assert_within(decode(encoded), x, bound)
    ends = (torch.arange(-80_000, 80_001, dtype=torch.float64) - 0.5) * 2 * bound / spread
    shares = torch.special.ndtr(ends).diff()
    entropy = -torch.special.xlogy(shares, shares).sum().item() / math.log(2)
    bits = 8 * encoded.nbytes / x.numel()
    assert entropy < bits < max(2.05, entropy + 0.4)


def test_flat_distributions_take_a_fixed_width():
    x = 2 * torch.rand(300, 64, generator=torch.Generator().manual_seed(0)) - 1
    encoded = encode(x, 1e-3)
    assert encoded.bits == 10 and encoded.format.zeros is None


def test_means_of_columns_are_taken_off_where_it_saves():
    torch.manual_seed(0)
    x = 0.01 * torch.randn(400, 64) + torch.randn(64)
    encoded, plain = encode(x, 1e-3), encode(x - x.mean(0), 1e-3)
    assert encoded.offset is not None and plain.offset is None
    assert_within(decode(encoded), x, 1e-3)
    assert encoded.nbytes < plain.nbytes + 4 * 64 + 400
    # Too far away for the rounding of x - c: the bound would not hold.
    far = encode(x + 1e4, 1e-3)
    assert far.offset is None
    assert_within(decode(far), x + 1e4, 1e-3)


def test_a_few_rows_do_not_cost_all_others_bits():
    torch.manual_seed(0)
    x = 0.05 * torch.randn(1000, 64)
    usual = encode(x, 1e-3)
    x[17] *= 1000
    x[400, 5] = math.nan
    x[401, 6] = -math.inf
    encoded = encode(x, 1e-3)
    assert {17, 400, 401} <= set(encoded.kept.tolist())
    assert encoded.nbytes < 1.02 * usual.nbytes
    decoded = decode(encoded)
    assert torch.equal(decoded[[17, 401]], x[[17, 401]]) and decoded[400].isnan().sum() == 1


def test_without_rows_in_float32_all_that_can_be_held_is():
    torch.manual_seed(0)
    x = 0.05 * torch.randn(1000, 64)
    x[17] *= 100
    x[18, 3] = math.nan
    how, offset = measure(x, 1e-3, float_rows=False)
    packed, held = pack(x, how, offset)
    assert (~held).nonzero().flatten().tolist() == [18]
    assert_within(unpack(packed, how, offset)[held], x[held], 1e-3)


# ------------------------------------------------------------------------------------------------------- promised


@given(rows(), BOUNDS, st.floats(0, 2e4))
@settings(max_examples=100, deadline=None)
def test_a_promised_limit(x, bound, steps):
    """Components within it keep the bound, all others come back as NaN; none is wrong unseen."""
    limit = min(steps * bound, 1e38)
    decoded = decode(encode(x, bound, limit=limit))
    promised = (x.double().abs() <= limit) & torch.isfinite(x)
    assert_within(decoded[promised], x[promised], bound)
    others = ~promised & ~decoded.isnan()
    assert_within(decoded[others], x[others], bound)
    assert decoded[(x.double().abs() > 2 * limit + 4 * bound) | ~torch.isfinite(x)].isnan().all()


@given(rows(st.floats(-1, 1, width=32)), st.floats(-4.4, 0).map(lambda e: 10.0**e), st.integers(0, 2**30))
@settings(max_examples=100, deadline=None)
def test_rows_of_a_promised_norm(x, bound, seed):
    """Whatever a row of that norm looks like, the place that follows from E and d alone suffices."""
    x = F.normalize(x, dim=1)
    if seed % 2:  # the longest code: all components alike
        x = torch.full_like(x, max(x.shape[1], 1) ** -0.5)
    decoded = decode(encode(x, bound, norm=1.0))
    assert_within(decoded, x, bound)


def test_what_breaks_a_promised_norm_comes_back_as_nan_and_nothing_else_does():
    torch.manual_seed(0)
    x = F.normalize(torch.randn(9, 64), dim=1)
    x[1, 5], x[3, 6], x[5] = math.nan, math.inf, 30 * x[5]
    decoded = decode(encode(x, 1e-3, norm=1.0))
    lost = torch.tensor([1, 3, 5])
    others = torch.tensor([0, 2, 4, 6, 7, 8])
    assert decoded[lost].isnan().all()
    assert_within(decoded[others], x[others], 1e-3)


@pytest.mark.parametrize("dim", [1, 7, 256, 512, 1024])
@pytest.mark.parametrize("bound", [1e-4, 1e-3, 2e-3, 1e-2])
def test_sizes_follow_from_the_bound_and_the_width(bound, dim):
    bits = {1e-4: 14, 1e-3: 10, 2e-3: 9, 1e-2: 7}[bound]
    assert bits == math.ceil(math.log2(1 / bound))  # 2^bits intervals of 2 E cover [-1, 1], and fewer do not
    padded = -(-dim // 8) * 8
    torch.manual_seed(0)
    for x in (torch.zeros(6, dim), F.normalize(torch.randn(6, dim), dim=1), torch.full((6, dim), math.nan)):
        fixed, rice = encode(x, bound, limit=1.0), encode(x, bound, norm=1.0)
        assert fixed.bits == bits and fixed.nbytes == 6 * padded * bits // 8
        assert rice.rows.shape == (6, Format.of_norm(bound, dim, 1.0).row_bytes)
        if dim >= 256:  # the entropy of a bell shape is log2(1 / (E sqrt(d))) + 1.05 bits
            assert 1.05 < rice.bits - math.log2(1 / (bound * math.sqrt(dim))) < 2.45


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_encoded_and_comes_back_in_float32(dtype):
    """Its unit norm is one to its own precision, which promises allow for."""
    torch.manual_seed(0)
    x = F.normalize(torch.randn(200, 96, dtype=torch.float32), dim=1).to(dtype)
    for promise in ({}, {"limit": 1.0}, {"norm": 1.0}):
        assert_within(decode(encode(x, 1e-3, **promise)), x, 1e-3)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("reach", range(1, 16))
def test_the_step_leaves_room_for_float32s_rounding(reach, moved):
    """At the ends of steps, where the error is largest: each a few float32 to either side of k + 1/2."""
    generator = torch.Generator().manual_seed(reach)
    for exponent in (-30, -4, -3, 2.5, 30):
        bound = 10.0**exponent
        how = Format(bound, 64, reach, reach + 1, None, moved)
        offset = None
        if moved:
            offset = (2 * torch.rand(64, generator=generator, dtype=torch.float64) - 1) * 2**14 * bound
            offset = (offset * (1 - 1e-6)).float()
        most = 2**reach - 1
        k = torch.randint(-most, most, (300, 64), generator=generator)
        k[::3], k[1::3] = most - 1, -most
        x = (k.double() + 0.5) * how.step
        x = (x if offset is None else x + offset.double()).float()
        for _ in range(2):
            x = torch.where(torch.rand(x.shape, generator=generator) < 0.5, x, torch.nextafter(x, x + bound))
        packed, held = pack(x, how, offset)
        assert held.all() or moved
        assert_within(unpack(packed, how, offset)[held], x[held], bound)
        assert how.step > 1.95 * below(bound)


# ------------------------------------------------------------------------------------------------------- packing


def bits_of(row: np.ndarray) -> str:
    return "".join(f"{byte:08b}"[::-1] for byte in row.tolist())


@pytest.mark.parametrize("dim", [1, 8, 13])
@pytest.mark.parametrize("low", range(2, 17))
def test_all_codes_of_all_widths_come_back(low, dim):
    how = Format(1.0, dim, low - 1, low)
    k = torch.arange(-(2 ** (low - 1)) + 1, 2 ** (low - 1))
    x = (k * how.step).float().repeat(dim)[: len(k) // dim * dim].reshape(-1, dim)
    packed, held = pack(x, how)
    assert held.all() and packed.shape == (len(x), how.row_bytes)
    assert torch.equal(unpack(packed, how), x)


def test_the_second_part_is_zeros_and_a_one_for_each_component():
    how = Format(0.5, 3, 7, 2, 20)
    x = torch.tensor([[0.0, -5.0, 9.0]]) * how.step  # v = 0, 9, 18: zeros 0, 2, 4
    packed, _ = pack(x, how)
    assert bits_of(packed[0, how.low_bytes :].numpy()).rstrip("0") == "1" + "001" + "00001"
    assert torch.equal(unpack(packed, how), x)
    longer = torch.cat([packed, packed.new_zeros(1, 5)], 1)  # rows of a store with room for longer ones
    assert torch.equal(unpack(longer, how), x)
    assert pack(x, replace(how, zeros=6))[1].all()
    assert not pack(4 * x, replace(how, zeros=6))[1].any()


@pytest.mark.parametrize("promise", [{"limit": 1.0}, {"norm": 1.0}])
def test_compiled_as_one_graph_it_gives_the_same(promise):
    torch.manual_seed(0)
    x = F.normalize(torch.randn(12, 40), dim=1)
    x[3, 3], x[4] = math.nan, 9.0

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        encoded = encode(x, 1e-3, **promise)
        return encoded.rows, decode(encoded)

    packed, decoded = torch.compile(both, fullgraph=True, backend="eager")(x)
    wanted = encode(x, 1e-3, **promise)
    assert torch.equal(packed, wanted.rows)
    assert torch.equal(decoded.nan_to_num(7.0), decode(wanted).nan_to_num(7.0))


def test_many_rows_and_rows_that_do_not_lie_together():
    """More than are worked on at a time, every second column of a transposed matrix."""
    torch.manual_seed(0)
    x = torch.randn(1000, 1200).t()[::2, ::2].mul(0.05)
    assert not x.is_contiguous()
    for promise in ({}, {"limit": 1.0}, {"norm": 3.0}):
        encoded = encode(x, 1e-3, **promise)
        decoded = decode(encoded)
        assert_within(decoded, x, 1e-3)
        assert torch.equal(decode(encode(x[300:307].clone(), 1e-3, **promise)), decoded[300:307]) or not promise
    assert encode(x.requires_grad_(), 1e-3).rows.grad_fn is None


# ------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_encoded_is_said():
    x = torch.zeros(2, 3)
    for bound in (0.0, -1.0, 1e-31, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"an error bound must be in \[1e-30, 1e\+30\], and this one is"):
            encode(x, bound)
    with pytest.raises(ValueError, match=r"rows \[n, d\] of float32.* not torch.float64 \[2, 3\]"):
        encode(x.double(), 1e-3)
    with pytest.raises(ValueError, match=r"not torch.float32 \[3\]"):
        encode(x[0], 1e-3)
    with pytest.raises(ValueError, match=r"an error bound of 1e-05 needs more than 16 bits for values up to 1"):
        encode(x, 1e-5, limit=1.0)
    with pytest.raises(ValueError, match="more than 16 bits for rows of norm 1"):
        encode(x, 1e-5, norm=1.0)
    with pytest.raises(ValueError, match="must be finite and not negative, and this one is nan"):
        encode(x, 1e-3, limit=math.nan)
    with pytest.raises(ValueError, match="promise one of them"):
        encode(x, 1e-3, limit=1.0, norm=1.0)
