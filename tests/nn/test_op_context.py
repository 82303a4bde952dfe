import pytest
import torch

from ipex_quant.nn import WeightOnlyQuantizedLinear
from ipex_quant.numerics import affine
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype


@pytest.mark.parametrize("symmetric", [False, True])
def test_it_tells_the_plain_tensors(symmetric):
    qw = affine.quantize(torch.randn(6, 32), WeightScheme(WoqWeightDtype.INT4, symmetric, 8))
    context = WeightOnlyQuantizedLinear.from_quantized_weight(qw, torch.arange(6.0))._op_context
    assert torch.equal(context.to_public(context.get_weight()), qw.codes)
    assert torch.equal(context.pack(qw.codes), qw.codes)
    assert torch.equal(context.get_scales(), qw.scales)
    assert context.get_zero_points() is None if symmetric else torch.equal(context.get_zero_points(), qw.zero_points)
    assert torch.equal(context.get_bias(), torch.arange(6.0))
    assert context.get_weight_shape() == [6, 32]
    assert context.get_g_idx() is None
    assert context.get_cached_weight() is None
