import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ipex_quant.autotune.divergence import MAX_BATCHES, SAMPLE_ROWS, LayerSample, sample_layers
from ipex_quant.conversion.example import Example
from ipex_quant.numerics.scheme import WoqActQuantMode


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
    """Logits that one linear layer makes, twice as large if `scaled`, so that the divergence is known."""

    def __init__(self, scaled=False):
        super().__init__()
        self.head = nn.Linear(6, 5, bias=False)
        self.never = nn.Linear(3, 3)
        self.scaled = scaled

    def forward(self, x, attention_mask=None):
        logits = self.head(x)
        return type("Output", (), {"logits": 2 * logits if self.scaled else logits})()


def divergence(model, inputs, weight):
    before, after = (
        torch.log_softmax((2 if model.scaled else 1) * (inputs @ each.T), -1)
        for each in (model.head.weight.detach(), weight)
    )
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize("scaled", [False, True])
def test_the_estimate_is_the_divergence(scaled):
    torch.manual_seed(0)
    model = OneLayer(scaled)
    batches = [Example((each,)) for each in torch.randn(400, 70, 6)]
    samples = sample_layers(model, batches, ["head", "never"])
    assert samples.keys() == {"head"}, "a layer that no batch reaches is left out"
    assert samples["head"].is_divergence
    assert samples["head"].makes_logits != scaled
    assert len(samples["head"].inputs) == MAX_BATCHES
    assert sum(map(len, samples["head"].inputs)) == SAMPLE_ROWS
    weight = model.head.weight.detach()
    changed = weight + 0.05 * torch.randn_like(weight)
    expected = divergence(model, torch.cat(samples["head"].inputs), changed)
    if scaled:
        # One draw of a token a row, and the Fisher information's diagonal only: the right size, not the value.
        assert sum(map(len, samples["head"].gradients)) == SAMPLE_ROWS
        assert samples["head"].error(model.head, changed) == pytest.approx(expected, rel=0.5)
    else:
        assert samples["head"].error(model.head, changed) == pytest.approx(expected, rel=1e-4)
        assert samples["head"].error(model.head, weight) == 0


def test_quantized_inputs_diverge_too():
    torch.manual_seed(0)
    model = OneLayer()
    (x,) = torch.randn(1, 40, 6)
    samples = sample_layers(model, [Example((x,))], ["head"])
    mode = WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM
    found = samples["head"].activation_error(model.head, 2, mode)
    inputs = torch.cat(samples["head"].inputs)
    scales = inputs.reshape(40, 3, 2).abs().amax(-1, keepdim=True) / 127
    rounded = ((inputs.reshape(40, 3, 2) / scales).round() * scales).reshape(40, 6)
    weight = model.head.weight.detach()
    before, after = (torch.log_softmax(each @ weight.T, -1) for each in (inputs, rounded))
    assert found == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=0.05)
    assert samples["head"].activation_error(model.head, -1, mode) > found, "a row is one block of 128 features"


def test_an_embedding_is_sampled_by_its_ids():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3))
    ids = torch.tensor([[1, 2, 3], [3, 3, 9]])
    samples = sample_layers(model, [Example((ids,))], ["0"])
    assert sorted(torch.cat(samples["0"].inputs).tolist()) == [1, 2, 3, 3, 3, 9]
    table = model[0].weight.detach()
    changed = table.clone()
    changed[0] += 100.0  # never looked up
    assert samples["0"].error(model[0], changed) == 0
    changed[3] += 1.0
    power = table[ids.flatten()].square().sum()
    assert samples["0"].error(model[0], changed) == pytest.approx(float(3 * 4 / power))


def test_what_is_not_finite_is_named():
    model = OneLayer()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the float model's logits are not finite"):
        sample_layers(model, [Example((torch.randn(1, 4, 6),))], ["head"])
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="1: expected finite inputs and gradients"):
        sample_layers(plain, [Example((torch.full((2, 4), torch.inf),))], ["1"])


def test_tokens_that_are_masked_have_no_gradient():
    torch.manual_seed(0)
    model = OneLayer(scaled=True)
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
    name = "model.layers.0.mlp.down_proj"
    first, again, other = (sample_layers(model, batches, [name], seed)[name] for seed in (0, 0, 1))
    assert torch.equal(first.gradients[0], again.gradients[0])
    assert not torch.equal(first.gradients[0], other.gradients[0])
    assert model.training
    assert not model.lm_head.weight.requires_grad
    assert all(p.requires_grad for name, p in model.named_parameters() if name != "lm_head.weight")
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
