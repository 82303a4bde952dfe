"""Both names of the cache, whichever release of transformers is installed."""

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

import ipex_quant as ipex
from ipex_quant.llm.cache.layers import NativeLayer
from ipex_quant.llm.cache.naming import CACHE, CACHE_NAMES, cache_name, given_cache

TOKENS = torch.arange(3, 11)[None]


def test_the_name_is_that_of_the_release(make_model):
    cache = DynamicCache()
    assert CausalLMOutputWithPast(logits=TOKENS, **{CACHE: cache})[CACHE] is cache
    assert cache_name(make_model("llama").forward) == CACHE
    assert cache_name(lambda input_ids, past_key_values=None: None) == "past_key_values"
    assert cache_name(lambda input_ids: None) is None


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_is_found_by_either_name(name):
    cache = DynamicCache()
    assert given_cache({name: cache, "use_cache": True}) is cache
    assert given_cache(dict.fromkeys(CACHE_NAMES) | {name: cache}) is cache
    assert given_cache(dict.fromkeys(CACHE_NAMES)) is None


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_code_with_the_older_name_runs_natively(make_model):
    model = ipex.llm.optimize(make_model("llama"), dtype=torch.float32)
    with torch.no_grad():
        first = model(TOKENS[:, :5], past_key_values=DynamicCache(config=model.config))
        second = model(TOKENS[:, 5:], past_key_values=first[CACHE])
        whole = model(TOKENS)
    assert all(isinstance(layer, NativeLayer) for layer in second[CACHE].layers)
    torch.testing.assert_close(second.logits, whole.logits[:, 5:], rtol=1e-4, atol=1e-5)
