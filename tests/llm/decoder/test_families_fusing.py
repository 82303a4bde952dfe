"""Linear layers that share an input, and those that take a post op."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from ipex_quant import ops
from ipex_quant.llm.decoder.linears import (
    FloatCall,
    Int8Call,
    Int8Group,
    LinearCall,
    LinearGroup,
    WeightOnlyCall,
    WeightOnlyGroup,
    activation_post_op,
    linear_call,
    linear_calls,
)
from ipex_quant.nn import Int8Linear, WeightOnlyQuantizedLinear
from ipex_quant.numerics.int8 import StaticActivation, quantize_per_channel
from ipex_quant.numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype
from ipex_quant.ops import PostOp

SIZES = (48, 16, 16)


@pytest.fixture(autouse=True)
def _without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def weight_only(rows, bias=True, group_size=32, g_idx=None, mode=WoqLowpMode.INT8):
    scheme = WeightScheme(WoqWeightDtype.INT4, False, group_size)
    weight = ops.quantize_weight(torch.randn(rows, 64), scheme)
    weight = type(weight)(weight.codes, weight.scales, weight.zero_points, g_idx, scheme, weight.shape)
    bias = torch.randn(rows) if bias else None
    return WeightOnlyQuantizedLinear.from_quantized_weight(weight, bias, mode, WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM)


def int8_group(sizes=SIZES, activation=None):
    weights = [quantize_per_channel(torch.randn(rows, 64)) for rows in sizes]
    return Int8Linear.make_group(weights, [torch.randn(rows) for rows in sizes], activation, torch.float32)


def assert_each(group, modules):
    for x in (torch.randn(2, 5, 64), torch.randn(1, 1, 64)):
        for actual, module in zip(group(x), modules, strict=True):
            torch.testing.assert_close(actual, module(x.clone()), rtol=0, atol=0)


def test_weight_only_linears_of_one_scheme_are_one_call():
    modules = [weight_only(rows, bias) for rows, bias in zip(SIZES, (True, False, True), strict=True)]
    group = linear_calls(modules)

    assert type(group) is WeightOnlyGroup
    assert_each(group, modules)


def test_an_order_of_features_is_shared_or_not():
    order = torch.randperm(64).int() // 32
    same = [weight_only(rows, g_idx=order) for rows in SIZES]
    group = linear_calls(same)
    assert_each(group, same)
    assert group.compared

    same[1].load_state_dict(weight_only(SIZES[1], g_idx=order.flip(0)).state_dict())

    assert_each(group, same)


def test_weight_only_linears_of_several_schemes_are_several_calls():
    modules = [weight_only(48), weight_only(16, group_size=64), weight_only(16, mode=WoqLowpMode.NONE)]
    group = linear_calls(modules)

    assert type(group) is LinearGroup
    assert_each(group, modules)


@pytest.mark.parametrize("activation", [None, StaticActivation(0.05, 120, torch.rand(64) + 0.5)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_int8_share_groups_are_one_call_in_any_order(activation, order):
    members = int8_group(activation=activation)
    modules = [members[i] for i in order]
    group = linear_calls(modules)

    assert type(group) is Int8Group
    assert_each(group, modules)


def test_a_part_of_a_share_group_is_called_by_its_modules():
    modules = int8_group()[:2]
    group = linear_calls(modules)

    assert type(group) is LinearGroup
    assert_each(group, modules)


def test_members_that_were_loaded_with_other_activations_count():
    modules = int8_group(activation=StaticActivation(0.05, 120))
    group = linear_calls(modules)
    other = int8_group(activation=StaticActivation(0.1, 100))

    modules[1].load_state_dict(other[1].state_dict())

    assert_each(group, modules)


@pytest.mark.parametrize("activation", [PostOp.SILU, PostOp.GELU, PostOp.NEW_GELU, PostOp.RELU])
@pytest.mark.parametrize("kind", ["float", "weight_only", "int8", "int8 swapped"])
def test_gated_products(kind, activation):
    modules = {
        "float": lambda: [nn.Linear(64, 48), nn.Linear(64, 48)],
        "weight_only": lambda: [weight_only(48), weight_only(48, bias=False)],
        "int8": lambda: int8_group((48, 48)),
        "int8 swapped": lambda: int8_group((48, 48))[::-1],
    }[kind]()
    x = torch.randn(2, 5, 64)
    gate, up = (module(x.clone()) for module in modules)
    functions = {
        PostOp.SILU: F.silu,
        PostOp.GELU: F.gelu,
        PostOp.NEW_GELU: lambda t: F.gelu(t, approximate="tanh"),
        PostOp.RELU: F.relu,
    }

    torch.testing.assert_close(
        linear_calls(modules).gated(x, activation), functions[activation](gate) * up, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Linear(64, 48), FloatCall),
        (weight_only(48), WeightOnlyCall),
        (int8_group((48,))[0], Int8Call),
        (int8_group()[0], Int8Call),
        (nn.Sequential(nn.Linear(64, 48)), LinearCall),
    ],
)
def test_post_ops_are_applied_after_the_result_is_rounded(module, kind):
    linear = linear_call(module)
    x, a, b = (torch.randn(3, n).bfloat16() for n in (64, 48, 48))
    if isinstance(module, (nn.Linear, nn.Sequential)):
        module.bfloat16()
    result = module(x.clone())

    assert type(linear) is kind
    torch.testing.assert_close(linear(x, PostOp.ADD, a), result + a, rtol=0, atol=0)
    torch.testing.assert_close(linear(x, PostOp.ADD_ADD, a, b), result + a + b, rtol=0, atol=0)
    torch.testing.assert_close(linear(x, PostOp.MUL, a), result * a, rtol=0, atol=0)
    torch.testing.assert_close(linear(x, PostOp.RELU), torch.relu(result), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("silu", PostOp.SILU),
        ("swish", PostOp.SILU),
        ("gelu", PostOp.GELU),
        ("gelu_new", PostOp.NEW_GELU),
        ("gelu_pytorch_tanh", PostOp.NEW_GELU),
        ("relu", PostOp.RELU),
        ("quick_gelu", None),
        ("relu2", None),
        ("tanh", None),
    ],
)
def test_activations_are_known_by_what_they_compute(name, expected):
    assert activation_post_op(ACT2FN[name]) == expected
