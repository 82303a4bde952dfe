import copy
import json
import pickle

import pytest
import torch
import torch.ao.quantization as torch_ao

from ipex_quant.observers import (
    HistogramObserver,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    SmoothQuantActivationObserver,
    SmoothQuantWeightObserver,
    describe_observer,
)

# As IPEX 2.8 writes them.
HISTOGRAM = {
    "name": "HistogramObserver",
    "bins": 2048,
    "dtype": "torch.quint8",
    "qscheme": "torch.per_tensor_affine",
    "reduce_range": False,
    "quant_min": 0,
    "quant_max": 255,
    "is_dynamic": False,
}
INPUT_CHANNELS = {
    "name": "PerChannelMinMaxObserver",
    "ch_axis": -1,
    "dtype": "torch.quint8",
    "qscheme": "torch.per_channel_affine",
    "reduce_range": False,
    "quant_min": 0,
    "quant_max": 255,
    "is_dynamic": False,
}
COLUMNS = INPUT_CHANNELS | {"ch_axis": 1, "dtype": "torch.qint8", "quant_min": -128, "quant_max": 127}
ROWS = COLUMNS | {"ch_axis": 0, "qscheme": "torch.per_channel_symmetric"}
ACTIVATION = {
    "name": "SmoothQuantActivationObserver",
    "smooth_quant_enabled": True,
    "dtype": "torch.quint8",
    "qscheme": "torch.per_tensor_affine",
    "reduce_range": False,
    "quant_min": 0,
    "quant_max": 255,
    "alpha": 0.5,
    "act_observer": HISTOGRAM,
    "act_ic_observer": INPUT_CHANNELS,
}
WEIGHT = {
    "name": "SmoothQuantWeightObserver",
    "smooth_quant_enabled": True,
    "dtype": "torch.qint8",
    "qscheme": "torch.per_channel_symmetric",
    "reduce_range": False,
    "quant_min": -128,
    "quant_max": 127,
    "alpha": 0.5,
    "wei_observer": ROWS,
    "wei_ic_observer": COLUMNS,
}


@pytest.mark.parametrize(
    ("observer", "description"),
    [
        (HistogramObserver(), HISTOGRAM),
        (torch_ao.HistogramObserver(), HISTOGRAM),
        (PerChannelMinMaxObserver(ch_axis=-1), INPUT_CHANNELS),
        (torch_ao.PerChannelMinMaxObserver(ch_axis=-1), INPUT_CHANNELS),
        (SmoothQuantActivationObserver(), ACTIVATION),
        (SmoothQuantActivationObserver(act_observer=torch_ao.HistogramObserver), ACTIVATION),
        (SmoothQuantWeightObserver(), WEIGHT),
        (SmoothQuantWeightObserver(smooth_quant_enabled=False), WEIGHT | {"smooth_quant_enabled": False}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_description_is_ipexs(observer, description):
    # As text, since the order of keys counts.
    assert json.dumps(describe_observer(observer)) == json.dumps(description)


def test_activation_pair_sees_channels_only():
    pair = SmoothQuantActivationObserver(alpha=0.7)
    x = torch.randn(2, 3, 8)
    assert not pair.has_data
    assert pair(x) is x
    assert pair.has_data
    assert not pair.act_obs.has_data
    assert torch.equal(pair.min_val, x.amin((0, 1)))
    assert torch.equal(pair.ic_obs.max_val, x.amax((0, 1)))
    pair.reset()
    assert not pair.has_data


@pytest.mark.parametrize("make", [PerChannelMinMaxObserver, torch_ao.PerChannelMinMaxObserver])
@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8)])
def test_features_may_be_called_axis_1(make, shape):
    """The API's own example, `with_args(ch_axis=1)`, means the features of a matrix."""
    pair = SmoothQuantActivationObserver(act_ic_observer=make.with_args(ch_axis=1))
    x = torch.randn(shape)
    pair(x)
    assert torch.equal(pair.min_val, x.reshape(-1, 8).amin(0))


def test_pair_of_a_layer_that_is_not_smoothed():
    activation = SmoothQuantActivationObserver(smooth_quant_enabled=False, act_observer=torch_ao.MinMaxObserver)
    x, weight = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 2, 2)
    activation(x)
    assert (activation.min_val, activation.max_val) == torch.aminmax(x)
    assert not activation.ic_obs.has_data
    weights = SmoothQuantWeightObserver(smooth_quant_enabled=False)
    weights(weight)
    scale, zero_point = weights.calculate_qparams()
    assert torch.equal(scale, weight.abs().amax((1, 2, 3)) / 127.5)
    assert not zero_point.any()


def test_weight_pair():
    pair = SmoothQuantWeightObserver()
    weight = torch.randn(6, 4)
    pair(weight)
    assert torch.equal(pair.ic_obs.min_val, weight.amin(0))
    assert (pair.ic_obs.ch_axis, pair.oc_obs.ch_axis) == (1, 0)


@pytest.mark.parametrize("torchs", [False, True])
def test_non_finite_values(torchs):
    factory = (torch_ao.PerChannelMinMaxObserver if torchs else PerChannelMinMaxObserver).with_args(ch_axis=-1)
    pair = SmoothQuantActivationObserver(act_ic_observer=factory)
    with pytest.raises(ValueError, match="expected finite values, got NaN or Inf"):
        pair(torch.tensor([[1.0, torch.nan]]))
    pair(torch.empty(0, 2))
    assert not pair.has_data


@pytest.mark.parametrize("cls", [SmoothQuantActivationObserver, SmoothQuantWeightObserver])
@pytest.mark.parametrize(
    ("alpha", "error"),
    [(-0.1, ValueError), (1.01, ValueError), (float("nan"), ValueError), ("auto", TypeError), (None, TypeError)],
)
def test_bad_alpha(cls, alpha, error):
    with pytest.raises(error, match=r"alpha: expected a number in \[0, 1\]"):
        cls(alpha=alpha)


def test_bad_factories():
    with pytest.raises(TypeError, match="act_observer: expected an observer class or factory"):
        SmoothQuantActivationObserver(act_observer=HistogramObserver())
    with pytest.raises(ValueError, match="act_ic_observer: expected a per-channel observer with ch_axis -1"):
        SmoothQuantActivationObserver(act_ic_observer=MinMaxObserver)
    with pytest.raises(ValueError, match="wei_ic_observer: expected a per-channel observer with ch_axis 1"):
        SmoothQuantWeightObserver(wei_ic_observer=PerChannelMinMaxObserver)


def test_pairs_copy_pickle_and_save():
    factory = SmoothQuantActivationObserver.with_args(alpha=0.25, act_observer=MinMaxObserver)
    pair = pickle.loads(pickle.dumps(factory))()
    pair(torch.randn(4, 3))
    loaded = copy.deepcopy(factory)()
    loaded.load_state_dict(pair.state_dict())
    for other in (loaded, copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert other.alpha == 0.25
        assert torch.equal(other.min_val, pair.min_val)
