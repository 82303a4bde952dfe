import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ipex_quant.nn.widened_linear import widened_linear

LOW = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24)])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", LOW)
def test_values_and_gradients(dtype, bias, shape, autocast):
    torch.manual_seed(0)
    linear = nn.Linear(24, 10, bias=bias).to(dtype)
    x = torch.randn(shape).to(dtype).requires_grad_()
    gradient = torch.randn(*shape[:-1], 10)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = widened_linear(x, linear.weight, linear.bias)
        y.backward(gradient)
    leaves = [each.detach().double().requires_grad_() for each in (x, *linear.parameters())]
    expected = F.linear(*leaves)
    expected.backward(gradient.double())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for found, leaf in zip((x, *linear.parameters()), leaves, strict=True):
        assert found.grad.dtype == dtype
        # rounded once, from products that are exact but for float32
        torch.testing.assert_close(found.grad.double(), leaf.grad, rtol=2**-8, atol=1e-5)


def test_only_what_is_needed_has_a_gradient():
    linear = nn.Linear(24, 10).bfloat16()
    linear.weight.requires_grad_(False)
    widened_linear(torch.randn(3, 24), linear.weight, linear.bias).sum().backward()
    assert linear.weight.grad is None
    assert linear.bias.grad.tolist() == [3.0] * 10


def second_derivative(linear, x, weight):
    (first,) = torch.autograd.grad(linear(x, weight).pow(2).sum(), x, create_graph=True)
    return torch.autograd.grad(first.float().sum(), weight)[0].float()


def test_second_derivatives():
    x, weight = (torch.randn(n, 4, dtype=torch.bfloat16, requires_grad=True) for n in (3, 5))
    found = second_derivative(lambda x, weight: widened_linear(x, weight, None), x, weight)
    expected = second_derivative(lambda x, weight: F.linear(x.float(), weight.float()), x, weight)
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.1)


def test_only_what_was_given_is_kept():
    x = torch.randn(30, 24, dtype=torch.bfloat16)
    weight = torch.randn(10, 24, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        widened_linear(x, weight, None)
    assert kept == [torch.bfloat16] * 2
