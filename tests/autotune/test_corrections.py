import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ipex_quant.autotune import corrections
from ipex_quant.autotune.corrections import measured_factors
from ipex_quant.conversion.example import Example


@pytest.fixture
def llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(**shape, num_hidden_layers=3, vocab_size=64, initializer_range=0.3)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [Example(kwargs={"input_ids": torch.randint(64, (2, 20), generator=generator)}) for _ in range(4)]


@torch.no_grad()
def divergence(model, changed, batches):
    total = count = 0
    for batch in batches:
        before, after = (each(**batch.kwargs).logits.log_softmax(-1) for each in (model, changed))
        total += float((before.exp() * (before - after)).sum())
        count += before.shape[0] * before.shape[1]
    return total / count


GROUPS = {
    **{f"model.layers.{i}.mlp.down_proj": [f"model.layers.{i}.mlp.down_proj"] for i in range(3)},
    **{f"model.layers.{i}.self_attn.o_proj": [f"model.layers.{i}.self_attn.o_proj"] for i in range(3)},
    "lm_head": ["lm_head"],
}


@pytest.fixture
def changes(llama):
    torch.manual_seed(2)
    weights = {name: llama.get_submodule(name).weight.detach() for name in GROUPS}
    return {name: weight + 0.01 * torch.randn_like(weight) for name, weight in weights.items()}


def changed(model, changes, names):
    other = copy.deepcopy(model)
    for name in names:
        other.get_submodule(name).weight.data = changes[name]
    return other


def test_errors_of_single_modules_become_what_is_measured(llama, batches, changes):
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    groups = {name: GROUPS[name] for name in ("lm_head", "model.layers.1.mlp.down_proj")}
    errors = dict.fromkeys(groups, 3e-4)
    factors = measured_factors(llama, batches, groups, errors, changes.__getitem__)
    for name in groups:
        measured = divergence(llama, changed(llama, changes, [name]), batches)
        assert errors[name] * factors[name] == pytest.approx(measured, rel=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())


def test_factors_of_blocks_and_kinds_are_found():
    blocks, kinds = {"a": 0.4, "b": 1.5, "c": 2.0}, {"up": 0.5, "down": 1.2}
    names = [f"{block}.{kind}" for block in blocks for kind in kinds]
    errors = {name: 0.1 * (i + 1) for i, name in enumerate(names)}
    true = {name: errors[name] * blocks[name[0]] * kinds[name[2:]] for name in names}
    sets = [[name for name in names if part in name.split(".")] for part in (*blocks, *kinds)]
    measured = {tuple(each): sum(true[name] for name in each) for each in sets}
    factors = corrections._fitted(errors, measured)
    assert {name: errors[name] * factor for name, factor in factors.items()} == pytest.approx(true, rel=1e-6)


def test_noise_makes_no_factor_large(llama, batches, changes):
    errors = dict.fromkeys(GROUPS, 1e-12)
    factors = measured_factors(llama, batches, GROUPS, errors, changes.__getitem__)
    assert max(factors.values()) <= 8
    same = {name: llama.get_submodule(name).weight.detach() for name in GROUPS}
    factors = measured_factors(llama, batches, GROUPS, errors, same.__getitem__)
    assert all(1 / 8 <= factor <= 8 for factor in factors.values())


def test_few_batches_are_enough(llama, batches, changes, monkeypatch):
    calls = []
    llama.register_forward_pre_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(corrections, "LOGITS", 2 * 40 * 64)
    measured_factors(llama, batches, GROUPS, dict.fromkeys(GROUPS, 1e-3), changes.__getitem__)
    measurements = 3 + 2 + 1
    assert len(calls) == 3 + 2 * measurements, "two batches fit; the third is looked at"
    calls.clear()
    monkeypatch.setattr(corrections, "TOKENS", 40)
    measured_factors(llama, batches, GROUPS, dict.fromkeys(GROUPS, 1e-3), changes.__getitem__)
    assert len(calls) == 1 + measurements
