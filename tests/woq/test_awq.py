import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant.numerics.affine import dequantize, quantize
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype
from ipex_quant.woq.awq import AwqOptions, InputSample, clipped, scale_of, search_scale

SCHEME = WeightScheme(WoqWeightDtype.INT4, True, 16)
OPTIONS = AwqOptions()


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _change(weight, scheme, inputs, scale=None):
    """By how much quantizing changes the outputs, with `scale` moved from the input to the weight."""
    scale = torch.ones(weight.shape[1]) if scale is None else scale
    return ((inputs / scale) @ dequantize(quantize(weight * scale, scheme)).t() - inputs @ weight.t()).double()


def test_a_salient_channel_is_scaled_up_and_its_error_reduced():
    weight, inputs = _normal(48, 64), _normal(200, 64, seed=1)
    inputs[:, 5] *= 50
    found = search_scale([weight], [SCHEME], inputs, inputs.abs().mean(0))
    others = torch.arange(64) != 5
    assert found.alpha > 0
    assert found.scale[5] > 3 * found.scale[others].max()
    assert found.error < 0.5 * found.plain_error

    def channel_error(scale):
        return (dequantize(quantize(weight * scale, SCHEME)) / scale - weight)[:, 5].norm()

    assert channel_error(found.scale) < 0.5 * channel_error(torch.ones(64))


def test_errors_are_those_of_the_whole_share_group():
    weights, inputs = [_normal(24, 64), _normal(40, 64, seed=2)], _normal(100, 64, seed=1)
    schemes = [SCHEME, WeightScheme(WoqWeightDtype.INT8, False)]
    inputs[:, :3] *= 20
    found = search_scale(weights, schemes, inputs, inputs.abs().mean(0), alpha_steps=7)
    for error, scale in ((found.error, found.scale), (found.plain_error, None)):
        expected = sum(_change(*each, inputs, scale).square().sum() for each in zip(weights, schemes, strict=True))
        assert error == pytest.approx(float(expected), rel=1e-3)
    tried = [scale_of(inputs.abs().mean(0), step / 7) for step in range(1, 8)]
    errors = [sum(_change(*e, inputs, s).square().sum() for e in zip(weights, schemes, strict=True)) for s in tried]
    assert found.alpha == pytest.approx((1 + torch.stack(errors).argmin().item()) / 7)


def test_scales_are_powers_of_the_magnitude_around_one():
    magnitude = torch.tensor([1.0, 4.0, 16.0])
    torch.testing.assert_close(scale_of(magnitude, 0.5), torch.tensor([0.5, 1.0, 2.0]))
    torch.testing.assert_close(scale_of(magnitude, 1.0), torch.tensor([0.25, 1.0, 4.0]))


def test_channels_that_are_always_zero_are_not_scaled():
    scale = scale_of(torch.tensor([0.0, 1.0, 100.0, 0.0]), 0.5)
    assert scale[0] == scale[3] == 1
    assert scale[2] / scale[1] == pytest.approx(10)
    assert torch.isfinite(scale_of(torch.tensor([1e-30, 1.0]), 1.0)).all()


def test_inputs_of_zeros_leave_the_weight_alone():
    weight, inputs = _normal(8, 32), torch.zeros(10, 32)
    found = search_scale([weight], [SCHEME], inputs, torch.zeros(32))
    assert (found.alpha, found.error) == (0, 0)
    assert torch.equal(found.scale, torch.ones(32))
    assert torch.equal(clipped(weight, SCHEME, inputs, OPTIONS), weight)


def test_an_outlier_that_meets_no_activation_is_cut():
    weight, inputs = _normal(6, 32).clamp(-2, 2), _normal(100, 32, seed=1)
    weight[:, 3] = 4.0
    inputs[:, 3] *= 1e-3
    cut = clipped(weight, SCHEME, inputs, OPTIONS)
    assert (cut[:, 3] < 2.6).all()
    assert _change(cut, SCHEME, inputs).norm() < 0.8 * _change(weight, SCHEME, inputs).norm()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    group_size=st.sampled_from([-1, 8, 32, 128]),
    dtype=st.sampled_from(list(WoqWeightDtype)),
    symmetric=st.booleans(),
)
def test_clipping_takes_the_best_of_the_fractions_group_by_group(rows, columns, group_size, dtype, symmetric):
    """Against every group of every row on its own, with the outputs that the groups before it have changed."""
    symmetric = symmetric or not dtype.has_integers
    scheme = WeightScheme(dtype, symmetric, group_size)
    weight, inputs = _normal(rows, columns), _normal(12, columns, seed=1).abs() ** 2
    options = AwqOptions(clip_steps=4, lowest_clip=0.6)
    cut = clipped(weight, scheme, inputs, options)
    fractions = torch.linspace(1, 0.6, 5, dtype=torch.float32).tolist()  # of 2 bits, an ulp turns a code
    size = columns if group_size == -1 else group_size
    own = WeightScheme(dtype, symmetric)  # a group is a whole row

    def change(values, part, start):
        rounded = dequantize(quantize(values, own)) - part
        return (inputs[:, start : start + size].double() @ rounded.t().double()).squeeze(1)

    for row in range(rows):
        before = torch.zeros(len(inputs), dtype=torch.float64)
        for start in range(0, columns, size):
            part = weight[row : row + 1, start : start + size]
            bounds = [part.abs().max() * fraction for fraction in fractions]
            errors = [float((before + change(part.clamp(-b, b), part, start)).square().sum()) for b in bounds]
            before += change(cut[row : row + 1, start : start + size], part, start)
            assert float(before.square().sum()) == pytest.approx(min(errors), rel=1e-3, abs=1e-5)


def test_sample_keeps_the_mean_of_all_and_some_vectors():
    inputs = _normal(300, 8)
    sample = InputSample(8, 40)
    for part in inputs.split(70):
        sample.add(part[None].bfloat16())
    seen = inputs.bfloat16().float()
    torch.testing.assert_close(sample.magnitude, seen.abs().mean(0))
    assert sample.count == 300
    assert sample.vectors.shape == (40, 8)
    places = [int((seen == vector).all(1).nonzero()) for vector in sample.vectors]
    assert places == sorted(set(places))
    assert min(places) < 60
    assert max(places) > 240
    few = InputSample(8, 400)
    few.add(inputs)
    assert torch.equal(few.vectors, inputs)


def test_sample_without_vectors():
    sample = InputSample(8, 4)
    sample.add(torch.empty(0, 8))
    assert sample.count == 0
    assert not sample.magnitude.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(value):
    inputs = torch.ones(2, 8)
    inputs[1, 3] = value
    with pytest.raises(ValueError, match="inputs: expected finite values, got NaN or Inf"):
        InputSample(8, 4).add(inputs)


def test_inputs_of_another_width():
    with pytest.raises(ValueError, match=r"inputs: expected shape \[\.\.\., 8\], got \[2, 7\]"):
        InputSample(8, 4).add(torch.ones(2, 7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_steps": -1}, "alpha_steps: expected at least 0, got -1"),
        ({"clip_steps": -1}, "clip_steps: expected at least 0, got -1"),
        ({"tokens": 0}, "tokens: expected at least 1, got 0"),
        ({"lowest_clip": 0.0}, "lowest_clip: expected a fraction of the range, above 0 and at most 1, got 0"),
        ({"lowest_clip": 1.5}, "lowest_clip: expected a fraction"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        AwqOptions(**options)
