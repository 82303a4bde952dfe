import pytest
import torch

from ipex_quant.numerics.affine import dequantize, quantize
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype
from ipex_quant.woq.clip_search import clip_fractions, rtn_searched, search_scales
from ipex_quant.woq.rtn import rtn

INTEGERS = [dtype for dtype in WoqWeightDtype if dtype.has_integers]


@pytest.fixture
def weight():
    """Two groups of 32 and one of 11, with a few large weights."""
    weight = torch.randn(70, 75, generator=torch.Generator().manual_seed(1))
    weight[:, ::17] *= 2
    weight[3, :32] = 0
    return weight


def _error(weight, scheme, importance, scales, zero_points):
    """Weighted cubed errors of every group, ``[N, groups]``, computed group by group."""
    errors = (dequantize(quantize(weight, scheme, scales, zero_points)) - weight).abs() ** 3 * importance
    return torch.stack([group.sum(1) for group in errors.split(scheme.group_size, 1)], 1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_no_fraction_of_the_range_has_less_error(dtype, symmetric, weight):
    scheme = WeightScheme(dtype, symmetric, 32)
    importance = torch.rand(75, generator=torch.Generator().manual_seed(2))
    fractions = clip_fractions(6, 0.7)
    scales, zero_points = search_scales(weight, scheme, importance, fractions)
    nearest = rtn(weight, scheme)
    assert symmetric == (zero_points is None)
    assert symmetric or torch.equal(zero_points, nearest.zero_points)
    found = _error(weight, scheme, importance, scales, zero_points)
    errors = torch.stack([_error(weight, scheme, importance, nearest.scales * f, zero_points) for f in fractions])
    torch.testing.assert_close(found, errors.amin(0))
    if dtype.bits <= 4:
        assert (found < errors[0]).float().mean() > 0.2


def test_an_important_feature_decides(weight):
    scheme = WeightScheme(WoqWeightDtype.INT3, True)
    largest = weight.abs().argmax(1)[0]
    importance = torch.ones(75)
    scales, _ = search_scales(weight[:1], scheme, importance, clip_fractions(10, 0.5))
    importance[largest] = 1e6
    kept, _ = search_scales(weight[:1], scheme, importance, clip_fractions(10, 0.5))
    value = weight[0, largest]
    reached = [float(dequantize(quantize(weight[:1], scheme, each, None))[0, largest]) for each in (scales, kept)]
    assert abs(reached[1] - value) < abs(reached[0] - value)


def test_one_fraction_is_the_range(weight):
    for scheme in (WeightScheme(WoqWeightDtype.INT4, False, 32), WeightScheme(WoqWeightDtype.INT8)):
        scales, zero_points = search_scales(weight, scheme, torch.ones(75), clip_fractions(0, 0.7))
        nearest = rtn(weight, scheme)
        assert torch.equal(scales, nearest.scales)
        assert zero_points is None or torch.equal(zero_points, nearest.zero_points)


def test_scales_fit_their_dtype_or_are_those_of_the_range(weight):
    smallest = 2.0**-24  # of float16; no fraction of it can be held
    weight[0, :32] = 7 * smallest
    scheme = WeightScheme(WoqWeightDtype.INT4, True, 32)
    scales, _ = search_scales(weight, scheme, torch.ones(75), clip_fractions(10, 0.4), torch.float16)
    assert torch.equal(scales.half().float(), scales)
    assert scales[0, 0] == smallest


@pytest.mark.parametrize(
    ("steps", "lowest", "message"),
    [
        (-1, 0.5, "clip_steps: expected at least 0, got -1"),
        (1, 0.0, "lowest_clip: expected a fraction"),
        (1, 1.5, "got 1.5"),
    ],
)
def test_bad_fractions(steps, lowest, message):
    with pytest.raises(ValueError, match=message):
        clip_fractions(steps, lowest)


def test_floats_are_refused(weight):
    with pytest.raises(ValueError, match="expected integers or a table of values, got FP8; round to nearest"):
        search_scales(weight, WeightScheme(WoqWeightDtype.FP8), torch.ones(75), clip_fractions(1, 0.5))


@pytest.mark.parametrize("dtype", [WoqWeightDtype.NF4, WoqWeightDtype.FP4, WoqWeightDtype.IQ4])
def test_no_fraction_of_a_table_on_either_side_has_less_error(dtype, weight):
    scheme = WeightScheme(dtype, True, 32)
    importance = torch.rand(75, generator=torch.Generator().manual_seed(2))
    fractions = clip_fractions(6, 0.7)
    scales, zero_points = search_scales(weight, scheme, importance, fractions)
    assert zero_points is None
    found = _error(weight, scheme, importance, scales, None)
    tried = [sign * rtn(sign * weight, scheme).scales * f for sign in (1, -1) for f in fractions]
    errors = torch.stack([_error(weight, scheme, importance, each, None) for each in tried])
    torch.testing.assert_close(found, errors.amin(0))
    assert (scales < 0).any() == (dtype != WoqWeightDtype.FP4)


def test_rounding_with_searched_scales_keeps_what_counts():
    torch.manual_seed(0)
    weight, inputs = torch.randn(16, 64), torch.randn(500, 64)
    inputs[:, ::3] *= 10
    inputs[:, 1] = 0
    scheme = WeightScheme(WoqWeightDtype.INT3, False, 32)
    importance = inputs.square().mean(0)
    errors = [
        (inputs @ (dequantize(found) - weight).T).square().sum()
        for found in (rtn(weight, scheme, torch.float16), rtn_searched(weight, scheme, importance, torch.float16))
    ]
    assert errors[1] < 0.9 * errors[0]
    assert dequantize(rtn_searched(weight, scheme, torch.zeros(64))).isfinite().all()
