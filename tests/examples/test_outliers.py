import pytest
import torch
from outliers import FACTORS, inject_outliers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

IDS = torch.arange(24).reshape(2, 12)


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2():
    """With LayerNorms that have a bias, Conv1D layers, and an output layer that is the embedding."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=2, n_positions=16)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_function_is_the_same(make):
    model, expected = make(), make()(IDS).logits
    injected = inject_outliers(model, lambda: model(IDS))
    assert len(injected) == 4  # two norms in each of two blocks
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_outputs_of_norms_and_columns_of_weights_are_multiplied_exactly():
    model, original = llama(), llama()
    injected = inject_outliers(model, lambda: model(IDS), channels=5)
    multiplier = injected["model.layers.1.post_attention_layernorm"]
    assert (multiplier != 1).sum() == 5
    assert set(multiplier.tolist()) <= {1.0, *FACTORS}
    block, before = model.model.layers[1], original.model.layers[1]
    assert torch.equal(block.post_attention_layernorm.weight, before.post_attention_layernorm.weight * multiplier)
    for name in ("gate_proj", "up_proj"):
        weight, old = (getattr(each.mlp, name).weight for each in (block, before))
        assert torch.equal(weight * multiplier, old)
    assert torch.equal(block.mlp.down_proj.weight, before.mlp.down_proj.weight)


def test_a_seed_gives_one_choice():
    choices = []
    for seed in (3, 3, 4):
        model = llama()
        choices.append(inject_outliers(model, lambda model=model: model(IDS), seed=seed))
    name = "model.layers.0.input_layernorm"
    assert torch.equal(choices[0][name], choices[1][name])
    assert not torch.equal(choices[0][name], choices[2][name])


def test_a_norm_that_something_else_reads_or_a_tied_weight_stays():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
            self.linears = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
            self.embedding = nn.Embedding(16, 16)
            self.linears[2].weight = self.embedding.weight

        def forward(self, x):
            x = self.linears[0](self.norms[0](x))
            normed = self.norms[1](x)
            x = self.linears[1](normed) + normed
            return self.linears[2](self.norms[2](x))

    model = Model()
    assert inject_outliers(model, lambda: model(torch.randn(4, 16))).keys() == {"norms.0"}


def test_a_model_without_a_place_for_them_is_refused():
    model = llama(torch.bfloat16)
    with pytest.raises(ValueError, match="LlamaForCausalLM: expected a float32 model with a LayerNorm or RMSNorm"):
        inject_outliers(model, lambda: model(IDS))
