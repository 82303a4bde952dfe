import pytest
import torch
from torch import nn

import ipex_quant as ipex
from ipex_quant.frontend import kernel_selection
from ipex_quant.nn.prepacked import PrepackedLayer


def prepacked(model):
    return [name for name, module in model.named_modules() if isinstance(vars(module).get("forward"), PrepackedLayer)]


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


@pytest.mark.parametrize(("slow", "kept"), [(PrepackedLayer, []), (object, ["0", "2"])])
def test_the_faster_forward_is_kept(monkeypatch, model, slow, kept):
    def seconds(forward, args, kwargs):
        forward(*args, **kwargs)
        return 1.0 + (isinstance(forward, PrepackedLayer) == (slow is PrepackedLayer))

    monkeypatch.setattr(kernel_selection, "_seconds", seconds)
    x = torch.randn(3, 8)
    optimized = ipex.optimize(model, auto_kernel_selection=True, sample_input=x)
    assert prepacked(optimized) == kept
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), model(x))
    assert not optimized[0]._forward_pre_hooks


def test_layers_without_an_example_or_that_it_does_not_reach_stay(model):
    model.add_module("other", nn.Identity())
    model.other.unused = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match="give it a sample_input") as caught:
        assert prepacked(ipex.optimize(model, auto_kernel_selection=True)) == ["0", "2", "other.unused"]
    assert caught[0].filename == __file__
    optimized = ipex.optimize(model, auto_kernel_selection=True, sample_input=torch.randn(3, 8))
    assert "other.unused" in prepacked(optimized)


def test_an_example_that_does_not_fit(model):
    with pytest.raises(ValueError, match="sample_input: Sequential cannot be called with it"):
        ipex.optimize(model, auto_kernel_selection=True, sample_input=torch.randn(3, 7))
