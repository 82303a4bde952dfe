import importlib

import pytest
import torch
import transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import ipex_quant as ipex
from ipex_quant.llm import hf_quantizer


def test_registering_twice_is_once():
    ipex.llm  # noqa: B018
    registered = AUTO_QUANTIZER_MAPPING["ipex_quant"], AUTO_QUANTIZATION_CONFIG_MAPPING["ipex_quant"]
    hf_quantizer.register()
    importlib.reload(ipex.llm)
    assert (AUTO_QUANTIZER_MAPPING["ipex_quant"], AUTO_QUANTIZATION_CONFIG_MAPPING["ipex_quant"]) == registered


def test_from_pretrained_does_not_quantize(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    config = hf_quantizer.IpexQuantConfig({}, "float32", 1)
    with pytest.raises(ValueError, match=r"use ipex_quant.llm.optimize"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_a_model_that_is_loaded_again_knows_it_is_quantized(llama, tmp_path):
    mapping = ipex.quantization.get_weight_only_quant_qconfig_mapping()
    ipex.llm.save(ipex.llm.optimize(llama, dtype=torch.bfloat16, quantization_config=mapping), tmp_path / "model")
    loaded = ipex.llm.load(tmp_path / "model")
    assert loaded.hf_quantizer.is_serializable()
    assert loaded.hf_quantizer.is_trainable
    assert loaded.hf_quantizer.is_compileable


@pytest.fixture
def int8_llama(llama, tokens):
    mapping = ipex.quantization.default_dynamic_qconfig_mapping
    return ipex.quantization.convert(ipex.quantization.prepare(llama, mapping, example_kwarg_inputs=tokens(llama)))


def test_an_int8_model_is_attached(int8_llama, logits, tmp_path):
    hf_quantizer.attach(int8_llama)
    config = int8_llama.config.quantization_config
    assert config["modules"]["lm_head"] == {"kind": "int8", "activation": "per_token", "smoothed": False, "bias": False}
    layer = "model.layers.1"
    assert config["share_groups"][2:] == [
        [f"{layer}.self_attn.{name}_proj" for name in "qkv"],
        [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"],
    ]
    int8_llama.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(int8_llama))
    assert loaded.hf_quantizer.quantization_config.share_groups == config["share_groups"]


def test_members_of_a_group_that_lost_a_sibling(int8_llama):
    int8_llama.model.layers[0].self_attn.k_proj = torch.nn.Linear(64, 32, bias=False)
    hf_quantizer.attach(int8_llama)
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qv"]
    assert int8_llama.config.quantization_config["share_groups"][0] == names
