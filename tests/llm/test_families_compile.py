"""`torch.compile` of optimized models: whole graphs, the same tokens, and no graph for each of them."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache

import ipex_quant as ipex
from ipex_quant.quantization import WoqLowpMode, WoqWeightDtype, get_weight_only_quant_qconfig_mapping

from .test_families import build

MODELS = ["llama", "qwen3", "gpt-neox"]


@pytest.fixture(autouse=True)
def _without_gradients():
    torch.compiler.reset()
    with torch.no_grad():
        yield


def optimized(name, **options):
    mapping = get_weight_only_quant_qconfig_mapping(
        weight_dtype=WoqWeightDtype.INT4, group_size=32, lowp_mode=WoqLowpMode.INT8
    )
    return ipex.llm.optimize(build(name), quantization_config=mapping, **options)


@pytest.mark.parametrize("name", MODELS)
def test_generating_takes_one_graph_for_the_prompt_and_one_for_the_tokens(name):
    model = optimized(name, kv_cache_dtype=torch.int8 if name == "llama" else None)
    tokens = torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(1))
    options = {"attention_mask": torch.tensor([[1] * 6, [0] * 2 + [1] * 4]), "max_new_tokens": 8, "do_sample": False}
    counter = CompileCounterWithBackend("aot_eager")
    compiled = copy.deepcopy(model)

    compiled.forward = torch.compile(compiled.forward, backend=counter, fullgraph=True)

    assert torch.equal(compiled.generate(tokens, **options), model.generate(tokens, **options))
    assert counter.frame_count == 2


def test_a_cache_becomes_native_within_the_graph():
    model = optimized("llama")
    tokens = torch.randint(3, 96, (1, 12))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)

    def logits(model):
        cache = DynamicCache(config=compiled.config)
        ends = [7, *range(8, 13)]
        steps = zip([0, *ends], ends, strict=False)
        return torch.cat([model(input_ids=tokens[:, a:b], past_key_values=cache).logits for a, b in steps], dim=1)

    torch.testing.assert_close(logits(compiled), logits(model), rtol=0, atol=1e-5)
    assert counter.frame_count == 2
