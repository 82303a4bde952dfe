import pytest
import torch

from ipex_quant.conversion.quantize_tensors import (
    dequantize_per_block,
    dequantize_per_channel,
    quantize_per_block,
    quantize_per_channel,
)
from ipex_quant.numerics import affine
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype

N, K = 6, 37


@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("dtype", list(WoqWeightDtype))
def test_there_and_back(dtype, sym, group_size):
    weight = torch.randn(N, K)
    symmetric = sym or not dtype.has_integers
    expected = affine.quantize(weight, WeightScheme(dtype, symmetric, group_size))
    if group_size < 0:
        codes, scales, zero_points = quantize_per_channel(weight, dtype, sym_quant=sym)
        back = dequantize_per_channel(codes, scales, zero_points, dtype, (N, K))
    else:
        codes, scales, zero_points = quantize_per_block(weight, dtype, group_size, sym_quant=sym)
        back = dequantize_per_block(codes, scales, zero_points, dtype, group_size, (N, K))
    assert torch.equal(codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(scales, expected.scales)
    assert symmetric == (zero_points is None)
    assert torch.equal(back, affine.dequantize(expected))


def test_parameters_may_be_given_flat():
    weight, scales, zero_points = torch.randn(N, K), torch.full((N,), 0.02), torch.full((N,), 3)
    codes, used, zps = quantize_per_channel(weight, WoqWeightDtype.INT8, scales, zero_points)
    assert torch.equal(used, scales[:, None])
    expected = ((weight / 0.02).round() + 3).clamp(-128, 127)
    torch.testing.assert_close(codes.float(), expected, atol=1, rtol=0)
    torch.testing.assert_close(
        dequantize_per_channel(codes, scales, zps, WoqWeightDtype.INT8), (codes.float() - 3) * 0.02
    )


def test_the_shape_tells_an_odd_number_of_columns():
    codes, scales, zero_points = quantize_per_channel(torch.randn(N, K), WoqWeightDtype.INT4)
    assert dequantize_per_channel(codes, scales, zero_points, WoqWeightDtype.INT4).shape == (N, K + 1)


def test_act_order():
    weight = torch.randn(N, 32)
    codes, scales, zero_points = quantize_per_block(weight, WoqWeightDtype.INT8, 16)
    g_idx = (torch.arange(32) // 16).flip(0)
    back = dequantize_per_block(codes, scales, zero_points, WoqWeightDtype.INT8, 16, g_idx=g_idx)
    assert torch.equal(back, (codes - zero_points[:, g_idx]).float() * scales[:, g_idx])


def test_tensors_that_do_not_fit_raise():
    codes, scales, zero_points = quantize_per_block(torch.randn(N, 32), WoqWeightDtype.INT8, 16)
    with pytest.raises(ValueError, match="scales: expected shape"):
        dequantize_per_block(codes, scales, zero_points, WoqWeightDtype.INT8, 8)
    with pytest.raises(TypeError, match="codes: expected dtype"):
        dequantize_per_block(codes, scales, None, WoqWeightDtype.FP8, 16)


def test_scales_of_another_size_raise():
    with pytest.raises(ValueError, match=r"scales: expected a multiple of 4 elements, as many a row, got \[3\]"):
        quantize_per_channel(torch.ones(4, 8), WoqWeightDtype.INT8, torch.ones(3))
