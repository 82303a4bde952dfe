import pytest
import torch
from torch import nn

from ipex_quant.bert.dropout import FastDropout, drop


@pytest.mark.parametrize("p", [0.0001, 0.1, 0.5, 0.999])
def test_the_rate_and_the_mean(p):
    torch.manual_seed(0)
    y = drop(torch.ones(1_000_001), p)
    kept = y[y != 0]
    assert torch.equal(kept, kept[:1].expand_as(kept))
    assert kept[0].item() == pytest.approx(1 / (1 - p), rel=2**-6)
    assert (y == 0).double().mean().item() == pytest.approx(p, abs=4e-3 * (p * (1 - p)) ** 0.5 + 2**-17)


def test_elements_are_dropped_independently():
    torch.manual_seed(0)
    dropped = (drop(torch.ones(4096, 256), 0.25) == 0).double() - 0.25
    for shift in (1, 2, 3, 4, 5, 256):
        neighbours = (dropped.flatten()[shift:] * dropped.flatten()[:-shift]).mean().item()
        assert abs(neighbours) < 5 * 0.25 * 0.75 / dropped.numel() ** 0.5


def test_edges():
    x = torch.randn(5)
    assert drop(x, 0.0) is x
    assert drop(x, 2**-18) is x
    assert drop(x, 1.0).tolist() == [0.0] * 5
    assert drop(x[:0], 0.5).shape == (0,)
    assert drop(torch.randn(3, 5).t(), 0.5).shape == (5, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_what_is_kept(dtype):
    torch.manual_seed(0)
    x = torch.randn(7, 9, dtype=dtype).abs().add(0.1).requires_grad_()
    y = drop(x, 0.5)
    gradient = torch.randn(7, 9, dtype=dtype)
    y.backward(gradient)
    assert y.dtype == x.grad.dtype == dtype
    assert torch.equal(y, torch.where(y == 0, 0, x * 2))
    assert torch.equal(x.grad, torch.where(y == 0, 0, gradient * 2))


def test_the_forward_of_a_module():
    module = nn.Dropout(0.5)
    module.forward = FastDropout(module)
    x = torch.ones(100)
    assert 0 < (module(x) == 0).sum() < 100
    module.p = 1.0
    assert (module(x) == 0).all()
    assert module.eval()(x) is x
