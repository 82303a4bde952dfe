"""The plain-torch oracle against independent forms of the same definition."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ipex_quant.numerics import affine
from ipex_quant.numerics.codebooks import NF4_LEVELS
from ipex_quant.numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype
from ipex_quant.ops import reference
from ipex_quant.ops.woq import PostOp

ACT_MODES = [mode for mode in WoqActQuantMode if mode != WoqActQuantMode.NONE]


def rounded_sum(value: Fraction) -> np.float32:
    """Nearest float32 of an exact value: float64 neighbours are compared exactly, so nothing is rounded twice."""
    guess = np.float32(float(value))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(near, key=lambda c: (abs(Fraction(float(c)) - value), int(c.view(np.int32)) & 1))


def test_fma_rounds_once() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-(2**24), 2**24, (500,), generator=generator).float()
    b = torch.randn(500, generator=generator)
    c = -(a.double() * b.double()).float() * torch.randint(0, 3, (500,), generator=generator)
    c[::7] *= 2.0**30
    exact = [
        Fraction(p) * Fraction(q) + Fraction(r) for p, q, r in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    expected = torch.tensor([rounded_sum(value) for value in exact])
    assert torch.equal(reference._fma(a, b, c), expected)


def test_fma_survives_double_rounding() -> None:
    """The exact value lies 2^-70 below a tie of float32: float64 alone drops that and rounds up."""
    ulp = 2.0**-23
    a, b, c = (torch.tensor([v]) for v in (1 + ulp, 2.0**-24 * (1 - ulp), 1 + ulp))
    assert (a.double() * b.double() + c.double()).float().item() == 1 + 2 * ulp
    assert reference._fma(a, b, c).item() == 1 + ulp
    assert reference._fma(-a, b, -c).item() == -1 - ulp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lowp_mode", [WoqLowpMode.NONE, WoqLowpMode.FP16, WoqLowpMode.BF16])
def test_float_modes_round_the_activation_only(dtype: torch.dtype, lowp_mode: WoqLowpMode) -> None:
    x = torch.randn(2, 3, 40).to(dtype)
    qw = affine.quantize(torch.randn(5, 40), WeightScheme(WoqWeightDtype.INT4, False, 16))
    bias = torch.randn(5)
    compute = {WoqLowpMode.NONE: dtype, WoqLowpMode.FP16: torch.float16, WoqLowpMode.BF16: torch.bfloat16}[lowp_mode]
    expected = F.linear(x.to(compute).double(), affine.dequantize(qw).double(), bias.double()).to(dtype)
    result = reference.woq_linear(x, qw, bias, lowp_mode)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected)


def quantize_row_by_hand(values: list[np.float32], low: float, high: float, symmetric: bool):
    """Codes, zero point and scale of one block, a scalar at a time."""
    one = np.float32
    if symmetric:
        span, steps, bounds = max(-one(low), one(high)), one(127), (-127, 127)
    else:
        span, steps, bounds = one(high) - one(low), one(255), (0, 255)
    if span == 0:
        return [0] * len(values), 0, span
    inverse = one(steps / span)
    zero = 0 if symmetric else min(255, max(0, int(np.rint(one(-one(low) * inverse)))))
    codes = [min(bounds[1], max(bounds[0], int(np.rint(one(v * inverse))) + zero)) for v in values]
    return codes, zero, one(span / steps)


@pytest.mark.parametrize("mode", ACT_MODES)
def test_activations_are_quantized_as_defined(mode: WoqActQuantMode) -> None:
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(int(mode)))
    x[1] = x[1].abs() + 1
    x[2, 4:8] = 0
    act = reference.quantize_activation(x, 4, mode)
    symmetric = mode.name.endswith("_SYM")
    blocked = "IC_BLOCK" in mode.name
    shared = "BATCH" not in mode.name
    assert act.block == (4 if blocked else 10)
    for row in range(3):
        for block, start in enumerate(range(0, 10, act.block)):
            part = x[:, start : start + act.block]
            scope = part if shared else part[row : row + 1]
            low, high = min(0.0, scope.min().item()), max(0.0, scope.max().item())
            codes, zero, scale = quantize_row_by_hand(list(part[row].numpy()), low, high, symmetric)
            assert act.codes[row, start : start + act.block].tolist() == codes
            assert act.zero_points[row, block].item() == zero
            assert act.scales[row, block].item() == scale


def test_zero_activations_stay_zero() -> None:
    for mode in ACT_MODES:
        act = reference.quantize_activation(torch.zeros(2, 8), 4, mode)
        assert not act.codes.any()
        assert not act.zero_points.any()
        assert not act.scales.any()


@pytest.mark.parametrize("mode", ACT_MODES)
@pytest.mark.parametrize("group_size", [-1, 2, 8, 64])
@pytest.mark.parametrize(
    ("dtype", "symmetric"),
    [
        (WoqWeightDtype.INT8, True),
        (WoqWeightDtype.INT8, False),
        (WoqWeightDtype.INT4, True),
        (WoqWeightDtype.INT4, False),
    ],
)
def test_int8_mode_multiplies_restored_activations(dtype, symmetric, group_size, mode) -> None:
    x = torch.randn(3, 150, generator=torch.Generator().manual_seed(3))
    qw = affine.quantize(torch.randn(4, 150), WeightScheme(dtype, symmetric, group_size))
    act = reference.quantize_activation(x, 128 if group_size == -1 else group_size, mode)
    blocks = torch.arange(150) // act.block
    restored = (act.codes - act.zero_points[:, blocks]).double() * act.scales[:, blocks].double()
    expected = restored @ affine.dequantize(qw).double().T
    result = reference.woq_linear(x, qw, None, WoqLowpMode.INT8, mode)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    assert (result.double() - x.double() @ affine.dequantize(qw).double().T).abs().max() > 1e-5


def test_int8_mode_rounds_nf4_levels_to_bytes() -> None:
    qw = affine.quantize(torch.randn(3, 20), WeightScheme(WoqWeightDtype.NF4, group_size=8))
    codes = torch.tensor([[c & 15, c >> 4] for c in qw.codes.flatten().tolist()]).reshape(3, 20)
    weight = (NF4_LEVELS * 127).round()[codes] * qw.scales.repeat_interleave(8, 1)[:, :20] / 127
    x = torch.tensor(127.0) * torch.eye(20)
    result = reference.woq_linear(x, qw, None, WoqLowpMode.INT8, WoqActQuantMode.PER_BATCH_SYM)
    torch.testing.assert_close(result, 127 * weight.T)


@pytest.mark.parametrize("dtype", [WoqWeightDtype.FP8, WoqWeightDtype.BNB_FP4])
def test_int8_mode_keeps_weights_exact_that_do_not_fit_int8(dtype: WoqWeightDtype) -> None:
    qw = affine.quantize(torch.randn(3, 20), WeightScheme(dtype, group_size=8))
    x = torch.tensor(127.0) * torch.eye(20)
    result = reference.woq_linear(x, qw, None, WoqLowpMode.INT8, WoqActQuantMode.PER_BATCH_SYM)
    torch.testing.assert_close(result, 127 * affine.dequantize(qw).T, rtol=1e-7, atol=0)


@pytest.mark.parametrize("lowp_mode", [WoqLowpMode.NONE, WoqLowpMode.INT8])
def test_g_idx_only_reorders_features(lowp_mode: WoqLowpMode) -> None:
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    plain = affine.quantize(torch.randn(4, 50), WeightScheme(WoqWeightDtype.INT8, False, 16))
    position = order.argsort()
    shuffled = reference.QuantizedWeight(
        plain.codes[:, position],
        plain.scales,
        plain.zero_points,
        (position // 16).int(),
        plain.scheme,
        plain.shape,
    )
    x = torch.randn(3, 50)
    assert torch.equal(affine.dequantize(shuffled), affine.dequantize(plain)[:, position])
    torch.testing.assert_close(
        reference.woq_linear(x[:, position], shuffled, None, lowp_mode, WoqActQuantMode.PER_BATCH_IC_BLOCK),
        reference.woq_linear(x, plain, None, lowp_mode, WoqActQuantMode.PER_BATCH_IC_BLOCK),
    )


def test_post_ops_round_before_the_addition() -> None:
    qw = affine.quantize(torch.randn(6, 30), WeightScheme())
    x = torch.randn(4, 30).bfloat16()
    y, z = torch.randn(4, 6).bfloat16(), torch.randn(4, 6).bfloat16()
    plain = reference.woq_linear(x, qw)
    expected = {
        PostOp.RELU: F.relu(plain),
        PostOp.GELU: F.gelu(plain),
        PostOp.NEW_GELU: F.gelu(plain, approximate="tanh"),
        PostOp.SILU: F.silu(plain),
        PostOp.ADD: plain + y,
        PostOp.ADD_ADD: plain + y + z,
        PostOp.MUL: plain * y,
        PostOp.RELU2: plain.relu().square(),
    }
    others = {PostOp.ADD: (y,), PostOp.ADD_ADD: (y, z), PostOp.MUL: (y,)}
    for post_op, value in expected.items():
        result = reference.woq_linear(x, qw, post_op=post_op, others=others.get(post_op, ()))
        # torch's GELU differs in a last bit between whole vectors and what is left of them
        torch.testing.assert_close(result, value, rtol=2.0**-8, atol=1e-6, msg=post_op.name)
    assert set(expected) == set(PostOp) - {PostOp.NONE}


@pytest.mark.parametrize("mode", ACT_MODES)
def test_empty_batch(mode: WoqActQuantMode) -> None:
    qw = affine.quantize(torch.randn(6, 30), WeightScheme())
    assert reference.woq_linear(torch.zeros(2, 0, 30), qw, None, WoqLowpMode.INT8, mode).shape == (2, 0, 6)


def test_int8_without_an_activation_mode_is_an_error() -> None:
    qw = affine.quantize(torch.randn(2, 3), WeightScheme())
    with pytest.raises(ValueError, match="act_quant_mode: compute mode INT8 needs one"):
        reference.woq_linear(torch.zeros(1, 3), qw, lowp_mode=WoqLowpMode.INT8)


def test_non_finite_activation_spoils_its_own_row_only() -> None:
    x = torch.randn(3, 32)
    x[1, 5] = math.nan
    qw = affine.quantize(torch.randn(4, 32), WeightScheme(group_size=8))
    result = reference.woq_linear(x, qw, None, WoqLowpMode.INT8, WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM)
    assert result.isnan().all(1).tolist() == [False, True, False]
    assert not result[[0, 2]].isnan().any()
