import pytest
import torch
from torch import nn

from ipex_quant.nn import WeightOnlyQuantizedLinear
from ipex_quant.nn.linears import (
    conv_obstacle,
    holds_experts,
    is_linear,
    linear_shape,
    obstacle,
    weight_matrix,
    weight_obstacle,
)
from ipex_quant.quantization import convert, get_weight_only_quant_qconfig_mapping, prepare


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-50, 50))


class Gated(nn.Linear):
    def forward(self, x, gate=None):
        return super().forward(x)


class Broken(nn.Linear):
    def forward(self, x):
        raise KeyError("x")


class Adapted(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.adapter = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return super().forward(x) + self.adapter


class Named(nn.Linear):
    pass


def test_transformers_conv1d_is_a_linear_with_a_transposed_weight():
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(nf=5, nx=3)
    assert is_linear(layer)
    assert weight_matrix(layer).shape == (5, 3)
    assert obstacle(layer) is None
    x = torch.randn(2, 3)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight_matrix(layer), layer.bias))


def test_quantized_linears_are_linears_to_others_alone():
    layer = WeightOnlyQuantizedLinear(8, 4)
    assert isinstance(layer, nn.Linear)
    assert not layer._parameters
    assert not is_linear(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_quantized_linear_gives_the_float_one_that_it_stands_for(bias, dtype):
    mapping = get_weight_only_quant_qconfig_mapping()
    layer = convert(prepare(nn.Linear(16, 8, bias).to(dtype).eval(), mapping))
    result = layer.dequantize()
    assert type(result) is nn.Linear
    assert not result.training
    assert torch.equal(result.weight, layer.weight.clone())
    assert result.weight.dtype == dtype
    assert (result.bias is None) != bias
    x = torch.randn(3, 16, dtype=dtype)
    # The packed weight's values are not rounded to bfloat16.
    torch.testing.assert_close(result(x), layer(x), **({} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}))


def test_other_layers_are_no_linears():
    assert not is_linear(nn.Conv1d(3, 3, 1))
    assert not is_linear(nn.Embedding(3, 3))
    assert not is_linear(nn.Bilinear(3, 3, 3))


def test_only_a_forward_that_computes_a_linear_can_be_replaced():
    assert obstacle(nn.Linear(2, 2)) is None
    assert obstacle(Named(2, 2)) is None
    for layer in (Scaled, Clamped, Gated, Broken, Adapted):
        assert obstacle(layer(2, 2)) == f"{layer.__name__} overrides Linear.forward"


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"device": "meta"}, {"dtype": torch.bfloat16}])
def test_a_forward_that_writes_the_same_differently_can_be_replaced(options):
    from transformers.models.falcon.modeling_falcon import FalconLinear

    torch.manual_seed(3)
    assert obstacle(FalconLinear(2, 2, **options)) is None
    assert torch.initial_seed() == 3


def test_stacked_experts_are_no_convolution():
    module = nn.Module()
    module.weights = nn.Parameter(torch.ones(2, 3, 4))
    assert holds_experts(module)
    assert not holds_experts(nn.Conv1d(2, 2, 2))
    assert not holds_experts(nn.Sequential(module))
    normalized = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 2))
    assert not any(map(holds_experts, normalized.modules()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_weights_can_be_quantized(dtype):
    assert weight_obstacle(nn.Linear(2, 3, dtype=dtype)) is None


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Linear(2, 3, dtype=torch.float64), "float64"),
        (lambda: nn.Linear(2, 3, device="meta"), "on device meta"),
        (lambda: nn.Linear(2, 0, bias=False), "empty"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), "computed from other parameters"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_weights_that_cannot_be_quantized_say_why(make, reason):
    assert reason in weight_obstacle(make())


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class TransposedInside(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight.transpose(2, 3), bias)


def test_convolutions_that_cannot_be_quantized():
    assert conv_obstacle(nn.Conv2d(3, 4, 3, padding="same", groups=1)) is None
    assert conv_obstacle(nn.Conv3d(3, 4, 3, padding=1, padding_mode="circular")) is None
    for cls in (Standardized, TransposedInside):
        assert conv_obstacle(cls(3, 4, 3)) == f"{cls.__name__} overrides Conv2d.forward"


def test_shape_of_linears_alone():
    assert linear_shape(nn.Linear(3, 5)) == (5, 3)
    with pytest.raises(ValueError, match="expected a linear layer, got a Conv2d"):
        linear_shape(nn.Conv2d(3, 4, 3))
