import pytest
import torch
from torch import nn

import ipex_quant as ipex
from ipex_quant.settings import compiler

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compiler._Setting, "backend", "inductor")  # restores it in the end
    yield
    torch._dynamo.reset()


def model():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()


@pytest.mark.parametrize("keywords", [{}, {"mode": "reduce-overhead"}, {"options": {"max_autotune": False}}])
def test_the_arguments_of_compile_fx(keywords, monkeypatch):
    seen = []

    def compile_fx(graph, example_inputs, config_patches):
        seen.append((type(example_inputs), config_patches))
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    plain = model()
    assert torch.equal(torch.compile(plain, backend=ipex.compile, **keywords)(X), plain(X))
    assert seen[0][0] is list
    assert bool(seen[0][1]) == bool(keywords)


def test_without_a_compiler_the_model_runs_as_it_is(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    plain = model()
    with torch.no_grad(), pytest.warns(match=r"without being compiled; install a C\+\+ compiler"):
        result = torch.compile(plain, backend=ipex.compile)(X)
    assert torch.equal(result, plain(X))


def test_other_errors_stay(monkeypatch):
    def compile_fx(graph, example_inputs, config_patches):
        raise RuntimeError("of another kind")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    with pytest.raises(Exception, match="of another kind"):
        torch.compile(model(), backend=ipex.compile)(X)


def test_torchscript():
    compiler.set_compiler_backend("torchscript")
    assert compiler.get_compiler_backend() == "torchscript"
    plain = model()
    compiled = torch.compile(plain, backend=ipex.compile)
    with torch.no_grad():
        assert torch.equal(compiled(X), plain(X))
        assert torch.equal(compiled(X + 1), plain(X + 1))
    compiled(X).sum().backward()
    assert plain[0].weight.grad is not None


def test_what_torchscript_cannot_trace_runs_as_it_is(monkeypatch):
    def trace(*args):
        raise RuntimeError("refused")

    monkeypatch.setattr(torch.jit, "trace", trace)
    compiler.set_compiler_backend("torchscript")
    plain = model()
    with torch.no_grad(), pytest.warns(match="without being traced: refused"):
        assert torch.equal(torch.compile(plain, backend=ipex.compile)(X), plain(X))


def test_a_backend_that_nobody_has():
    with pytest.raises(RuntimeError, match="Unexpected compilation path llvm"):
        compiler.set_compiler_backend("llvm")
