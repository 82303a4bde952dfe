import dataclasses

import pytest
import torch

from ipex_quant.numerics import affine
from ipex_quant.numerics.quantized_stack import QuantizedStack
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype

SCHEME = WeightScheme(WoqWeightDtype.INT4, False, 4)


def weight(seed, n=3, k=8, scheme=SCHEME):
    return affine.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)), scheme)


def ordered(qw):
    return dataclasses.replace(qw, g_idx=torch.tensor([0, 1] * 4, dtype=torch.int32))


def test_experts_come_back():
    weights = [weight(seed) for seed in range(4)]
    stack = QuantizedStack.of(weights)
    assert stack.shape == (4, 3, 8)
    assert list(stack.tensors()) == ["codes", "scales", "zero_points"]
    for expert, expected in enumerate(weights):
        assert torch.equal(affine.dequantize(stack[expert]), affine.dequantize(expected))
        assert stack[expert].codes.data_ptr() == stack.codes[expert].data_ptr()


def test_an_order_of_some_is_an_order_of_all():
    stack = QuantizedStack.of([weight(0), ordered(weight(1))])
    assert stack.g_idx.tolist() == [[0] * 4 + [1] * 4, [0, 1] * 4]


@pytest.mark.parametrize("other", [weight(1, k=16), weight(1, n=2), weight(1, scheme=WeightScheme())])
def test_others_are_refused(other):
    with pytest.raises(ValueError, match="expected experts of one scheme and shape, got int4 asym g4"):
        QuantizedStack.of([weight(0), other])


def test_bad_tensors_are_refused():
    stack = QuantizedStack.of([weight(0), weight(1)])
    with pytest.raises(ValueError, match=r"codes: expected those of 2 experts, got shape \[1, 3, 4\]"):
        dataclasses.replace(stack, codes=stack.codes[:1])
    with pytest.raises(ValueError, match=r"scales: expected those of 2 experts, got shape \[6, 2\]"):
        dataclasses.replace(stack, scales=stack.scales.flatten(0, 1))
    with pytest.raises(ValueError, match="scales: expected finite"):
        dataclasses.replace(stack, scales=stack.scales / 0)
    with pytest.raises(ValueError, match="g_idx"):
        dataclasses.replace(stack, g_idx=torch.zeros(2, 8, dtype=torch.int32))
