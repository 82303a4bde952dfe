"""Which layers are found to share an input, in modules written to show each case."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ipex_quant.smoothquant.tracing import SharedInput, trace_groups

X = torch.ones(2, 3, 4)


class _Block(nn.Module):
    """Two linears and a norm; `use` says what the forward does with them."""

    def __init__(self, use):
        super().__init__()
        self.norm, self.q, self.k = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.use = use

    def forward(self, x):
        return self.use(self, x)


def groups(use, consumers=("q", "k"), producers=("norm",), x=X):
    block = _Block(use)
    found = trace_groups(block, consumers, producers, lambda: block(x.clone()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())
    return [(group.members, group.producer) for group in found]


def test_layers_that_get_the_same_tensor_are_a_group():
    assert groups(lambda b, x: b.q(x) + b.k(x)) == [(("q", "k"), None)]


def test_equal_tensors_are_not_the_same_tensor():
    assert groups(lambda b, x: b.q(x) + b.k(x.clone())) == [(("q",), None), (("k",), None)]


def test_keyword_inputs_count():
    assert groups(lambda b, x: b.q(input=x) + b.k(x)) == [(("q", "k"), None)]


def test_a_tensor_that_is_written_to_in_between_is_not_shared():
    def use(block, x):
        first = block.q(x)
        x.add_(1)
        return first + block.k(x)

    assert groups(use) == [(("q",), None), (("k",), None)]


def test_a_layer_that_is_called_twice_is_alone():
    assert groups(lambda b, x: b.q(x) + b.k(x) + b.q(x + 1)) == [(("q",), None), (("k",), None)]


@dataclass
class _Unregistered:
    hidden: torch.Tensor
    result: torch.Tensor


@torch.jit.script
def _scripted(x):
    return x * 2


def _hands_out(block, x):
    h = block.norm(x)
    return _Unregistered(h, block.q(h))


def _remembers(block, x):
    block.last = block.norm(x)
    return block.q(block.last)


def _calls_compiled_code(block, x):
    h = block.norm(x)
    return block.q(h) + _scripted(h)


@pytest.mark.parametrize("use", [_hands_out, _remembers, _calls_compiled_code])
def test_readers_that_torch_functions_do_not_show(use):
    assert groups(use) == [(("q",), None)]


def test_layers_that_are_not_called_are_left_out():
    assert groups(lambda b, x: b.q(x)) == [(("q",), None)]


def test_layers_of_different_parents_do_not_share():
    model = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(4, 4)]), "b": nn.ModuleList([nn.Linear(4, 4)])})
    run = lambda: model["b"][0](X) + model["a"][0](X)  # noqa: E731
    found = trace_groups(model, ("a.0", "b.0"), (), run)
    assert [group.members for group in found] == [("b.0",), ("a.0",)]


def norm_then(use):
    return lambda block, x: use(block, block.norm(x))


@pytest.mark.parametrize(
    ("use", "private"),
    [
        (lambda b, h: b.q(h) + b.k(h), True),
        (lambda b, h: b.q(h).view(h.shape) + b.k(h).to(h.dtype) + h.size(-1), True),
        (lambda b, h: b.q(h) + b.k(h) + h, False),
        (lambda b, h: (b.q(h) + b.k(h), h), False),
        (lambda b, h: b.q(h) + b.k(h) + h[:, -1:], False),
        (lambda b, h: b.q(h) + b.k(h) + torch.cat([h]), False),
        (lambda b, h: b.q(h) + b.k(h) + b.other(h), False),
        (lambda b, h: b.q(h) + b.k(h) + b.norm(h), False),
        (lambda b, h: (b.q(h) + b.k(h)) * b.norm.weight.sum(), False),
    ],
    ids=[
        *("members only", "metadata", "residual", "returned", "indexed", "in a list", "a layer in float"),
        *("norm again", "its weight is read"),
    ],
)
def test_a_producer_is_named_only_when_nothing_else_reads_its_output(use, private):
    assert groups(norm_then(use)) == [(("q", "k"), "norm" if private else None)]


def test_a_producer_whose_output_goes_to_two_groups_is_not_named():
    block = _Block(norm_then(lambda b, h: b.q(h) + b.inner[0](h)))
    block.inner = nn.ModuleList([nn.Linear(4, 4)])
    found = trace_groups(block, ("q", "inner.0"), ("norm",), lambda: block(X))
    assert [(group.members, group.producer) for group in found] == [(("q",), None), (("inner.0",), None)]


def test_hooks_are_removed_when_the_model_fails():
    def fail(block, x):
        block.q(x)
        raise RuntimeError("no")

    block = _Block(fail)
    with pytest.raises(RuntimeError, match="no"):
        trace_groups(block, ("q",), ("norm",), lambda: block(X))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


def test_llama():
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config).eval()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    norms = [name for name, module in model.named_modules() if "norm" in name]
    found = trace_groups(model, linears, norms, lambda: model(**model.dummy_inputs))
    layer = "model.layers.0"
    assert found == [
        SharedInput(tuple(f"{layer}.self_attn.{n}_proj" for n in "qkv"), f"{layer}.input_layernorm", 3),
        SharedInput((f"{layer}.self_attn.o_proj",), None, 3),
        SharedInput(tuple(f"{layer}.mlp.{n}_proj" for n in ("gate", "up")), f"{layer}.post_attention_layernorm", 3),
        SharedInput((f"{layer}.mlp.down_proj",), None, 3),
        SharedInput(("lm_head",), None, 3),  # the last norm's output is the model's as well
    ]
