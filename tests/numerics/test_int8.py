"""INT8 parameters and codes against torch.ao's observers and torch's own quantizers, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant.numerics.affine import dequantize
from ipex_quant.numerics.int8 import (
    StaticActivation,
    affine_parameters,
    channel_scales,
    quantize_per_channel,
    same_activation,
)

EPS = torch.finfo(torch.float32).eps
# A weight that calibration would meet and some that it would not: denormal, eps, near the largest of each dtype.
MAGNITUDES = (0.0, 1e-42, 1e-30, EPS, 1e-3, 1.0, 300.0, 6e4, 1e30, 3e38)


def random_weight(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows of any magnitude that `dtype` holds, some of one sign, some that are multiples of half a step."""
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.tensor(MAGNITUDES)[torch.randint(len(MAGNITUDES), (rows, 1), generator=generator)]
    weight = torch.rand(rows, columns, generator=generator) * 2 - 1
    weight[0::3] = (weight[0::3] * 255).round() / 255  # 255 halves of a step on either side
    weight[1::5] = weight[1::5].abs()
    largest = torch.finfo(dtype).max
    return (weight * magnitudes).clamp(-largest, largest).to(dtype)


EPS = torch.finfo(torch.float32).eps


def torch_observer(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    observer = torch.ao.quantization.PerChannelMinMaxObserver(
        ch_axis=0, dtype=torch.qint8, qscheme=torch.per_channel_symmetric
    )
    observer(weight.float())
    return observer.calculate_qparams()


@settings(deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_weight_equals_torch(rows: int, columns: int, dtype: torch.dtype, seed: int) -> None:
    weight = random_weight(rows, columns, dtype, seed)
    scales, zero_points = torch_observer(weight)
    quantized = quantize_per_channel(weight)
    assert torch.equal(channel_scales(weight), quantized.scales.flatten())
    largest = weight.float().abs().amax(1)
    same = (largest == 0) | (largest > 127.5 * EPS)  # torch makes 0 of all that is smaller
    assert torch.equal(quantized.scales[same], scales[same, None])
    expected = torch.quantize_per_channel(weight.float(), scales, zero_points, 0, torch.qint8)
    assert torch.equal(quantized.codes[same], expected.int_repr()[same])
    torch.testing.assert_close(dequantize(quantized)[same], expected.dequantize()[same], rtol=0, atol=0)
    error = (dequantize(quantized) - weight.float()).abs().amax(1)
    assert (error <= 0.502 * largest.clamp(min=2.0**-120) / 127.5).all()


@settings(deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_weight_with_given_scales_equals_torch(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(rows, generator=generator) + 0.01
    weight = torch.randint(-300, 301, (rows, columns), generator=generator) * 0.5 * scales[:, None]
    zero_points = torch.zeros(rows, dtype=torch.int64)
    expected = torch.quantize_per_channel(weight, scales, zero_points, 0, torch.qint8).int_repr()
    assert torch.equal(quantize_per_channel(weight, scales).codes, expected)


@settings(deadline=None)
@given(ends=st.lists(st.tuples(*[st.floats(-(2.0**126), 2.0**126, width=32)] * 2), min_size=1, max_size=20))
def test_affine_parameters_equal_torch(ends: list[tuple[float, float]]) -> None:
    low, high = torch.tensor(ends).sort(1).values.unbind(1)
    span = high.clamp(min=0) - low.clamp(max=0)
    same = (span == 0) | (span > 255 * EPS)  # torch makes 0 of all that is smaller
    observer = torch.ao.quantization.PerChannelMinMaxObserver(dtype=torch.quint8, qscheme=torch.per_channel_affine)
    observer(torch.stack([low, high], dim=1))
    scale, zero_point = affine_parameters(low, high)
    expected_scale, expected_zero_point = observer.calculate_qparams()
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)
    assert torch.equal(scale[same], expected_scale[same])
    assert torch.equal(zero_point[same].long(), expected_zero_point[same].long())


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [(0.0, 0.0, EPS, 0), (0.0, 255.0, 1.0, 0), (-255.0, 0.0, 1.0, 255), (3.0, 51.0, 0.2, 0), (-51.0, -3.0, 0.2, 255)],
)
def test_affine_range_always_holds_zero(low, high, scale, zero_point) -> None:
    got_scale, got_zero_point = affine_parameters(torch.tensor(low), torch.tensor(high))
    assert got_scale.shape == got_zero_point.shape == ()
    assert got_scale.item() == pytest.approx(scale)
    assert got_zero_point == zero_point


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (1.0, 0.0, "expected low <= high"),
        (torch.nan, 1.0, "expected low <= high, got the reverse or NaN"),
        (-torch.inf, 1.0, "expected a finite range, got Inf"),
        (-3e38, 3e38, "or one that float32 does not hold"),
    ],
)
def test_bad_range_is_an_error(low, high, message) -> None:
    with pytest.raises(ValueError, match=message):
        affine_parameters(torch.tensor([0.0, low]), torch.tensor([1.0, high]))


def test_channel_scales_of_a_convolution_are_those_of_its_rows() -> None:
    weight = torch.randn(3, 2, 5, 4)
    assert torch.equal(channel_scales(weight), channel_scales(weight.flatten(1)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weight_that_is_not_finite_is_an_error(value) -> None:
    weight = torch.ones(2, 3)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="weight: expected finite values, got NaN or Inf"):
        quantize_per_channel(weight)


@pytest.mark.parametrize("shape", [(3,), (2, 0)])
def test_weight_without_columns_is_an_error(shape) -> None:
    with pytest.raises(ValueError, match=r"weight: expected shape \[N, K\]"):
        quantize_per_channel(torch.ones(shape))


def test_arguments_that_do_not_fit_are_errors() -> None:
    with pytest.raises(TypeError, match=r"expected dtype float32, bfloat16 or float16, got torch.float64"):
        quantize_per_channel(torch.ones(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"scales: expected shape \[2, 1\], got \[3, 1\]"):
        quantize_per_channel(torch.ones(2, 3), torch.ones(3))


@pytest.mark.parametrize("smoothed", [False, True])
def test_multiplier_makes_torch_codes(smoothed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 7, generator=generator) * 2
    factor = torch.rand(7, generator=generator) + 0.5 if smoothed else None
    activation = StaticActivation(torch.tensor(0.03).item(), 100, factor)
    assert activation.multiplier.shape == ((7,) if smoothed else (1,))
    codes = (torch.round(x * activation.multiplier) + 100).clamp(0, 255)
    smooth = x if factor is None else x * factor
    expected = torch.quantize_per_tensor(smooth, activation.scale, 100, torch.quint8).int_repr()
    # One multiplication rounds once where two round twice: a tie may fall to the other side, nothing else.
    assert (codes - expected).abs().max() <= smoothed
    assert (codes != expected).float().mean() <= 0.02 * smoothed


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.0, 0), ValueError, "scale: expected a finite number above 0, got 0.0"),
        ((float("nan"), 0), ValueError, "scale: expected a finite number above 0, got nan"),
        ((1.0, 256), ValueError, r"zero_point: expected 0..255, got 256"),
        ((1.0, 0, torch.ones(3, dtype=torch.float64)), TypeError, "smoothing_factor: expected dtype torch.float32"),
        ((1.0, 0, torch.ones(1, 3)), ValueError, r"smoothing_factor: expected shape \[K\], got \[1, 3\]"),
        ((1.0, 0, torch.tensor([1.0, torch.inf])), ValueError, "smoothing_factor: expected finite values"),
    ],
)
def test_bad_static_activation_is_an_error(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        StaticActivation(*arguments)


def test_activations_are_compared_by_value():
    factor = torch.tensor([1.0, 2.0])
    one = StaticActivation(0.5, 3, factor)
    assert same_activation(one, StaticActivation(0.5, 3, factor.clone()))
    for other in (
        StaticActivation(0.25, 3, factor),
        StaticActivation(0.5, 4, factor),
        StaticActivation(0.5, 3, factor + 1),
        StaticActivation(0.5, 3),
        None,
    ):
        assert not same_activation(one, other)
        assert not same_activation(other, one)


@pytest.mark.parametrize("power", [-30, -60, -100])
def test_small_weights_and_activations_have_the_codes_of_large_ones(power: int) -> None:
    weight = random_weight(4, 32, torch.float32, 3)
    small = quantize_per_channel(weight * 2.0**power)
    assert torch.equal(small.codes, quantize_per_channel(weight).codes)
    low, high = torch.tensor([-0.5, 0.0]), torch.tensor([1.5, 0.0])
    scale, zero_point = affine_parameters(low * 2.0**power, high * 2.0**power)
    expected, expected_zero_point = affine_parameters(low, high)
    assert torch.equal(scale, torch.stack([expected[0] * 2.0**power, expected[1]]))
    assert torch.equal(zero_point, expected_zero_point)
