import copy

import pytest
import torch
from torch import nn

import ipex_quant as ipex
from ipex_quant.frontend.graph_mode import CompiledForward

compile_now = torch.compile


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        y = self.linear(x)
        return y.relu() if x.sum().item() > 0 else y


@pytest.fixture
def backend(monkeypatch):
    """Compile with a backend that counts the graphs it is given, or fails."""
    seen = []

    def make(graph, inputs):
        seen.append(graph)
        if seen[0] == "fail":
            raise NotImplementedError("no compiler")
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda forward: compile_now(forward, backend=make))
    yield seen
    torch._dynamo.reset()


@pytest.fixture
def model():
    return Net().eval()


def test_the_model_runs_as_graphs(backend, model):
    optimized, x = ipex.optimize(model, graph_mode=True), torch.randn(5, 4)
    assert not backend
    with torch.no_grad():
        for sign in (1, -1, 1):
            torch.testing.assert_close(optimized(sign * x), model(sign * x))
        assert backend
        count = len(backend)
        optimized(x)
        assert len(backend) == count
        other = copy.deepcopy(optimized)
        other.linear.weight.zero_()
        other.linear.bias.fill_(1)
        assert torch.equal(other(x), torch.ones(5, 3))
    x.requires_grad_()
    optimized(x).sum().backward()
    assert x.grad is not None
    assert torch.jit.trace(optimized, x, check_trace=False)(x).shape == (5, 3)
    again = ipex.optimize(optimized)
    assert not isinstance(vars(again).get("forward"), CompiledForward)


def test_a_model_that_cannot_be_compiled_runs_as_it_is_and_says_so_once(backend, model):
    backend.append("fail")
    optimized, x = ipex.optimize(model, graph_mode=True), torch.randn(5, 4)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="graph_mode: the model runs without graphs"):
            torch.testing.assert_close(optimized(x), model(x))
        count = len(backend)
        torch.testing.assert_close(optimized(x), model(x))
        assert len(backend) == count


def test_errors_are_those_of_the_model(backend, model):
    optimized = ipex.optimize(model, graph_mode=True)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            optimized(torch.randn(5, 3))
        torch.testing.assert_close(optimized(torch.ones(5, 4)), model(torch.ones(5, 4)))
    assert not optimized.forward._fails
