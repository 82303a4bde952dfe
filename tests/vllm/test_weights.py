"""Weights cut for the ranks of tensor parallelism, and joined."""

import pytest
import torch

from ipex_quant import ops
from ipex_quant.integrations.vllm.packed import JoinedLinears
from ipex_quant.integrations.vllm.weights import (
    Int8Weight,
    Part,
    WoqWeight,
    pack_joined,
    part_indices,
    rank_rows,
    with_columns,
    with_rows,
)
from ipex_quant.numerics import affine
from ipex_quant.numerics.int8 import StaticActivation, quantize_per_channel
from ipex_quant.numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype

FLOAT = WoqLowpMode.NONE, WoqActQuantMode.NONE


def woq(rows=64, columns=256, dtype=WoqWeightDtype.INT4, symmetric=False, group_size=64, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return WoqWeight(ops.quantize_weight(weight, WeightScheme(dtype, symmetric, group_size)), FLOAT)


def values(weight):
    return affine.dequantize(weight.weight)


@pytest.mark.parametrize("key", ["q", 0, None, (0, 1)])
def test_part_indices(key):
    assert part_indices(key, 2) == {"q": (0,), 0: (0,), None: (0, 1), (0, 1): (0, 1)}[key]


def test_rows_of_parts_and_of_repeated_heads():
    part = Part("qkv", (8, 2, 2), (2, 1, 1))  # 4 ranks, two of which share each head of keys and values
    rows = [rank_rows(part, rank, 4).tolist() for rank in range(4)]
    assert rows == [[0, 1, 8, 10], [2, 3, 8, 10], [4, 5, 9, 11], [6, 7, 9, 11]]
    assert rank_rows(Part("o", (8,), (8,)), 3, 4) == slice(None)
    with pytest.raises(ValueError, match="q: 6 output features cannot be divided among 4 ranks"):
        rank_rows(Part("q", (6,), (2,)), 0, 4)


@pytest.mark.parametrize("dtype", [WoqWeightDtype.INT4, WoqWeightDtype.INT8, WoqWeightDtype.INT3, WoqWeightDtype.INT5])
@pytest.mark.parametrize("group_size", [64, -1])
def test_columns_and_rows(dtype, group_size):
    weight = woq(dtype=dtype, group_size=group_size)
    cut = with_columns(with_rows(weight, torch.tensor([3, 1])), 128, 256)
    assert torch.equal(values(cut), values(weight)[[3, 1], 128:])
    ops.pack_weight(cut.weight)


def test_columns_keep_groups_whole():
    with pytest.raises(ValueError, match="cut groups of 64; use a smaller tensor parallel size"):
        with_columns(woq(), 32, 64)


def test_act_order_is_not_cut():
    weight = woq()
    g_idx = torch.arange(256, dtype=torch.int32).flip(0) // 64
    ordered = WoqWeight(type(weight.weight)(**{**vars(weight.weight), "g_idx": g_idx}), FLOAT)
    with pytest.raises(ValueError, match=r"act-order: .* tensor parallel size of 1"):
        with_columns(ordered, 0, 128)


def test_columns_of_a_smoothed_input():
    weight = quantize_per_channel(torch.randn(8, 16))
    factor = torch.rand(16) + 1
    cut = with_columns(Int8Weight(weight, StaticActivation(0.1, 3, factor)), 4, 12)
    assert torch.equal(cut.activation.smoothing_factor, factor[4:12])
    assert torch.equal(cut.weight.codes, weight.codes[:, 4:12])


@pytest.mark.parametrize("other", [woq(32, seed=1), woq(32, symmetric=True, seed=1)])
def test_neighbours_are_packed_as_one(other):
    first, bias, x = woq(), torch.randn(96), torch.randn(3, 256)
    linear = pack_joined([first, other], bias)
    assert not isinstance(linear, JoinedLinears)
    expected = x @ torch.cat((values(first), values(other))).T
    torch.testing.assert_close(linear.forward(x, bias), expected + bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear.forward(x, None), expected, rtol=1e-4, atol=1e-4)


def test_different_neighbours_are_packed_each():
    first, second, third = woq(), woq(32, dtype=WoqWeightDtype.INT8, seed=1), torch.randn(8, 256)
    bias, x = torch.randn(104), torch.randn(3, 256)
    linear = pack_joined([first, second, third, third], torch.cat((bias, bias[:8])))
    assert len(linear.linears) == 3
    expected = torch.cat((values(first), values(second), third, third))
    torch.testing.assert_close(
        linear.forward(x, bias), x @ expected.T + torch.cat((bias, bias[:8])), rtol=1e-4, atol=1e-4
    )


def test_int8_inputs_are_shared_if_alike():
    weights = [quantize_per_channel(torch.randn(8, 16)) for _ in range(3)]
    one, other = StaticActivation(0.1, 3), StaticActivation(0.2, 3)
    same = pack_joined([Int8Weight(weights[0], one), Int8Weight(weights[1], one)], None)
    mixed = pack_joined([Int8Weight(weights[0], one), Int8Weight(weights[1], one), Int8Weight(weights[2], other)], None)
    assert not isinstance(same, JoinedLinears)
    assert len(mixed.linears) == 2
    x = torch.randn(2, 16)
    assert torch.equal(mixed.forward(x, None)[:, :16], same.forward(x, None))
