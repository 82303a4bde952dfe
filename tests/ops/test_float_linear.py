"""Linears with float weights against their plain-torch definition; test_isa.py runs this file at every ISA level."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant import ops
from ipex_quant.ops import PostOp
from ipex_quant.ops import reference_llm as reference
from ipex_quant.ops.float_linear import MAX_ROWS, is_native

native = torch.ops.ipex_quant.float_linear.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# As in test_isa.py: sums of unit variance in any order, one rounding; a post op starts from the rounded sum.
RTOL = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
ATOL = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
OTHERS = {PostOp.ADD: 1, PostOp.ADD_ADD: 2, PostOp.MUL: 1}
# With an odd K, rows of the weight are not aligned; 1365 is one more than a block of three rows, 4200 than one of one.
FEATURES = [1, 2, 31, 32, 33, 64, 100, 511, 513, 768, 1365, 2049, 4200]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.sampled_from([(0,), (), (1,), (2,), (3,), (4,), (5,), (2, 3), (7,), (8,), (9,), (19,)]),
    n=st.sampled_from([0, 1, 3, 15, 16, 17, 63, 64, 65, 100, 130]),
    k=st.sampled_from(FEATURES),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    post_op=st.sampled_from([PostOp.NONE, *PostOp]),
)
def test_close_to_the_definition(rows, n, k, dtype, bias, post_op) -> None:
    x, weight = draw(*rows, k, dtype=dtype), draw(n, k, dtype=dtype, seed=1) / k**0.5
    biases = draw(n, dtype=dtype, seed=2) if bias else None
    others = [draw(*rows, n, dtype=dtype, seed=3 + i) for i in range(OTHERS.get(post_op, 0))]
    got = native(x, weight, biases, others, int(post_op))
    assert got.dtype == dtype
    assert got.is_contiguous()
    expected = reference.float_linear(x, weight, biases, post_op, others)
    torch.testing.assert_close(got, expected, rtol=RTOL[dtype], atol=ATOL[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [33, 768, 5000])
def test_every_row_and_output_has_the_bits_that_it_has_alone(dtype: torch.dtype, k: int) -> None:
    x, weight, bias = draw(11, k, dtype=dtype), draw(70, k, dtype=dtype, seed=1), draw(70, dtype=dtype, seed=2)
    alone = torch.stack([native(row, weight, bias, [], 0) for row in x])
    for rows in range(1, 12):
        assert torch.equal(native(x[:rows], weight, bias, [], 0), alone[:rows])
    parts = [native(x, weight[i : i + 7], bias[i : i + 7], [], 0) for i in range(0, 70, 7)]
    assert torch.equal(torch.cat(parts, 1), alone)


def lane_by_lane(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sums in the order that kernels/float_linear.h documents, where every product and sum is exact in float64."""
    x, weight = (F.pad(t, (0, -t.shape[-1] % 32)).unflatten(-1, (-1, 32)) for t in (x, weight))
    if x.dtype == torch.bfloat16:
        x, weight = (torch.cat([t[..., ::2], t[..., 1::2]], -1) for t in (x, weight))
    total = torch.zeros(len(x), len(weight), 16, dtype=torch.float32)
    for step in range(x.shape[1]):
        for half in (slice(0, 16), slice(16, 32)):
            product = x[:, None, step, half].double() * weight[None, :, step, half].double()
            total = (total.double() + product).float()
    for lanes in (8, 4, 2, 1):
        total = total[..., :lanes] + total[..., lanes:]
    return total[..., 0].to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k"), [(1, 100), (1, 2100), (2, 65), (5, 96)])
def test_order_of_the_sums(dtype: torch.dtype, rows: int, k: int) -> None:
    """Float64 holds the products of 12-bit numbers and, with few more bits, their sums with a float32 number."""
    x, weight = ((draw(n, k, seed=n) * 256).round().clamp(-2047, 2047).to(dtype) for n in (rows, 33))
    assert torch.equal(native(x, weight, None, [], 0), lane_by_lane(x, weight))


def test_results_do_not_depend_on_the_thread_count() -> None:
    x, weight = draw(3, 300), draw(700, 300, seed=1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(native(x, weight, None, [], 0))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_spoils_its_own_row_only(dtype: torch.dtype) -> None:
    x, weight = draw(6, 70, dtype=dtype), draw(20, 70, dtype=dtype, seed=1)
    expected = native(x, weight, None, [], 0)
    x[1, 69], x[4, 0], weight[3, 2] = torch.nan, torch.inf, torch.nan
    got = native(x, weight, None, [], 0)
    assert got[1].isnan().all()
    assert not got[4].isfinite().any()
    assert got[:, 3].isnan().all()
    kept = [i for i in range(20) if i != 3]
    assert torch.equal(got[[0, 2, 3, 5]][:, kept], expected[[0, 2, 3, 5]][:, kept])


def test_views() -> None:
    x, weight, bias = draw(40, 3).t(), draw(20, 40, seed=1), draw(40)[::2]
    assert torch.equal(native(x, weight, bias, [], 0), native(x.contiguous(), weight, bias.contiguous(), [], 0))
    shifted = torch.cat([torch.zeros(1), weight.flatten()])[1:].view(20, 40)  # at an odd address
    assert torch.equal(native(x, shifted, None, [], 0), native(x, weight, None, [], 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_are_native_and_others_are_torchs(dtype: torch.dtype) -> None:
    weight, bias = draw(20, 40, dtype=dtype).requires_grad_(), draw(20, dtype=dtype)
    few, many = draw(MAX_ROWS[dtype], 40, dtype=dtype), draw(MAX_ROWS[dtype] + 1, 40, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(ops.float_linear(few, weight, bias), native(few, weight, bias, [], 0))
        assert torch.equal(ops.float_linear(many, weight, bias, PostOp.RELU), F.linear(many, weight, bias).relu())
        assert is_native(few, weight)
        assert not is_native(many, weight)
        for x, w in (
            (few[:0], weight),
            (few.double(), weight.double()),
            (few, weight[:, ::2]),
            (few, draw(40)),
            (few.to("meta"), weight.to("meta")),
        ):
            assert not is_native(x, w)
        other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
        with torch.autocast("cpu", other):
            assert not is_native(few, weight)
            assert ops.float_linear(few, weight, bias).dtype == other
    assert not is_native(few, weight)
    with torch.inference_mode():
        assert is_native(few, weight)
        assert is_native(few[0], weight)


def test_gradients_are_torchs() -> None:
    x, weight, bias = (t.requires_grad_() for t in (draw(2, 5), draw(3, 5, seed=1), draw(3, seed=2)))
    got = torch.autograd.grad(ops.float_linear(x, weight, bias, PostOp.SILU).sum(), (x, weight, bias))
    expected = torch.autograd.grad(F.silu(F.linear(x, weight, bias)).sum(), (x, weight, bias))
    assert all(map(torch.equal, got, expected))


X, W, B = torch.zeros(3, 16), torch.zeros(5, 16), torch.zeros(5)
GOOD = {"x": X, "weight": W, "bias": B, "others": [], "post_op": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, "x"),
        ({"x": torch.zeros(3, 17)}, "x"),
        ({"x": X.double()}, "x"),
        ({"x": X.half()}, "weight"),
        ({"x": X.int(), "weight": W.int(), "bias": B.int()}, "x"),
        ({"weight": W.bfloat16()}, "weight"),
        ({"weight": W.t()}, "x|weight"),
        ({"weight": torch.zeros(16, 16).t()}, "weight"),
        ({"weight": torch.zeros(16)}, "weight"),
        ({"x": torch.zeros(3, 0), "weight": torch.zeros(5, 0)}, "weight"),
        ({"bias": torch.zeros(6)}, "bias"),
        ({"bias": torch.zeros(1, 5)}, "bias"),
        ({"bias": B.half()}, "bias"),
        ({"post_op": -1}, "post_op"),
        ({"post_op": 9}, "post_op"),
        ({"post_op": 2**40}, "post_op"),
        ({"post_op": 5}, "others"),
        ({"others": [torch.zeros(3, 5)]}, "others"),
        ({"post_op": 5, "others": [torch.zeros(3, 6)]}, "others"),
        ({"post_op": 5, "others": [torch.zeros(5)]}, "others"),
        ({"post_op": 7, "others": [torch.zeros(3, 5).half()]}, "others"),
    ],
)
def test_bad_argument(change: dict, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        native(**GOOD | change)


def test_opcheck() -> None:
    torch.library.opcheck(native, (draw(2, 3, 40), draw(5, 40), draw(5), [draw(2, 3, 5)], int(PostOp.MUL)))
    torch.library.opcheck(native, (draw(40).half(), draw(5, 40).half(), None, [], 0))


def test_compile_without_graph_break() -> None:
    weight, bias = draw(5, 40).requires_grad_(), draw(5)

    def run(x: torch.Tensor) -> torch.Tensor:
        return ops.float_linear(x * 2, weight, bias, PostOp.SILU) + 1

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (1, 3, 40):
            torch.testing.assert_close(compiled(draw(rows, 40)), run(draw(rows, 40)))


class Linear(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.float_linear(x, self.weight, self.bias)


def test_graphs_for_any_number_of_rows_have_torchs_operator() -> None:
    model, many = Linear(40, 5).requires_grad_(False), draw(100, 40)
    expected = F.linear(many, model.weight, model.bias)
    rows = torch.export.Dim("rows", min=1, max=1000)
    exported = torch.export.export(model, (draw(2, 40),), dynamic_shapes=({0: rows},))
    assert "aten.linear" in exported.graph_module.code
    torch.testing.assert_close(exported.module()(many), expected)
    traced = torch.jit.trace(model, draw(2, 40))
    assert "aten::linear" in str(traced.graph)
    torch.testing.assert_close(torch.vmap(model)(many), expected)
