import dataclasses

import pytest
import torch

from ipex_quant.numerics.affine import code_offset, code_range, dequantize
from ipex_quant.numerics.codebooks import CODEBOOKS
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype
from ipex_quant.woq.auto_round import AutoRoundOptions, TunedWeight
from ipex_quant.woq.rtn import rtn

INTEGERS = [dtype for dtype in WoqWeightDtype if dtype.has_integers]
TABLES = [WoqWeightDtype.NF4, WoqWeightDtype.FP4, WoqWeightDtype.IQ4]
GRIDS = [*((dtype, symmetric) for dtype in INTEGERS for symmetric in (True, False)), *((each, True) for each in TABLES)]
SCHEMES = [WeightScheme(dtype, symmetric, 32) for dtype, symmetric in GRIDS]


@pytest.fixture
def weight():
    """Two groups of 32 and one of 11."""
    return torch.randn(24, 75, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scheme", [*SCHEMES, WeightScheme(WoqWeightDtype.INT4, False)], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_a_new_weight_is_rounded_to_nearest(scheme, scale_dtype, weight):
    tuned, nearest = TunedWeight(weight, scheme, scale_dtype), rtn(weight, scheme, scale_dtype)
    found = tuned.quantized_weight()
    torch.testing.assert_close(found.scales, nearest.scales, rtol=1e-6, atol=0)
    assert found.zero_points is None or torch.equal(found.zero_points, nearest.zero_points)
    assert torch.equal(dequantize(found), tuned.values())
    assert torch.isclose(dequantize(found), dequantize(nearest)).float().mean() > 0.99


def _reference(weight, scheme, offsets, high_clip, low_clip):
    """The paper's formula for one group per row, with rounding that passes gradients, from its own ranges."""

    def rounded(x):
        return x + (x.round() - x).detach()

    lowest, highest = code_range(scheme.dtype)
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    if scheme.symmetric:
        scale = torch.maximum(high, -low) * high_clip / (2 ** (scheme.dtype.bits - 1) - 1)
        zero = code_offset(scheme.dtype)
    else:
        nearest = (high - low) / (highest - lowest)
        zero = lowest - torch.round(low / nearest)
        low, high = nearest * (lowest - zero), nearest * (highest - zero)
        scale = (high * high_clip - low * low_clip) / (highest - lowest)
        zero = lowest - rounded(low * low_clip / scale)
    codes = (rounded(weight / scale + offsets) + zero).clamp(lowest, highest)
    return (codes - zero) * scale


@pytest.mark.parametrize("scheme", [WeightScheme(dtype, s) for dtype in INTEGERS for s in (True, False)], ids=str)
def test_a_step_is_that_of_autograd(scheme, weight):
    generator = torch.Generator().manual_seed(3)
    tuned = TunedWeight(weight, scheme)
    tuned.offsets.copy_(torch.rand(24, 1, 75, generator=generator) * 0.6 - 0.3)
    for clip in tuned.parameters[1:]:
        clip.copy_(torch.rand(24, 1, generator=generator) * 0.4 + 0.5)  # so that some weights are clipped
    before = [each.clone() for each in tuned.parameters]
    gradient = torch.randn(24, 75, generator=generator)
    offsets = before[0][:, 0].clone().requires_grad_()
    clips = [clip.clone().requires_grad_() for clip in before[1:]]
    values = _reference(weight, scheme, offsets, *(clips if len(clips) == 2 else [*clips, None]))
    torch.testing.assert_close(values.detach(), tuned.values(), rtol=1e-5, atol=1e-5)
    values.backward(gradient)
    tuned.step(gradient, 0.01, 0.02)
    assert torch.equal(tuned.offsets[:, 0], (before[0][:, 0] - 0.01 * offsets.grad.sign()).clamp(-0.5, 0.5))
    for clip, old, wanted in zip(tuned.parameters[1:], before[1:], clips, strict=True):
        expected = old - 0.02 * wanted.grad.sign()
        assert (clip - expected).abs().lt(1e-6).float().mean() > 0.95  # a sum close to 0 may have either sign


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", TABLES)
def test_a_step_with_a_table_is_that_of_autograd(dtype, sign, weight):
    generator = torch.Generator().manual_seed(3)
    scheme = WeightScheme(dtype)
    start = rtn(weight, scheme)
    start = dataclasses.replace(start, scales=start.scales * sign * 0.7)  # some weights are clipped
    tuned = TunedWeight(weight, scheme, start=start)
    tuned.offsets.copy_(torch.rand(24, 1, 75, generator=generator) * 0.6 - 0.3)
    tuned.high_clip.copy_(torch.rand(24, 1, generator=generator) * 0.2 + 0.8)
    clip = tuned.high_clip.clone().requires_grad_()
    offsets = tuned.offsets[:, 0].clone().requires_grad_()

    levels = CODEBOOKS[dtype].unique()
    scales = start.scales * clip
    scaled = weight / scales
    below = (scaled.detach().unsqueeze(-1) >= levels[:-1]).sum(-1).sub(1).clamp(min=0)
    gaps = levels.diff()[below]
    codes = (below + (scaled - levels[below]) / gaps + offsets).round()
    kept = codes.clamp(0, len(levels) - 1)
    moved = (scaled + offsets * gaps) * (codes == kept)  # what passes the gradient
    values = (moved + (levels[kept.int()] - moved).detach()) * scales
    torch.testing.assert_close(values.detach(), tuned.values(), rtol=1e-5, atol=1e-5)
    assert (codes != kept).any()
    gradient = torch.randn(24, 75, generator=generator)
    values.backward(gradient)
    before = tuned.offsets[:, 0].clone()
    tuned.step(gradient, 0.01, 0.02)
    assert torch.equal(tuned.offsets[:, 0], (before - 0.01 * offsets.grad.sign()).clamp(-0.5, 0.5))
    expected = (clip - 0.02 * clip.grad.sign()).clamp(max=1)
    assert (tuned.high_clip - expected).abs().lt(1e-6).float().mean() > 0.9
    found = tuned.quantized_weight()
    assert (found.scales * sign > 0).all()
    assert torch.equal(dequantize(found), tuned.values())


@pytest.mark.parametrize("dtype", [WoqWeightDtype.INT3, WoqWeightDtype.IQ4])
def test_steps_lower_the_error_of_the_outputs(dtype, weight):
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(300, 12, generator=generator) @ torch.randn(12, 75, generator=generator)
    scheme = WeightScheme(dtype, dtype == WoqWeightDtype.IQ4, 32)
    tuned = TunedWeight(weight, scheme)

    def change():
        return tuned.values() - weight

    first = (inputs @ change().t()).norm()
    for step in range(60):
        tuned.step(change() @ (inputs.t() @ inputs), 0.5 / 60 * (1 - step / 60), 0.0)
    assert (inputs @ change().t()).norm() < 0.8 * first
    assert torch.equal(dequantize(tuned.quantized_weight()), tuned.values())


def test_it_starts_on_the_grid_that_is_given(weight):
    scheme = WeightScheme(WoqWeightDtype.INT4, False, 32)
    start = rtn(weight * 0.8, scheme, torch.float16)
    found = TunedWeight(weight, scheme, torch.float16, start).quantized_weight()
    assert torch.equal(found.scales, start.scales)
    assert torch.equal(found.zero_points, start.zero_points)


def test_the_rate_falls_to_0():
    options = AutoRoundOptions(steps=4, rate=0.2)
    assert [options.rate_at(step) for step in range(5)] == pytest.approx([0.2, 0.15, 0.1, 0.05, 0.0])
    assert AutoRoundOptions(steps=50).rate_at(0) == 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"rate": 0.0}, "rate: expected a number above 0"),
        ({"rate": float("nan")}, "rate: expected a number above 0"),
        ({"clip_rate": -1.0}, "clip_rate: expected a number from 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        AutoRoundOptions(**options)


def test_bad_weights(weight):
    with pytest.raises(ValueError, match="expected integers or a table of values, got FP8"):
        TunedWeight(weight, WeightScheme(WoqWeightDtype.FP8))
    with pytest.raises(ValueError, match="weight: expected finite"):
        TunedWeight(weight * float("nan"), SCHEMES[0])
