import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ipex_quant.bert.linears import FastLinear, fuse_linears
from ipex_quant.nn import prepacked


def fast_linear(bias=True):
    linear = nn.Linear(24, 10, bias=bias).bfloat16()
    linear.forward = FastLinear(linear)
    return linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24)])
@pytest.mark.parametrize("autocast", [False, True])
def test_values_and_gradients(bias, shape, autocast):
    torch.manual_seed(0)
    linear = fast_linear(bias)
    x = torch.randn(shape).bfloat16().requires_grad_()
    gradient = torch.randn(*shape[:-1], 10).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = linear(x)
        y.backward(gradient)
    leaves = [each.detach().double().requires_grad_() for each in (x, *linear.parameters())]
    expected = F.linear(*leaves)
    expected.backward(gradient.double())
    assert y.dtype == torch.bfloat16
    # rounded once, from products that are exact but for float32
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-5)
    for found, leaf in zip((x, *linear.parameters()), leaves, strict=True):
        torch.testing.assert_close(found.grad.double(), leaf.grad, rtol=2**-8, atol=1e-5)


def test_only_what_is_needed_has_a_gradient():
    linear = fast_linear()
    linear.weight.requires_grad_(False)
    x = torch.randn(3, 24).bfloat16()
    linear(x).sum().backward()
    assert linear.weight.grad is None
    assert linear.bias.grad.tolist() == [3.0] * 10


def test_other_dtypes():
    linear = fast_linear()
    with pytest.raises(RuntimeError, match="dtype"):
        linear(torch.randn(3, 24))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(3, 24)).dtype == torch.bfloat16


@pytest.mark.parametrize("supported", [False, True])
def test_cpus(supported, monkeypatch):
    monkeypatch.setattr(prepacked, "_SLOW", frozenset() if supported else frozenset((torch.bfloat16,)))
    model = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4), nn.Conv1d(4, 4, 1).bfloat16())
    fuse_linears(model)
    assert ["forward" in vars(module) for module in model] == [not supported, False, False]
