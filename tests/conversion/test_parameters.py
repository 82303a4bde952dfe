import pytest
import torch
from torch import nn
from torch.ao.quantization import QConfig

from ipex_quant import observers
from ipex_quant.conversion.observed import ATTRIBUTE
from ipex_quant.conversion.parameters import group_parameters, layer_parameters, observed_scales
from ipex_quant.conversion.qconfig import QuantizationKind, default_static_qconfig
from ipex_quant.quantization import calibrate, get_smooth_quant_qconfig_mapping, prepare
from ipex_quant.smoothquant.scaling import bounded_factors


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return {"q": nn.Linear(8, 6), "k": nn.Linear(8, 4)}


@pytest.fixture
def x():
    return torch.randn(30, 8, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0] * 7 + [40.0])


def smooth(alpha=0.5, shared=True):
    return get_smooth_quant_qconfig_mapping(alpha, share_weight_observers=shared).global_qconfig


def seen(qconfig, x):
    observer = qconfig.activation()
    observer(x)
    return observer


def test_a_static_activation_has_one_range_and_no_factor(layers, x):
    qconfig = QConfig(observers.MinMaxObserver, default_static_qconfig().weight)
    q, k = layer_parameters(QuantizationKind.STATIC, seen(qconfig, x), layers, qconfig)
    assert q.activation == k.activation
    assert q.activation.scale == pytest.approx(float(x.max() - x.min()) / 255)
    assert q.activation.zero_point == round(float(-x.min()) / q.activation.scale)
    assert q.activation.smoothing_factor is None
    assert q.weight_factor is None
    torch.testing.assert_close(q.weight_scales, layers["q"].weight.abs().amax(1) / 127.5, rtol=5e-3, atol=0)
    assert k.weight_scales.shape == (4,)


def test_signed_codes_become_unsigned(layers, x):
    unsigned, signed = (
        QConfig(observers.MinMaxObserver.with_args(dtype=dtype), default_static_qconfig().weight)
        for dtype in (torch.quint8, torch.qint8)
    )
    found = [layer_parameters(QuantizationKind.STATIC, seen(q, x), layers, q)[0].activation for q in (unsigned, signed)]
    assert found[0].zero_point == found[1].zero_point
    assert found[0].scale == pytest.approx(found[1].scale)


def test_a_dynamic_layer_has_only_scales_of_its_weight(layers):
    (q, _) = layer_parameters(QuantizationKind.DYNAMIC, None, layers, default_static_qconfig())
    assert q.activation is None
    assert q.weight_scales.shape == (6,)


def test_shared_layers_have_the_factor_of_all_their_weights(layers, x):
    qconfig = smooth(0.3)
    observer = seen(qconfig, x)
    q, k = layer_parameters(QuantizationKind.SMOOTH_QUANT, observer, layers, qconfig)
    weights = torch.cat([layer.weight.detach() for layer in layers.values()])
    ranges = x.amin(0), x.amax(0), weights.amin(0), weights.amax(0)
    for_activation, for_weight = bounded_factors(*ranges, 0.3)
    for own in (q, k):
        torch.testing.assert_close(own.activation.smoothing_factor, for_activation)
        torch.testing.assert_close(own.weight_factor, for_weight)
    scaled = layers["q"].weight.detach() * for_weight
    torch.testing.assert_close(q.weight_scales, scaled.abs().amax(1) / 127.5, rtol=5e-3, atol=0)


def test_layers_that_share_nothing_have_factors_of_their_own(layers, x):
    qconfig = smooth(shared=False)
    q, k = layer_parameters(QuantizationKind.SMOOTH_QUANT, seen(qconfig, x), layers, qconfig)
    (alone,) = layer_parameters(QuantizationKind.SMOOTH_QUANT, seen(qconfig, x), {"k": layers["k"]}, qconfig)
    assert not torch.equal(q.weight_factor, k.weight_factor)
    assert torch.equal(k.weight_factor, alone.weight_factor)


def test_an_alpha_and_channels_in_place_of_the_observers_own(layers, x):
    """One observer answers for every alpha, which is what a search asks it for, and stays as it is."""
    observer, other = seen(smooth(0.5), x), seen(smooth(0.9), x * 2)
    found = layer_parameters(QuantizationKind.SMOOTH_QUANT, observer, layers, smooth(0.5), 0.9, other.ic_obs)
    expected = layer_parameters(QuantizationKind.SMOOTH_QUANT, other, layers, smooth(0.9))
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one.weight_factor, two.weight_factor)
        assert one.activation.scale == two.activation.scale
    assert observer.alpha == 0.5
    assert torch.equal(observer.ic_obs.max_val, x.amax(0))


def test_an_alpha_of_0_is_one(layers, x):
    observer = seen(smooth(0.5), x)
    zero = layer_parameters(QuantizationKind.SMOOTH_QUANT, observer, layers, smooth(0.5), 0.0)
    own = layer_parameters(QuantizationKind.SMOOTH_QUANT, observer, layers, smooth(0.5))
    assert not torch.equal(zero[0].weight_factor, own[0].weight_factor)


def test_what_was_observed_comes_before_what_was_loaded(layers, x):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = layers["q"], layers["k"]

        def forward(self, x):
            return self.q(x), self.k(x)

    prepared = prepare(Model().eval(), get_smooth_quant_qconfig_mapping(), x)
    (group,) = getattr(prepared, ATTRIBUTE).groups
    assert group_parameters(prepared, group) == [None, None]
    group.layers[0].parameters = "loaded"
    assert group_parameters(prepared, group) == ["loaded", None]
    calibrate(prepared, [x])
    q, k = group_parameters(prepared, group)
    assert torch.equal(q.weight_factor, k.weight_factor)


def test_weight_observers_that_do_not_fit_are_named(layers):
    weight = layers["q"].weight.detach()
    asymmetric = observers.PerChannelMinMaxObserver(dtype=torch.qint8, qscheme=torch.per_channel_affine)
    with pytest.raises(ValueError, match=r"q: weight: PerChannelMinMaxObserver: expected symmetric qint8"):
        observed_scales("q", asymmetric, weight)
    per_tensor = observers.MinMaxObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    scales = observed_scales("q", per_tensor, weight)
    assert scales.shape == (6,)
    assert len(scales.unique()) == 1
