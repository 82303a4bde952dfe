"""RMS norms of any model, by what they compute."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from ipex_quant.llm.norms import fuse_norms
from ipex_quant.nn.fused_forward import restore_forwards


class Doubling(LlamaRMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def sequential(norm):
    nn.init.normal_(norm.weight, 1.0, 0.2)
    return nn.Sequential(norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [LlamaRMSNorm, GemmaRMSNorm, T5LayerNorm])
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


@pytest.mark.parametrize("module", [Doubling(48), nn.LayerNorm(48), nn.PReLU(48), nn.Linear(48, 48)])
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
