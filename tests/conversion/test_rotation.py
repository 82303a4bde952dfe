import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

import ipex_quant as ipex
from ipex_quant.quantization import default_dynamic_qconfig_mapping, rotate

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "initializer_range": 0.2,
}
IDS = torch.arange(30).view(2, 15) * 3
CONFIGS = {
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "gemma": GemmaConfig(**SIZES, head_dim=12),
}


def _model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(len(parameter)) * 0.3)
    return model


def _logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_rotated_model_computes_the_same(config):
    model = _model(config)
    before = copy.deepcopy(model.state_dict())
    rotated = rotate(model)
    torch.testing.assert_close(_logits(rotated), _logits(model), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(rotated.model.embed_tokens.weight, model.model.embed_tokens.weight, atol=0.1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_outliers_no_longer_hurt():
    model = _model(CONFIGS["tied"])
    with torch.no_grad():  # a feature of the stream that is far larger than all others
        model.model.embed_tokens.weight[:, 7] += 60
        for layer in model.model.layers:
            layer.input_layernorm.weight[7] = layer.post_attention_layernorm.weight[7] = 0.2

    def error(start):
        quantized = ipex.llm.optimize(
            copy.deepcopy(start), dtype=torch.float32, quantization_config=default_dynamic_qconfig_mapping
        )
        return float((_logits(quantized) - _logits(model)).norm())

    assert error(rotate(model)) < 0.5 * error(model)


def test_a_rotated_model_is_saved_and_loaded(tmp_path):
    rotated = rotate(_model(CONFIGS["tied"]))
    rotated.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(_logits(loaded), _logits(rotated))


def test_in_place_and_in_bfloat16():
    model = _model(CONFIGS["tied"]).to(torch.bfloat16)
    before = _logits(model).float()
    assert rotate(model, inplace=True) is model
    assert float((_logits(model).float() - before).norm() / before.norm()) < 0.1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=96), "LayerNorm"),
        (Gemma2Config(**SIZES, head_dim=12), "is not read by linears alone"),
        (MixtralConfig(**SIZES, num_local_experts=4), "experts in 3-D parameters are not rotated"),
    ],
)
def test_models_that_cannot_be_rotated_stay_as_they_were(config, message):
    model = _model(config)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        rotate(model, inplace=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_a_head():
    with pytest.raises(ValueError, match="expected a float decoder"):
        rotate(_model(CONFIGS["tied"]).model)


def test_what_does_not_commute_is_found_by_the_run():
    model = _model(CONFIGS["tied"])
    layer = model.model.layers[1]
    forward = layer.mlp.forward
    layer.mlp.forward = lambda x: forward(x) * torch.linspace(1, 2, 48)
    with pytest.raises(ValueError, match="do not allow a rotation"):
        rotate(model, inplace=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
