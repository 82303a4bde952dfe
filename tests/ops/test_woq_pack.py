"""Native quantization, packing and unpacking of weights."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant import ops
from ipex_quant.numerics import affine
from ipex_quant.numerics.codebooks import NF4_LEVELS
from ipex_quant.numerics.quantized_weight import QuantizedWeight
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype

from .weights import GROUP_SIZES, KINDS, shuffle_features

schemes = st.builds(
    lambda kind, group_size: WeightScheme(*kind, group_size), st.sampled_from(KINDS), st.sampled_from(GROUP_SIZES)
)


def assert_same(a: QuantizedWeight, b: QuantizedWeight) -> None:
    assert (a.scheme, a.shape) == (b.scheme, b.shape)
    for name in QuantizedWeight.names:
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert (left.dtype, left.shape) == (right.dtype, right.shape), name
            assert not left.numel() or torch.equal(
                left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
            ), name


def random_weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(
    n=st.integers(0, 140),
    k=st.integers(1, 300),
    scheme=schemes,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    magnitude=st.sampled_from([1.0, 1e-9, 1e4]),
)
def test_quantize_is_bit_equal_to_the_definition(n, k, scheme: WeightScheme, dtype, magnitude) -> None:
    weight = (random_weight(n, k) * magnitude).to(dtype)
    assert_same(ops.quantize_weight(weight, scheme), affine.quantize(weight, scheme))


@pytest.mark.parametrize(("dtype", "symmetric"), KINDS)
def test_quantize_breaks_ties_as_the_definition(dtype: WoqWeightDtype, symmetric: bool) -> None:
    halves = (torch.arange(4 * 130) % 61 - 30).float().reshape(4, 130) / 2
    powers = torch.randint(0, 2**9, (4, 130), generator=torch.Generator().manual_seed(0)).float()
    midpoints = (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2
    levels = torch.cat([midpoints, torch.tensor([1.0, -1.0])]).repeat(4, 8)[:, :130]
    for weight in (halves, powers, levels, torch.zeros(4, 130), -torch.zeros(4, 130)):
        for group_size in (-1, 32):
            scheme = WeightScheme(dtype, symmetric, group_size)
            assert_same(ops.quantize_weight(weight, scheme), affine.quantize(weight, scheme))


def test_quantize_takes_a_view() -> None:
    weight = random_weight(30, 20)
    for view in (weight.t(), weight[::2, 1::3], weight[:, 3:]):
        assert_same(ops.quantize_weight(view, WeightScheme()), affine.quantize(view.contiguous(), WeightScheme()))


@pytest.mark.parametrize(("dtype", "symmetric"), KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 16), (2, 32)])
def test_quantize_rejects_non_finite_weights(dtype, symmetric, value, place) -> None:
    weight = random_weight(3, 33)
    weight[place] = value
    with pytest.raises(ValueError, match="weight: expected finite values"):
        ops.quantize_weight(weight, WeightScheme(dtype, symmetric, 8))


@pytest.mark.parametrize(
    ("weight", "error"),
    [
        (torch.zeros(3), ValueError),
        (torch.zeros(2, 0), ValueError),
        (torch.zeros(2, 3, 4), ValueError),
        (torch.zeros(2, 3, dtype=torch.float64), TypeError),
        (torch.zeros(2, 3, dtype=torch.int32), TypeError),
    ],
)
def test_quantize_rejects_what_is_no_weight(weight: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="weight"):
        ops.quantize_weight(weight, WeightScheme())


@settings(deadline=None)
@given(
    n=st.integers(0, 140),
    k=st.integers(1, 300),
    scheme=schemes,
    half_scales=st.booleans(),
    act_order=st.booleans(),
    seed=st.integers(0, 3),
)
def test_unpack_is_the_inverse_of_pack(n, k, scheme, half_scales, act_order, seed) -> None:
    qw = affine.quantize(random_weight(n, k, seed), scheme)
    if half_scales:
        qw = dataclasses.replace(qw, scales=qw.scales.half().float())
    if act_order:
        qw = shuffle_features(qw, seed)
    packed = ops.pack_weight(qw)
    assert packed.data.dtype == torch.uint8
    assert (packed.scheme, tuple(packed.shape)) == (scheme, (n, k))
    assert (packed.perm is None) == (qw.g_idx is None)
    assert_same(ops.unpack_weight(packed), qw)


def test_every_code_survives() -> None:
    int8 = torch.arange(-128, 128, dtype=torch.int8).repeat(3, 2)
    fp8 = torch.arange(256, dtype=torch.uint8)[torch.arange(256) % 128 != 127].view(torch.float8_e4m3fn).repeat(3, 1)
    int4 = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    for codes, dtype in ((int8, WoqWeightDtype.INT8), (fp8, WoqWeightDtype.FP8), (int4, WoqWeightDtype.INT4)):
        k = codes.shape[1] * (2 if dtype == WoqWeightDtype.INT4 else 1)
        qw = QuantizedWeight(codes, torch.rand(3, 1), None, None, WeightScheme(dtype), (3, k))
        assert_same(ops.unpack_weight(ops.pack_weight(qw)), qw)


@pytest.mark.parametrize(("dtype", "zero_points"), [(WoqWeightDtype.INT4, (0, 16)), (WoqWeightDtype.INT8, (-128, 127))])
def test_extreme_zero_points_survive(dtype: WoqWeightDtype, zero_points: tuple[int, int]) -> None:
    qw = affine.quantize(random_weight(2, 8), WeightScheme(dtype, False))
    qw = dataclasses.replace(qw, zero_points=torch.tensor(zero_points, dtype=torch.int16)[:, None])
    assert_same(ops.unpack_weight(ops.pack_weight(qw)), qw)


@pytest.mark.parametrize(("dtype", "zero_point"), [("INT8", 128), ("INT8", -129), ("INT4", 17), ("INT4", -1)])
def test_the_op_itself_refuses_zero_points_that_its_kernels_cannot_hold(dtype: str, zero_point: int) -> None:
    qw = affine.quantize(random_weight(2, 8), WeightScheme(WoqWeightDtype[dtype], False))
    zero_points = torch.full((2, 1), zero_point, dtype=torch.int16)
    pack = torch.ops.ipex_quant.woq_pack
    with pytest.raises(RuntimeError, match=r"^zero_points: expected values in"):
        pack(qw.codes, qw.scales, zero_points, None, None, None, None, 8, WoqWeightDtype[dtype], -1)


def test_packing_through_a_perm_needs_a_permutation() -> None:
    qw = affine.quantize(random_weight(2, 8), WeightScheme(WoqWeightDtype.INT8))
    perm = torch.zeros(8, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="permutation"):
        torch.ops.ipex_quant.woq_pack(qw.codes, qw.scales, None, None, None, None, perm, 8, WoqWeightDtype.INT8, -1)
    with pytest.raises(RuntimeError, match="permutation"):
        torch.ops.ipex_quant.woq_unpack(ops.pack_weight(qw).data, perm, 2, 8, WoqWeightDtype.INT8, -1, 0, 0)


def test_scales_of_any_size_survive() -> None:
    scales = torch.tensor([[2.0**-24], [2.0**-25], [65504.0], [65536.0], [-0.5], [1e-30], [0.0], [1 + 2.0**-10]])
    codes = torch.ones(8, 5, dtype=torch.int8)
    for rows in (slice(None), slice(0, 1), slice(2, 3), slice(6, 8)):
        part = scales[rows].contiguous()
        qw = QuantizedWeight(codes[rows], part, None, None, WeightScheme(), (len(part), 5))
        assert_same(ops.unpack_weight(ops.pack_weight(qw)), qw)


@pytest.mark.parametrize("kind", KINDS[2:4])
def test_packed_size_is_near_that_of_the_codes(kind: tuple[WoqWeightDtype, bool]) -> None:
    qw = affine.quantize(random_weight(256, 1024), WeightScheme(*kind, 128))
    qw = dataclasses.replace(qw, scales=qw.scales.half().float())
    packed = ops.pack_weight(qw)
    assert packed.nbytes == packed.data.numel()
    assert packed.nbytes <= 0.53 * 256 * 1024


def test_packed_weight_can_be_copied_and_pickled() -> None:
    qw = shuffle_features(affine.quantize(random_weight(9, 40), WeightScheme(group_size=8)))
    packed = ops.pack_weight(qw)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert_same(ops.unpack_weight(other), qw)
    with pytest.raises(dataclasses.FrozenInstanceError):
        packed.data = None


def test_pack_leaves_its_input_alone() -> None:
    qw = shuffle_features(affine.quantize(random_weight(9, 41), WeightScheme(WoqWeightDtype.INT4, False, 8)))
    before = copy.deepcopy(qw)
    ops.unpack_weight(ops.pack_weight(qw))
    assert_same(qw, before)


def test_pack_takes_views() -> None:
    qw = shuffle_features(affine.quantize(random_weight(6, 10), WeightScheme(WoqWeightDtype.INT8, False, 4)))
    views = {
        name: torch.stack([getattr(qw, name)] * 2, dim=-1)[..., 0]
        for name in ("codes", "scales", "zero_points", "g_idx")
    }
    assert not any(view.is_contiguous() for view in views.values())
    assert_same(ops.unpack_weight(ops.pack_weight(dataclasses.replace(qw, **views))), qw)


@pytest.mark.parametrize("change", ["truncated", "extended", "empty", "noise", "no header"])
def test_damaged_packed_data_is_an_error(change: str) -> None:
    packed = ops.pack_weight(affine.quantize(random_weight(9, 40), WeightScheme(WoqWeightDtype.INT4, False, 8)))
    noise = torch.randint(0, 256, packed.data.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = {
        "truncated": packed.data[:-1],
        "extended": torch.cat([packed.data, packed.data[:1]]),
        "empty": packed.data[:0],
        "noise": noise,
        "no header": packed.data[:40],
    }[change]
    with pytest.raises((ValueError, RuntimeError), match="packed"):
        ops.unpack_weight(dataclasses.replace(packed, data=data))
    with pytest.raises((ValueError, RuntimeError), match="packed"):
        ops.woq_linear(torch.zeros(1, 40), data, 9)


def test_no_header_leads_outside_the_data() -> None:
    """Any change of the header is either caught or leaves the sizes, and so every access, as they were."""
    packed = ops.pack_weight(affine.quantize(random_weight(9, 40), WeightScheme(WoqWeightDtype.INT8, False, 8)))
    caught = 0
    for byte in range(64):
        for value in (0, 1, 2, 4, 127, 128, 255):
            data = packed.data.clone()
            data[byte] = value
            try:
                ops.woq_linear(torch.zeros(1, 40), data, 9)
            except (ValueError, RuntimeError):
                caught += 1
    assert caught > 64


def test_sizes_that_overflow_are_an_error() -> None:
    """A header whose packed size, computed in 64 bits, wraps to the small size that the data has."""
    packed = ops.pack_weight(affine.quantize(random_weight(2, 8), WeightScheme(WoqWeightDtype.INT8, True, 1)))
    feature_bytes = 64 * 4 + 8 * 64  # of one feature, a group of its own with float32 scales, in a tile of 64 rows
    assert packed.data.numel() == 64 + 8 * feature_bytes

    def wrapped(tiles: int) -> tuple[int, int, int]:
        in_features = -(-(2**64) // (feature_bytes * tiles))
        return feature_bytes * tiles * in_features - 2**64, tiles, in_features

    size, tiles, in_features = min(wrapped(tiles) for tiles in range(2**25 - 40000, 2**25))
    assert size < 2**22
    data = torch.cat([packed.data[:64], torch.zeros(size, dtype=torch.uint8)])
    data[8:24].view(torch.int64)[:] = torch.tensor([tiles * 64, in_features])
    with pytest.raises((ValueError, RuntimeError), match=r"packed"):
        ops.woq_linear(torch.zeros(0, in_features), data, tiles * 64)
