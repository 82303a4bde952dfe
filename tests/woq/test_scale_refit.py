import dataclasses

import pytest
import torch

from ipex_quant.numerics.affine import dequantize
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype
from ipex_quant.woq.gptq import GptqOptions, quantize_weight
from ipex_quant.woq.rtn import rtn
from ipex_quant.woq.scale_refit import refit_scales

IN_FEATURES = 75


def _normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def weight():
    return _normal(300, IN_FEATURES, seed=1)


@pytest.fixture
def hessian():
    inputs = _normal(400, 20, seed=2) @ _normal(20, IN_FEATURES, seed=3) + _normal(400, IN_FEATURES, seed=4)
    return inputs.t() @ inputs / len(inputs)


def _errors(weight, hessian, quantized):
    difference = (dequantize(quantized) - weight).double()
    return ((difference @ hessian.double()) * difference).sum(1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [WoqWeightDtype.INT2, WoqWeightDtype.INT4, WoqWeightDtype.INT8])
@pytest.mark.parametrize("group_size", [-1, 16, 32])
def test_no_row_gets_worse_and_most_better(group_size, dtype, symmetric, weight, hessian):
    quantized = rtn(weight, WeightScheme(dtype, symmetric, group_size))
    scales = refit_scales(weight, hessian, quantized, torch.float32)
    before = _errors(weight, hessian, quantized)
    after = _errors(weight, hessian, dataclasses.replace(quantized, scales=scales))
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < (0.999 if dtype == WoqWeightDtype.INT8 else 0.97) * before.sum()


def test_the_scales_that_made_a_weight_are_found(weight, hessian):
    exact = rtn(weight, WeightScheme(WoqWeightDtype.INT4, False, 32))
    moved = dataclasses.replace(
        exact, scales=exact.scales * (1 + 0.2 * _normal(*exact.scales.shape, seed=5).clamp(-1, 1))
    )
    found = refit_scales(dequantize(exact), hessian, moved, torch.float32)
    torch.testing.assert_close(found, exact.scales, rtol=2e-3, atol=0)


def test_features_in_any_order(weight, hessian):
    options = GptqOptions(static_groups=False, refit=False)
    quantized = quantize_weight(weight, hessian, WeightScheme(WoqWeightDtype.INT3, True, 16), options)
    assert quantized.g_idx is not None
    scales = refit_scales(weight, hessian, quantized, torch.float16)
    assert torch.equal(scales, scales.half().float())
    better = dataclasses.replace(quantized, scales=scales)
    assert _errors(weight, hessian, better).sum() < 0.98 * _errors(weight, hessian, quantized).sum()


def test_codes_that_say_nothing_keep_their_scale(weight, hessian):
    weight[:2, :32] = 0
    weight[1] = 0
    quantized = rtn(weight, WeightScheme(WoqWeightDtype.INT4, True, 32))
    scales = refit_scales(weight, hessian, quantized, torch.float32)
    assert torch.equal(scales[0, 0], quantized.scales[0, 0])
    assert torch.equal(scales[1], quantized.scales[1])
    assert torch.isfinite(scales).all()
    assert (scales > 0).all()


def test_gptq_refits_few_bits_by_default(weight, hessian):
    four = WeightScheme(WoqWeightDtype.INT4, False, 32)
    without = quantize_weight(weight, hessian, four, GptqOptions(refit=False))
    assert torch.equal(quantize_weight(weight, hessian, four).scales, without.scales)
    assert not torch.equal(quantize_weight(weight, hessian, four, GptqOptions(refit=True)).scales, without.scales)
    scheme = WeightScheme(WoqWeightDtype.INT2, False, 32)
    plain = quantize_weight(weight, hessian, scheme, GptqOptions(refit=False))
    refitted = quantize_weight(weight, hessian, scheme)
    assert torch.equal(refitted.codes, plain.codes)
    assert _errors(weight, hessian, refitted).sum() < 0.99 * _errors(weight, hessian, plain).sum()
