"""Linears of several packed weights with one input; test_isa.py runs this file at every ISA level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant import ops
from ipex_quant.numerics.quantized_weight import QuantizedWeight
from ipex_quant.numerics.scheme import WeightScheme, WoqLowpMode, WoqWeightDtype
from ipex_quant.ops import PostOp, reference

from .weights import KINDS, MODES, draw, make

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GATES = [PostOp.SILU, PostOp.GELU, PostOp.NEW_GELU]
ROWS = [0, 1, 2, 8, 9, 70]
RTOL = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


def order(k: int, wanted: bool) -> torch.Tensor | None:
    return torch.randperm(k, generator=torch.Generator().manual_seed(k)).int() if wanted else None


calls = {
    "k": st.sampled_from([1, 16, 100, 257]),
    "rows": st.sampled_from(ROWS),
    "kind": st.sampled_from(KINDS),
    "group_size": st.sampled_from([-1, 4, 32]),
    "modes": st.sampled_from(MODES),
    "dtype": st.sampled_from(DTYPES),
    "act_order": st.booleans(),
}


@settings(max_examples=120, deadline=None)
@given(sizes=st.lists(st.sampled_from([0, 1, 63, 64, 65, 130]), min_size=1, max_size=4), bias=st.booleans(), **calls)
def test_group_has_the_bits_of_separate_calls(sizes, bias, k, rows, kind, group_size, modes, dtype, act_order) -> None:
    weights = [ops.pack_weight(make(n, k, WeightScheme(*kind, group_size), seed)) for seed, n in enumerate(sizes)]
    biases = [draw(n, seed=n) if bias and i != 1 else None for i, n in enumerate(sizes)]
    x, perm = draw(rows, k, dtype=dtype), order(k, act_order)
    results = ops.woq_linear_group(x, [w.data for w in weights], sizes, biases, perm, *modes)
    for got, weight, n, b in zip(results, weights, sizes, biases, strict=True):
        assert torch.equal(got, ops.woq_linear(x, weight.data, n, b, perm, *modes))


@settings(max_examples=120, deadline=None)
@given(n=st.sampled_from([0, 1, 63, 64, 65, 130]), bias=st.booleans(), gate=st.sampled_from(GATES), **calls)
def test_gated_has_the_bits_of_post_ops(n, bias, gate, k, rows, kind, group_size, modes, dtype, act_order) -> None:
    first, second = (ops.pack_weight(make(n, k, WeightScheme(*kind, group_size), seed)).data for seed in (0, 1))
    biases = (draw(n, seed=2), draw(n, seed=3)) if bias else (None, None)
    x, perm = draw(rows, k, dtype=dtype), order(k, act_order)
    got = ops.woq_linear_gated(x, first, second, n, gate, *biases, perm, *modes)
    gated = ops.woq_linear(x, first, n, biases[0], perm, *modes, gate)
    assert torch.equal(got, ops.woq_linear(x, second, n, biases[1], perm, *modes, PostOp.MUL, [gated]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("gate", GATES)
def test_gated_is_close_to_the_definition(dtype: torch.dtype, rows: int, gate: PostOp) -> None:
    scheme = WeightScheme(WoqWeightDtype.INT4, False, 32)
    first, second, x = make(100, 96, scheme), make(100, 96, scheme, 1), draw(2, rows, 96, dtype=dtype)
    expected = reference.woq_linear(x, first, post_op=gate) * reference.woq_linear(x, second)
    got = ops.woq_linear_gated(x, ops.pack_weight(first).data, ops.pack_weight(second).data, 100, gate)
    torch.testing.assert_close(got, expected, rtol=RTOL[dtype], atol=RTOL[dtype])


@pytest.mark.parametrize("rows", [3, 200])
def test_results_do_not_depend_on_the_thread_count(rows: int) -> None:
    scheme = WeightScheme(WoqWeightDtype.INT4, True, 32)
    weights, x = [ops.pack_weight(make(n, 64, scheme, n)).data for n in (200, 200, 70)], draw(rows, 64)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            group = ops.woq_linear_group(x, weights, [200, 200, 70])
            results.append(torch.cat([*group, ops.woq_linear_gated(x, *weights[:2], 200, PostOp.SILU)], 1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_members_may_differ_in_zero_points_and_precision_of_scales() -> None:
    schemes = [WeightScheme(WoqWeightDtype.INT4, symmetric, 32) for symmetric in (True, False)]
    coarse = make(64, 64, schemes[0], 2)
    coarse = QuantizedWeight(coarse.codes, coarse.scales.half().float(), None, None, schemes[0], (64, 64))
    weights = [ops.pack_weight(qw) for qw in (make(64, 64, schemes[0]), make(64, 64, schemes[1], 1), coarse)]
    for x in (draw(2, 64), draw(20, 64)):
        for modes in (MODES[0], MODES[-1]):
            got = ops.woq_linear_group(x, [w.data for w in weights], [64] * 3, None, None, *modes)
            for y, weight in zip(got, weights, strict=True):
                assert torch.equal(y, ops.woq_linear(x, weight.data, 64, None, None, *modes))


def test_gradient() -> None:
    weights = [ops.pack_weight(make(n, 16, WeightScheme())).data for n in (5, 7)]
    x = draw(3, 16).requires_grad_()
    sum(y.sum() for y in ops.woq_linear_group(x, weights, [5, 7])).backward()
    expected = sum(ops.woq_dequantize(d, None, n, 16).sum(0) for d, n in zip(weights, (5, 7), strict=True))
    torch.testing.assert_close(x.grad, expected.expand(3, 16))
    with pytest.raises(RuntimeError, match="gradient"):
        ops.woq_linear_gated(x, weights[0], weights[0], 5, PostOp.SILU)


K = 16


def packed(n: int = 10, k: int = K, dtype: WoqWeightDtype = WoqWeightDtype.INT4, group_size: int = 4) -> torch.Tensor:
    return ops.pack_weight(make(n, k, WeightScheme(dtype, True, group_size))).data


GROUP = {"x": torch.zeros(3, K), "data": [packed(), packed(70)], "out_features": [10, 70], "biases": [None, None]}
BAD_GROUP = [
    ({"x": torch.zeros(3, K + 1)}, "x"),
    ({"x": torch.zeros(3, K).double()}, "x"),
    ({"x": torch.zeros(3, K, device="meta")}, "meta|device"),
    ({"data": []}, "out_features"),
    ({"data": [], "out_features": [], "biases": []}, "out_features|packed"),
    ({"data": [packed()]}, "out_features"),
    ({"out_features": [70, 10]}, "out_features"),
    ({"out_features": [10]}, "out_features"),
    ({"data": [packed(), packed(70, dtype=WoqWeightDtype.NF4)]}, "packed"),
    ({"data": [packed(), packed(70, group_size=8)]}, "packed"),
    ({"data": [packed(), packed(70, 20)]}, "packed"),
    ({"data": [packed(), packed(70)[:-1]]}, "packed"),
    ({"data": [packed(), torch.zeros(999, dtype=torch.uint8)]}, "packed"),
    ({"biases": [None]}, "biases"),
    ({"biases": [torch.zeros(70), None]}, "biases"),
    ({"biases": [None, torch.zeros(70).half()]}, "biases"),
    ({"perm": torch.arange(K + 1).int()}, "perm"),
    ({"lowp_mode": 4}, "lowp_mode"),
    ({"lowp_mode": WoqLowpMode.INT8}, "act_quant_mode"),
]
GATED = {"x": torch.zeros(3, K), "gate": packed(), "up": packed(), "out_features": 10, "activation": PostOp.SILU}
BAD_GATED = [
    ({"x": torch.zeros(3, K + 1)}, "x"),
    ({"up": packed(70)}, "out_features"),
    ({"gate": packed(70)}, "out_features"),
    ({"out_features": 11}, "out_features"),
    ({"up": packed(10, group_size=8)}, "packed"),
    ({"up": packed(10, dtype=WoqWeightDtype.INT8)}, "packed"),
    ({"up": packed().to("meta")}, "meta|device"),
    ({"up_bias": torch.zeros(11)}, "up_bias"),
    ({"gate_bias": torch.zeros(10).double()}, "gate_bias"),
    ({"activation": PostOp.NONE}, "activation"),
    ({"activation": PostOp.MUL}, "activation"),
    ({"activation": -1}, "activation"),
    ({"perm": torch.arange(K).int() + 1}, "perm"),
    ({"lowp_mode": -1}, "lowp_mode"),
]
ERRORS = (RuntimeError, ValueError, NotImplementedError)


@pytest.mark.parametrize(("change", "name"), BAD_GROUP)
def test_bad_argument_of_a_group(change: dict, name: str) -> None:
    ops.woq_linear_group(**GROUP)
    with pytest.raises(ERRORS, match=name):
        ops.woq_linear_group(**(GROUP | change))


@pytest.mark.parametrize(("change", "name"), BAD_GATED)
def test_bad_argument_of_gated(change: dict, name: str) -> None:
    ops.woq_linear_gated(**GATED)
    with pytest.raises(ERRORS, match=name):
        ops.woq_linear_gated(**(GATED | change))


def test_opcheck() -> None:
    x, perm = draw(2, 3, K), torch.arange(K).int()
    group = (x, [packed(), packed(70)], [draw(10), None], perm, [10, 70], 0, -1)
    gated = (x, packed(), packed(), None, draw(10), perm, 10, 3, 2, int(PostOp.GELU))
    torch.library.opcheck(torch.ops.ipex_quant.woq_linear_group.default, group)
    torch.library.opcheck(torch.ops.ipex_quant.woq_linear_gated.default, gated)


def test_compile_without_graph_break() -> None:
    weights = [packed(), packed(70)]

    def run(x: torch.Tensor) -> torch.Tensor:
        gated = ops.woq_linear_gated(x * 2, weights[0], weights[0], 10, PostOp.SILU)
        return torch.cat([*ops.woq_linear_group(x, weights, [10, 70]), gated], -1) + 1

    compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)
    for rows in (2, 4, 9):
        x = draw(rows, K)
        assert torch.equal(compiled(x), run(x))
