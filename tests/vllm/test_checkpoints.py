"""Checkpoints of every kind: vLLM with the plugin gives the tokens of this package's own `generate`."""

import json

import pytest
import torch

from ipex_quant import llm, quantization
from ipex_quant.conversion.qconfig import get_weight_only_quant_qconfig_mapping
from ipex_quant.integrations.vllm.attention import PagedImpl
from ipex_quant.numerics.scheme import WoqLowpMode, WoqWeightDtype
from ipex_quant.recipes.apply import apply_recipe
from ipex_quant.recipes.recipe import load_recipe

GPTQ = {
    "symmetric": {"sym": True},
    "zero_points": {"sym": False},
    "act_order": {"sym": True, "act_order": True},
    "act_order_zero_points": {"sym": False, "act_order": True},
    "3_bits": {"wbits": 3},
    "8_bits": {"wbits": 8},
    "per_channel": {"sym": True, "group_size": -1},
}


def mapping(bits):
    """The compute mode that the plugin has by default."""
    dtype = WoqWeightDtype.INT8 if bits == 8 else WoqWeightDtype.INT4
    lowp_mode = WoqLowpMode.NONE if bits == 8 else WoqLowpMode.INT8
    return get_weight_only_quant_qconfig_mapping(weight_dtype=dtype, lowp_mode=lowp_mode)


@pytest.fixture(scope="module")
def gptq(tmp_path_factory, float_model, calibration, tokenizer):
    """Returns the directory of a GPTQ checkpoint; its scales are bfloat16, to which vLLM rounds them."""
    made = {}

    def make(name):
        if name not in made:
            options = {"group_size": 64, "scale_dtype": torch.bfloat16} | GPTQ[name]
            made[name] = tmp_path_factory.mktemp("gptq") / name
            quantization.gptq(float_model(), calibration, save_dir=made[name], **options)
            tokenizer.save_pretrained(made[name])
        return made[name]

    return make


@pytest.mark.parametrize("name", GPTQ)
def test_gptq(name, gptq, generate_in_vllm, check_tokens, prompts):
    directory = gptq(name)
    found = generate_in_vllm(directory, prompts)
    check_tokens(llm.from_pretrained(directory, torch.bfloat16, mapping(GPTQ[name].get("wbits", 4))), prompts, found)


@pytest.mark.parametrize("name", ["symmetric", "zero_points"])
@pytest.mark.parametrize("kind", ["awq", "compressed-tensors"])
def test_other_producers_of_4_bits(kind, name, gptq, generate_in_vllm, check_tokens, prompts, tokenizer, tmp_path):
    model = llm.from_pretrained(gptq(name), torch.bfloat16, mapping(4))
    llm.export(model, tmp_path / "model", kind, tokenizer)
    check_tokens(model, prompts, generate_in_vllm(tmp_path / "model", prompts))


def test_bf16_arithmetic(gptq, generate_in_vllm, check_tokens, prompts, monkeypatch):
    monkeypatch.setenv("IPEX_QUANT_VLLM_LOWP", "bf16")
    found = generate_in_vllm(gptq("symmetric"), prompts)
    arithmetic = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, lowp_mode=WoqLowpMode.BF16)
    check_tokens(llm.from_pretrained(gptq("symmetric"), torch.bfloat16, arithmetic), prompts, found)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_compressed_tensors_w8a8(kind, int8_model, generate_in_vllm, check_tokens, prompts, tokenizer, tmp_path):
    model = int8_model(kind)
    llm.export(model, tmp_path / "model", "compressed-tensors", tokenizer)
    check_tokens(model, prompts, generate_in_vllm(tmp_path / "model", prompts))


@pytest.mark.parametrize("kind", ["static", "smoothed", "dynamic"])
def test_saved_w8a8(kind, int8_model, generate_in_vllm, check_tokens, prompts, tokenizer, tmp_path):
    model = int8_model(kind)
    llm.save(model, tmp_path, tokenizer)
    check_tokens(model, prompts, generate_in_vllm(tmp_path, prompts))


@pytest.mark.parametrize(
    ("dtype", "lowp_mode", "group_size"),
    [
        (WoqWeightDtype.INT4, WoqLowpMode.INT8, 64),
        (WoqWeightDtype.INT4, WoqLowpMode.BF16, 128),
        (WoqWeightDtype.INT8, WoqLowpMode.INT8, -1),
        (WoqWeightDtype.NF4, WoqLowpMode.BF16, 64),
        (WoqWeightDtype.INT3, WoqLowpMode.INT8, 64),
    ],
)
def test_saved_weight_only(
    dtype, lowp_mode, group_size, float_model, generate_in_vllm, check_tokens, prompts, tokenizer, tmp_path
):
    chosen = get_weight_only_quant_qconfig_mapping(weight_dtype=dtype, lowp_mode=lowp_mode, group_size=group_size)
    model = llm.optimize(float_model().eval(), dtype=torch.bfloat16, quantization_config=chosen)
    llm.save(model, tmp_path, tokenizer)
    check_tokens(model, prompts, generate_in_vllm(tmp_path, prompts))


def test_saved_recipe_with_quantized_embedding_and_head(
    float_model, generate_in_vllm, check_tokens, prompts, tokenizer, tmp_path
):
    model = apply_recipe(load_recipe("w4a8-g128"), float_model().eval())
    llm.save(model, tmp_path, tokenizer)
    tied = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["tied"]
    assert tied == [["model.embed_tokens", "lm_head"]]
    check_tokens(model, prompts, generate_in_vllm(tmp_path, prompts))


def test_saved_parts_of_a_layer_quantized_differently(
    float_model, generate_in_vllm, check_tokens, prompts, tokenizer, tmp_path
):
    chosen = get_weight_only_quant_qconfig_mapping(
        weight_dtype=WoqWeightDtype.INT4, lowp_mode=WoqLowpMode.INT8, group_size=64
    )
    wide = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT8).global_qconfig
    chosen.set_module_name_regex(r".*\.v_proj", wide)
    chosen.set_module_name_regex(r".*\.k_proj", None)
    chosen.set_module_name_regex(r".*\.0\.self_attn\.o_proj", None)
    model = llm.optimize(float_model().eval(), dtype=torch.bfloat16, quantization_config=chosen)
    llm.save(model, tmp_path, tokenizer)
    check_tokens(model, prompts, generate_in_vllm(tmp_path, prompts))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_of_activations(dtype, gptq, generate_in_vllm, check_tokens, prompts):
    found = generate_in_vllm(gptq("zero_points"), prompts, dtype=dtype)
    check_tokens(llm.from_pretrained(gptq("zero_points"), getattr(torch, dtype), mapping(4)), prompts, found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_int8_cache(dtype, gptq, generate_in_vllm, check_tokens, prompts):
    found = generate_in_vllm(gptq("act_order"), prompts, dtype=dtype, kv_cache_dtype="int8_per_token_head")
    model = llm.from_pretrained(gptq("act_order"), getattr(torch, dtype), mapping(4), kv_cache_dtype=torch.int8)
    check_tokens(model, prompts, found)


@pytest.mark.parametrize(("chosen", "is_int8"), [("auto", True), ("bfloat16", False)])
def test_saved_int8_cache(
    chosen, is_int8, float_model, generate_in_vllm, check_tokens, prompts, tokenizer, tmp_path, monkeypatch
):
    own = {"dtype": torch.bfloat16, "quantization_config": mapping(4)}
    llm.save(llm.optimize(float_model().eval(), kv_cache_dtype=torch.int8, **own), tmp_path, tokenizer)
    caches = []
    views = PagedImpl._cache_views

    def recorded(self, cache):
        caches.append(self.is_int8)
        return views(self, cache)

    monkeypatch.setattr(PagedImpl, "_cache_views", recorded)
    found = generate_in_vllm(tmp_path, prompts, kv_cache_dtype=chosen)
    assert set(caches) == {is_int8}
    dtype = torch.int8 if is_int8 else torch.bfloat16
    check_tokens(llm.optimize(float_model().eval(), kv_cache_dtype=dtype, **own), prompts, found)
