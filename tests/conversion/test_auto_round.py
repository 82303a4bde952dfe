import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import ipex_quant as ipex
from ipex_quant.nn import WeightOnlyQuantizedLinear
from ipex_quant.numerics.affine import dequantize
from ipex_quant.quantization import (
    AutoRoundOptions,
    WoqWeightDtype,
    auto_round,
    default_dynamic_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
)
from ipex_quant.woq.auto_round_blocks import auto_round_blocks

MAPPING = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, group_size=16)
OPTIONS = AutoRoundOptions(steps=6, batch_size=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def test_the_result_has_the_tuned_weights(model, samples, tmp_path):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scheme = MAPPING.global_qconfig.scheme
    expected = auto_round_blocks(model, [{"input_ids": ids} for ids in samples], scheme, OPTIONS)
    quantized = auto_round(model, samples, MAPPING, OPTIONS, work_dir=tmp_path / "work")
    layers = {n: m for n, m in quantized.named_modules() if isinstance(m, WeightOnlyQuantizedLinear)}
    assert layers.keys() == {*expected, "lm_head"}
    for name, weight in expected.items():
        assert torch.equal(dequantize(layers[name].quantized_weight()), dequantize(weight))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert len(list((tmp_path / "work").iterdir())) == 2
    optimized = ipex.llm.optimize(quantized, dtype=torch.float32)
    assert torch.isfinite(optimized(input_ids=samples[0]).logits).all()


def test_floats_are_rounded_to_nearest_with_a_warning(model, samples):
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, group_size=16)
    fp8 = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.FP8, group_size=16)
    mapping.set_module_name("model.layers.1.mlp.down_proj", fp8.global_qconfig)
    with pytest.warns(UserWarning, match=r"auto_round: these linear layers are rounded to nearest: .*mlp.down_proj"):
        quantized = auto_round(model, samples, mapping, OPTIONS)
    assert quantized.model.layers[1].mlp.down_proj.scheme.dtype == WoqWeightDtype.FP8


def test_bad_input(model, samples):
    with pytest.raises(TypeError, match="quantization_config: expected a QConfigMapping, got NoneType"):
        auto_round(model, samples, None)
    with pytest.raises(ValueError, match="AutoRound quantizes weights only"):
        auto_round(model, samples, default_dynamic_qconfig_mapping)
    with pytest.raises(ValueError, match="dataloader: expected at least one sample"):
        auto_round(model, [], MAPPING)
    with pytest.raises(ValueError, match=r"has no nn\.ModuleList of transformer blocks"):
        auto_round(nn.Sequential(nn.Linear(16, 16)), [{"input": torch.ones(1, 16)}], MAPPING)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj: weight: expected finite values, got NaN"):
        auto_round(model, samples, MAPPING)
