"""RMS norms of any model, by what they compute."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from ipex_quant.llm.decoder.norms import fuse_norms, norm_of
from ipex_quant.nn.fused_forward import restore_forwards


class Doubling(LlamaRMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Gated(LlamaRMSNorm):
    def forward(self, x, gate=None):
        return super().forward(x) * gate.sigmoid()


def sequential(norm):
    nn.init.normal_(norm.weight, 1.0, 0.2)
    return nn.Sequential(norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [LlamaRMSNorm, GemmaRMSNorm, T5LayerNorm, CohereLayerNorm])
def test_norms_compute_what_they_did(norm, dtype):
    model = sequential(norm(48)).to(dtype)
    x = torch.randn(2, 5, 48, dtype=dtype)
    expected = model(x).detach()

    assert fuse_norms(model) == ["0"]
    with torch.no_grad():
        actual = model(x)

    torch.testing.assert_close(actual, expected)
    restore_forwards(model)
    assert "forward" not in vars(model[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_may_have_weights_of_their_own(dtype):
    norm = CohereLayerNorm((3, 16)).to(dtype)
    norms = nn.ModuleList(nn.LayerNorm(16, bias=False) for _ in range(3)).to(dtype)
    x = torch.randn(2, 5, 3, 16, dtype=dtype) + 1
    with torch.no_grad():
        nn.init.normal_(norm.weight, 1.0, 0.2)
        for each, weight in zip(norms, norm.weight, strict=True):
            each.weight.copy_(weight)

        torch.testing.assert_close(norm_of(norm)(x), norm(x))
        torch.testing.assert_close(norm_of(norms)(x), norm(x))


@pytest.mark.parametrize(
    "norms", [[nn.LayerNorm(16)], [nn.LayerNorm(16, 1e-5, bias=False), nn.LayerNorm(16, 1e-6, bias=False)], []]
)
def test_other_lists_are_no_norm(norms):
    assert norm_of(nn.ModuleList(norms)) is None


@pytest.mark.parametrize("module", [Doubling(48), Gated(48), nn.LayerNorm(48), nn.PReLU(48), nn.Linear(48, 48)])
def test_other_modules_stay(module):
    assert fuse_norms(nn.Sequential(module)) == []


def test_gradients_are_those_of_the_stock_norm():
    model = sequential(LlamaRMSNorm(48))
    fused = copy.deepcopy(model)
    fuse_norms(fused)
    x = torch.randn(3, 48)

    with torch.enable_grad():
        for each in (model, fused):
            each(x).square().sum().backward()

    torch.testing.assert_close(fused[0].weight.grad, model[0].weight.grad)


def test_a_model_of_no_known_family_keeps_its_logits():
    config = transformers.Olmo2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, pad_token_id=0
    )
    model = transformers.Olmo2ForCausalLM(config).eval()
    tokens = torch.randint(3, 96, (2, 7))
    with torch.no_grad():
        expected = model(tokens).logits

        assert len(fuse_norms(model)) == 2 * 4 + 1

        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)
