import pytest
import torch

from ipex_quant.numerics.affine import dequantize, quantize
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype
from ipex_quant.woq.rtn import round_scales, rtn


@pytest.mark.parametrize("dtype", list(WoqWeightDtype))
def test_rtn_is_the_formula_of_numerics(dtype):
    weight, scheme = torch.randn(6, 40), WeightScheme(dtype, True, 16)
    qw, expected = rtn(weight, scheme), quantize(weight, scheme)
    assert torch.equal(qw.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(qw.scales, expected.scales)


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_found_with_the_rounded_scales(symmetric):
    weight = torch.randn(6, 64) * 0.01
    qw = rtn(weight, WeightScheme(WoqWeightDtype.INT8, symmetric, 32), torch.float16)
    assert torch.equal(qw.scales.half().float(), qw.scales)
    # Every weight but the clamped extremes is within half a step of the grid that is stored.
    inside = (qw.codes > -128) & (qw.codes < 127)
    error = (dequantize(qw) - weight).abs() / qw.scales.repeat_interleave(32, 1)
    assert error[inside].max() <= 0.5 + 1e-4


def test_scales_that_overflow_or_vanish_raise():
    for scale in (1e6, 1e-9):
        with pytest.raises(ValueError, match=r"scales: not representable in torch\.float16, range"):
            round_scales(torch.tensor([[scale, 1.0]]), torch.float16)
