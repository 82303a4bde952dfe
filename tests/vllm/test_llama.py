"""Llama in vLLM: steps of few tokens are one native call for all layers, other steps and models are vLLM's own."""

import pytest
import torch

from ipex_quant import llm
from ipex_quant.conversion.qconfig import get_weight_only_quant_qconfig_mapping
from ipex_quant.integrations.vllm import llama
from ipex_quant.numerics.scheme import WoqLowpMode, WoqWeightDtype


@pytest.fixture(scope="module")
def model(float_model):
    chosen = get_weight_only_quant_qconfig_mapping(
        weight_dtype=WoqWeightDtype.INT4, lowp_mode=WoqLowpMode.INT8, group_size=64
    )
    return llm.optimize(float_model().eval(), dtype=torch.bfloat16, quantization_config=chosen)


@pytest.fixture(scope="module")
def directory(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    llm.save(model, path, tokenizer)
    return path


@pytest.fixture
def steps(monkeypatch):
    """Numbers of tokens of the steps that were one native call."""
    taken = []
    run = llama.Stack.run

    def counted(self, x, positions, pages):
        taken.append(len(x))
        return run(self, x, positions, pages)

    monkeypatch.setattr(llama.Stack, "run", counted)
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
    monkeypatch.setattr(llama, "MAX_TOKENS", 0)
    assert generate_in_vllm(directory, prompts, kv_cache_dtype=cache) == found
    assert not steps
    if cache == "auto":
        check_tokens(model, prompts, found)


def test_prompts_within_a_call_and_cached_prefixes(directory, prompts, generate_in_vllm, check_tokens, model, steps):
    long = [11, 13] * 34  # more than a block of the cache, which the second request finds there
    found = generate_in_vllm(directory, [long, [*long, 5], prompts[0]], block_size=32, max_num_seqs=1)
    assert max(steps) <= llama.MAX_TOKENS
    assert any(1 < tokens < len(long) for tokens in steps)
    check_tokens(model, [long, [*long, 5], prompts[0]], found)


def test_layers_in_float_are_left_to_vllm(float_model, tokenizer, prompts, generate_in_vllm, steps, tmp_path):
    float_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert len(generate_in_vllm(tmp_path, prompts)) == len(prompts)
    assert not steps
