import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from ipex_quant.nn import Int8Conv, memory_format
from ipex_quant.numerics.int8 import StaticActivation, quantize_per_channel

ACTIVATION = StaticActivation(0.03125, 120)
CONVOLUTIONS = [
    (nn.Conv2d, {"padding": 1}),
    (nn.Conv2d, {"kernel_size": (2, 4), "padding": "same"}),
    (nn.Conv2d, {"padding": "valid", "stride": (2, 1)}),
    (nn.Conv2d, {"groups": 4, "dilation": 2, "padding": (2, 0)}),
    (nn.Conv2d, {"groups": 8, "bias": False}),
    (nn.Conv2d, {"kernel_size": 1}),
    (nn.Conv2d, {"padding": 1, "padding_mode": "reflect"}),
    (nn.Conv2d, {"kernel_size": (3, 2), "padding": "same", "padding_mode": "circular"}),
    (nn.Conv1d, {"padding": 2, "stride": 2}),
    (nn.Conv1d, {"groups": 8, "padding": "same", "padding_mode": "replicate"}),
    (nn.Conv3d, {"padding": (1, 0, 2), "stride": (1, 2, 1)}),
    (nn.Conv3d, {"kernel_size": (1, 2, 3), "padding": "same", "groups": 2, "padding_mode": "circular"}),
]
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
pytestmark = pytest.mark.filterwarnings("error::UserWarning", "ignore:Using padding='same':UserWarning")


@pytest.fixture(params=CONVOLUTIONS, ids=lambda param: f"{param[0].__name__}{param[1]}")
def conv(request):
    kind, options = request.param
    return kind(8, 16, **{"kernel_size": 3, **options})


def input_of(conv, batch=2):
    return torch.randn(batch, 8, *(9, 10, 7)[: len(conv.kernel_size)])


def float_result(conv, layer, x):
    """The float convolution of the values that the codes of weight and input stand for."""
    codes = ((x.float() / ACTIVATION.scale).round() + ACTIVATION.zero_point).clamp(0, 255)
    other = copy.deepcopy(conv)
    other.weight.data = layer.weight.clone()
    return other((codes - ACTIVATION.zero_point) * ACTIVATION.scale).detach()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
def test_convolves_the_rounded_input(conv, dtype, tolerance):
    layer = Int8Conv.from_float(conv, ACTIVATION)
    x = input_of(conv).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert y.is_contiguous()
    torch.testing.assert_close(y.float(), float_result(conv, layer, x), rtol=tolerance, atol=tolerance)
    assert torch.equal(layer(x[0]), y[0])
    assert layer(x[:0]).shape == (0, *y.shape[1:])
    if x.dim() in CHANNELS_LAST:
        channels_last = layer(x.contiguous(memory_format=CHANNELS_LAST[x.dim()]))
        assert channels_last.is_contiguous(memory_format=CHANNELS_LAST[x.dim()])
        assert torch.equal(channels_last, y)


def test_is_channels_last_where_the_weight_was_or_the_switch_says_so(monkeypatch):
    conv, x = nn.Conv2d(8, 16, 3), torch.randn(2, 8, 9, 10)
    plain = Int8Conv.from_float(conv, ACTIVATION)(x)
    layer = Int8Conv.from_float(conv.to(memory_format=torch.channels_last), ACTIVATION)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer(x), plain)
    conv = conv.to(memory_format=torch.contiguous_format)
    monkeypatch.setattr(memory_format._Setting, "automatic", None)  # restores it in the end
    for automatic in (True, False):
        memory_format.set_auto_channels_last(automatic)
        y = Int8Conv.from_float(conv, ACTIVATION)(x)
        assert y.is_contiguous(memory_format=torch.channels_last) == automatic
        assert y.is_contiguous() != automatic


def test_the_weight_has_a_scale_for_each_output_channel(conv):
    layer = Int8Conv.from_float(conv, ACTIVATION)
    expected = quantize_per_channel(conv.weight.detach().flatten(1))
    assert torch.equal(layer.quantized_weight().codes, expected.codes)
    assert layer.weight.shape == conv.weight.shape
    assert torch.equal(layer.weight.clone().flatten(1), expected.codes * expected.scales)
    assert layer.nbytes >= layer.weight.numel() + 4 * (17 + 16 * (conv.bias is not None))


def test_state_dict_copies_and_pickles(conv):
    layer = Int8Conv.from_float(conv, ACTIVATION)
    state = layer.state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "codes": torch.int8,
        "scales": torch.float32,
        "input_scale": torch.float32,
        "input_zero_point": torch.int32,
        **({} if conv.bias is None else {"bias": torch.float32}),
    }
    assert state["codes"].shape == conv.weight.shape
    nn.init.normal_(conv.weight)
    other = Int8Conv.from_float(conv, StaticActivation(0.5, 3))
    other.load_state_dict(state)
    x = input_of(conv)
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x), layer(x))
    assert other.activation == ACTIVATION


@pytest.fixture
def layer():
    return Int8Conv.from_float(nn.Conv2d(8, 16, 3), ACTIVATION)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_compiles_without_a_graph_break(layer, mode):
    compiled = torch.compile(
        lambda x: (layer(x.to(layer.weight.dtype)), layer.weight * 2), backend="aot_eager", fullgraph=True, dynamic=True
    )
    with mode():
        x = torch.randn(2, 8, 9, 10)
        y, weight = compiled(x)
        assert torch.equal(y, layer(x))
        assert torch.equal(weight, layer.weight * 2)


def test_autocast_and_casting(layer):
    x = torch.randn(1, 8, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, layer(x.bfloat16()))
    before = layer.state_dict()
    layer.half()
    assert layer.weight.dtype == layer.bias.dtype == torch.float16
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    with pytest.raises(RuntimeError, match="Int8Conv is packed for the CPU"):
        layer.to("meta")


def test_no_gradient_and_no_warning(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not layer(torch.randn(1, 8, 5, 5, requires_grad=True)).requires_grad


@pytest.mark.parametrize("shape", [(2, 7, 9, 9), (9, 9), (1, 1, 8, 9, 9)])
def test_input_that_does_not_fit_raises(layer, shape):
    with pytest.raises(RuntimeError, match=r"x: expected \[N, 8, H, W\] or without N, got \["):
        layer(torch.randn(shape))


class Scaled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def test_what_cannot_be_quantized_raises():
    with pytest.raises(ValueError, match=r"Scaled overrides Conv2d\.forward"):
        Int8Conv.from_float(Scaled(3, 4, 3), ACTIVATION)
    with pytest.raises(ValueError, match="smoothing factor"):
        Int8Conv.from_float(nn.Conv2d(3, 4, 3), StaticActivation(0.1, 3, torch.ones(3)))
    broken = nn.Conv2d(3, 4, 3)
    nn.init.constant_(broken.weight, torch.inf)
    with pytest.raises(ValueError, match="weight: expected finite"):
        Int8Conv.from_float(broken, ACTIVATION)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("codes", torch.zeros(16, 8, 3, 2, dtype=torch.int8), r"codes: expected shape \[16, 8, 3, 3\]"),
        ("codes", torch.zeros(16, 8, 3, 3), "codes: expected dtype torch.int8"),
        ("input_scale", torch.tensor([-1.0]), "scale: expected a finite number above 0"),
        ("bias", torch.ones(3), r"bias: expected shape \[16\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(layer, name, tensor, message):
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(layer.state_dict() | {name: tensor})


def test_repr(layer):
    assert layer.extra_repr() == (
        "8, 16, kernel_size=(3, 3), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, bias=True"
    )


def test_a_one_by_one_convolution_of_the_largest_codes_is_exact():
    """Sums of two products of the largest codes do not fit 16 bits, which some CPUs add them in."""
    conv = nn.Conv2d(4, 8, 1, bias=False)
    nn.init.constant_(conv.weight, 1.0)
    layer = Int8Conv.from_float(conv, StaticActivation(1 / 255, 0))
    assert torch.allclose(layer(torch.ones(1, 4, 3, 3)), torch.full((1, 8, 3, 3), 4.0), rtol=0.01)


def test_traces_freezes_saves_and_loads(conv, tmp_path):
    layer = Int8Conv.from_float(conv, ACTIVATION).eval()
    with torch.no_grad():
        traced = torch.jit.trace(layer, input_of(conv))
        torch.jit.save(torch.jit.freeze(traced), tmp_path / "conv.pt")
        x = input_of(conv, batch=3)
        assert torch.equal(torch.jit.load(tmp_path / "conv.pt")(x), layer(x))


def test_a_traced_layer_refuses_other_channels():
    layer = Int8Conv.from_float(nn.Conv1d(8, 8, 3, groups=8), ACTIVATION).eval()
    traced = torch.jit.trace(layer, torch.randn(1, 8, 9))
    with pytest.raises(RuntimeError, match="as many channels as there are groups, 8"):
        traced(torch.randn(1, 4, 9))
