from __future__ import annotations

import pytest
import torch

from ipex_quant.numerics.codebooks import CODEBOOKS, FP8_MAX, NF4_LEVELS, code_levels, nearest_codes
from ipex_quant.numerics.scheme import WoqWeightDtype


def test_nf4_levels_ascend_from_minus_one_to_one_through_zero() -> None:
    assert NF4_LEVELS.dtype == torch.float32
    assert NF4_LEVELS.shape == (16,)
    assert (NF4_LEVELS.diff() > 0).all()
    assert NF4_LEVELS[[0, 7, 15]].tolist() == [-1.0, 0.0, 1.0]


def test_nf4_levels_are_the_quantiles_of_a_normal_distribution() -> None:
    """QLoRA appendix E: 8 quantiles below and 9 above zero, between the offset 0.9677083 and one half."""
    offset = 0.9677083
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64))[:-1]
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    torch.testing.assert_close(NF4_LEVELS.double(), levels / levels.max(), atol=2e-6, rtol=0)


def test_fp8_max_is_that_of_the_torch_type() -> None:
    assert torch.finfo(torch.float8_e4m3fn).max == FP8_MAX


def test_values_of_bitsandbytes_are_those_of_its_bits() -> None:
    """A sign, two bits of exponent and one of mantissa in an order of its own, over three; the 1 is subnormal."""
    magnitudes = [0, 1 / 64, 2.0, 3.0, 1.0, 1.5, 0.5, 0.75]
    expected = torch.tensor(magnitudes + [-each for each in magnitudes]) * 64
    assert torch.equal(CODEBOOKS[WoqWeightDtype.BNB_FP4], expected)


@pytest.mark.parametrize("dtype", list(CODEBOOKS))
def test_the_nearest_code_is_the_one_of_all(dtype: WoqWeightDtype) -> None:
    levels = CODEBOOKS[dtype]
    values = torch.linspace(float(levels.min()) * 1.1, float(levels.max()) * 1.1, 1237)
    found = code_levels(nearest_codes(values, dtype), levels)
    torch.testing.assert_close((found - values).abs(), (levels - values[:, None]).abs().amin(1), rtol=0, atol=0)


def test_ties_between_magnitudes_go_to_the_lower_one_and_zeros_keep_their_sign() -> None:
    values = torch.tensor([0.5, -0.5, 160.0, -16.5, 0.0, -0.0, 191.0])
    assert nearest_codes(values, WoqWeightDtype.BNB_FP4).tolist() == [0, 8, 2, 9, 0, 8, 3]
