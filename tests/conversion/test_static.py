"""prepare, calibrate, convert for static, SmoothQuant and dynamic configurations."""

import copy
import pickle
from collections import namedtuple

import pytest
import torch
import torch.ao.quantization as torch_quantization
from torch import nn
from torch.ao.quantization import QConfig, QConfigMapping
from transformers.pytorch_utils import Conv1D

import ipex_quant as ipex
from ipex_quant import observers
from ipex_quant.nn import Int8Conv, Int8Linear, WeightOnlyQuantizedLinear
from ipex_quant.quantization import (
    convert,
    get_smooth_quant_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
    prepare,
)


class Block(nn.Module):
    """q and k share the norm's output; o is alone."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(16), nn.Dropout(0.5)
        self.q, self.k, self.o = nn.Linear(16, 16), nn.Linear(16, 8), Conv1D(16, 24)

    def forward(self, x):
        h = self.norm(x)
        return x + self.o(torch.cat([torch.relu(self.q(h)), self.k(h)], -1))


@pytest.fixture
def block():
    torch.manual_seed(0)
    block = Block().eval().requires_grad_(False)
    block.norm.weight[3] = 30.0  # an outlier channel
    return block


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 5, 16, generator=generator) for _ in range(3)]


def mappings():
    return {
        "static": ipex.quantization.default_static_qconfig_mapping,
        "smooth": get_smooth_quant_qconfig_mapping(),
        "unshared": get_smooth_quant_qconfig_mapping(share_weight_observers=False),
        "dynamic": ipex.quantization.default_dynamic_qconfig_mapping,
    }


def calibrated(model, mapping, batches, **options):
    prepared = prepare(model, mapping, example_inputs=batches[0], **options)
    for batch in batches:
        prepared(batch)
    return prepared


def kinds(model):
    return {name: type(module) for name, module in model.named_modules() if hasattr(module, "weight_shape")}


@pytest.mark.parametrize("name", mappings())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_is_close_to_float_and_holds_no_float_weight(block, batches, name, dtype):
    block, batches = block.to(dtype), [batch.to(dtype) for batch in batches]
    converted = convert(calibrated(block, mappings()[name], batches))
    assert kinds(converted) == dict.fromkeys(("q", "k", "o"), Int8Linear)
    assert type(converted) is Block
    assert not any(parameter.dim() > 1 for parameter in converted.parameters())
    expected, actual = block(batches[0]).float(), converted(batches[0])
    assert actual.dtype == dtype
    error = (actual.float() - expected).norm() / expected.norm()
    assert 0 < error < (0.04 if name == "static" else 0.02)


def test_smoothing_beats_plain_static_quantization_where_channels_differ(block, batches):
    expected = block(batches[0])
    errors = {
        name: (convert(calibrated(block, mapping, batches))(batches[0]) - expected).norm()
        for name, mapping in mappings().items()
    }
    assert errors["smooth"] < 0.7 * errors["static"]


@pytest.mark.parametrize(("name", "members"), [("static", 2), ("smooth", 2), ("unshared", 1), ("dynamic", 2)])
def test_layers_with_one_input_and_one_factor_are_one_gemm(block, batches, name, members):
    converted = convert(calibrated(block, mappings()[name], batches))
    assert len(converted.q.share_group.inputs) == members
    assert (converted.q.share_group is converted.k.share_group) == (members == 2)
    assert len(converted.o.share_group.inputs) == 1


def test_the_factor_is_folded_into_a_norm_that_nothing_else_reads(block, batches):
    before = block.norm.weight.clone()
    converted = convert(calibrated(block, get_smooth_quant_qconfig_mapping(), batches))
    assert converted.q.activation.smoothing_factor is None
    assert converted.o.activation.smoothing_factor is not None
    assert torch.equal(block.norm.weight, before)
    factor = converted.norm.weight / block.norm.weight
    torch.testing.assert_close(converted.norm.bias, block.norm.bias * factor)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", [*mappings(), "weight-only"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@torch.no_grad()
def test_layers_of_torchs_encoders_are_called(batches, name, activation):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, activation=activation, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    mapping = {**mappings(), "weight-only": get_weight_only_quant_qconfig_mapping()}[name]
    expected = [model(x, src_key_padding_mask=padding) for x, padding in masked(batches)]
    converted = convert(calibrated(model, mapping, batches))
    layers = "linear1", "linear2", *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out"))
    assert set(kinds(converted)) == {f"layers.{i}.{layer}" for i in (0, 1) for layer in layers}
    calls = []
    for module in (converted.layers[0].self_attn.k_proj, converted.layers[1].linear2):
        module.forward = lambda x, module=module: calls.append(module) or type(module).forward(module, x)
    for (x, padding), wanted in zip(masked(batches), expected, strict=True):
        actual = converted(x, src_key_padding_mask=padding)
        kept = slice(None) if padding is None else ~padding
        assert 0 < (actual - wanted)[kept].norm() / wanted[kept].norm() < 0.02
    assert len(calls) == 2 * len(expected)


def masked(batches):
    padding = torch.zeros(4, 5, dtype=torch.bool)
    padding[1, 3:] = True
    return [(batches[0], None), (batches[1], padding)]


class HalfSilent(nn.Module):
    """The sign of the first feature chooses which half of the hidden units fires."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64, bias=False), nn.Linear(64, 16)
        self.up.weight[:32, 0], self.up.weight[32:, 0] = -4, 4

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("share", [True, False])
def test_channels_that_calibration_never_saw_are_not_clipped(share):
    torch.manual_seed(0)
    with torch.no_grad():
        model = HalfSilent().eval().requires_grad_(False)
    seen, unseen = torch.randn(2, 128, 16)
    seen[:, 0], unseen[:, 0] = -1.5, 1.5
    mapping = get_smooth_quant_qconfig_mapping(share_weight_observers=share)
    with pytest.warns(UserWarning, match=r"SmoothQuant: calibration leaves \d+ input channels of 1 layers at zero"):
        converted = convert(calibrated(model, mapping, [seen]))
    for x in (seen, unseen):
        assert (converted(x) - model(x)).norm() / model(x).norm() < 0.03


class Residual(Block):
    def forward(self, x):
        h = self.norm(x)
        return h + self.o(torch.cat([torch.relu(self.q(h)), self.k(h)], -1))


def test_the_factor_stays_out_of_a_norm_that_is_read_elsewhere(block, batches):
    block.__class__ = Residual
    converted = convert(calibrated(block, get_smooth_quant_qconfig_mapping(), batches))
    assert torch.equal(converted.norm.weight, block.norm.weight)
    assert converted.q.activation.smoothing_factor is not None


def test_the_factor_stays_out_of_a_norm_with_hooks(block, batches):
    block.norm.register_forward_hook(lambda module, args, output: output + 1)
    converted = convert(calibrated(block, get_smooth_quant_qconfig_mapping(), batches))
    expected = block(batches[0])
    assert (converted(batches[0]) - expected).norm() / expected.norm() < 0.02


class CrossAttention(Block):
    def forward(self, x, context=None):
        h = self.norm(x)
        return self.o(torch.cat([self.q(h), self.k(h if context is None else context)], -1))


def test_the_factor_stays_out_of_a_norm_when_calibration_shows_another_input(block, batches):
    block.__class__ = CrossAttention
    prepared = calibrated(block, get_smooth_quant_qconfig_mapping(), batches)
    assert convert(prepared).q.activation.smoothing_factor is None
    prepared(batches[0], batches[1])
    converted = convert(prepared)
    assert torch.equal(converted.norm.weight, block.norm.weight)
    expected = block(batches[0], batches[1])
    assert (converted(batches[0], batches[1]) - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("name", ["static", "smooth"])
def test_a_conversion_that_fails_names_the_layer_and_leaves_the_norms(block, batches, name):
    prepared = calibrated(block, mappings()[name], batches, inplace=True)
    before = block.norm.weight.clone()
    block.o.weight[0, 0], kept = torch.nan, block.o.weight[0, 0].clone()
    with pytest.raises(ValueError, match=r"^o: weight: expected finite values"):
        convert(prepared, inplace=True)
    assert torch.equal(block.norm.weight, before)
    block.o.weight[0, 0] = kept
    expected = block(batches[0])
    assert (convert(prepared, inplace=True)(batches[0]) - expected).norm() / expected.norm() < 0.04


@pytest.mark.parametrize("name", ["static", "smooth"])
def test_another_default_dtype_changes_nothing(block, batches, name):
    mapping = mappings()[name]
    for layer, rows in (("q", 16), ("k", 8)):
        block.set_submodule(layer, nn.Linear(16, rows, bias=False).requires_grad_(False))
    block.o = nn.Linear(24, 16, bias=False).requires_grad_(False)
    expected = convert(calibrated(block, mapping, batches))
    torch.set_default_dtype(torch.bfloat16)
    try:
        converted = convert(calibrated(block, mapping, batches))
    finally:
        torch.set_default_dtype(torch.float32)
    assert converted.q.activation.smoothing_factor is None
    assert torch.equal(converted(batches[0]), expected(batches[0]))


def test_folded_and_unfolded_factors_agree(block, batches):
    mapping = get_smooth_quant_qconfig_mapping()
    folded = convert(calibrated(block, mapping, batches))
    prepared = calibrated(block, mapping, batches)
    for group in prepared._ipex_quant_observed.groups:
        group.producer = None
    unfolded = convert(prepared)
    assert unfolded.q.activation.smoothing_factor is not None
    torch.testing.assert_close(folded(batches[0]), unfolded(batches[0]), atol=0.02, rtol=0.02)


def test_alpha_by_module_name(block, batches):
    mapping = get_smooth_quant_qconfig_mapping(alpha=0.5)
    other = get_smooth_quant_qconfig_mapping(alpha=0.9).global_qconfig
    same = convert(calibrated(block, mapping, batches))
    differ = convert(calibrated(block, mapping.set_module_name("o", other), batches))
    assert not torch.equal(differ.o.activation.smoothing_factor, same.o.activation.smoothing_factor)
    assert torch.equal(differ.q.quantized_weight().codes, same.q.quantized_weight().codes)
    split = convert(calibrated(block, get_smooth_quant_qconfig_mapping().set_module_name_regex("k", other), batches))
    assert split.q.share_group is not split.k.share_group, "layers with different alphas have no factor in common"


def test_kinds_of_configurations_mix_and_modules_are_excluded(block, batches):
    mapping = get_smooth_quant_qconfig_mapping().set_module_name("k", None)
    mapping.set_module_name("o", get_weight_only_quant_qconfig_mapping().global_qconfig)
    converted = convert(calibrated(block, mapping, batches))
    assert kinds(converted) == {"q": Int8Linear, "o": WeightOnlyQuantizedLinear}
    assert type(converted.k) is nn.Linear
    assert torch.equal(converted.norm.weight, block.norm.weight), "k in float reads the norm too"
    assert ipex.explain(converted).summary.startswith("2 modules quantized")


def test_torch_observers(block, batches):
    activation = torch_quantization.MinMaxObserver.with_args(qscheme=torch.per_tensor_affine, dtype=torch.quint8)
    weight = torch_quantization.PerChannelMinMaxObserver.with_args(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric
    )
    theirs = QConfigMapping().set_global(QConfig(activation=activation, weight=weight))
    ours = QConfigMapping().set_global(
        QConfig(
            activation=observers.MinMaxObserver,
            weight=observers.PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric),
        )
    )
    converted = [convert(calibrated(block, mapping, batches)) for mapping in (theirs, ours)]
    assert torch.equal(converted[0](batches[0]), converted[1](batches[0]))
    smooth = get_smooth_quant_qconfig_mapping(
        act_ic_observer=torch_quantization.PerChannelMinMaxObserver.with_args(ch_axis=-1),
        wei_ic_observer=torch_quantization.PerChannelMinMaxObserver.with_args(ch_axis=1),
    )
    converted = [convert(calibrated(block, m, batches)) for m in (smooth, get_smooth_quant_qconfig_mapping())]
    assert torch.equal(converted[0](batches[0]), converted[1](batches[0]))


@pytest.mark.parametrize("dtype", [torch.quint8, torch.qint8])
def test_signed_activations_are_the_same_as_unsigned_ones(block, batches, dtype):
    activation = observers.MinMaxObserver.with_args(dtype=dtype, qscheme=torch.per_tensor_symmetric)
    weight = ipex.quantization.default_static_qconfig.weight
    mapping = QConfigMapping().set_global(QConfig(activation=activation, weight=weight))
    converted = convert(calibrated(block, mapping, batches))
    assert converted.q.activation.zero_point == 128


@pytest.mark.parametrize(
    "activation",
    [
        torch_quantization.PerChannelMinMaxObserver.with_args(ch_axis=-1),
        observers.PerChannelMinMaxObserver,
        torch_quantization.MinMaxObserver.with_args(dtype=torch.qint32),
        torch_quantization.FakeQuantize,
    ],
)
def test_activation_observers_that_no_int8_gemm_has_are_refused_before_calibration(block, batches, activation):
    weight = ipex.quantization.default_static_qconfig.weight
    mapping = QConfigMapping().set_global(QConfig(activation=activation, weight=weight))
    with pytest.raises(ValueError, match=r"q: activation observer .*: expected an observer of one range"):
        prepare(block, mapping, batches[0])


def test_weight_observers_that_no_int8_gemm_has_are_refused(block, batches):
    asymmetric = observers.MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_affine)
    mapping = QConfigMapping().set_global(QConfig(activation=observers.MinMaxObserver, weight=asymmetric))
    with pytest.raises(ValueError, match="q: weight: MinMaxObserver: expected symmetric qint8"):
        convert(calibrated(block, mapping, batches))


# ------------------------------------------------------------------------------------------------------------ examples
Pair = namedtuple("Pair", ["value", "square"])


class Outputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, batch=None, scale=1.0):
        y = self.linear(batch["x"]) * scale
        return Pair(y, y * y)


def test_dictionaries_in_and_named_tuples_out():
    model, batch = Outputs().eval(), {"x": torch.randn(2, 4)}
    for example in ({"example_inputs": batch}, {"example_kwarg_inputs": {"batch": batch, "scale": 2.0}}):
        prepared = prepare(model, get_smooth_quant_qconfig_mapping(), **example)
        prepared(batch)
        assert isinstance(convert(prepared)(batch), Pair)


@pytest.mark.parametrize("example", [torch.ones(2, 16), (torch.ones(2, 16),), [torch.ones(2, 16)]])
def test_forms_of_positional_examples(block, example):
    assert len(prepare(block, get_smooth_quant_qconfig_mapping(), example)._ipex_quant_observed.groups) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "cannot be none at same time for static quantization"),
        ({"example_inputs": 1, "example_kwarg_inputs": {}}, ValueError, "cannot be set at same time"),
        ({"example_kwarg_inputs": [1]}, TypeError, "must be type of Dict.*got list"),
        ({"example_kwarg_inputs": {"y": 1}}, ValueError, "example_kwarg_inputs: .*Block.forward takes x"),
        (
            {"example_inputs": (1, 2)},
            ValueError,
            "example_inputs: too many positional arguments; Block.forward takes x",
        ),
        ({"example_inputs": torch.ones(2, 7)}, ValueError, "example_inputs: Block cannot be called with it: .*shape"),
    ],
)
def test_examples_that_do_not_fit(block, options, error, message):
    with pytest.raises(error, match=message):
        prepare(block, get_smooth_quant_qconfig_mapping(), **options)
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_dynamic_quantization_needs_no_example_and_no_calibration(block, batches):
    converted = convert(prepare(block, ipex.quantization.default_dynamic_qconfig_mapping))
    assert kinds(converted) == dict.fromkeys(("q", "k", "o"), Int8Linear)
    assert converted.q.share_group is not converted.k.share_group
    grouped = convert(calibrated(block, ipex.quantization.default_dynamic_qconfig_mapping, batches))
    assert torch.equal(converted(batches[0]), grouped(batches[0]))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.ones(2, 7), "without the example.* Block cannot be called with it: .*shape"),
        ((1, 2), "Block cannot be called with it: .*positional"),
    ],
)
def test_dynamic_quantization_goes_without_an_example_that_does_not_fit(block, batches, example, message):
    with pytest.warns(UserWarning, match=message) as warned:
        prepared = prepare(block, ipex.quantization.default_dynamic_qconfig_mapping, example)
    assert warned[0].filename == __file__
    expected = convert(prepare(block, ipex.quantization.default_dynamic_qconfig_mapping))
    assert torch.equal(convert(prepared)(batches[0]), expected(batches[0]))


# --------------------------------------------------------------------------------------------------------- calibration
def test_an_uncalibrated_model_is_refused_by_name(block, batches):
    prepared = prepare(block, get_smooth_quant_qconfig_mapping(), batches[0])
    with pytest.raises(RuntimeError, match="not calibrated: q, k, o have seen no data"):
        convert(prepared)
    with pytest.raises(RuntimeError, match="not calibrated"):
        prepared.save_qconf_summary("never.json")
    prepared(batches[0])
    convert(prepared)


def test_a_layer_that_calibration_never_reached_stays_in_float(block, batches):
    block.extra = nn.Linear(16, 16)
    prepared = calibrated(block, get_smooth_quant_qconfig_mapping(), batches)
    with pytest.warns(UserWarning, match="never reached 1 layers, which stay in float: extra"):
        converted = convert(prepared)
    assert type(converted.extra) is nn.Linear
    row = next(row for row in ipex.explain(converted).rows if row.module == "extra")
    assert row.reason == "calibration never reached it"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["static", "smooth"])
def test_a_value_that_is_not_finite_names_the_layer(block, batches, bad, name):
    prepared = prepare(block, mappings()[name], batches[0])
    wrong = batches[0].clone()
    wrong[0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"^q: input of the layer: expected finite values"):
        prepared(wrong)


def test_an_empty_batch_changes_nothing(block, batches):
    prepared = calibrated(block, get_smooth_quant_qconfig_mapping(), batches)
    before = prepared._ipex_quant_observed.observers()["q"].ic_obs.max_val.clone()
    prepared(batches[0][:0])
    assert torch.equal(prepared._ipex_quant_observed.observers()["q"].ic_obs.max_val, before)


def test_a_batch_in_the_same_memory_is_seen(batches):
    model = nn.Sequential(nn.Linear(16, 4))
    prepared = prepare(model, get_smooth_quant_qconfig_mapping(), batches[0])
    buffer = batches[0].clone()
    prepared(buffer)
    prepared(buffer.copy_(batches[0] * 10))
    assert prepared._ipex_quant_observed.observers()["0"].ic_obs.max_val.max() == batches[0].max() * 10


# -------------------------------------------------------------------------------------------------- copies and in place
def test_the_model_is_untouched_unless_in_place(block, batches):
    before = copy.deepcopy(block.state_dict())
    expected = block(batches[0])
    prepared = calibrated(block, get_smooth_quant_qconfig_mapping(), batches)
    converted = convert(prepared)
    assert torch.equal(block(batches[0]), expected)
    assert type(block.drop) is nn.Dropout
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    assert torch.equal(prepared(batches[0]), expected), "convert without inplace leaves the prepared model"
    again = convert(prepared)
    assert torch.equal(again(batches[0]), converted(batches[0]))
    for parameter in converted.parameters():
        parameter.zero_()
    assert torch.equal(block(batches[0]), expected)


def test_in_place(block, batches):
    prepared = calibrated(block, get_smooth_quant_qconfig_mapping(), batches, inplace=True)
    assert prepared is block
    assert type(block.drop) is nn.Identity
    assert block.drop.p == 0.0
    assert convert(prepared, inplace=True) is block
    for name in ("q_config", "save_qconf_summary", "load_qconf_summary", "_ipex_quant_observed"):
        assert not hasattr(block, name)


def test_preparing_again_forgets_the_first_time(block, batches):
    first = calibrated(block, ipex.quantization.default_static_qconfig_mapping, batches, inplace=True)
    second = prepare(first, get_smooth_quant_qconfig_mapping(), batches[0], inplace=True)
    assert all(len(module._forward_pre_hooks) <= 1 for module in second.modules())
    with pytest.raises(RuntimeError, match="not calibrated"):
        convert(second)


def test_a_prepared_model_can_be_copied_and_pickled(block, batches):
    prepared = prepare(block, get_smooth_quant_qconfig_mapping(), batches[0])
    prepared(batches[0])
    copies = [copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))]
    prepared(batches[1] * 100)
    for each in copies:
        each(batches[1])
        each(batches[2])
    reference = convert(calibrated(block, get_smooth_quant_qconfig_mapping(), batches))
    for each in copies:
        assert torch.equal(convert(each)(batches[0]), reference(batches[0]))


def test_a_model_that_is_a_layer(batches):
    layer = nn.Linear(16, 4).eval()
    converted = convert(calibrated(layer, get_smooth_quant_qconfig_mapping(), batches))
    assert type(converted) is Int8Linear
    torch.testing.assert_close(converted(batches[0]), layer(batches[0]), atol=0.05, rtol=0.05)


def test_a_weight_that_is_not_finite_is_named(block, batches):
    prepared = calibrated(block, ipex.quantization.default_dynamic_qconfig_mapping, batches)
    prepared.k.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"k: .*NaN"):
        convert(prepared)


# -------------------------------------------------------------------------------------------------------- convolutions
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head, self.head_bn = nn.Linear(8, 6), nn.BatchNorm1d(6)
        self.conv2 = nn.Conv2d(8, 8, 3, groups=2)

    def forward(self, x):
        x = self.conv2(torch.relu(self.bn(self.conv(x))))
        return self.head_bn(self.head(x.mean((2, 3))))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    for _ in range(4):
        net(torch.randn(8, 3, 10, 10) * 3 + 1)
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["static", "smooth"])
def test_convolutions_and_batch_norms(net, name):
    images = [torch.randn(4, 3, 10, 10) for _ in range(3)]
    converted = convert(calibrated(net, mappings()[name], images))
    assert kinds(converted) == {"conv": Int8Conv, "conv2": Int8Conv, "head": Int8Linear}
    assert type(converted) is Net
    assert type(converted.bn) is type(converted.head_bn) is nn.Identity
    expected = net(images[0])
    assert 0 < (converted(images[0]) - expected).norm() / expected.norm() < 0.05
    assert type(net.bn) is nn.BatchNorm2d


def test_batch_norms_stay_when_asked_to(net):
    prepared = prepare(net, mappings()["static"], torch.randn(4, 3, 10, 10), bn_folding=False)
    assert type(prepared.bn) is nn.BatchNorm2d


def test_a_batch_norm_whose_input_is_read_elsewhere_stays(net):
    net.forward = lambda x: (net.bn(y := net.conv(x)) + y).mean((2, 3))
    prepared = prepare(net, mappings()["static"], torch.randn(4, 3, 10, 10), inplace=True)
    assert type(prepared.bn) is nn.BatchNorm2d


def test_dynamic_leaves_convolutions_in_float(net):
    assert kinds(convert(prepare(net, mappings()["dynamic"]))) == {"head": Int8Linear}


def per_tensor_weight():
    return observers.MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)


def test_the_weight_observer_counts_for_every_kind_of_layer(net, block):
    mapping = QConfigMapping().set_global(QConfig(activation=observers.MinMaxObserver, weight=per_tensor_weight()))
    converted = convert(calibrated(net, mapping, [torch.randn(4, 3, 10, 10)]))
    dynamic = ipex.quantization.default_dynamic_qconfig._replace(weight=per_tensor_weight())
    layers = [converted.conv, converted.head, convert(prepare(block, QConfigMapping().set_global(dynamic))).q]
    assert [layer.state_dict()["scales"].unique().numel() for layer in layers] == [1, 1, 1]


def test_an_example_that_fails_leaves_nothing_prepared(block):
    with pytest.raises(ValueError, match="example_inputs"):
        prepare(block, get_smooth_quant_qconfig_mapping(), torch.ones(2, 5), inplace=True)
    with pytest.raises(RuntimeError, match="Please do prepare"):
        convert(block)


# ------------------------------------------------------------------------------------------------------- configurations
@pytest.mark.parametrize(
    ("options", "error"), [({"alpha": 1.5}, ValueError), ({"alpha": -0.1}, ValueError), ({"alpha": "auto"}, TypeError)]
)
def test_alpha_must_be_a_number_from_0_to_1(options, error):
    with pytest.raises(error, match="alpha"):
        get_smooth_quant_qconfig_mapping(**options)


def test_defaults_can_be_changed_without_effect_on_others():
    first = ipex.quantization.default_static_qconfig_mapping
    first.set_module_name("o", None)
    assert not ipex.quantization.default_static_qconfig_mapping.module_name_qconfigs
    assert ipex.quantization.default_dynamic_qconfig.activation().is_dynamic


def test_a_plain_configuration_still_works_with_a_warning(block, batches):
    with pytest.warns(DeprecationWarning, match="QConfigMapping instead"):
        prepared = prepare(block, get_smooth_quant_qconfig_mapping().global_qconfig, batches[0])
    assert "q" in prepared._ipex_quant_observed.observers()
