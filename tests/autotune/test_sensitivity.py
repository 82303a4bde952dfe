import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ipex_quant.autotune.sensitivity import COMBINE, block_error, int8_errors, relative_error
from ipex_quant.conversion.example import Example
from ipex_quant.conversion.observed import LayerParameters
from ipex_quant.numerics.int8 import StaticActivation


def test_relative_error():
    exact = torch.tensor([3.0, 4.0])
    assert relative_error(exact, torch.tensor([3.0, 5.0])) == pytest.approx(1 / 25)
    assert relative_error(exact, exact) == 0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0


def linear(weight):
    made = nn.Linear(*reversed(weight.shape), bias=True)
    made.weight.data = weight.clone()
    return made


def test_the_error_of_a_layer_by_hand():
    weight = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    parameters = LayerParameters(StaticActivation(0.5, 4), torch.tensor([1.0, 0.25]))
    sample = torch.tensor([[1.2, -0.6]])
    # 1.2 becomes the code 2 + 4, -0.6 the code -1 + 4: 1.0 and -0.5; the weights are on their grids
    exact, actual = torch.tensor([1.2 - 1.2, 0.6 + 0.6]), torch.tensor([1.0 - 1.0, 0.5 + 0.5])
    (error,) = int8_errors([linear(weight)], sample, [parameters])
    assert error == pytest.approx(relative_error(exact, actual), rel=1e-5)


def test_a_smoothing_factor_moves_from_the_activation_to_the_weight():
    weight, sample = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 100.0]])
    factor = torch.tensor([1.0, 100.0])
    plain = LayerParameters(StaticActivation(1.0, 0), torch.tensor([1.0]))
    smooth = LayerParameters(StaticActivation(0.01, 0, 1 / factor), torch.tensor([1.0]), factor)
    errors = [int8_errors([linear(weight)], sample + 0.3, [each])[0] for each in (plain, smooth)]
    assert errors[1] < 0.3 * errors[0]


def test_layers_of_one_input_and_of_every_kind():
    torch.manual_seed(0)
    one, transposed, conv = nn.Linear(6, 4), Conv1D(4, 6), nn.Conv1d(6, 4, 1)
    transposed.weight.data = one.weight.data.t().clone()
    conv.weight.data = one.weight.data[:, :, None].clone()
    sample = torch.randn(20, 6)
    activation = StaticActivation(float(sample.abs().max()) / 127, 128)
    scales = one.weight.detach().abs().amax(1) / 127
    parameters = LayerParameters(activation, scales)
    first, second = int8_errors([one, transposed], sample, [parameters, parameters])
    (third,) = int8_errors([conv], sample[:, :, None], [parameters])
    assert first == pytest.approx(second, rel=1e-5) == pytest.approx(third, rel=1e-5)
    assert 0 < first < 1e-3


def test_the_error_of_a_block_is_that_of_what_it_returns():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    x = torch.randn(5, 6)
    exact = block(x).detach()
    activation = StaticActivation(0.05, 128)
    parameters = {each: LayerParameters(activation, torch.full((6,), 0.01)) for each in (block[0], block[2])}
    error = block_error(block, Example((x,)), parameters)

    def rounded(y, module):
        codes = (y / 0.05).round().clamp(-128, 127) * 0.05
        return codes @ ((module.weight / 0.01).round().clamp(-127, 127) * 0.01).T + module.bias

    with torch.no_grad():
        actual = rounded(torch.relu(rounded(x, block[0])), block[2])
    assert error == pytest.approx(relative_error(exact, actual), rel=1e-3)
    assert torch.equal(block(x), exact), "the hooks are gone"


def test_how_errors_are_combined():
    assert [COMBINE[name]([1.0, 2.0, 6.0]) for name in ("min", "mean", "max")] == [1.0, 3.0, 6.0]
