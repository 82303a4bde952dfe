"""Decoder layers in vLLM: steps of few tokens are one native call, other steps and models are vLLM's own."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

from ipex_quant import llm
from ipex_quant.conversion.qconfig import get_weight_only_quant_qconfig_mapping
from ipex_quant.integrations.vllm import decoder
from ipex_quant.nn import WeightOnlyQuantizedLinear
from ipex_quant.numerics.scheme import WoqLowpMode, WoqWeightDtype

SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10_000.0}
FAMILIES = {
    "mistral": lambda shape: MistralConfig(**shape, sliding_window=None),
    "qwen2": lambda shape: Qwen2Config(**shape),
    "qwen2-yarn": lambda shape: Qwen2Config(**shape | {"rope_parameters": YARN}),
    "qwen3": lambda shape: Qwen3Config(**shape, head_dim=shape["hidden_size"] // shape["num_attention_heads"]),
    "phi3": lambda shape: Phi3Config(**shape),
}


def quantized(model):
    chosen = get_weight_only_quant_qconfig_mapping(
        weight_dtype=WoqWeightDtype.INT4, lowp_mode=WoqLowpMode.INT8, group_size=64
    )
    return llm.optimize(model.eval(), dtype=torch.bfloat16, quantization_config=chosen)


@pytest.fixture(scope="module")
def model(float_model):
    return quantized(float_model())


def joined(tensors):
    """`tensors` of a Llama with the joined projections of Phi-3 added."""
    for name in [name for name in tensors if name.endswith("q_proj.weight")]:
        parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
        tensors[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
    for name in [name for name in tensors if name.endswith("gate_proj.weight")]:
        parts = [tensors[name.replace("gate_proj", part)] for part in ("gate_proj", "up_proj")]
        tensors[name.replace("gate_proj", "gate_up_proj")] = torch.cat(parts)
    return tensors


def like(llama, config):
    """A model of `config` with the weights of `llama`, and others, biases and norms of heads, at random."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    missing = model.load_state_dict(joined(llama.state_dict()), strict=False).missing_keys
    assert all(name.endswith(("_proj.bias", "q_norm.weight", "k_norm.weight")) for name in missing)
    for name in missing:
        torch.nn.init.normal_(model.get_parameter(name), mean=1.5 if "norm" in name else 0.0, std=0.2)
    return model


@pytest.fixture(scope="module")
def directory(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    llm.save(model, path, tokenizer)
    return path


@pytest.fixture
def steps(monkeypatch):
    """Numbers of tokens of the steps that were one native call."""
    taken = []
    run = decoder.Stack.run

    def counted(self, x, positions, pages):
        taken.append(len(x))
        return run(self, x, positions, pages)

    monkeypatch.setattr(decoder.Stack, "run", counted)
    return taken


@pytest.mark.parametrize("cache", ["auto", "int8_per_token_head"])
def test_native_call_is_what_single_layers_compute(
    cache, directory, prompts, generate_in_vllm, check_tokens, model, steps, monkeypatch
):
    prompts = [*prompts, [7, 9] * 40]
    found = generate_in_vllm(directory, prompts, kv_cache_dtype=cache)
    assert set(steps) == {len(prompts)}  # the first step has more tokens than a call takes
    assert len(steps) >= 19
    del steps[:]
    monkeypatch.setattr(decoder, "MAX_TOKENS", 0)
    assert generate_in_vllm(directory, prompts, kv_cache_dtype=cache) == found
    assert not steps
    if cache == "auto":
        check_tokens(model, prompts, found)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(
    family, float_model, tokenizer, prompts, generate_in_vllm, check_tokens, steps, monkeypatch, tmp_path
):
    llama = float_model()
    model = like(llama, FAMILIES[family]({name: getattr(llama.config, name) for name in SHAPE}))
    model = quantized(model)
    llm.save(model, tmp_path, tokenizer)
    found = generate_in_vllm(tmp_path, prompts)
    assert len(steps) >= 19
    assert max(steps) <= decoder.MAX_TOKENS
    check_tokens(model, prompts, found)
    del steps[:]
    monkeypatch.setattr(decoder, "MAX_TOKENS", 0)
    assert generate_in_vllm(tmp_path, prompts) == found
    assert not steps


@pytest.mark.parametrize("kind", ["static", "smoothed", "dynamic"])
def test_w8a8(kind, int8_model, tokenizer, prompts, generate_in_vllm, check_tokens, steps, monkeypatch, tmp_path):
    model = int8_model(kind)
    llm.save(model, tmp_path, tokenizer)
    found = generate_in_vllm(tmp_path, prompts)
    assert len(steps) >= 19
    check_tokens(model, prompts, found)
    del steps[:]
    monkeypatch.setattr(decoder, "MAX_TOKENS", 0)
    check_tokens(model, prompts, generate_in_vllm(tmp_path, prompts))  # other norms and rotations, so other ties
    assert not steps


def test_sliding_windows_are_left_to_vllm(
    float_model, tokenizer, prompts, generate_in_vllm, check_tokens, steps, tmp_path
):
    llama = float_model()
    config = MistralConfig(**{name: getattr(llama.config, name) for name in SHAPE}, sliding_window=8)
    model = quantized(like(llama, config))
    llm.save(model, tmp_path, tokenizer)
    check_tokens(model, prompts, generate_in_vllm(tmp_path, prompts))
    assert not steps


def test_prompts_within_a_call_and_cached_prefixes(directory, prompts, generate_in_vllm, check_tokens, model, steps):
    long = [11, 13] * 34  # more than a block of the cache, which the second request finds there
    found = generate_in_vllm(directory, [long, [*long, 5], prompts[0]], block_size=32, max_num_seqs=1)
    assert max(steps) <= decoder.MAX_TOKENS
    assert any(1 < tokens < len(long) for tokens in steps)
    check_tokens(model, [long, [*long, 5], prompts[0]], found)


def test_layers_in_float_are_left_to_vllm(float_model, tokenizer, prompts, generate_in_vllm, steps, tmp_path):
    float_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert len(generate_in_vllm(tmp_path, prompts)) == len(prompts)
    assert not steps


def test_embeddings_of_a_model_whose_head_is_quantized(directory, model, prompts, steps):
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    assert isinstance(model.lm_head, WeightOnlyQuantizedLinear)
    options = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 8}
    embedder = LLM(str(directory), runner="pooling", kv_cache_memory_bytes=16 << 20, **options)
    try:
        results = embedder.embed([{"prompt_token_ids": ids} for ids in prompts], use_tqdm=False)
    finally:
        del embedder
        cleanup_dist_env_and_memory()
    assert steps
    for ids, result in zip(prompts, results, strict=True):
        with torch.no_grad():
            own = model.model(torch.tensor([ids])).last_hidden_state[0, -1].float()
        torch.testing.assert_close(
            torch.tensor(result.outputs.embedding), own / own.norm(), atol=0.002, rtol=0, check_dtype=False
        )
