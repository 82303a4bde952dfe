"""`torch.compile` of optimized models: whole graphs, the same tokens, and no graph for each of them."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache

import ipex_quant as ipex
from ipex_quant.llm.cache.naming import CACHE
from ipex_quant.quantization import WoqLowpMode, WoqWeightDtype, get_weight_only_quant_qconfig_mapping

from .test_families import build

CALLS = {"llama": 1, "qwen3": 1, "phi": 2, "gpt-neox": 0}
"""Native calls for the decoder layers, of which there are two: one for both, one for each, or their parts."""


@pytest.fixture(autouse=True)
def _without_gradients():
    torch.compiler.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def counter():
    return CompileCounterWithBackend("aot_eager")


def optimized(name, **options):
    mapping = get_weight_only_quant_qconfig_mapping(
        weight_dtype=WoqWeightDtype.INT4, group_size=32, lowp_mode=WoqLowpMode.INT8
    )
    return ipex.llm.optimize(build(name), quantization_config=mapping, **options)


def compiled_copy(model, counter):
    model = copy.deepcopy(model)
    model.forward = torch.compile(model.forward, backend=counter, fullgraph=True)
    return model


def native_calls(graph):
    return sum(node.target is torch.ops.ipex_quant.decoder_layers.default for node in graph.graph.nodes)


def last_logits(model, tokens):
    """Of a step with one token after a prompt."""
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens[:, :-1], **{CACHE: cache})
    return model(input_ids=tokens[:, -1:], **{CACHE: cache}).logits


@pytest.mark.parametrize("dtype", [None, torch.int8])
@pytest.mark.parametrize("name", CALLS)
def test_generating_takes_one_graph_for_the_prompt_and_one_for_the_tokens(name, dtype, counter):
    model = optimized(name, kv_cache_dtype=dtype)
    tokens = torch.randint(3, 96, (2, 6), generator=torch.Generator().manual_seed(1))
    options = {"attention_mask": torch.tensor([[1] * 6, [0] * 2 + [1] * 4]), "max_new_tokens": 8, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(tokens, **options)

    got = compiled_copy(model, counter).generate(tokens, **options)

    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-5)
    assert [native_calls(graph) for graph in counter.graphs] == [0, CALLS[name]]


def test_growing_caches_take_few_graphs(counter):
    model = optimized("llama")
    tokens = torch.randint(3, 96, (1, 6), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 180, "min_new_tokens": 180, "do_sample": False}

    got = compiled_copy(model, counter).generate(tokens, **options)

    assert torch.equal(got, model.generate(tokens, **options))
    assert counter.frame_count <= 5
    assert all(native_calls(graph) == 1 for graph in counter.graphs[1:])


def test_a_cache_becomes_native_within_the_graph():
    model = optimized("llama")
    tokens = torch.randint(3, 96, (1, 12))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)

    def logits(model):
        cache = DynamicCache(config=compiled.config)
        ends = [7, *range(8, 13)]
        steps = zip([0, *ends], ends, strict=False)
        return torch.cat([model(input_ids=tokens[:, a:b], **{CACHE: cache}).logits for a, b in steps], dim=1)

    torch.testing.assert_close(logits(compiled), logits(model), rtol=0, atol=1e-5)
    assert counter.frame_count == 2


class Plus(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 1


def replace_by_another_class(attention):
    attention.k_proj = Plus(attention.k_proj)


def replace_by_other_weights(attention):
    attention.k_proj = copy.deepcopy(attention.k_proj)
    attention.k_proj._packed[64:200] = 0x11


def load_other_weights(attention):
    packed = attention.k_proj._packed.clone()
    packed[64:200] = 0x11
    attention.k_proj._packed = packed


@pytest.mark.parametrize("change", [replace_by_another_class, replace_by_other_weights, load_other_weights])
def test_changed_modules_are_noticed(change, counter):
    model = optimized("llama")
    tokens = torch.randint(3, 96, (1, 7), generator=torch.Generator().manual_seed(1))
    compiled = compiled_copy(model, counter)
    before = last_logits(compiled, tokens)

    for each in (model, compiled):
        change(each.model.layers[1].self_attn)

    after = last_logits(compiled, tokens)
    torch.testing.assert_close(after, last_logits(model, tokens), rtol=0, atol=1e-5)
    assert not torch.allclose(after, before)


def test_hooks_between_layers_are_called(counter):
    model = optimized("llama")
    tokens = torch.randint(3, 96, (1, 7), generator=torch.Generator().manual_seed(1))
    compiled = compiled_copy(model, counter)
    for each in (model, compiled):
        each.model.layers[0].register_forward_hook(lambda module, inputs, output: output + 1)

    torch.testing.assert_close(last_logits(compiled, tokens), last_logits(model, tokens), rtol=0, atol=1e-5)
    assert [native_calls(graph) for graph in counter.graphs] == [0, 2]
