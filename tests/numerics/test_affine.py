"""Round-to-nearest quantization against IPEX's own results and against the definition.

`data/ipex_rtn.safetensors` was recorded from IPEX 2.8.0 on CPU: float32 weights "normal" 3x7, "ragged" 3x63 (one row of
zeros, one without negative values), "ties" 2x129 (multiples of 0.5) and "even" 2x64 (mean 0.5), each through
`quantize_per_channel` (group -1) and `quantize_per_block` of `ipex.quantization._quantize_utils`, as
``<weight>.<dtype>.<sym|asym>.<group size>.<codes|scales|zero_points>``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ipex_quant import ops
from ipex_quant.numerics.affine import dequantize, feature_groups, quantize, stored_codes
from ipex_quant.numerics.codebooks import FP8_MAX, NF4_LEVELS
from ipex_quant.numerics.nibbles import unpack_nibbles
from ipex_quant.numerics.quantized_weight import QuantizedWeight
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype

GOLDEN = load_file(Path(__file__).parent / "data" / "ipex_rtn.safetensors")
EPS = torch.finfo(torch.float32).eps
GOLDEN_CASES = sorted({key.rsplit(".", 1)[0] for key in GOLDEN if "." in key})
KINDS = [
    (WoqWeightDtype.INT8, True),
    (WoqWeightDtype.INT8, False),
    (WoqWeightDtype.INT4, True),
    (WoqWeightDtype.INT4, False),
    (WoqWeightDtype.NF4, True),
    (WoqWeightDtype.FP8, True),
]

schemes = st.builds(
    lambda kind, group_size: WeightScheme(*kind, group_size),
    st.sampled_from(KINDS),
    st.sampled_from([-1, 1, 2, 4, 8, 16, 32, 64, 128, 256]),
)


def random_weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_quantize_equals_ipex(case: str) -> None:
    weight, dtype, kind, group_size = case.split(".")
    scheme = WeightScheme(WoqWeightDtype[dtype], kind == "sym", int(group_size))
    quantized = quantize(GOLDEN[weight], scheme)
    scales = GOLDEN[f"{case}.scales"]
    # Some values of 1e-9 are alone in their group: IPEX, whose scales are at least eps, makes them 0.
    small = (scales == EPS) & (quantized.scales < EPS)
    assert small.sum() <= 5
    assert torch.equal(quantized.scales[~small], scales[~small])
    expected = QuantizedWeight(GOLDEN[f"{case}.codes"], scales, quantized.zero_points, None, scheme, quantized.shape)
    ours, theirs = stored_codes(quantized), stored_codes(expected)
    compared = ~small[:, feature_groups(quantized)]
    assert torch.equal(ours[compared], theirs[compared])
    assert (quantized.zero_points is None) == scheme.symmetric
    if not scheme.symmetric:
        assert torch.equal(quantized.zero_points[~small], GOLDEN[f"{case}.zero_points"][~small])


def test_golden_file_covers_every_kind_ipex_has() -> None:
    kinds = {tuple(case.split(".")[1:3]) for case in GOLDEN_CASES}
    assert kinds == {(d.name, "sym" if sym else "asym") for d, sym in KINDS if d != WoqWeightDtype.FP8}


@settings(deadline=None)
@given(n=st.integers(1, 9), k=st.integers(1, 300), scheme=schemes, seed=st.integers(0, 9))
def test_error_is_at_most_half_a_step(n: int, k: int, scheme: WeightScheme, seed: int) -> None:
    weight = random_weight(n, k, seed)
    quantized = quantize(weight, scheme)
    restored = dequantize(quantized)
    assert restored.shape == weight.shape
    assert restored.dtype == torch.float32
    scale = quantized.scales[:, feature_groups(quantized)]
    if scheme.dtype == WoqWeightDtype.NF4:
        step = (NF4_LEVELS.diff().max() / 2) * scale
    elif scheme.dtype == WoqWeightDtype.FP8:
        step = weight.abs() / 16 + scale * 2.0**-10
    else:
        step = scale / 2
    assert ((restored - weight).abs() <= step * (1 + 1e-4)).all()


@settings(deadline=None)
@given(n=st.integers(1, 9), k=st.integers(1, 300), scheme=schemes, seed=st.integers(0, 9))
def test_scales_in_float16_cost_next_to_nothing(n: int, k: int, scheme: WeightScheme, seed: int) -> None:
    weight = random_weight(n, k, seed)
    exact, half = quantize(weight, scheme), quantize(weight, scheme, scale_dtype=torch.float16)
    held = half.scales >= torch.finfo(torch.float16).tiny
    assert torch.equal(half.scales[held], exact.scales[held].half().float())
    assert torch.equal(half.scales[~held], exact.scales[~held])
    errors = [(dequantize(each) - weight).abs().max(1).values for each in (exact, half)]
    assert (errors[1] <= errors[0] + weight.abs().amax(1) * 2.0**-9).all()


@pytest.mark.parametrize("size", [1e-9, 1e-4, 1.0, 1e7, 1e30])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_scale_that_float16_lacks_stays(size: float, symmetric: bool) -> None:
    weight = random_weight(3, 40) * size
    scheme = WeightScheme(WoqWeightDtype.INT8, symmetric)
    exact, half = quantize(weight, scheme), quantize(weight, scheme, scale_dtype=torch.float16)
    assert torch.equal(exact.scales, half.scales) == (size != 1.0)
    assert torch.isfinite(dequantize(half)).all()


def test_scales_have_no_other_dtype() -> None:
    with pytest.raises(
        ValueError, match=r"scale_dtype: expected torch\.float32 or torch\.float16, got torch\.bfloat16"
    ):
        quantize(random_weight(2, 4), WeightScheme(WoqWeightDtype.INT8, True), scale_dtype=torch.bfloat16)


@settings(deadline=None)
@given(n=st.integers(1, 5), k=st.integers(1, 70), scheme=schemes)
def test_groups_are_independent(n: int, k: int, scheme: WeightScheme) -> None:
    weight = random_weight(n, k)
    size = k if scheme.group_size == -1 else scheme.group_size
    alone = [dequantize(quantize(part, WeightScheme(scheme.dtype, scheme.symmetric))) for part in weight.split(size, 1)]
    assert torch.equal(dequantize(quantize(weight, scheme)), torch.cat(alone, 1))


@pytest.mark.parametrize(("dtype", "symmetric"), KINDS)
def test_quantizing_restored_values_again_changes_nothing(dtype: WoqWeightDtype, symmetric: bool) -> None:
    first = quantize(random_weight(4, 96), WeightScheme(dtype, symmetric, 32))
    second = quantize(dequantize(first), first.scheme, first.scales, first.zero_points)
    assert torch.equal(second.codes.view(torch.uint8), first.codes.view(torch.uint8))


@pytest.mark.parametrize(("dtype", "symmetric"), KINDS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_quantized_in_float32(dtype: WoqWeightDtype, symmetric: bool, half: torch.dtype) -> None:
    weight = random_weight(3, 40).to(half)
    scheme = WeightScheme(dtype, symmetric, 16)
    expected, got = quantize(weight.float(), scheme), quantize(weight, scheme)
    assert torch.equal(got.scales, expected.scales)
    assert torch.equal(got.codes.view(torch.uint8), expected.codes.view(torch.uint8))


@pytest.mark.parametrize(("dtype", "symmetric"), KINDS)
def test_zeros_stay_exactly_zero(dtype: WoqWeightDtype, symmetric: bool) -> None:
    weight = random_weight(2, 33)
    weight[:, ::3] = 0
    weight[1] = 0
    restored = dequantize(quantize(weight, WeightScheme(dtype, symmetric, 8)))
    assert (restored[weight == 0] == 0).all()


def test_spare_nibble_is_zero() -> None:
    codes = quantize(random_weight(3, 5), WeightScheme(WoqWeightDtype.INT4, False)).codes
    assert (codes[:, -1] >> 4 == 0).all()


def test_fp8_uses_the_whole_range() -> None:
    quantized = quantize(random_weight(4, 64), WeightScheme(WoqWeightDtype.FP8))
    assert (quantized.codes.float().abs().amax(1) == FP8_MAX).all()


def test_fp8_saturates_with_given_scales() -> None:
    scheme = WeightScheme(WoqWeightDtype.FP8)
    quantized = quantize(torch.tensor([[1e6, -1e6]]), scheme, torch.ones(1, 1))
    assert quantized.codes.float().tolist() == [[FP8_MAX, -FP8_MAX]]


def test_given_parameters_are_used() -> None:
    weight = torch.tensor([[0.0, 1.0, -1.0, 40.0]])
    zero_points = torch.tensor([[3]], dtype=torch.int16)
    quantized = quantize(weight, WeightScheme(WoqWeightDtype.INT4, False), torch.tensor([[0.5]]), zero_points)
    assert unpack_nibbles(quantized.codes, 4).tolist() == [[3, 5, 1, 15]]
    assert quantized.scales.item() == 0.5
    assert quantized.zero_points.item() == 3


@pytest.mark.parametrize("group_size", [-1, 4])
def test_dequantize_honours_g_idx(group_size: int) -> None:
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    weight = random_weight(3, 10)
    plain = quantize(weight[:, order], WeightScheme(WoqWeightDtype.INT8, False, group_size))
    groups = torch.empty(10, dtype=torch.int32)
    groups[order] = feature_groups(plain).int()
    codes = torch.empty_like(plain.codes)
    codes[:, order] = plain.codes
    shuffled = QuantizedWeight(codes, plain.scales, plain.zero_points, groups, plain.scheme, plain.shape)
    assert torch.equal(dequantize(shuffled)[:, order], dequantize(plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dequantize_rounds_once(dtype: torch.dtype) -> None:
    quantized = quantize(random_weight(3, 17), WeightScheme(WoqWeightDtype.INT4, False, 4))
    assert torch.equal(dequantize(quantized, dtype), dequantize(quantized).to(dtype))


@pytest.mark.parametrize(("dtype", "symmetric"), KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("given_scales", [False, True])
def test_non_finite_weight_is_an_error(
    dtype: WoqWeightDtype, symmetric: bool, value: float, given_scales: bool
) -> None:
    weight = random_weight(3, 9)
    scheme = WeightScheme(dtype, symmetric, 4)
    parameters = (torch.ones(3, 3), None if symmetric else torch.zeros(3, 3, dtype=torch.int16)) if given_scales else ()
    weight[2, 8] = value
    with pytest.raises(ValueError, match=r"weight: expected finite values.*check the checkpoint"):
        quantize(weight, scheme, *parameters)


def test_range_beyond_float32_is_an_error() -> None:
    with pytest.raises(ValueError, match="range fits float32"):
        quantize(torch.tensor([[3e38, -3e38]]), WeightScheme(WoqWeightDtype.INT8, False))


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (3, 0)])
def test_bad_shape_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected shape \[N, K\] with K > 0"):
        quantize(torch.zeros(shape), WeightScheme())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_bad_dtype_is_an_error(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="expected dtype float32, bfloat16 or float16"):
        quantize(torch.zeros(2, 2, dtype=dtype), WeightScheme())


@pytest.mark.parametrize(
    ("symmetric", "scales", "zero_points", "message"),
    [
        (False, None, torch.zeros(2, 1, dtype=torch.int16), "zero_points: given without scales"),
        (False, torch.ones(2, 1), None, "zero_points: int8 asym per-channel needs them"),
        (False, torch.ones(2, 1), torch.zeros(2, 2, dtype=torch.int16), r"zero_points: .*\[2, 1\], got \[2, 2\]"),
        (True, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int16), "must not have them"),
        (True, torch.ones(2, 3), None, r"scales: expected shape \[2, 1\], got \[2, 3\]"),
        (True, torch.zeros(2, 1), None, "finite values other than 0"),
        (True, torch.full((2, 1), float("nan")), None, "finite values other than 0"),
    ],
)
def test_bad_parameters_are_errors(symmetric, scales, zero_points, message) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(random_weight(2, 4), WeightScheme(WoqWeightDtype.INT8, symmetric), scales, zero_points)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [WoqWeightDtype.INT8, WoqWeightDtype.INT4, WoqWeightDtype.NF4, WoqWeightDtype.FP8])
def test_small_weights_have_the_codes_of_large_ones(dtype: WoqWeightDtype, symmetric: bool) -> None:
    if dtype not in (WoqWeightDtype.INT8, WoqWeightDtype.INT4) and not symmetric:
        pytest.skip("there is no such scheme")
    scheme, weight = WeightScheme(dtype, symmetric, 32), random_weight(8, 64)
    expected = quantize(weight, scheme)
    for power in (-20, -60, -100):
        small = quantize(weight * 2.0**power, scheme)
        assert torch.equal(small.codes.view(torch.uint8), expected.codes.view(torch.uint8))
        assert torch.equal(small.scales, expected.scales * 2.0**power)
    smallest = quantize(weight * 2.0**-140, scheme)
    assert torch.isfinite(dequantize(smallest)).all()


def test_zeros_stay_zeros() -> None:
    weight = random_weight(4, 64)
    weight[1], weight[2, 32:] = 0, 0
    zeros = quantize(weight, WeightScheme(WoqWeightDtype.INT4, False, 32))
    assert torch.equal(dequantize(zeros)[1], torch.zeros(64))
    assert torch.equal(dequantize(zeros)[2, 32:], torch.zeros(32))
    assert zeros.scales[1, 0] == torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    "scheme",
    [WeightScheme(WoqWeightDtype.INT4, False, 32, True), WeightScheme(WoqWeightDtype.FP4, True, 16, False, -1)],
)
def test_nothing_rounds_to_schemes_that_only_checkpoints_have(scheme):
    for round_to in (quantize, ops.quantize_weight):
        with pytest.raises(ValueError, match="which checkpoints have; quantize to"):
            round_to(torch.ones(2, 64), scheme)
