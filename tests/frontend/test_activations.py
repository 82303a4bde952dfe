import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

import ipex_quant as ipex
from ipex_quant.nn.prepacked import InPlaceActivation

ACTIVATIONS = [
    nn.ReLU(),
    nn.SiLU(),
    nn.GELU(),
    nn.GELU("tanh"),
    *(ACT2FN[name] for name in ("gelu", "gelu_pytorch_tanh", "silu")),
]


class Block(nn.Module):
    def __init__(self, activation, twice=False, branches=False):
        super().__init__()
        self.first, self.activation, self.second = nn.Linear(6, 8), activation, nn.Linear(8, 3)
        self.twice, self.branches = twice, branches

    def forward(self, x):
        y = self.first(x)
        z = self.activation(y)
        if self.branches and x.sum() > 1e9:
            return y
        return self.second(z + y if self.twice else z)


X = torch.randn(5, 6)


def in_place(model):
    return [name for name, m in model.named_modules() if isinstance(vars(m).get("forward"), InPlaceActivation)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_writes_over_what_it_alone_reads(activation, dtype):
    torch.manual_seed(0)
    model = Block(activation).eval()
    optimized, x = ipex.optimize(model, dtype=dtype), X.to(dtype, copy=True)
    assert in_place(optimized) == ["activation"]
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    with torch.no_grad():
        expected = model(X)
        for each in (optimized, copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
            torch.testing.assert_close(each(x).float(), expected, rtol=tolerance, atol=tolerance)
            hidden = each.first(x)
            assert each.activation(hidden) is hidden
            assert each.activation(hidden.clone()) is not hidden
    x.requires_grad_()
    optimized(x).sum().backward()
    assert x.grad is not None
    assert in_place(ipex.optimize(optimized, weights_prepack=False)) == []


def test_convolutions_and_examples():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True)
    ).eval()
    optimized, x = ipex.optimize(model), torch.randn(2, 3, 8, 8)
    assert in_place(optimized) == ["2"]
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), model(x))
    branches = Block(nn.GELU(), branches=True).eval()
    assert in_place(ipex.optimize(branches)) == []
    assert in_place(ipex.optimize(branches, sample_input=X)) == ["activation"]


@pytest.mark.parametrize("name", ["gelu_python", "gelu_new"])
def test_activations_that_are_not_known_stay(name):
    assert in_place(ipex.optimize(Block(ACT2FN[name]).eval())) == []


def test_results_that_are_read_elsewhere_stay():
    model = Block(nn.GELU(), twice=True).eval()
    assert in_place(ipex.optimize(model)) == []
    shared = nn.ReLU()
    assert in_place(ipex.optimize(nn.Sequential(nn.Linear(3, 3), shared, nn.Linear(3, 3), shared).eval())) == []
    optimized = ipex.optimize(Block(nn.GELU()).eval())
    seen = []
    optimized.first.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        optimized(X)
        torch.testing.assert_close(seen[0], nn.functional.linear(X, optimized.first.weight, optimized.first.bias))
