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
    assert not loaded.hf_quantizer.is_trainable
    assert loaded.hf_quantizer.is_compileable
