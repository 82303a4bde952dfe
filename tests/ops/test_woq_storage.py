"""Weights whose groups have minimums or super scales: packing, matmul and lookup."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant import ops
from ipex_quant.numerics import affine
from ipex_quant.numerics.quantized_weight import QuantizedWeight
from ipex_quant.numerics.scheme import PER_CHANNEL, WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype
from ipex_quant.ops import reference

from .test_woq_pack import assert_same
from .weights import draw, make, stored_schemes

SCHEMES = [scheme for size in (16, 32) for scheme in stored_schemes(size, 4 * size)]
INT8_MODES = [mode for mode in WoqActQuantMode if mode != WoqActQuantMode.NONE]


def nvfp4(n: int, k: int) -> QuantizedWeight:
    """FP4 in groups of 16, whose scales are float8 numbers times one for all."""
    qw = make(n, k, WeightScheme(WoqWeightDtype.FP4, True, 16))
    factor = torch.full((n, 1), float(qw.scales.max() / 400))
    scales = (qw.scales / factor).to(torch.float8_e4m3fn).float() * factor
    scheme = WeightScheme(WoqWeightDtype.FP4, True, 16, super_group_size=PER_CHANNEL)
    return dataclasses.replace(qw, scales=scales, super_scales=factor, scheme=scheme)


def mxfp4(n: int, k: int) -> QuantizedWeight:
    """FP4 in groups of 32, whose scales are powers of two."""
    qw = make(n, k, WeightScheme(WoqWeightDtype.FP4, True, 32))
    return dataclasses.replace(qw, scales=torch.exp2(qw.scales.log2().round()))


def linear(x: torch.Tensor, qw: QuantizedWeight, *arguments) -> torch.Tensor:
    return ops.woq_linear(x, ops.pack_weight(qw).data, qw.shape[0], None, None, *arguments)


@settings(deadline=None)
@given(n=st.integers(0, 140), supers=st.integers(1, 4), scheme=st.sampled_from(SCHEMES))
def test_unpack_is_the_inverse_of_pack(n: int, supers: int, scheme: WeightScheme) -> None:
    qw = make(n, supers * 4 * scheme.group_size, scheme)
    assert_same(ops.unpack_weight(ops.pack_weight(qw)), qw)


@pytest.mark.parametrize("weight", [nvfp4(70, 64), mxfp4(70, 64)])
def test_floating_scales_take_a_byte_and_survive(weight: QuantizedWeight) -> None:
    packed = ops.pack_weight(weight)
    assert_same(ops.unpack_weight(packed), weight)
    groups = 64 // weight.scheme.group_size
    supers = 0 if weight.super_scales is None else 4
    assert packed.nbytes == 64 + 128 * (64 // 2 + groups + supers)


def test_a_group_of_k_quants_takes_the_bytes_that_gguf_says() -> None:
    scheme = WeightScheme(WoqWeightDtype.INT4, False, 32, True, 256)
    packed = ops.pack_weight(make(64, 512, scheme))
    assert packed.nbytes == 64 + 64 * 2 * (256 // 2 + 8 * 2 + 2 * 2)  # its six-bit factors are bytes here


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 140),
    supers=st.integers(1, 3),
    rows=st.sampled_from([1, 2, 3, 5, 8, 9, 20]),
    scheme=st.sampled_from(SCHEMES),
    mode=st.sampled_from(INT8_MODES),
)
def test_integer_compute_is_bit_equal_to_the_definition(n, supers, rows, scheme, mode) -> None:
    qw = make(n, supers * 4 * scheme.group_size, scheme)
    x = draw(rows, qw.shape[1])
    expected = reference.woq_linear(x, qw, None, WoqLowpMode.INT8, mode)
    assert torch.equal(linear(x, qw, WoqLowpMode.INT8, mode), expected)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_compute_matches_the_dequantized_matmul(scheme: WeightScheme, rows: int, dtype: torch.dtype) -> None:
    qw = make(70, 8 * scheme.group_size, scheme)
    x = draw(rows, qw.shape[1], dtype=dtype)
    expected = F.linear(x.float(), affine.dequantize(qw))
    torch.testing.assert_close(
        linear(x, qw).float(), expected, rtol=1e-2, atol=1e-2 if dtype != x.float().dtype else 1e-5
    )


@pytest.mark.parametrize("weight", [nvfp4(70, 64), mxfp4(70, 64)])
@pytest.mark.parametrize("rows", [1, 12])
def test_floating_scales_compute(weight: QuantizedWeight, rows: int) -> None:
    x, mode = draw(rows, 64), WoqActQuantMode.PER_BATCH_SYM
    torch.testing.assert_close(linear(x, weight), F.linear(x, affine.dequantize(weight)), rtol=1e-4, atol=1e-5)
    expected = reference.woq_linear(x, weight, None, WoqLowpMode.INT8, mode)
    assert torch.equal(linear(x, weight, WoqLowpMode.INT8, mode), expected)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rows_are_looked_up(scheme: WeightScheme) -> None:
    qw = make(70, 4 * scheme.group_size, scheme)
    ids = torch.tensor([0, 69, 17, 3])
    packed = ops.pack_weight(qw)
    rows = ops.woq_embedding(packed.data, ids, qw.shape[1], None, torch.float32)
    assert torch.equal(rows, affine.dequantize(qw)[ids])


def test_scales_that_are_no_multiples_of_their_super_scales_are_refused() -> None:
    qw = make(3, 64, WeightScheme(WoqWeightDtype.INT4, True, 16, super_group_size=64))
    scales = qw.scales.clone()
    scales[1, 2] *= 1.0001
    with pytest.raises(RuntimeError, match="super_scales: expected scales that are"):
        ops.pack_weight(dataclasses.replace(qw, scales=scales))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"minimums": None}, "minimums: a int4 min g16 in g64 weight must have them"),
        ({"super_scales": None}, "super_scales: a int4 min g16 in g64 weight must have them"),
        ({"zero_points": torch.zeros(3, 4, dtype=torch.int16)}, "zero_points: a int4 min g16 in g64 weight must not"),
        ({"minimums": torch.full((3, 4), torch.inf)}, "minimums: expected finite"),
        ({"super_minimums": torch.zeros(3, 2)}, "super_minimums: expected shape"),
    ],
)
def test_parts_that_do_not_fit_the_scheme_are_refused(change: dict, message: str) -> None:
    qw = make(3, 64, WeightScheme(WoqWeightDtype.INT4, False, 16, True, 64))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(qw, **change)


def test_codes_beyond_their_bits_are_refused() -> None:
    qw = make(3, 64, WeightScheme(WoqWeightDtype.INT3, True, 16))
    with pytest.raises(ValueError, match=r"codes: expected 3 bits, 0..7"):
        dataclasses.replace(qw, codes=torch.full_like(qw.codes, 0x80))
