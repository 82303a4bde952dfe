"""Norms in this process against their plain-torch definition; test_isa.py runs this file at every ISA level."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ipex_quant import ops
from ipex_quant.ops import reference_llm as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FEATURES = [1, 2, 7, 15, 16, 17, 31, 63, 64, 65, 129, 300]
SHAPES = [(), (0,), (1,), (3,), (2, 5), (1, 1)]
RTOL = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # the last bit may fall either way


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def vector(k: int, dtype: torch.dtype | None, seed: int) -> torch.Tensor | None:
    return None if dtype is None else draw(k, dtype=dtype, seed=seed)


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=RTOL[got.dtype], atol=2e-6, equal_nan=True)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    k=st.sampled_from(FEATURES),
    dtype=st.sampled_from(DTYPES),
    own_weight=st.sampled_from([None, True, False]),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
)
def test_rms_norm(shape, k, dtype, own_weight, eps) -> None:
    x, residual = draw(*shape, k, dtype=dtype), draw(*shape, k, dtype=dtype, seed=1)
    weight = vector(k, {None: None, True: dtype, False: torch.float32}[own_weight], 2)
    assert_near(ops.rms_norm(x, weight, eps), reference.rms_norm(x, weight, eps))
    normed, total = ops.add_rms_norm(x, residual, weight, eps)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, ops.rms_norm(total, weight, eps))


@settings(max_examples=150, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    k=st.sampled_from(FEATURES),
    dtype=st.sampled_from(DTYPES),
    single=st.booleans(),
    has_weight=st.booleans(),
    has_bias=st.booleans(),
    shift=st.sampled_from([0.0, 30.0]),
)
def test_layer_norm(shape, k, dtype, single, has_weight, has_bias, shift) -> None:
    x, residual = draw(*shape, k, dtype=dtype) + shift, draw(*shape, k, dtype=dtype, seed=1)
    vectors = torch.float32 if single else dtype
    weight, bias = vector(k, vectors if has_weight else None, 2), vector(k, vectors if has_bias else None, 3)
    got = ops.layer_norm(x, weight, bias, 1e-5)
    assert got.dtype == dtype
    # What cancels when the mean is taken off is of the size of the mean's own rounding.
    expected = reference.layer_norm(x, weight, bias, 1e-5)
    torch.testing.assert_close(got, expected, rtol=RTOL[dtype], atol=1e-5 * (1 + shift))
    normed, total = ops.add_layer_norm(x, residual, weight, bias, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, ops.layer_norm(total, weight, bias, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_modules_of_transformers_and_torch(dtype: torch.dtype) -> None:
    x = draw(9, 2048, dtype=dtype) * 3
    llama, gemma = LlamaRMSNorm(2048, 1e-6), GemmaRMSNorm(2048, 1e-6)
    layer = torch.nn.LayerNorm(2048, 1e-5)
    with torch.no_grad():
        for parameter in (llama.weight, gemma.weight, layer.weight, layer.bias):
            parameter.copy_(draw(2048, seed=parameter.numel() + len(parameter.shape)))
        assert_near(ops.rms_norm(x, gemma.weight + 1, 1e-6), gemma(x))
        llama, layer = llama.to(dtype), layer.to(dtype)
        assert_near(ops.rms_norm(x, llama.weight, 1e-6), llama(x))
        torch.testing.assert_close(
            ops.layer_norm(x, layer.weight, layer.bias, 1e-5), layer(x), rtol=RTOL[dtype], atol=1e-5
        )


def test_rms_norm_in_bfloat16_differs_from_llama_in_few_last_bits() -> None:
    """A result that was not rounded before the weight would differ in a fifth of all values."""
    llama = LlamaRMSNorm(2048, 1e-6).bfloat16()
    with torch.no_grad():
        llama.weight.copy_(draw(2048, seed=1))
        x = draw(20, 2048, dtype=torch.bfloat16)
        assert (ops.rms_norm(x, llama.weight, 1e-6) != llama(x)).float().mean() < 1e-3


def test_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    rms = 12.5**0.5
    expected = torch.tensor([[6 / rms, 12 / rms], [0.0, 0.0]])
    torch.testing.assert_close(ops.rms_norm(x, torch.tensor([2.0, 3.0]), 0.0)[:1], expected[:1])
    torch.testing.assert_close(ops.rms_norm(x, torch.tensor([2.0, 3.0]), 1e-6), expected)
    centered = ops.layer_norm(x, torch.tensor([2.0, 3.0]), torch.tensor([10.0, 20.0]), 0.0)
    torch.testing.assert_close(centered[0], torch.tensor([8.0, 23.0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_value_spoils_its_own_row_only(dtype: torch.dtype, value: float) -> None:
    x, weight, bias = draw(4, 70, dtype=dtype), draw(70, dtype=dtype, seed=1), draw(70, dtype=dtype, seed=2)
    clean = ops.rms_norm(x, weight, 1e-5), ops.layer_norm(x, weight, bias, 1e-5)
    x[2, 69] = value
    for got, before in zip((ops.rms_norm(x, weight, 1e-5), ops.layer_norm(x, weight, bias, 1e-5)), clean, strict=True):
        assert torch.equal(got[[0, 1, 3]], before[[0, 1, 3]])
        assert got[2, 69].isnan()
    assert ops.layer_norm(x, weight, bias, 1e-5)[2].isnan().all()
    assert torch.equal(ops.rms_norm(x, weight, 1e-5).isnan(), reference.rms_norm(x, weight, 1e-5).isnan())


def test_views_rows_and_threads() -> None:
    x, weight = draw(700, 2, 300, dtype=torch.bfloat16), draw(600, seed=1)[::2]
    view = x[:, 1]
    expected = torch.cat([ops.rms_norm(row.clone(), weight.clone(), 1e-6) for row in view.split(1)])
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ops.rms_norm(view, weight, 1e-6), expected)
    finally:
        torch.set_num_threads(before)
    normed, total = ops.add_layer_norm(view, x[:, 0], weight, None, 1e-5)
    assert torch.equal(total, view + x[:, 0])
    assert normed.is_contiguous()
    assert total.is_contiguous()


def test_layer_norm_of_a_large_mean_is_as_good_as_float64() -> None:
    x = draw(3, 4096) + 1000
    got, expected = ops.layer_norm(x, None, None, 1e-5), F.layer_norm(x.double(), (4096,))
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-4)


K = 24
GOOD = {"x": draw(3, K), "residual": draw(3, K, seed=1), "weight": draw(K), "bias": draw(K), "eps": 1e-5}
BAD = [
    ({"x": torch.zeros(())}, "x"),
    ({"x": torch.zeros(3, 0)}, "x"),
    ({"x": torch.zeros(3, K, dtype=torch.float64)}, "x"),
    ({"x": torch.zeros(3, K, dtype=torch.int8)}, "x"),
    ({"residual": torch.zeros(1, K)}, "residual"),
    ({"residual": torch.zeros(3, K, 1)}, "residual"),
    ({"residual": torch.zeros(3, K, dtype=torch.bfloat16)}, "residual"),
    ({"weight": torch.zeros(K + 1)}, "weight"),
    ({"weight": torch.zeros(1, K)}, "weight"),
    ({"weight": torch.zeros(K, dtype=torch.bfloat16)}, "weight"),
    ({"weight": torch.zeros(K, device="meta")}, "CPU|meta|device"),
    ({"x": torch.zeros(3, K, device="meta")}, "CPU|meta|device"),
]
BAD_LAYER = [
    *BAD,
    ({"bias": torch.zeros(K - 1)}, "bias"),
    ({"bias": torch.zeros(K, dtype=torch.float64)}, "bias"),
    ({"x": GOOD["x"].half(), "residual": GOOD["residual"].half(), "bias": GOOD["bias"].half()}, "bias"),
]
ERRORS = (RuntimeError, ValueError, NotImplementedError)


@pytest.mark.parametrize(("change", "name"), BAD)
def test_bad_argument_of_rms_norm(change: dict, name: str) -> None:
    good = {key: value for key, value in GOOD.items() if key != "bias"}
    ops.add_rms_norm(**good)
    with pytest.raises(ERRORS, match=name):
        ops.add_rms_norm(**(good | change))
    if "residual" not in change:
        arguments = {key: value for key, value in (good | change).items() if key != "residual"}
        with pytest.raises(ERRORS, match=name):
            ops.rms_norm(**arguments)


@pytest.mark.parametrize(("change", "name"), BAD_LAYER)
def test_bad_argument_of_layer_norm(change: dict, name: str) -> None:
    ops.add_layer_norm(**GOOD)
    with pytest.raises(ERRORS, match=name):
        ops.add_layer_norm(**(GOOD | change))
    if "residual" not in change:
        arguments = {key: value for key, value in (GOOD | change).items() if key != "residual"}
        with pytest.raises(ERRORS, match=name):
            ops.layer_norm(**arguments)


def test_opcheck() -> None:
    namespace = torch.ops.ipex_quant
    x, residual, weight = draw(2, 3, 18), draw(2, 3, 18, seed=1), draw(18)
    cases = {
        "rms_norm": (x, weight, 1e-5),
        "layer_norm": (x, weight, None, 1e-5),
        "add_rms_norm": (x, residual, None, 1e-5),
        "add_layer_norm": (x, residual, weight, weight, 1e-5),
    }
    for name, arguments in cases.items():
        torch.library.opcheck(getattr(namespace, name).default, arguments)


def test_compile_without_graph_break() -> None:
    weight = draw(16)

    def run(x: torch.Tensor) -> torch.Tensor:
        normed, total = ops.add_rms_norm(x * 2, x, weight, 1e-5)
        return ops.layer_norm(normed, weight, None, 1e-5) + ops.add_layer_norm(total, x, None, None, 1e-5)[1]

    compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)
    for rows in (2, 4, 9):
        x = draw(rows, 16)
        assert torch.equal(compiled(x), run(x))
