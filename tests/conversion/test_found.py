import pytest
import torch
from torch import nn

from ipex_quant.conversion.found import FoundWeights
from ipex_quant.nn import WeightOnlyQuantizedLinear
from ipex_quant.numerics.scheme import WoqLowpMode, WoqWeightDtype
from ipex_quant.quantization import convert, get_weight_only_quant_qconfig_mapping, prepare
from ipex_quant.woq.rtn import rtn


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32), nn.Linear(32, 16)).eval()


@pytest.mark.parametrize("inplace", [False, True])
def test_found_weights_take_the_place_of_rounding(model, inplace):
    mapping = get_weight_only_quant_qconfig_mapping(
        weight_dtype=WoqWeightDtype.INT4, group_size=32, lowp_mode=WoqLowpMode.BF16
    )
    scheme = mapping.global_qconfig.scheme
    float_weight, norm = model[1].weight.detach().clone(), model[0].weight.detach().clone()
    found = FoundWeights({"1": rtn(float_weight * 2, scheme)}, {"0.weight": norm / 2})
    prepared = prepare(model, mapping, inplace=inplace)
    found.put_into(prepared)
    converted = convert(prepared, inplace=True)
    assert torch.equal(converted[1].quantized_weight().codes, found.weights["1"].codes)
    assert torch.equal(converted[0].weight, norm / 2)
    rounded = convert(prepare(nn.Sequential(model[0], nn.Identity(), converted[2]), mapping))[2]
    assert isinstance(rounded, WeightOnlyQuantizedLinear), "what was not found is rounded to nearest"
    assert "lowp_mode=bf16" in repr(converted[1])
    assert not hasattr(converted[1], "qconfig")
    assert not converted[1].training
    if not inplace:
        assert torch.equal(model[0].weight, norm), "a copy's parameter has memory of its own"
        assert torch.equal(model[1].weight, float_weight)


def test_a_bias_of_zeros_is_dropped(model):
    nn.init.zeros_(model[1].bias)
    prepared = prepare(model, get_weight_only_quant_qconfig_mapping())
    scheme = get_weight_only_quant_qconfig_mapping().global_qconfig.scheme
    FoundWeights({name: rtn(model[int(name)].weight.detach(), scheme) for name in ("1", "2")}).put_into(prepared)
    assert ("bias=False" in repr(prepared[1]), "bias=False" in repr(prepared[2])) == (True, False)
