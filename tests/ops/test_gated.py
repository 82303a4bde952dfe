"""Gated products in this process against their plain-torch definition; test_isa.py runs this at every ISA level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant import ops
from ipex_quant.ops import reference_llm as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# An activation that falls to the other side of a rounding moves the product by one bit, its own rounding by another.
RTOL = {torch.float32: 5e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
ACTIVATIONS = [
    (ops.silu_mul, ops.silu_mul_halves, reference.silu_mul, {}),
    (ops.gelu_mul, ops.gelu_mul_halves, reference.gelu_mul, {}),
    (ops.gelu_mul, ops.gelu_mul_halves, reference.gelu_mul, {"tanh": True}),
]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype) * 3


@pytest.mark.parametrize(("product", "halves", "expected", "options"), ACTIVATIONS)
@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(), (0,), (1,), (3,), (2, 5)]),
    n=st.sampled_from([0, 1, 7, 16, 17, 64, 100, 301]),
    dtype=st.sampled_from(DTYPES),
)
def test_close_to_the_definition(product, halves, expected, options, shape, n, dtype) -> None:
    xy = draw(*shape, 2 * n, dtype=dtype)
    x, y = xy.chunk(2, -1) if n else (xy, xy)
    got = product(x, y, **options)
    assert got.is_contiguous()
    torch.testing.assert_close(got, expected(x, y, **options), rtol=RTOL[dtype], atol=5e-6)
    assert torch.equal(halves(xy, **options), got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_is_rounded_before_the_product(dtype: torch.dtype) -> None:
    """Where the activation itself has the bits of torch's, so has the product."""
    x, y = draw(4000, dtype=dtype), draw(4000, dtype=dtype, seed=1)
    same = ops.silu_mul(x, torch.ones_like(y)) == torch.nn.functional.silu(x)
    assert same.float().mean() > (0.2 if dtype == torch.float32 else 0.99)
    assert torch.equal(ops.silu_mul(x, y)[same], reference.silu_mul(x, y)[same])


def test_by_hand_and_at_the_ends() -> None:
    x = torch.tensor([0.0, 1.0, -1.0, 100.0, -100.0, torch.inf, torch.nan])
    y = torch.full((7,), 2.0)
    for got, one in ((ops.silu_mul(x, y), 0.7310586), (ops.gelu_mul(x, y), 0.8413447)):
        expected = torch.tensor([0.0, 2 * one, 2 * (one - 1), 200.0, 0.0, torch.inf, torch.nan])
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-6, atol=1e-6)


def test_large_tensors_and_views() -> None:
    xy = draw(3, 40000, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results += [ops.silu_mul_halves(xy), ops.silu_mul(xy[:, :20000], xy[:, 20000:])]
    finally:
        torch.set_num_threads(before)
    rows = torch.cat([ops.silu_mul_halves(row[None]) for row in xy])
    assert all(torch.equal(result, rows) for result in results)
    assert torch.equal(ops.gelu_mul(xy.t(), xy.t()), ops.gelu_mul(xy, xy).t())
    assert torch.equal(ops.gelu_mul_halves(xy[:, 1:40000:2][:, :19998]), ops.gelu_mul_halves(xy[:, 1:39997:2].clone()))


ERRORS = (RuntimeError, ValueError, NotImplementedError)


@pytest.mark.parametrize(
    ("x", "y", "name"),
    [
        (draw(3, 4), draw(4), "y"),
        (draw(3, 4), draw(4, 3), "y"),
        (draw(3, 4), draw(3, 4).half(), "y"),
        (draw(3, 4).double(), draw(3, 4).double(), "x"),
        (draw(3, 4).int(), draw(3, 4).int(), "x"),
        (draw(3, 4), draw(3, 4).to("meta"), "CPU|meta|device"),
        (draw(3, 4).to("meta"), draw(3, 4), "CPU|meta|device"),
    ],
)
def test_bad_argument(x: torch.Tensor, y: torch.Tensor, name: str) -> None:
    for product in (ops.silu_mul, ops.gelu_mul):
        with pytest.raises(ERRORS, match=name):
            product(x, y)


@pytest.mark.parametrize("xy", [draw(), draw(3, 5), draw(3, 4).double(), draw(3, 4).long()])
def test_bad_argument_of_halves(xy: torch.Tensor) -> None:
    for product in (ops.silu_mul_halves, ops.gelu_mul_halves):
        with pytest.raises(ERRORS, match="xy"):
            product(xy)


@pytest.mark.parametrize("activation", [-1, 0, 1, 5, 8, 2**40])
def test_bad_activation(activation: int) -> None:
    with pytest.raises(RuntimeError, match="activation"):
        torch.ops.ipex_quant.gated_product(draw(2), draw(2), activation)
    with pytest.raises(RuntimeError, match="activation"):
        torch.ops.ipex_quant.gated_product_halves(draw(2), activation)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.ipex_quant.gated_product.default, (draw(2, 3, 5), draw(2, 3, 5), 4))
    torch.library.opcheck(torch.ops.ipex_quant.gated_product_halves.default, (draw(2, 3, 6), 2))


def test_compile_without_graph_break() -> None:
    def run(xy: torch.Tensor) -> torch.Tensor:
        return ops.silu_mul_halves(xy * 2) + ops.gelu_mul(*xy.chunk(2, -1), tanh=True) + 1

    compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)
    for rows in (2, 4, 9):
        xy = draw(rows, 16)
        assert torch.equal(compiled(xy), run(xy))
