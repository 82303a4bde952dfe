import warnings

import pytest
import torch
from torch import nn

from ipex_quant import quantization
from ipex_quant.conversion.int8 import int8_replacements, recurrent_replacements
from ipex_quant.conversion.observed import observed
from ipex_quant.conversion.rules import BY_SUMMARY
from ipex_quant.nn import Int8Conv, Int8Linear
from ipex_quant.nn.int8_recurrent import int8_recurrent_class
from ipex_quant.quantization import (
    calibrate,
    get_smooth_quant_qconfig_mapping,
    prepare,
)


class Net(nn.Module):
    """q and k read what the norm makes; `rarely` is not reached."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.rarely = nn.Linear(8, 6), nn.Linear(8, 4), nn.Linear(8, 2)
        self.conv = nn.Conv1d(3, 3, 1)

    def forward(self, x):
        h = self.norm(self.conv(x))
        return torch.cat([self.q(h), self.k(h)], -1)


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def prepared(mapping, x):
    torch.manual_seed(0)
    model = prepare(Net().eval(), mapping, x)
    return calibrate(model, [x])


def found(model):
    """As `convert` does it: observers let go of the model before modules are made."""
    observations = observed(model)
    result = int8_replacements(model, observations)
    observations.detach(model)
    return result


@pytest.mark.filterwarnings("ignore:calibration never reached")
def test_channels_that_calibration_leaves_at_zero_are_told(x):
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.norm.weight[2:4] = 0.0
        net.norm.bias[2:4] = 0.0
    for mapping, told in (
        (get_smooth_quant_qconfig_mapping(), True),
        (quantization.default_static_qconfig_mapping, False),  # one range for all channels
    ):
        model = calibrate(prepare(net, mapping, x), [x])
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found(model)
        messages = [str(each.message) for each in warned if "at zero" in str(each.message)]
        expected = "SmoothQuant: calibration leaves 2 input channels of 1 layers at zero (q: 2 of 8): their factors are"
        assert len(messages) == told
        assert all(message.startswith(expected) for message in messages)


@pytest.mark.filterwarnings("ignore:calibration never reached")
def test_members_of_a_group_share_one_packed_weight_and_the_norm_takes_the_factor(x):
    model = prepared(get_smooth_quant_qconfig_mapping(), x)
    before = model.norm.weight.detach().clone()
    replacements, reasons = found(model)
    assert replacements.keys() == {"q", "k", "conv"}
    assert reasons == {"rarely": "calibration never reached it"}
    assert torch.equal(model.norm.weight, before), "nothing changes before a module is made"
    q, k = (replacements[name](model.get_submodule(name)) for name in ("q", "k"))
    assert isinstance(q, Int8Linear)
    assert q.share_group is k.share_group
    assert not torch.equal(model.norm.weight, before)
    assert q.describe() | {"smoothed": None} == k.describe() | {"smoothed": None}
    assert isinstance(replacements["conv"](model.conv), Int8Conv)


@pytest.mark.filterwarnings("ignore:calibration never reached")
def test_the_norm_keeps_its_weight_when_a_reader_stays_in_float(x):
    model = prepared(get_smooth_quant_qconfig_mapping(), x)
    before = model.norm.weight.detach().clone()
    layer = next(layer for group in observed(model).groups for layer in group.layers if layer.name == "k")
    layer.quantized = False
    replacements, reasons = found(model)
    assert reasons["k"] == BY_SUMMARY
    h = model.norm(model.conv(x)).detach()  # what it was calibrated on
    actual = replacements["q"](model.q)(h)
    assert torch.equal(model.norm.weight, before)
    assert (actual - model.q(h)).norm() < 0.1 * model.q(h).norm()


def test_layers_without_data_are_named(x):
    model = prepared(quantization.default_static_qconfig_mapping, x)
    with pytest.warns(UserWarning, match="calibration never reached 1 layers, which stay in float: rarely"):
        found(model)


def test_a_weight_that_cannot_be_quantized_leaves_the_norm_alone(x):
    model = prepared(get_smooth_quant_qconfig_mapping(), x)
    with pytest.warns(UserWarning, match="calibration never reached"):
        replacements, _ = found(model)
    before = model.norm.weight.detach().clone()
    with torch.no_grad():
        model.k.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^k: .*(finite|NaN)"):
        replacements["q"](model.q)
    assert torch.equal(model.norm.weight, before)


def test_dynamic_layers_need_no_data(x):
    model = prepare(Net().eval(), quantization.default_dynamic_qconfig_mapping, x)
    replacements, reasons = found(model)
    assert replacements.keys() == {"q", "k", "rarely"}
    assert not reasons
    assert replacements["rarely"](model.rarely).share_group is not replacements["q"](model.q).share_group


def test_recurrent_layers_that_were_marked():
    model = nn.ModuleDict({"a": nn.LSTM(8, 8), "b": nn.GRUCell(8, 8), "c": nn.Linear(8, 8)}).eval()
    marked = prepare(model, quantization.default_dynamic_qconfig_mapping.set_module_name("b", None))
    replacements = recurrent_replacements(marked)
    assert replacements.keys() == {"a"}
    made = replacements["a"](marked["a"])
    assert type(made) is int8_recurrent_class(marked["a"])
