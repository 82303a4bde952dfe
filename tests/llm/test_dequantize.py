"""`model.dequantize()`: back to float modules with the values that the quantized ones stand for."""

import pytest
import torch
import transformers

import ipex_quant as ipex
from ipex_quant.nn import QuantizedModule
from ipex_quant.quantization import (
    WoqWeightDtype,
    convert,
    default_dynamic_qconfig_mapping,
    get_weight_only_quant_qconfig_mapping,
    prepare,
)

from .conftest import MODELS, build, inputs_of, random_model


def weight_only(model):
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, group_size=32)
    return ipex.llm.optimize(model, quantization_config=mapping)


def values(model):
    return {n: m.weight.clone() for n, m in model.named_modules() if isinstance(m, QuantizedModule)}


def check(quantized, model, inputs, dtype=None):
    stood_for = values(quantized)
    with torch.no_grad():
        expected = quantized(**inputs).logits
    result = quantized.dequantize(dtype=dtype)
    assert not values(result)
    assert {n: (type(m), tuple(p.shape for p in m.parameters(recurse=False))) for n, m in result.named_modules()} == {
        n: (type(m), tuple(p.shape for p in m.parameters(recurse=False))) for n, m in model.named_modules()
    }
    assert not hasattr(result.config, "quantization_config")
    with torch.no_grad():
        actual = result(**inputs).logits
    return stood_for, result, actual, expected


@pytest.mark.filterwarnings("ignore:.*stay in float")
@pytest.mark.parametrize("name", [name for name in MODELS if name != "mamba"])
def test_a_weight_only_model_computes_what_it_did(name):
    model = build(name)
    _, result, actual, expected = check(weight_only(model), model, inputs_of(model))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert result.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape[1] >= 3


def test_layers_hold_the_values_they_stood_for(tmp_path):
    model = build("llama")
    mapping = default_dynamic_qconfig_mapping
    quantized = ipex.llm.optimize(convert(prepare(model, mapping)))
    stood_for, result, *_ = check(quantized, model, inputs_of(model))
    assert len(stood_for) == 15
    for name, weight in stood_for.items():
        assert torch.equal(result.get_submodule(name).weight, weight)
    result.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, stood_for["lm_head"])


def test_a_loaded_model_in_another_dtype(tmp_path):
    model = build("llama")
    ipex.llm.save(weight_only(model), tmp_path / "model")
    loaded = ipex.llm.load(tmp_path / "model")
    *_, actual, expected = check(loaded, model, inputs_of(model), torch.bfloat16)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0.1, atol=0.1)


def test_experts_with_biases_that_alternate_between_gate_and_up():
    options = MODELS["llama"][1] | {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "attn_implementation": "eager",
    }
    model = random_model(transformers.GptOssForCausalLM, options)
    quantized = convert(prepare(model, get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT8)))
    *_, actual, expected = check(quantized, model, inputs_of(model))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
def test_a_model_that_convert_alone_made(name, tmp_path):
    model = build(name)
    quantized = convert(prepare(model, get_weight_only_quant_qconfig_mapping()))
    quantized.save_pretrained(tmp_path)
    *_, actual, expected = check(quantized, model, inputs_of(model))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
