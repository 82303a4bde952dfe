import dataclasses
import itertools

import pytest
import torch

from ipex_quant import ops
from ipex_quant.numerics.affine import code_values, dequantize
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype
from ipex_quant.woq.gptq import GptqOptions, HessianAccumulator, quantize_weight
from ipex_quant.woq.rtn import rtn

INT4, INT8 = WoqWeightDtype.INT4, WoqWeightDtype.INT8
TABLES = (WoqWeightDtype.NF4, WoqWeightDtype.FP4, WoqWeightDtype.IQ4)
GRIDS = [*itertools.product((INT4, INT8), (True, False)), *((dtype, True) for dtype in TABLES)]
PAPER = GptqOptions(act_order=False, static_groups=False, clip_steps=0, refit=False)


@pytest.fixture
def weight():
    return torch.randn(24, 96, generator=torch.Generator().manual_seed(1)) * 0.05


@pytest.fixture
def inputs():
    """Correlated inputs with a few large features, as in language models."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(600, 24, generator=generator) @ torch.randn(24, 96, generator=generator)
    x += 0.3 * torch.randn(600, 96, generator=generator)
    x[:, ::9] *= 6
    return x


@pytest.fixture
def hessian(inputs):
    return inputs.t() @ inputs / len(inputs)


def _output_error(inputs, weight, qw):
    return float((inputs @ (weight - dequantize(qw)).t()).norm())


ALL_OPTIONS = list(itertools.product((False, True), (False, True), (32, 128)))


@pytest.mark.parametrize("group_size", [-1, 16, 64])
@pytest.mark.parametrize(("dtype", "symmetric"), GRIDS)
def test_beats_round_to_nearest_with_all_options(dtype, symmetric, group_size, weight, inputs, hessian):
    scheme = WeightScheme(dtype, symmetric, group_size)
    nearest = _output_error(inputs, weight, rtn(weight, scheme))
    for act_order, static_groups, block_size in ALL_OPTIONS:
        options = GptqOptions(act_order=act_order, static_groups=static_groups, block_size=block_size)
        error = _output_error(inputs, weight, quantize_weight(weight, hessian, scheme, options))
        assert error < 0.6 * nearest, (options, error / nearest)


@pytest.mark.parametrize(("in_features", "group_size"), [(96, -1), (96, 32), (81, 16), (33, 64)])
@pytest.mark.parametrize(("dtype", "symmetric"), GRIDS)
def test_diagonal_hessian_is_round_to_nearest(dtype, symmetric, in_features, group_size):
    weight, scheme = torch.randn(8, in_features), WeightScheme(dtype, symmetric, group_size)
    hessian = torch.diag(torch.rand(in_features) + 0.1)
    nearest = rtn(weight, scheme)
    for act_order, static_groups in ((False, False), (False, True), (True, True)):
        options = dataclasses.replace(PAPER, act_order=act_order, static_groups=static_groups)
        qw = quantize_weight(weight, hessian, scheme, options)
        assert torch.equal(qw.codes, nearest.codes)
        assert torch.equal(qw.scales, nearest.scales)
        assert symmetric or torch.equal(qw.zero_points, nearest.zero_points)
        assert qw.g_idx is None


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("dtype", TABLES)
def test_a_table_may_stand_upside_down(dtype, refit, weight, inputs, hessian):
    scheme, options = WeightScheme(dtype, True, 32), GptqOptions(refit=refit, scale_dtype=torch.float16)
    turned = quantize_weight(weight, hessian, scheme, options)
    negative = turned.scales < 0
    assert negative.any() == (dtype != WoqWeightDtype.FP4)
    assert torch.equal(turned.scales.half().float(), turned.scales)
    mirrored = quantize_weight(-weight, hessian, scheme, options)
    assert torch.equal(mirrored.scales, -turned.scales) or dtype == WoqWeightDtype.FP4
    values = dequantize(turned)
    computed = ops.woq_linear(inputs, ops.pack_weight(turned).data, len(weight))
    torch.testing.assert_close(computed, inputs @ values.t(), rtol=1e-4, atol=1e-4)


def _obq(weight, hessian, percdamp, scales, zero_points):
    """The paper's recursion as it is derived, with a fresh inverse of what is left for each feature, in float64."""
    w, h = weight.double().clone(), hessian.double()
    h = h + percdamp * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    group = w.shape[1] // scales.shape[1]
    for k in range(w.shape[1]):
        inverse = torch.linalg.inv(h[k:, k:])
        s, z = scales[:, k // group].double(), zero_points[:, k // group].double()
        snapped = ((w[:, k] / s).round() + z).clamp(0, 15).sub(z).mul(s)
        error = (w[:, k] - snapped) / inverse[0, 0]
        w[:, k:] -= error[:, None] * inverse[0]
        w[:, k] = snapped
    return w.float()


@pytest.mark.parametrize("block_size", [1, 20, 128])
def test_agrees_with_the_recursion_of_the_paper(block_size, weight, hessian):
    scheme = WeightScheme(INT4, False, 32)
    qw = quantize_weight(weight, hessian, scheme, dataclasses.replace(PAPER, block_size=block_size))
    expected = _obq(weight, hessian, 0.01, qw.scales, qw.zero_points)
    # Both round, and once in a while a value lies at a rounding boundary.
    assert ((dequantize(qw) - expected).abs() < 1e-5).float().mean() > 0.97


def test_act_order_is_a_permutation_of_the_problem(weight, hessian):
    scheme = WeightScheme(INT4, True, 32)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    qw = quantize_weight(weight, hessian, scheme, dataclasses.replace(PAPER, act_order=True))
    permuted = quantize_weight(weight[:, order], hessian[order][:, order], scheme, PAPER)
    assert torch.equal(code_values(qw)[:, order], code_values(permuted))
    assert torch.equal(dequantize(qw)[:, order], dequantize(permuted))
    assert torch.equal(qw.g_idx[order], torch.arange(96, dtype=torch.int32) // 32)


def test_act_order_needs_a_g_idx_only_with_groups_of_its_own(weight, hessian):
    for group_size, static_groups in ((32, True), (-1, False), (128, False)):
        options = GptqOptions(act_order=True, static_groups=static_groups)
        assert quantize_weight(weight, hessian, WeightScheme(INT4, True, group_size), options).g_idx is None


def test_ragged_last_group(inputs, weight):
    x, w = inputs[:, :75], weight[:, :75]
    for act_order in (False, True):
        scheme = WeightScheme(INT4, False, 32)
        qw = quantize_weight(w, x.t() @ x, scheme, GptqOptions(act_order=act_order, static_groups=False))
        assert _output_error(x, w, qw) < 0.6 * _output_error(x, w, rtn(w, scheme))
        if act_order:
            assert qw.g_idx.bincount().tolist() == [32, 32, 11]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("dtype", [WoqWeightDtype.INT3, INT4])
def test_a_search_of_scales_lowers_the_error(dtype, static_groups, act_order, weight, inputs, hessian):
    scheme = WeightScheme(dtype, True, 32)
    options = GptqOptions(act_order=act_order, static_groups=static_groups, clip_steps=10)
    whole, searched = (
        _output_error(inputs, weight, quantize_weight(weight, hessian, scheme, each))
        for each in (dataclasses.replace(options, clip_steps=0), options)
    )
    assert searched < 0.99 * whole


def test_a_factor_of_the_hessian_does_not_matter(weight, hessian):
    scheme = WeightScheme(INT4, True, 32)
    reference = quantize_weight(weight, hessian, scheme)
    for factor in (2.0**-40, 2.0**40):
        assert torch.equal(quantize_weight(weight, factor * hessian, scheme).codes, reference.codes)


def test_features_without_input_are_rounded_to_nearest(weight, inputs):
    inputs[:, 5:20] = 0
    inputs[:, 90:] = 0
    scheme = WeightScheme(INT4, True)
    qw = quantize_weight(weight, inputs.t() @ inputs, scheme, PAPER)
    nearest = rtn(weight, scheme)
    dead = [*range(5, 20), *range(90, 96)]
    assert torch.equal(code_values(qw)[:, dead], code_values(nearest)[:, dead])
    assert _output_error(inputs, weight, qw) < 0.6 * _output_error(inputs, weight, nearest)


def test_no_input_at_all_is_round_to_nearest(weight):
    scheme = WeightScheme(INT8, False, 32)
    qw = quantize_weight(weight, torch.zeros(96, 96), scheme, GptqOptions(percdamp=0))
    assert torch.equal(qw.codes, rtn(weight, scheme).codes)


def test_singular_hessian_takes_more_damping(weight, inputs):
    few = inputs[:10]  # rank 10 of 96
    scheme = WeightScheme(INT4, True, 32)
    with pytest.warns(UserWarning, match="the Hessian is near singular; trying percdamp 0.0001"):
        qw = quantize_weight(weight, few.t() @ few, scheme, GptqOptions(percdamp=0))
    assert _output_error(few, weight, qw) < 0.2 * _output_error(few, weight, rtn(weight, scheme))


def test_hessian_that_is_not_one_raises(weight):
    with (
        pytest.warns(UserWarning, match="near singular"),
        pytest.raises(RuntimeError, match="the Hessian cannot be inverted"),
    ):
        quantize_weight(weight, -torch.eye(96), WeightScheme(INT4))


@pytest.mark.parametrize("act_order", [False, True])
def test_scales_fit_the_dtype_they_are_stored_in(act_order, weight, hessian, inputs):
    scheme = WeightScheme(INT4, False, 32)
    options = GptqOptions(act_order=act_order, scale_dtype=torch.float16)
    qw = quantize_weight(weight, hessian, scheme, options)
    assert torch.equal(qw.scales.half().float(), qw.scales)
    assert _output_error(inputs, weight, qw) < 0.6 * _output_error(inputs, weight, rtn(weight, scheme))


def test_half_precision_weights_are_not_changed(hessian, weight):
    half = weight.bfloat16()
    before = half.clone()
    qw = quantize_weight(half, hessian, WeightScheme(INT4, True, 32))
    assert torch.equal(half, before)
    assert torch.equal(qw.codes, quantize_weight(before.float(), hessian, WeightScheme(INT4, True, 32)).codes)


def test_the_hessian_is_not_changed(hessian, weight):
    before = hessian.clone()
    quantize_weight(weight, hessian, WeightScheme(INT4, True, 32))
    assert torch.equal(hessian, before)


@pytest.mark.parametrize(
    ("weight", "hessian", "scheme", "error", "message"),
    [
        (torch.full((2, 4), float("nan")), torch.eye(4), WeightScheme(INT4), ValueError, "weight: expected finite"),
        (
            torch.ones(2, 4),
            torch.full((4, 4), float("inf")),
            WeightScheme(INT4),
            ValueError,
            "hessian: expected finite",
        ),
        (
            torch.ones(2, 4),
            torch.eye(5),
            WeightScheme(INT4),
            ValueError,
            r"hessian: expected shape \[4, 4\], got \[5, 5\]",
        ),
        (torch.ones(4), torch.eye(4), WeightScheme(INT4), ValueError, "weight: expected shape"),
        (torch.ones(2, 4, dtype=torch.int32), torch.eye(4), WeightScheme(INT4), TypeError, "weight: expected dtype"),
        (torch.ones(2, 4), torch.eye(4), WeightScheme(WoqWeightDtype.FP8), ValueError, "or a table of values, got FP8"),
    ],
)
def test_bad_input(weight, hessian, scheme, error, message):
    with pytest.raises(error, match=message):
        quantize_weight(weight, hessian, scheme)


def test_bad_options():
    for percdamp in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="percdamp: expected 0 to 10"):
            GptqOptions(percdamp=percdamp)
    with pytest.raises(ValueError, match="block_size: expected at least 1, got 0"):
        GptqOptions(block_size=0)
    with pytest.raises(ValueError, match="clip_steps: expected at least 0, got -1"):
        GptqOptions(clip_steps=-1)
    with pytest.raises(ValueError, match="lowest_clip: expected a fraction"):
        GptqOptions(lowest_clip=0)
    with pytest.raises(ValueError, match="correction: expected a number from 0 to 1, got 2"):
        GptqOptions(correction=2)


def _paired(inputs, seed=5):
    """The inputs of the same layer in a float model."""
    return (
        inputs
        + 0.2 * inputs.roll(1, 1)
        + 0.1 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(seed))
    )


def test_a_shift_moves_the_weight_to_the_least_squares_solution(weight, inputs):
    floats = _paired(inputs)
    seen = HessianAccumulator(96)
    seen.add(inputs, floats)
    scheme = WeightScheme(INT8, True)  # fine enough to see the solution
    qw = quantize_weight(weight, seen.hessian, scheme, GptqOptions(percdamp=0.0), seen.shift)
    solution = torch.linalg.lstsq(inputs.double(), floats.double() @ weight.double().t()).solution.t().float()
    target = floats @ weight.t()
    least = (inputs @ solution.t() - target).norm()
    found, plain = ((inputs @ dequantize(each).t() - target).norm() for each in (qw, rtn(weight, scheme)))
    assert least < found < 1.02 * least
    assert plain > 2 * least


def test_a_share_of_the_shift(weight, inputs):
    seen = HessianAccumulator(96)
    seen.add(inputs, _paired(inputs))
    scheme, target = WeightScheme(INT4, False, 32), _paired(inputs) @ weight.t()
    errors = [
        float((inputs @ dequantize(qw).t() - target).norm())
        for share in (0.0, 0.5, 1.0)
        for qw in [quantize_weight(weight, seen.hessian, scheme, GptqOptions(correction=share), seen.shift)]
    ]
    assert errors == sorted(errors, reverse=True)
    none = quantize_weight(weight, seen.hessian, scheme, GptqOptions())
    off = quantize_weight(weight, seen.hessian, scheme, GptqOptions(correction=0.0), seen.shift)
    assert torch.equal(off.codes, none.codes)


def test_shifts_are_means_of_products(inputs):
    floats = _paired(inputs)
    seen = HessianAccumulator(96)
    seen.add(inputs[:100].view(4, 25, 96), floats[:100].view(4, 25, 96))
    seen.add(inputs[100:150])  # not known in float
    seen.add(inputs[150:200], floats[150:190])  # other positions
    seen.add(inputs[200:], floats[200:])
    known = torch.ones(600, 1)
    known[100:200] = 0
    expected = (known * (floats - inputs)).t() @ inputs / 600
    torch.testing.assert_close(seen.shift, expected, rtol=1e-4, atol=1e-3)


def test_accumulation_is_the_mean_of_outer_products(inputs):
    seen = HessianAccumulator(96)
    seen.add(inputs[:100].view(4, 25, 96))
    seen.add(inputs[100:100])
    seen.add(inputs[100].bfloat16())
    seen.add(inputs[101:])
    exact = inputs.clone()
    exact[100] = exact[100].bfloat16().float()
    assert seen.count == 600
    torch.testing.assert_close(seen.hessian, exact.t() @ exact / 600, rtol=1e-4, atol=1e-3)


def test_accumulation_refuses_another_width():
    for inputs in (torch.ones(3, 5), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"inputs: expected shape \[..., 4\]"):
            HessianAccumulator(4).add(inputs)
