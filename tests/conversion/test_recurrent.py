"""prepare and convert of recurrent layers, which dynamic configurations quantize and others leave in float."""

import pytest
import torch
from torch import nn
from torch.ao.quantization import QConfig, QConfigMapping
from torch.nn.utils.parametrizations import weight_norm

import ipex_quant as ipex
from ipex_quant import observers
from ipex_quant.nn import Int8Linear, Int8Recurrent, Int8RecurrentCell
from ipex_quant.quantization import (
    convert,
    default_dynamic_qconfig,
    default_dynamic_qconfig_mapping,
    default_static_qconfig_mapping,
    get_smooth_quant_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
    prepare,
)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(16, 12, 2, batch_first=True, bidirectional=True, dropout=0.3)
        self.gru, self.cell = nn.GRU(24, 12, batch_first=True), nn.LSTMCell(12, 12)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(12, 5)

    def forward(self, x):
        y, _ = self.gru(self.lstm(x)[0])
        return self.head(self.drop(self.cell(y[:, -1])[0]))


@pytest.fixture
def tagger():
    torch.manual_seed(0)
    return Tagger().eval().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(1))


def kinds(model):
    return {name: type(module) for name, module in model.named_modules() if hasattr(module, "weight_shape")}


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dynamic_quantizes_them(tagger, x, example, dtype):
    tagger, x = tagger.to(dtype), x.to(dtype)
    prepared = prepare(tagger, default_dynamic_qconfig_mapping, x if example else None)
    assert torch.equal(prepared(x), tagger(x))
    converted = convert(prepared)
    assert kinds(converted) == {
        "lstm": Int8Recurrent,
        "gru": Int8Recurrent,
        "cell": Int8RecurrentCell,
        "head": Int8Linear,
    }
    assert not list(converted.parameters())
    assert converted.lstm.weight.dtype == dtype
    actual = converted(x)
    assert actual.dtype == dtype
    assert 0 < (actual - tagger(x)).float().norm() / tagger(x).float().norm() < 0.02
    assert not hasattr(converted.lstm, "qconfig")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_one_that_is_the_model(kind):
    converted = convert(prepare(kind(4, 4), default_dynamic_qconfig_mapping))
    assert isinstance(converted, (Int8Recurrent, Int8RecurrentCell))


def test_other_configurations_leave_them_in_float(tagger, x):
    for mapping in (default_static_qconfig_mapping, get_smooth_quant_qconfig_mapping()):
        prepared = prepare(tagger, mapping, x)
        prepared(x)
        assert kinds(convert(prepared)) == {"head": Int8Linear}
    converted = convert(prepare(tagger, get_weight_only_quant_qconfig_mapping()))
    assert set(kinds(converted)) == {"head"}
    reasons = {row.module: row.reason for row in ipex.explain(converted).rows}
    assert reasons["lstm"] == "recurrent layers are quantized dynamically only"


def test_rules_choose_them(tagger, x):
    mapping = QConfigMapping().set_global(default_dynamic_qconfig).set_object_type(nn.GRU, None)
    converted = convert(prepare(tagger, mapping.set_module_name("cell", None)))
    assert set(kinds(converted)) == {"lstm", "head"}
    reasons = {row.module: row.reason for row in ipex.explain(converted).rows}
    assert reasons["gru"] == "the mapping's set_object_type(GRU) is None"
    assert reasons["lstm"] == ""
    mixed = get_smooth_quant_qconfig_mapping().set_object_type(nn.LSTM, default_dynamic_qconfig)
    prepared = prepare(tagger, mixed, x)
    prepared(x)
    assert kinds(convert(prepared)) == {"lstm": Int8Recurrent, "head": Int8Linear}


def test_the_weight_observer_counts(tagger):
    per_tensor = observers.MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    qconfig = QConfig(activation=default_dynamic_qconfig.activation, weight=per_tensor)
    lstm = convert(prepare(tagger, QConfigMapping().set_global(qconfig))).lstm
    assert lstm.state_dict()["scales_hh_l1"].unique().numel() == 1


def test_reasons_against_it(tagger):
    class Reversed(nn.GRU):
        def forward(self, x, hx=None):
            return super().forward(x.flip(1), hx)

    tagger.gru = Reversed(24, 12, batch_first=True)
    weight_norm(tagger.cell, "weight_hh")
    tagger.lstm = nn.LSTM(16, 12, batch_first=True)
    with pytest.warns(UserWarning, match="most weights stay in float: 2 recurrent layers cannot be quantized"):
        converted = convert(prepare(tagger, default_dynamic_qconfig_mapping))
    assert set(kinds(converted)) == {"lstm", "head"}
    reasons = {row.module: row.reason for row in ipex.explain(converted).rows}
    assert reasons["gru"] == "Reversed overrides GRU.forward"
    assert reasons["cell"] == "its weight_hh is computed from other parameters"


def test_a_weight_with_nan_names_the_module(tagger):
    tagger.lstm.weight_ih_l1[0, 0] = torch.nan
    with pytest.raises(ValueError, match="lstm"):
        convert(prepare(tagger, default_dynamic_qconfig_mapping))
