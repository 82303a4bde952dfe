"""Linear layers with float weights in the lean decoder and around it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ipex_quant as ipex
from ipex_quant.llm.decoder.linears import FloatCall, fuse_linears, is_fused, linear_call
from ipex_quant.nn.fused_forward import restore_forwards
from ipex_quant.ops import PostOp
from ipex_quant.quantization import get_weight_only_quant_qconfig_mapping, prepare

native = torch.ops.ipex_quant.float_linear.default
TOKENS = torch.tensor([[5, 9, 17, 33, 4, 8], [7, 3, 90, 12, 61, 25]])


class Subclass(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 30), nn.ReLU(), Subclass(30, 20), nn.Linear(20, 9, bias=False)).eval()


def test_plain_linears_read_their_weight_once_for_few_rows(model):
    assert fuse_linears(model) == fuse_linears(model) == ["0", "3"]
    assert [is_fused(module) for module in model] == [True, False, False, True]
    for rows in (2, 3, 50):
        x = torch.randn(rows, 40)
        with torch.no_grad():
            first = model[0](x)
            expected = F.linear(x, model[0].weight, model[0].bias)
        if rows < 50:
            assert torch.equal(first, native(x, model[0].weight.detach(), model[0].bias.detach(), [], 0))
        torch.testing.assert_close(first, expected)
    restore_forwards(model)
    assert not any("forward" in vars(module) for module in model)


def test_gradients_hooks_and_changed_weights(model):
    stock = copy.deepcopy(model)
    fuse_linears(model)
    x, seen = torch.randn(2, 40), []
    with torch.enable_grad():
        model(x).sum().backward()
        stock(x).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, stock[0].weight.grad)
    model[0].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(x)
        model[3].weight.zero_()
        assert not model(x).any()
    assert len(seen) == 2


def test_copies_read_their_own_weights(model):
    fuse_linears(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0].forward.module is other[0]
        assert other.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("rows", [1, 50])
def test_a_fused_linear_is_called_with_its_post_op(model, rows):
    fuse_linears(model)
    call = linear_call(model[0])
    assert type(call) is FloatCall
    x, other = torch.randn(rows, 40), torch.randn(rows, 30)
    with torch.no_grad():
        torch.testing.assert_close(call(x, PostOp.SILU), F.silu(model[0](x)))
        torch.testing.assert_close(call(x, PostOp.ADD, other), model[0](x) + other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_llm_optimize_leaves_in_float(llama, dtype):
    model = ipex.llm.optimize(llama, dtype=dtype)
    assert is_fused(model.lm_head)
    states = torch.randn(2, 1, model.config.hidden_size, dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(model.lm_head(states), native(states, model.lm_head.weight, None, [], 0))
        one = model(TOKENS[:1, :1]).logits
        expected = copy.deepcopy(llama).to(dtype)(TOKENS[:1, :1]).logits
    bits = {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(one, expected, rtol=bits, atol=bits)
    prepared = prepare(model, get_weight_only_quant_qconfig_mapping(), (TOKENS,))
    assert not any("forward" in vars(module) for module in prepared.modules())
