import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.nn.utils.rnn import pack_sequence as pack

from ipex_quant.nn import Int8Recurrent, Int8RecurrentCell
from ipex_quant.numerics import affine
from ipex_quant.numerics.int8 import quantize_per_channel
from ipex_quant.ops.reference_int8 import quantize_activation_per_token

LAYERS = [
    (nn.LSTM, {}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 7}),
    (nn.LSTM, {"bias": False}),
    (nn.GRU, {"num_layers": 2, "bias": False}),
    (nn.GRU, {"bidirectional": True, "batch_first": True}),
    (nn.RNN, {"num_layers": 3}),
    (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
]
CELLS = [
    (nn.LSTMCell, {}),
    (nn.LSTMCell, {"bias": False}),
    (nn.GRUCell, {}),
    (nn.GRUCell, {"bias": False}),
    (nn.RNNCell, {}),
    (nn.RNNCell, {"nonlinearity": "relu", "bias": False}),
]
pytestmark = pytest.mark.filterwarnings("error::UserWarning", "ignore:LSTM with projections:UserWarning")


@pytest.fixture(params=LAYERS, ids=lambda param: f"{param[0].__name__}{param[1]}")
def layer(request):
    kind, options = request.param
    return kind(10, 12, **options).eval()


@pytest.fixture(params=CELLS, ids=lambda param: f"{param[0].__name__}{param[1]}")
def cell(request):
    kind, options = request.param
    return kind(10, 12, **options).eval()


def initial(layer, *batch):
    count = layer.num_layers * (1 + layer.bidirectional)
    hidden = torch.randn(count, *batch, layer.proj_size or layer.hidden_size) / 2
    return (hidden, torch.randn(count, *batch, layer.hidden_size)) if isinstance(layer, nn.LSTM) else hidden


def flat(result):
    if isinstance(result, torch.Tensor) and not isinstance(result, PackedSequence):
        return [result]
    return [tensor for each in result if each is not None for tensor in flat(each)]


def assert_close(actual, expected, tolerance=1e-2):
    assert type(actual) is type(expected)
    for one, other in zip(flat(actual), flat(expected), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other.detach(), rtol=tolerance, atol=tolerance)


def simulated(module):
    """A float copy with the values that the weights are rounded to."""
    other = copy.deepcopy(module)
    for name, parameter in other.named_parameters():
        if name.startswith("weight"):
            parameter.data = affine.dequantize(quantize_per_channel(parameter.data), torch.float32)
    return other


def rounded(x):
    codes, scales, zero_points = quantize_activation_per_token(x)
    return (codes.float() - zero_points[:, None]) * scales[:, None]


def gates(values, x, hidden, end):
    """The products with rounded inputs that a step starts from."""
    products = rounded(x) @ values[f"weight_ih{end}"].T, rounded(hidden) @ values[f"weight_hh{end}"].T
    biases = values.get(f"bias_ih{end}"), values.get(f"bias_hh{end}")
    return [p if bias is None else p + bias for p, bias in zip(products, biases, strict=True)]


def step(kind, x, h, hidden, c=None):
    """One step by the formulas of torch's documentation."""
    if kind == "LSTM":
        i, f, g, o = (x + h).split(12, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    if kind == "GRU":
        r, z = (torch.sigmoid(x[:, part] + h[:, part]) for part in (slice(12), slice(12, 24)))
        return ((1 - z) * torch.tanh(x[:, 24:] + r * h[:, 24:]) + z * hidden,)
    return (torch.tanh(x + h) if kind == "tanh" else torch.relu(x + h),)


def kind_of(module):
    name = type(module).__name__.removesuffix("Cell")
    return module.nonlinearity if name == "RNN" else name


@pytest.mark.parametrize("state", [False, True])
def test_layers_are_close_to_float(layer, state):
    quantized = Int8Recurrent.from_float(layer)
    hx = initial(layer, 3) if state else None
    x = torch.randn(3, 5, 10) if layer.batch_first else torch.randn(5, 3, 10)
    assert_close(quantized(x, hx), layer(x, hx))
    assert not torch.equal(quantized(x, hx)[0], layer(x, hx)[0])
    hx = initial(layer) if state else None
    assert_close(quantized(x[0], hx), layer(x[0], hx))
    none = x[:0] if layer.batch_first else x[:, :0]
    assert quantized(none)[0].shape == (*none.shape[:2], quantized(x)[0].shape[-1])


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("in_order", [False, True])
def test_packed_sequences(layer, state, in_order):
    quantized = Int8Recurrent.from_float(layer)
    lengths = [6, 4, 4, 1] if in_order else [4, 1, 6, 4]
    x = pack([torch.randn(length, 10) for length in lengths], enforce_sorted=in_order)
    hx = initial(layer, 4) if state else None
    assert_close(quantized(x, hx), layer(x, hx))


def test_a_sequence_does_not_depend_on_the_others_of_its_batch(layer):
    quantized = Int8Recurrent.from_float(layer)
    x = torch.randn(3, 6, 10)
    packed = pack_padded_sequence(x, [6, 3, 2], batch_first=True)
    _, state = quantized(packed)
    alone = x[1:2, :3] if layer.batch_first else x[1:2, :3].transpose(0, 1)
    for one, other in zip(flat(state), flat(quantized(alone)[1]), strict=True):
        torch.testing.assert_close(one[:, 1], other[:, 0])


def test_cells_compute_rounded_products(cell):
    quantized = Int8RecurrentCell.from_float(cell)
    values = dict(simulated(cell).named_parameters())
    x, hidden = torch.randn(4, 10), torch.randn(4, 12)
    state = (hidden, torch.randn(4, 12)) if isinstance(cell, nn.LSTMCell) else (hidden,)
    expected = step(kind_of(cell), *gates(values, x, hidden, ""), *state)
    hx = state if len(state) == 2 else hidden
    assert_close(quantized(x, hx), expected if len(state) == 2 else expected[0], 1e-5)
    assert_close(quantized(x, hx), cell(x, hx), 2e-2)
    assert_close(quantized(x), cell(x), 2e-2)
    one = tuple(s[0] for s in state) if len(state) == 2 else hidden[0]
    assert_close(quantized(x[0], one), cell(x[0], one), 2e-2)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_compute_rounded_products(kind, bias):
    layer = kind(10, 12, bidirectional=True, bias=bias).eval()
    values = dict(simulated(layer).named_parameters())
    x = torch.randn(5, 3, 10)
    outputs = []
    for end, steps in (("_l0", range(5)), ("_l0_reverse", range(4, -1, -1))):
        state, found = (torch.zeros(3, 12),) * (1 + (kind is nn.LSTM)), {}
        for t in steps:
            state = step(kind_of(layer), *gates(values, x[t], state[0], end), *state)
            found[t] = state[0]
        outputs.append(torch.stack([found[t] for t in range(5)]))
    # a value at a rounding boundary may fall to the other side
    torch.testing.assert_close(
        Int8Recurrent.from_float(layer)(x)[0], torch.cat(outputs, -1).detach(), rtol=1e-3, atol=1e-3
    )


def test_state_dict_copies_and_pickles(layer):
    quantized = Int8Recurrent.from_float(layer)
    state = quantized.state_dict()
    weights = {name: p for name, p in layer.named_parameters() if name.startswith("weight")}
    for name, weight in weights.items():
        expected = quantize_per_channel(weight.detach())
        assert torch.equal(state[name.replace("weight", "codes")], expected.codes)
        assert torch.equal(state[name.replace("weight", "scales")], expected.scales)
    assert len(state) == len(weights) + len(list(layer.named_parameters()))
    other = Int8Recurrent.from_float(type(layer)(10, 12, **_options(layer)))
    other.load_state_dict(state)
    x = torch.randn(5, 5, 10)
    for same in (other, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert all(torch.equal(a, b) for a, b in zip(flat(same(x)), flat(quantized(x)), strict=True))
    assert quantized.weight.shape == (sum(weight.numel() for weight in weights.values()),)
    assert quantized.nbytes >= quantized.weight.numel()
    assert quantized.bias is layer.bias
    quantized.flatten_parameters()


def _options(layer):
    names = ("num_layers", "bias", "batch_first", "bidirectional", "proj_size")
    options = {name: getattr(layer, name) for name in names}
    if type(layer) is nn.RNN:
        options |= {"nonlinearity": layer.nonlinearity}
    return options if type(layer) is nn.LSTM else {k: v for k, v in options.items() if k != "proj_size"}


def test_a_state_dict_that_does_not_fit_is_refused():
    quantized = Int8Recurrent.from_float(nn.LSTM(10, 12))
    state = quantized.state_dict()
    with pytest.raises(RuntimeError, match=r"codes_ih_l0: expected shape \[48, 10\], got \[48, 9\]"):
        quantized.load_state_dict(state | {"codes_ih_l0": torch.zeros(48, 9, dtype=torch.int8)})
    with pytest.raises(RuntimeError, match=r"bias_hh_l0: expected dtype torch\.float32"):
        quantized.load_state_dict(state | {"bias_hh_l0": torch.zeros(48, dtype=torch.int32)})
    del state["scales_hh_l0"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"scales_hh_l0"'):
        quantized.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    layer = nn.GRU(10, 12, 2)
    quantized, x = Int8Recurrent.from_float(layer), torch.randn(5, 3, 10)
    expected = [each.to(dtype) for each in quantized(x.to(dtype).float())]
    assert_close(tuple(quantized(x.to(dtype))), tuple(expected), 0)
    with torch.autocast("cpu", dtype):
        assert_close(tuple(quantized(x)), tuple(expected), 0)
    before = quantized.state_dict()
    assert quantized.to(dtype).weight.dtype == dtype
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantized.state_dict().items())


def test_no_gradient_no_warning_no_dropout():
    layer = nn.LSTM(10, 12, 2, dropout=0.5)
    quantized, x = Int8Recurrent.from_float(layer), torch.randn(5, 3, 10, requires_grad=True)
    assert quantized.training
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output, _ = quantized(x)
    assert not output.requires_grad
    assert torch.equal(output, quantized.eval()(x)[0])


def test_compiles_without_a_graph_break():
    layer = Int8Recurrent.from_float(nn.LSTM(10, 12, bidirectional=True))
    x = torch.randn(4, 3, 10)
    output, state = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert all(torch.equal(a, b) for a, b in zip(flat((output, state)), flat(layer(x)), strict=True))


def test_what_does_not_fit_raises():
    layer, cell = Int8Recurrent.from_float(nn.LSTM(10, 12)), Int8RecurrentCell.from_float(nn.GRUCell(10, 12))
    with pytest.raises(RuntimeError, match=r"input: expected .* the last of 10, got \[5, 3, 9\]"):
        layer(torch.randn(5, 3, 9))
    with pytest.raises(RuntimeError, match=r"input: expected .*, got torch\.float64"):
        layer(torch.randn(5, 3, 10).double())
    with pytest.raises(RuntimeError, match="expected one time step or more"):
        layer(torch.randn(0, 3, 10))
    with pytest.raises(RuntimeError, match=r"hx: expected shapes \[\[1, 3, 12\], \[1, 3, 12\]\], got \[\[1, 2, 12\]"):
        layer(torch.randn(5, 3, 10), (torch.zeros(1, 2, 12), torch.zeros(1, 3, 12)))
    with pytest.raises(RuntimeError, match=r"hx: expected shapes \[\[3, 12\]\], got \[\[2, 12\]\]"):
        cell(torch.randn(3, 10), torch.zeros(2, 12))


def test_modules_that_cannot_be_quantized_raise():
    class Scaled(nn.LSTM):
        def forward(self, x, hx=None):
            return super().forward(x * 2, hx)

    with pytest.raises(ValueError, match=r"Scaled overrides LSTM\.forward"):
        Int8Recurrent.from_float(Scaled(4, 4))
    with pytest.raises(ValueError, match="that an Int8Recurrent can stand for, got a LSTMCell"):
        Int8Recurrent.from_float(nn.LSTMCell(4, 4))
    broken = nn.GRU(4, 4)
    broken.weight_hh_l0.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        Int8Recurrent.from_float(broken)
