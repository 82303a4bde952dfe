from __future__ import annotations

import dataclasses

import pytest
import torch

from ipex_quant.numerics.affine import quantize
from ipex_quant.numerics.quantized_weight import QuantizedWeight
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype


def make(symmetric: bool = False) -> QuantizedWeight:
    return quantize(torch.randn(3, 10), WeightScheme(WoqWeightDtype.INT4, symmetric, 4))


def test_nbytes_counts_every_tensor() -> None:
    weight = make()
    g_idx = (torch.arange(10) // 4).int()
    assert weight.nbytes == 3 * 5 + 3 * 3 * 4 + 3 * 3 * 2
    assert dataclasses.replace(weight, g_idx=g_idx).nbytes == weight.nbytes + 40
    assert make(symmetric=True).nbytes == 3 * 5 + 3 * 3 * 4


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("codes", torch.zeros(3, 5, dtype=torch.int8), TypeError, "codes: expected dtype torch.uint8"),
        ("codes", torch.zeros(3, 4, dtype=torch.uint8), ValueError, r"codes: expected shape \[3, 5\], got \[3, 4\]"),
        ("scales", torch.ones(3, 3, dtype=torch.float16), TypeError, "scales: expected dtype torch.float32"),
        ("scales", torch.ones(3), ValueError, r"scales: expected shape \[3, 3\]"),
        ("zero_points", None, ValueError, "zero_points: a int4 asym g4 weight must have them"),
        ("zero_points", torch.zeros(3, 3), TypeError, "zero_points: expected dtype torch.int16"),
        ("zero_points", torch.zeros(3, 2, dtype=torch.int16), ValueError, r"zero_points: expected shape \[3, 3\]"),
        ("zero_points", torch.full((3, 3), 17, dtype=torch.int16), ValueError, "expected 0..16 for INT4, got 17..17"),
        ("zero_points", torch.full((3, 3), -1, dtype=torch.int16), ValueError, "expected 0..16 for INT4, got -1..-1"),
        ("scales", torch.full((3, 3), torch.nan), ValueError, "scales: expected finite values, got NaN or Inf"),
        ("scales", torch.full((3, 3), -torch.inf), ValueError, "scales: expected finite values, got NaN or Inf"),
        ("g_idx", torch.zeros(10, dtype=torch.int64), TypeError, "g_idx: expected dtype torch.int32"),
        ("g_idx", torch.zeros(9, dtype=torch.int32), ValueError, r"g_idx: expected shape \[10\]"),
        ("g_idx", torch.zeros(10, dtype=torch.int32), ValueError, r"g_idx: expected groups 0..2 with 4 features"),
        ("g_idx", torch.arange(10, dtype=torch.int32), ValueError, r"got values 0..9"),
        ("shape", (3, 12), ValueError, r"codes: expected shape \[3, 6\]"),
    ],
)
def test_tensors_that_do_not_fit_are_errors(field, value, error, message) -> None:
    with pytest.raises(error, match=message):
        dataclasses.replace(make(), **{field: value})


def test_symmetric_weight_has_no_zero_points() -> None:
    with pytest.raises(ValueError, match="must not have them"):
        dataclasses.replace(make(symmetric=True), zero_points=torch.zeros(3, 3, dtype=torch.int16))


def test_nan_among_fp8_codes_is_an_error() -> None:
    weight = quantize(torch.randn(2, 4), WeightScheme(WoqWeightDtype.FP8))
    codes = weight.codes.clone()
    codes.view(torch.uint8)[1, 2] = 0xFF
    with pytest.raises(ValueError, match="codes: expected finite FP8 values, got NaN"):
        dataclasses.replace(weight, codes=codes)


@pytest.mark.parametrize(("dtype", "extremes"), [(WoqWeightDtype.INT4, (0, 16)), (WoqWeightDtype.INT8, (-128, 127))])
def test_extreme_zero_points_are_accepted(dtype: WoqWeightDtype, extremes: tuple[int, int]) -> None:
    weight = quantize(torch.randn(2, 4), WeightScheme(dtype, False))
    zero_points = torch.tensor(extremes, dtype=torch.int16)[:, None]
    assert torch.equal(dataclasses.replace(weight, zero_points=zero_points).zero_points, zero_points)
