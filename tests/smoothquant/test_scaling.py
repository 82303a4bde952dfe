"""SmoothQuant's factors and parameters against IPEX's own results, bit for bit, and against the definition.

`data/ipex_scaling.safetensors` was recorded from IPEX 2.8.0 with torch 2.8.0 on CPU, one thread, AVX-512. Three modules
of `nn.Linear`: "single" (one 37 -> 11), "attention" (q, k, v 24 -> 24, 8, 24 on one input, o 24 -> 24 on what they
give) and "mlp" (gate, up 24 -> 40 on one input, down 40 -> 24 on gelu(gate) * up); the weights have a column of zeros,
the inputs an outlier channel, a channel of zeros and a mean that moves. `prepare` saw an input of 100s, then three
batches calibrated, and `save_qconf_summary` wrote what is recorded here:

- ``<module>.<layer>.weight`` and ``<module>.<first of share group>.input.<batch>``, what the layer was given;
- ``<module>.<layer>.<shared|own>.<what>`` of `get_smooth_quant_qconfig_mapping(alpha, share_weight_observers)`, stacked
  over `ALPHAS`: act_factor, act_scale, act_zero_point, weight_factor, weight_scales, and codes, the INT8 weight that
  the converted model computed with; "own" only where several layers share the input;
- ``<module>.<layer>.<histogram|minmax>.<what>`` of `default_static_qconfig_mapping` and of a mapping with
  `MinMaxObserver` (quint8, per_tensor_affine) and `PerChannelMinMaxObserver` (qint8, per_channel_symmetric).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ipex_quant.numerics.int8 import affine_parameters, channel_scales, quantize_per_channel
from ipex_quant.smoothquant.scaling import (
    bounded_factors,
    smooth_activation,
    smoothing_factor,
    weight_smoothing_factor,
)

GOLDEN = load_file(Path(__file__).parent / "data" / "ipex_scaling.safetensors")
ALPHAS = (0.0, 0.3, 0.5, 0.8, 1.0)
# torch's powers, and with them IPEX's factors, differ in the last bit from one vector width to another.
SAME_POWERS = torch.backends.cpu.get_cpu_capability() == "AVX512"
GROUPS = {
    "single": [["linear"]],
    "attention": [["q", "k", "v"], ["o"]],
    "mlp": [["gate", "up"], ["down"]],
}
CASES = [
    (module, layer, group if share == "shared" else [layer], group[0], share)
    for module, groups in GROUPS.items()
    for group in groups
    for layer in group
    for share in (("shared", "own") if len(group) > 1 else ("shared",))
]
LAYERS = [(module, layer, group[0]) for module, groups in GROUPS.items() for group in groups for layer in group]


def inputs(module: str, first: str) -> torch.Tensor:
    return torch.cat([GOLDEN[f"{module}.{first}.input.{batch}"].flatten(0, 1) for batch in range(3)])


def channel_ranges(module: str, first: str, members: list[str]) -> tuple[torch.Tensor, ...]:
    weights = torch.cat([GOLDEN[f"{module}.{member}.weight"] for member in members])
    return (*torch.aminmax(inputs(module, first), dim=0), *torch.aminmax(weights, dim=0))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("module", "layer", "members", "first", "share"), CASES)
def test_factors_equal_ipex(module, layer, members, first, share, alpha) -> None:
    ranges = channel_ranges(module, first, members)
    for function, what in ((smoothing_factor, "act_factor"), (weight_smoothing_factor, "weight_factor")):
        ours, theirs = function(*ranges, alpha), GOLDEN[f"{module}.{layer}.{share}.{what}"][ALPHAS.index(alpha)]
        if alpha in (0.0, 0.5, 1.0) or SAME_POWERS:
            assert torch.equal(ours, theirs), what
        else:
            torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("module", "layer", "members", "first", "share"), CASES)
def test_parameters_and_codes_equal_ipex(module, layer, members, first, share, alpha) -> None:
    theirs = {
        what: GOLDEN[f"{module}.{layer}.{share}.{what}"][ALPHAS.index(alpha)]
        for what in ("act_factor", "act_scale", "act_zero_point", "weight_factor", "weight_scales", "codes")
    }
    activation = smooth_activation(*channel_ranges(module, first, members)[:2], theirs["act_factor"])
    assert activation.scale == theirs["act_scale"]
    assert activation.zero_point == theirs["act_zero_point"]
    assert activation.smoothing_factor is theirs["act_factor"]
    weight = quantize_per_channel(GOLDEN[f"{module}.{layer}.weight"] * theirs["weight_factor"])
    assert torch.equal(weight.scales[:, 0], theirs["weight_scales"])
    assert torch.equal(weight.codes, theirs["codes"])


@pytest.mark.parametrize(("module", "layer", "first"), LAYERS)
def test_static_min_max_equals_ipex(module, layer, first) -> None:
    scale, zero_point = affine_parameters(*torch.aminmax(inputs(module, first)))
    assert scale == GOLDEN[f"{module}.{layer}.minmax.act_scale"]
    assert zero_point == GOLDEN[f"{module}.{layer}.minmax.act_zero_point"]


@pytest.mark.parametrize("observer", ["minmax", "histogram"])
@pytest.mark.parametrize(("module", "layer", "first"), LAYERS)
def test_static_weight_equals_ipex(module, layer, first, observer) -> None:
    weight = GOLDEN[f"{module}.{layer}.weight"]
    quantized = quantize_per_channel(weight)
    assert torch.equal(channel_scales(weight), GOLDEN[f"{module}.{layer}.{observer}.weight_scales"])
    assert torch.equal(quantized.codes, GOLDEN[f"{module}.{layer}.{observer}.codes"])


def random_ranges(channels: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Ranges of an activation and a weight, with values of either sign over many magnitudes and dead channels."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randn(2, 2, channels, generator=generator) * 10.0 ** torch.randint(
        -8, 5, (channels,), generator=generator
    )
    ends[:, :, torch.rand(channels, generator=generator) < 0.1] = 0.0
    (act_low, weight_low), (act_high, weight_high) = ends.amin(0), ends.amax(0)
    return act_low, act_high, weight_low, weight_high


@settings(deadline=None)
@given(channels=st.integers(1, 70), alpha=st.floats(0, 1), seed=st.integers(0, 2**16))
def test_factors_are_the_definition_and_undo_each_other(channels: int, alpha: float, seed: int) -> None:
    ranges = random_ranges(channels, seed)
    act, weight = (torch.maximum(ranges[i].abs(), ranges[i + 1].abs()).double() + 1e-6 for i in (0, 2))
    factor = smoothing_factor(*ranges, alpha)
    assert factor.dtype == torch.float32
    torch.testing.assert_close(factor.double(), weight ** (1 - alpha) / act**alpha, rtol=2e-6, atol=0)
    torch.testing.assert_close(factor * weight_smoothing_factor(*ranges, alpha), torch.ones(channels))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("module", "layer", "members", "first", "share"), CASES)
def test_a_bound_leaves_channels_that_were_seen_to_ipex(module, layer, members, first, share, alpha) -> None:
    ranges = channel_ranges(module, first, members)
    seen = (ranges[0] != 0) | (ranges[1] != 0)
    assert seen.any()
    for bounded, function in zip(
        bounded_factors(*ranges, alpha), (smoothing_factor, weight_smoothing_factor), strict=True
    ):
        assert torch.equal(bounded[seen], function(*ranges, alpha)[seen])


@pytest.mark.parametrize("alpha", ALPHAS)
def test_an_unseen_channel_may_reach_what_others_reached(alpha) -> None:
    act, weight = torch.tensor([1.0, 4.0, 0.0]), torch.tensor([0.5, 1.0, 0.5])
    act_factor, weight_factor = bounded_factors(-act, act, -weight, weight, alpha)
    torch.testing.assert_close(act_factor * weight_factor, torch.ones(3))
    expected = 0.5 ** (1 - alpha) / 4.0**alpha  # that of a channel that reached 4
    assert act_factor[2].item() == pytest.approx(expected, rel=1e-5)
    assert 4 * act_factor[2] <= (act * act_factor)[:2].max() * (1 + 1e-5)


def test_an_unseen_channel_does_not_make_the_codes_of_others_coarser() -> None:
    act, weight = torch.tensor([1.0, 100.0, 0.0]), torch.tensor([1.0, 0.01, 3.0])
    _, weight_factor = bounded_factors(-act, act, -weight, weight, 0.5)
    assert (weight * weight_factor)[2].item() == pytest.approx(1.0, rel=1e-4)


@settings(deadline=None)
@given(channels=st.integers(1, 70), alpha=st.floats(0, 1), seed=st.integers(0, 2**16))
def test_a_bound_is_never_above_the_formula(channels: int, alpha: float, seed: int) -> None:
    ranges = random_ranges(channels, seed)
    act_factor, weight_factor = bounded_factors(*ranges, alpha)
    assert (act_factor <= smoothing_factor(*ranges, alpha)).all()
    assert (act_factor > 0).all()
    torch.testing.assert_close(act_factor * weight_factor, torch.ones(channels))


def test_a_channel_of_one_value_has_room_for_the_opposite() -> None:
    low, high = torch.tensor([-3.0, -1.0]), torch.tensor([-3.0, 0.5])
    activation = smooth_activation(low, high, torch.ones(2))
    assert activation.scale == pytest.approx(6 / 255)
    alone = smooth_activation(low[:1], high[:1], torch.ones(1))
    assert (alone.scale, alone.zero_point) == (pytest.approx(3 / 255), 255)  # IPEX's, where none varies


@settings(deadline=None)
@given(channels=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_smoothed_range_covers_every_channel(channels: int, seed: int) -> None:
    act_low, act_high, *weight = random_ranges(channels, seed)
    activation = smooth_activation(act_low, act_high, smoothing_factor(act_low, act_high, *weight, 0.5))
    ends = torch.stack([act_low, act_high])
    codes = torch.round(ends * activation.multiplier) + activation.zero_point
    assert codes.min() >= -1
    assert codes.max() <= 256


def test_alpha_moves_the_outlier_from_the_activation_to_the_weight() -> None:
    low, high = torch.tensor([-1.0, -100.0]), torch.tensor([1.0, 100.0])
    ranges = (low, high, -torch.ones(2), torch.ones(2))
    ratios = [float((high * smoothing_factor(*ranges, alpha)).div(high[0]).max()) for alpha in (0.0, 0.5, 1.0)]
    assert ratios == pytest.approx([100.0, 10.0, 1.0], rel=1e-4)


def test_dead_channels_keep_finite_factors() -> None:
    zeros = torch.zeros(3)
    for alpha in ALPHAS:
        factor = smoothing_factor(zeros, zeros, zeros, zeros, alpha)
        assert torch.isfinite(factor).all()
        assert (factor > 0).all()
    assert smooth_activation(zeros, zeros, torch.ones(3)).scale == torch.finfo(torch.float32).eps


@pytest.mark.parametrize("function", [smoothing_factor, weight_smoothing_factor])
@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan")])
def test_alpha_outside_zero_to_one_is_an_error(function, alpha) -> None:
    with pytest.raises(ValueError, match=f"alpha: expected a number from 0 to 1, got {alpha}"):
        function(*torch.ones(4, 3), alpha)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("position", range(4))
def test_range_that_is_not_finite_is_an_error(position, value) -> None:
    ranges = torch.ones(4, 3)
    ranges[position, 1] = value
    with pytest.raises(ValueError, match="smoothing factor: expected finite ranges, got NaN or Inf"):
        smoothing_factor(*ranges, 0.5)


def test_shapes_that_differ_are_errors() -> None:
    with pytest.raises(ValueError, match=r"expected the same shape \[K\], got \[\[3\], \[3\], \[4\], \[4\]\]"):
        smoothing_factor(torch.ones(3), torch.ones(3), torch.ones(4), torch.ones(4), 0.5)
    with pytest.raises(ValueError, match=r"expected the same shape \[K\], got \[3\], \[3\] and \[4\]"):
        smooth_activation(torch.zeros(3), torch.ones(3), torch.ones(4))
