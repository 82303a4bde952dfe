import importlib

import pytest
import torch
import transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import ipex_quant as ipex
from ipex_quant.llm.native import attends_natively, native_stack, parts_of
from ipex_quant.llm.saved import hf_quantizer


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


def from_pretrained(directory, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **options)


@pytest.fixture
def saved(llama, tmp_path):
    mapping = ipex.quantization.get_weight_only_quant_qconfig_mapping()
    model = ipex.llm.optimize(llama, dtype=torch.bfloat16, quantization_config=mapping, kv_cache_dtype=torch.int8)
    ipex.llm.save(model, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "float32", "auto", None])
def test_the_model_loads_in_the_dtype_that_is_asked_for(saved, logits, tmp_path, dtype):
    expected = getattr(torch, dtype) if dtype == "float32" else dtype
    expected = expected if isinstance(expected, torch.dtype) else torch.bfloat16
    saved_model = ipex.llm.load(saved)
    for loaded in (from_pretrained(saved, dtype=dtype), type(saved_model).from_pretrained(saved, dtype=dtype)):
        assert loaded.config.dtype == loaded.dtype == loaded.lm_head.weight.dtype == expected
        assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
        assert loaded.lm_head.plain_tensors()["scales"].dtype == torch.float32
        again = ipex.llm.optimize(saved_model, dtype=expected, kv_cache_dtype=torch.int8)
        assert logits(loaded).dtype == expected
        assert torch.equal(logits(loaded), logits(again))
    loaded.save_pretrained(tmp_path / "second")
    second = from_pretrained(tmp_path / "second")
    assert second.dtype == expected
    assert torch.equal(logits(second), logits(loaded))


def test_a_dtype_that_nothing_computes_in_is_refused(saved):
    with pytest.raises(ValueError, match=r"dtype: expected 'auto' or one of .*'bfloat16'.*, got torch.float64"):
        from_pretrained(saved, dtype=torch.float64)


def test_tensor_parallelism_is_refused(saved, monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_tp_size", 2)  # as `distributed_config` sets it on the model
    with pytest.raises(ValueError, match="quantized layers are not divided among processes by transformers"):
        from_pretrained(saved)


@pytest.mark.parametrize("narrow", ["lm_head", "model.embed_tokens"])
def test_a_mixture_of_dtypes_stays_one(llama, tmp_path, narrow):
    mapping = ipex.quantization.get_weight_only_quant_qconfig_mapping().set_module_name("lm_head", None)
    model = ipex.llm.optimize(llama, quantization_config=mapping)
    model.get_submodule(narrow).to(torch.bfloat16)
    model.model.norm.to(torch.float16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model.save_pretrained(tmp_path)
    for loaded in (from_pretrained(tmp_path), from_pretrained(tmp_path, dtype="auto"), ipex.llm.load(tmp_path)):
        assert {name: parameter.dtype for name, parameter in loaded.named_parameters()} == dtypes


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_that_is_asked_for_runs(saved, logits, tmp_path, implementation):
    native = from_pretrained(saved, attn_implementation="ipex_quant")
    assert [part.stock for part in parts_of(native)] == [()] * 3
    for load in (transformers.AutoModelForCausalLM, type(native)):
        loaded = load.from_pretrained(saved, attn_implementation=implementation)
        assert loaded.config._attn_implementation == implementation
        layers, norms, attention, mlps = parts_of(loaded)
        assert (layers.native, norms.stock, attention.native, mlps.stock) == ((), (), (), ())
        assert native_stack(loaded) == (True, torch.int8)
        torch.testing.assert_close(logits(loaded), logits(native), rtol=0.1, atol=0.2)
    if implementation == "eager":
        weights = loaded(torch.tensor([[5, 6, 7]]), output_attentions=True).attentions
        assert [each.shape for each in weights] == [(1, 4, 3, 3)] * 2
    loaded.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(from_pretrained(tmp_path / "second")), logits(native))
    assert not attends_natively(loaded.dequantize())
    assert attends_natively(native.dequantize())
