import pytest
import torch
from torch import nn

import ipex_quant as ipex
from ipex_quant.nn import memory_format
from ipex_quant.nn.memory_format import is_contiguous_channels_last_1d, to_channels_last_1d

CASES = [
    (nn.Conv1d, (2, 4, 9), is_contiguous_channels_last_1d),
    (nn.Conv2d, (2, 4, 9, 9), lambda x: x.is_contiguous(memory_format=torch.channels_last)),
    (nn.Conv3d, (2, 4, 9, 9, 9), lambda x: x.is_contiguous(memory_format=torch.channels_last_3d)),
    (nn.ConvTranspose2d, (2, 4, 9, 9), lambda x: x.is_contiguous(memory_format=torch.channels_last)),
]


@pytest.mark.parametrize(("kind", "shape", "channels_last"), CASES)
def test_weights_and_results_are_channels_last(kind, shape, channels_last):
    model, x = kind(4, 6, 3).eval(), torch.randn(shape)
    optimized = ipex.optimize(model, weights_prepack=False)
    assert channels_last(optimized.weight)
    with torch.no_grad():
        result = optimized(x)
    assert channels_last(result)
    torch.testing.assert_close(result, model(x))
    assert channels_last(ipex.optimize(model, sample_input=x).weight)
    assert ipex.optimize(model, level="O0").weight.is_contiguous()


def test_the_setting_turns_it_off(monkeypatch):
    assert memory_format.auto_channels_last()
    monkeypatch.setattr(memory_format._Setting, "automatic", None)  # restores it in the end
    memory_format.set_auto_channels_last(False)
    assert ipex.optimize(nn.Conv2d(3, 4, 3).eval()).weight.is_contiguous()


def test_channels_last_1d():
    x = torch.randn(2, 3, 5)
    y = to_channels_last_1d(x)
    assert torch.equal(x, y)
    assert y.stride() == (15, 1, 3)
    assert is_contiguous_channels_last_1d(y)
    assert not is_contiguous_channels_last_1d(x)
    assert to_channels_last_1d(torch.randn(4, 1, 3)).stride() == (3, 1, 1)
    model = nn.Sequential(nn.Conv1d(3, 4, 5), nn.Linear(3, 3))
    assert to_channels_last_1d(model) is model
    assert is_contiguous_channels_last_1d(model[0].weight)
    with pytest.raises(ValueError, match="N, C, L"):
        to_channels_last_1d(torch.ones(3, 3))
