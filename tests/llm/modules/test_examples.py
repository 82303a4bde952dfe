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


def test_both_are_reached_from_the_package():
    assert ipex.llm.modules is modules
    assert ipex.llm.functional is functional
