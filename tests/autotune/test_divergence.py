import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ipex_quant.autotune.divergence import MAX_BATCHES, SAMPLE_ROWS, LayerSample, sample_layers
from ipex_quant.conversion.example import Example


def test_a_divergence_is_half_the_squared_change_along_the_gradients():
    linear = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    changed = torch.tensor([[1.5, 0.0], [0.0, 0.0]])
    inputs, gradients = torch.tensor([[2.0, 3.0], [0.0, 1.0]]), torch.tensor([[1.0, 2.0], [5.0, 1.0]])
    # changes of the outputs: [1, -3] and [0, -1]; times the gradients: 1, -6 and 0, -1
    sample = LayerSample([inputs[:1], inputs[1:]], [gradients[:1], gradients[1:]])
    assert sample.error(linear, changed) == pytest.approx((1 + 36 + 0 + 1) / (2 * 2))
    # without gradients: the squared change relative to the squared outputs, [2, 3] and [0, 1]
    assert LayerSample([inputs]).error(linear, changed) == pytest.approx((1 + 9 + 0 + 1) / (4 + 9 + 0 + 1))
    assert sample.error(linear, linear.weight.detach()) == 0
    assert LayerSample([torch.zeros(1, 2)]).error(linear, changed) == 0


class OneLayer(nn.Module):
    """Logits that one linear layer makes, so that the second order of the divergence is known."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 5, bias=False)
        self.never = nn.Linear(3, 3)

    def forward(self, x, attention_mask=None):
        return type("Output", (), {"logits": self.head(x)})()


def test_the_estimate_is_the_divergence_of_a_small_change():
    torch.manual_seed(0)
    model = OneLayer()
    x = torch.randn(400, 50, 6)
    batches = [Example((each,)) for each in x]
    samples = sample_layers(model, batches, ["head", "never"])
    assert samples.keys() == {"head"}, "a layer that no batch reaches is left out"
    assert len(samples["head"].inputs) == MAX_BATCHES
    assert sum(map(len, samples["head"].inputs)) == sum(map(len, samples["head"].gradients)) == SAMPLE_ROWS
    weight = model.head.weight.detach()
    changed = weight + 0.05 * torch.randn_like(weight)
    seen = torch.cat(samples["head"].inputs)
    before, after = (torch.log_softmax(seen @ each.T, -1) for each in (weight, changed))
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    # One draw of a token a row, and the Fisher information's diagonal only: the right size, not the value.
    assert samples["head"].error(model.head, changed) == pytest.approx(divergence, rel=0.5)


def test_tokens_that_are_masked_have_no_gradient():
    torch.manual_seed(0)
    model = OneLayer()
    mask = torch.zeros(4, 8, dtype=torch.long)
    mask[0] = 1
    samples = sample_layers(model, [Example((torch.randn(4, 8, 6),), {"attention_mask": mask})], ["head"])
    (gradients,) = samples["head"].gradients
    assert len(gradients) == 32
    assert (gradients.abs().sum(-1) > 0).sum() == 8


def test_the_model_comes_back_as_it_was_and_the_seed_counts():
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=24)).train()
    model.lm_head.weight.requires_grad_(False)
    batches = [Example(kwargs={"input_ids": torch.arange(24)[None]})]
    first, again, other = (sample_layers(model, batches, ["lm_head"], seed)["lm_head"] for seed in (0, 0, 1))
    assert torch.equal(first.gradients[0], again.gradients[0])
    assert not torch.equal(first.gradients[0], other.gradients[0])
    assert model.training
    assert not model.lm_head.weight.requires_grad
    assert all(p.requires_grad for name, p in model.named_parameters() if name != "lm_head.weight")
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
