"""prepare, calibrate and convert for models with ``nn.MultiheadAttention``."""

import copy

import pytest
import torch
from torch import nn

import ipex_quant as ipex
from ipex_quant.conversion.prepare import FLOAT_REASONS
from ipex_quant.nn import Int8Linear, SplitMultiheadAttention, WeightOnlyQuantizedLinear
from ipex_quant.quantization import (
    convert,
    get_smooth_quant_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
    prepare,
)

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def mappings():
    return {
        "static": ipex.quantization.default_static_qconfig_mapping,
        "smooth": get_smooth_quant_qconfig_mapping(),
        "dynamic": ipex.quantization.default_dynamic_qconfig_mapping,
        "weight-only": get_weight_only_quant_qconfig_mapping(),
    }


class Block(nn.Module):
    """A block of a vision transformer: nothing but the attention reads the norm's output."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        h = self.norm(x)
        return x + self.attention(h, h, h, need_weights=False)[0]


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block().eval().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))


def calibrated(model, mapping, *example):
    prepared = prepare(model, mapping, example_inputs=example)
    prepared(*example)
    return prepared


def error(actual, expected):
    return (actual - expected).norm() / expected.norm()


@pytest.mark.parametrize("name", mappings())
@torch.no_grad()
def test_transformers_of_torchs(name):
    torch.manual_seed(0)
    options = {"dim_feedforward": 24, "num_encoder_layers": 1, "num_decoder_layers": 1, "batch_first": True}
    with pytest.warns(UserWarning, match="enable_nested_tensor"):
        model = nn.Transformer(16, 2, norm_first=True, **options).eval()
    source, target = torch.randn(3, 6, 16), torch.randn(3, 4, 16)
    masked = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(4), "tgt_is_causal": True}
    prepared = calibrated(model, mappings()[name], source, target)
    prepared(source, target, **masked)
    converted = convert(prepared)
    kind = WeightOnlyQuantizedLinear if name == "weight-only" else Int8Linear
    attentions = [module for module in converted.modules() if isinstance(module, nn.MultiheadAttention)]
    assert len(attentions) == 3
    assert all(type(getattr(module, each)) is kind for module in attentions for each in PROJECTIONS)
    assert 0 < error(converted(source, target), model(source, target)) < 0.02
    if kind is Int8Linear:
        crossing = converted.decoder.layers[0].multihead_attn
        assert crossing.k_proj.share_group is crossing.v_proj.share_group
        assert crossing.q_proj.share_group is not crossing.k_proj.share_group
    assert 0 < error(converted(source, target, **masked), model(source, target, **masked)) < 0.02


@pytest.mark.parametrize("name", ["static", "smooth", "dynamic"])
def test_queries_keys_and_values_of_one_tensor_are_one_gemm(block, x, name):
    converted = convert(calibrated(block, mappings()[name], x))
    attention = converted.attention
    assert attention.q_proj.share_group is attention.k_proj.share_group is attention.v_proj.share_group
    assert attention.q_proj.share_group is not attention.out_proj.share_group
    assert error(converted(x), block(x)) < 0.01
    assert attention.dropout == 0.0
    assert block.attention.dropout == 0.5


def test_the_smoothing_factor_is_folded_into_the_norm_before(block, x):
    converted = convert(calibrated(block, get_smooth_quant_qconfig_mapping(), x))
    assert not torch.equal(converted.norm.weight, block.norm.weight)
    assert converted.attention.q_proj.activation.smoothing_factor is None
    assert converted.attention.out_proj.activation.smoothing_factor is not None


@pytest.mark.parametrize("inplace", [False, True])
def test_a_prepared_model_computes_and_is_saved_as_the_float_one(block, x, inplace):
    before, expected = copy.deepcopy(block.state_dict()), block(x)
    prepared = prepare(block, get_smooth_quant_qconfig_mapping(), example_inputs=x, inplace=inplace)
    assert isinstance(prepared.attention, nn.MultiheadAttention)
    torch.testing.assert_close(prepared(x), expected)
    after = prepared.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert type(block.attention) is (SplitMultiheadAttention if inplace else nn.MultiheadAttention)


def test_a_projection_that_stays_in_float_has_a_weight_of_its_own(block, x):
    mapping = get_weight_only_quant_qconfig_mapping().set_module_name("attention.q_proj", None)
    converted = convert(prepare(block, mapping))
    assert type(converted.attention.q_proj) is nn.Linear
    with torch.no_grad():
        converted.attention.q_proj.weight += 1
        assert not torch.equal(converted.attention.q_proj.weight, block.attention.in_proj_weight[:32])
        converted.attention.q_proj.weight -= 1
    assert type(converted.attention.k_proj) is WeightOnlyQuantizedLinear
    assert error(converted(x), block(x)) < 0.01


@pytest.mark.parametrize("name", ["static", "smooth"])
def test_a_summary_names_the_projections(block, x, name, tmp_path):
    prepared = calibrated(block, mappings()[name], x)
    prepared.save_qconf_summary(tmp_path / "summary.json")
    other = prepare(block, mappings()[name], example_inputs=x)
    other.load_qconf_summary(tmp_path / "summary.json")
    assert torch.equal(convert(other)(x), convert(prepared)(x))


def test_attention_that_nothing_is_quantized_of_is_as_before(block, x):
    mapping = get_smooth_quant_qconfig_mapping()
    prepared = prepare(nn.Sequential(block, nn.Linear(16, 4)).eval(), mapping, example_inputs=x)
    prepared[1](x)
    with pytest.warns(UserWarning, match="calibration never reached 4 layers"):
        converted = convert(prepared)
    assert type(converted[0].attention) is nn.MultiheadAttention
    assert type(converted[1]) is Int8Linear
    assert torch.equal(converted[0](x), block(x))
    excluded = prepare(block, mapping.set_object_type(nn.MultiheadAttention, None), example_inputs=x)
    assert type(excluded.attention) is nn.MultiheadAttention
    assert getattr(excluded, FLOAT_REASONS).keys() == {"attention", "attention.out_proj"}


def test_attention_alone(x):
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    mapping = get_weight_only_quant_qconfig_mapping()
    for inplace in (False, True):
        converted = convert(prepare(attention, mapping, inplace=inplace), inplace=inplace)
        assert type(converted) is SplitMultiheadAttention
        assert error(converted(x, x, x)[0], attention(x, x, x)[0]) < 0.01
    with pytest.warns(UserWarning, match="the model stays in float"):
        assert type(convert(prepare(attention.double(), mapping))) is nn.MultiheadAttention


class Own(nn.MultiheadAttention):
    """Of the user's."""


def test_what_stays_in_float_is_named_with_the_reason():
    model = nn.ModuleDict({"own": Own(4, 2), "wide": nn.Linear(64, 64), "odd": nn.Linear(4, 4, dtype=torch.float64)})
    prepared = prepare(model, get_weight_only_quant_qconfig_mapping())
    told = r"^3 layers stay in float: own: Own is a class .*own\.out_proj.*odd: .*float64"
    with pytest.warns(UserWarning, match=told):
        convert(prepared)
