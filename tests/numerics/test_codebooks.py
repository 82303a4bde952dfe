from __future__ import annotations

import torch

from ipex_quant.numerics.codebooks import FP8_MAX, NF4_LEVELS


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
