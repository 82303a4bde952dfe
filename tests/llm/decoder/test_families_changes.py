"""Fused layers of a model that somebody has changed, before they were fused or after."""

import copy
import types

import pytest
import torch
from torch import nn

import ipex_quant as ipex
from ipex_quant.nn.fused_forward import fused_forward, restore_forwards
from ipex_quant.quantization import WoqWeightDtype, get_weight_only_quant_qconfig_mapping

WITHIN = ("self_attn", "self_attn.q_proj", "self_attn.o_proj", "mlp", "mlp.act_fn", "mlp.down_proj", "input_layernorm")


class Louder(nn.Module):
    """As an adapter has it: a module around a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) * 1.5


def louder(module, args, result):
    return (result[0] * 1.5, *result[1:]) if isinstance(result, tuple) else result * 1.5


def hook(model, name):
    model.model.layers[0].get_submodule(name).register_forward_hook(louder)


def replace(model, name):
    layer = model.model.layers[0]
    layer.set_submodule(name, Louder(layer.get_submodule(name)))


def subclass(model, name):
    module = model.model.layers[0].get_submodule(name)
    old = type(module)
    forward = lambda self, *args, **kwargs: louder(self, args, old.forward(self, *args, **kwargs))  # noqa: E731
    module.__class__ = type(old.__name__, (old,), {"forward": forward, "__module__": __name__})


def patch(model, name):
    module = model.model.layers[0].get_submodule(name)
    forward = lambda self, *args, **kwargs: louder(self, args, type(self).forward(self, *args, **kwargs))  # noqa: E731
    module.forward = types.MethodType(forward, module)


@pytest.fixture
def changed(llama, logits):
    def changed(change, name, after):
        plain = logits(llama)
        native = ipex.llm.optimize(llama)
        change(llama, name)
        expected = logits(llama)
        assert not torch.allclose(plain, expected, rtol=1e-2, atol=1e-2)
        if after:
            torch.testing.assert_close(logits(native), plain, rtol=1e-4, atol=1e-4)
            change(native, name)
        else:
            native = ipex.llm.optimize(llama, inplace=True)
        torch.testing.assert_close(logits(native), expected, rtol=1e-4, atol=1e-4)
        return native

    return changed


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", WITHIN)
def test_hooks_within_a_layer_run(changed, name, after):
    native = changed(hook, name, after)
    assert bool(fused_forward(native.model.layers[0])) == (after or name.endswith("proj"))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", [name for name in WITHIN if name.endswith("proj")])
def test_modules_around_linear_layers_are_called(changed, name, after):
    changed(replace, name, after)


@pytest.mark.parametrize("name", ["", "self_attn", "mlp"])
@pytest.mark.parametrize("change", [subclass, patch])
def test_layers_with_code_of_others_stay_as_they_are(changed, change, name):
    native = changed(change, name, after=False)
    assert not fused_forward(native.model.layers[0])
    assert fused_forward(native.model.layers[1])


def test_attention_weights_that_no_layer_is_asked_for(make_model, tokens):
    stock = make_model("gpt2")
    stock.set_attn_implementation("eager")
    native = ipex.llm.optimize(stock)
    type(native).set_attn_implementation(native, "eager")  # the model's own takes fused layers apart
    expected = stock(**tokens(stock), output_attentions=True).attentions
    actual = native(**tokens(stock), output_attentions=True).attentions
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert all(map(fused_forward, native.transformer.h))


@pytest.mark.parametrize("change", [hook, replace])
@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.down_proj"])
def test_changes_count_where_all_layers_are_one_call(llama, change, name):
    mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT4, group_size=32)
    native = ipex.llm.optimize(llama, quantization_config=mapping)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
    inputs = torch.tensor([[5, 6, 7]])
    plain, *_ = native.generate(inputs, return_dict_in_generate=True, **options).logits[-1:]
    change(native, name)
    stock = copy.deepcopy(native)
    restore_forwards(stock)
    got, expected = (each.generate(inputs, return_dict_in_generate=True, **options) for each in (native, stock))
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain, expected.logits[-1], rtol=1e-2, atol=1e-2)
