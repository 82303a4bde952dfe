"""The examples of the API document as they stand there, but for their sizes, which are smaller, and typing errors."""

import pytest
import torch

import ipex_quant as ipex
from ipex_quant.llm import functional, modules

N = 64  # 4096 in the document


@pytest.mark.parametrize("name", ["LinearSilu", "LinearRelu", "LinearNewGelu", "LinearGelu"])
def test_linear_and_activation(name):
    linear_module = torch.nn.Linear(N, N)
    ipex_fusion = getattr(modules, name)(linear_module)
    input = torch.randn(N, N)
    result = ipex_fusion(input)
    functions = {
        "LinearSilu": torch.nn.functional.silu,
        "LinearRelu": torch.nn.functional.relu,
        "LinearNewGelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "LinearGelu": torch.nn.functional.gelu,
    }
    torch.testing.assert_close(result, functions[name](linear_module(input)))


@pytest.mark.parametrize("name", ["Silu", "SiluMul", "Relu", "Gelu", "NewGelu", "Mul", "Add", "AddAdd"])
def test_names_that_the_tutorials_spell_in_lower_case(name):
    assert getattr(modules, f"linear{name}") is getattr(modules, f"Linear{name}")
    assert modules.linear2SiluMul is modules.Linear2SiluMul
    with pytest.raises(AttributeError, match="no attribute 'linearCube'"):
        modules.linearCube  # noqa: B018


def test_linear_silu_mul():
    linear_module = torch.nn.Linear(N, N)
    ipex_fusion = modules.LinearSiluMul(linear_module)
    input, other = torch.randn(N, N), torch.randn(N, N)
    result = ipex_fusion(input, other)
    torch.testing.assert_close(result, torch.nn.functional.silu(linear_module(input)) * other)


def test_linear2_silu_mul():
    linear_s_module = torch.nn.Linear(N, N)
    linear_m_module = torch.nn.Linear(N, N)
    ipex_fusion = modules.Linear2SiluMul(linear_s_module, linear_m_module)
    input = torch.randn(N, N)
    result = ipex_fusion(input)
    torch.testing.assert_close(result, torch.nn.functional.silu(linear_s_module(input)) * linear_m_module(input))


def test_linear_mul():
    linear_module = torch.nn.Linear(N, N)
    ipex_fusion = modules.LinearMul(linear_module)
    input, other = torch.randn(N, N), torch.randn(N, N)
    result = ipex_fusion(input, other)
    torch.testing.assert_close(result, linear_module(input) * other)


def test_linear_add():
    linear_module = torch.nn.Linear(N, N)
    ipex_fusion = modules.LinearAdd(linear_module)
    input, other = torch.randn(N, N), torch.randn(N, N)
    result = ipex_fusion(input, other)
    torch.testing.assert_close(result, linear_module(input) + other)


def test_linear_add_add():
    linear_module = torch.nn.Linear(N, N)
    ipex_fusion = modules.LinearAddAdd(linear_module)
    input, other_1, other_2 = torch.randn(N, N), torch.randn(N, N), torch.randn(N, N)
    result = ipex_fusion(input, other_1, other_2)
    torch.testing.assert_close(result, linear_module(input) + other_1 + other_2)


def test_rotary_embedding():
    rope_module = modules.RotaryEmbedding(2048, 64, base=10000, backbone="GPTJForCausalLM")
    query = torch.randn(1, 32, 16, 256)
    position_ids = torch.arange(32).unsqueeze(0)
    query_rotary = rope_module(query, position_ids, 16, 256, 1, 64)
    assert query_rotary.shape == query.shape
    assert torch.equal(query_rotary[..., 64:], query[..., 64:])
    torch.testing.assert_close(query_rotary.norm(dim=-1), query.norm(dim=-1))


def test_rms_norm():
    rmsnorm_module = modules.RMSNorm(N)
    input = torch.randn(1, 32, N)
    result = rmsnorm_module(input)
    torch.testing.assert_close(result.square().mean(-1), torch.ones(1, 32), rtol=1e-4, atol=0)


def test_fast_layer_norm():
    layernorm = torch.nn.LayerNorm(N)
    layernorm_module = modules.FastLayerNorm(N, eps=1e-05, weight=layernorm.weight, bias=layernorm.bias)
    input = torch.randn(1, 32, N)
    result = layernorm_module(input)
    torch.testing.assert_close(result, layernorm(input))


def test_varlen_attention():
    varlen_attention_module = modules.VarlenAttention()
    query = torch.randn(32, 16, 256)
    key = torch.randn(32, 16, 256)
    value = torch.randn(32, 16, 256)
    out = torch.empty_like(query)
    seqlen_q = torch.tensor([0, 32])  # tensor(1) in the document, which is no start of a sequence
    seqlen_k = torch.tensor([0, 32])
    max_seqlen_q = 32
    max_seqlen_k = 32
    pdropout = 0.0
    softmax_scale = 0.5
    varlen_attention_module(
        query, key, value, out, seqlen_q, seqlen_k, max_seqlen_q, max_seqlen_k, pdropout, softmax_scale
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(states.transpose(0, 1) for states in (query, key, value)), is_causal=True, scale=0.5
    )
    torch.testing.assert_close(out, expected.transpose(0, 1), rtol=1e-4, atol=1e-4)


def test_paged_attention():
    num_blocks, block_size, num_heads, head_size = 6, 16, 4, 32
    key_cache, value_cache = (torch.zeros(num_blocks, block_size, num_heads, head_size) for _ in range(2))
    block_tables = torch.tensor([[4, 1], [2, 0]], dtype=torch.int32)
    context_lens = torch.tensor([20, 3], dtype=torch.int32)
    states = [torch.randn(2, length, num_heads, head_size) for length in context_lens.tolist()]
    for table, (key, value) in zip(block_tables.tolist(), states, strict=True):
        slots = torch.tensor([table[i // block_size] * block_size + i % block_size for i in range(len(key))])
        modules.PagedAttention.reshape_and_cache(key, value, key_cache, value_cache, slots)
    query = torch.randn(2, num_heads, head_size)
    out, scale = torch.empty_like(query), float(1.0 / (head_size**0.5))
    modules.PagedAttention.single_query_cached_kv_attention(
        out,
        query,
        key_cache,
        value_cache,
        torch.arange(num_heads),
        scale,
        block_tables,
        context_lens,
        block_size,
        20,
        None,
    )
    for row, one, (key, value) in zip(out, query, states, strict=True):
        heads = (x.transpose(0, 1) for x in (one[None], key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(*heads, scale=scale)
        torch.testing.assert_close(row, expected[:, 0], rtol=1e-4, atol=1e-5)


def test_indirect_access_kv_cache_attention():
    attention = modules.IndirectAccessKVCacheAttention(text_max_length=8)
    layer_past, beams, keys, values = None, 2, [], []
    for length in (3, 1, 1):
        query, key, value = (torch.randn(beams, length, 4, 16) for _ in range(3))
        output, _, layer_past = attention(query, key, value, 4.0, layer_past)
        keys, values = [*keys, key], [*values, value]
        mask = torch.ones(length, sum(x.shape[1] for x in keys)).tril(sum(x.shape[1] for x in keys) - length).bool()
        heads = (x.transpose(1, 2) for x in (query, torch.cat(keys, 1), torch.cat(values, 1)))
        expected = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask, scale=0.25)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        beam_idx = torch.tensor([1, 1])  # as generation's _reorder_cache does it
        layer_past[3][layer_past[0].size(-2) - 1] = beam_idx
        keys, values = ([x[beam_idx] for x in states] for states in (keys, values))


def test_both_are_reached_from_the_package():
    assert ipex.llm.modules is modules
    assert ipex.llm.functional is functional
