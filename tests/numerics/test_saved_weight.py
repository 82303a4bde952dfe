import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant import ops
from ipex_quant.numerics import affine
from ipex_quant.numerics.quantized_stack import QuantizedStack
from ipex_quant.numerics.saved_weight import saved_places, saved_stack, saved_weight, to_saved
from ipex_quant.numerics.scheme import PER_CHANNEL, WeightScheme, WoqWeightDtype

KINDS = [(dtype, symmetric) for dtype in WoqWeightDtype for symmetric in (True, False)[: 1 + dtype.has_integers]]
STREAMED = (WoqWeightDtype.INT2, WoqWeightDtype.INT3, WoqWeightDtype.INT5, WoqWeightDtype.INT6)


def weight(scheme, n=5, k=70, seed=0):
    return affine.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)), scheme)


def ordered(qw, seed=0):
    groups = affine.feature_groups(qw).int()
    return dataclasses.replace(
        qw, g_idx=groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))]
    )


def with_supers(dtype, symmetric=False, n=6, k=128, factor_dtype=torch.int8):
    """A weight in groups of 16 and super groups of 64, whose factors are random ones of `factor_dtype`."""
    plain = weight(WeightScheme(dtype, symmetric, 16), n, k)
    scheme = WeightScheme(dtype, symmetric, 16, not symmetric, 64)
    draws = torch.Generator().manual_seed(1)
    parts = {}
    for name in ("scales", "minimums")[: 1 if symmetric else 2]:
        supers = torch.rand(n, 2, generator=draws) / 100
        factors = torch.randint(-128, 128, (n, 8), generator=draws).to(torch.int8)
        if factor_dtype != torch.int8:
            factors = (factors / 64).to(factor_dtype)
        parts |= {f"super_{name}": supers, name: factors.float() * supers.repeat_interleave(4, 1)}
    return dataclasses.replace(plain, zero_points=None, scheme=scheme, **parts)


def assert_same(a, b):
    assert (a.scheme, a.shape) == (b.scheme, b.shape)
    assert list(a.tensors()) == list(b.tensors())
    for name, tensor in a.tensors().items():
        other = b.tensors()[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert torch.equal(tensor.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)), name


def saved_bytes(qw):
    return sum(tensor.nbytes for tensor in to_saved(qw).values())


@settings(deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    group=st.sampled_from([-1, 4, 32]),
    n=st.integers(1, 5),
    k=st.integers(1, 70),
    act_order=st.booleans(),
)
def test_every_weight_comes_back_bit_for_bit(kind, group, n, k, act_order):
    qw = weight(WeightScheme(*kind, group), n, k)
    qw = ordered(qw) if act_order else qw
    saved = to_saved(qw)
    places = saved_places(qw.scheme, qw.shape, act_order)
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == {
        name: place[1] for name, place in places.items() if place is not None
    }
    assert_same(saved_weight(saved, qw.scheme, qw.shape), qw)


@pytest.mark.parametrize("dtype", STREAMED)
def test_codes_are_a_stream_of_bits_along_k(dtype):
    qw = weight(WeightScheme(dtype, False, 32), k=67)
    rows = affine.stored_codes(qw).tolist()
    expected = [sum(code << dtype.bits * k for k, code in enumerate(row)) for row in rows]
    codes = to_saved(qw)["codes"]
    assert codes.dtype == torch.uint8
    assert [int.from_bytes(bytes(row), "little") for row in codes.tolist()] == expected
    assert codes.shape[1] == -(-67 * dtype.bits // 8)


@pytest.mark.parametrize("dtype", [dtype for dtype in WoqWeightDtype if dtype not in STREAMED])
def test_codes_of_4_and_8_bits_are_as_they_are(dtype):
    qw = weight(WeightScheme(dtype, True, 32))
    assert to_saved(qw)["codes"] is qw.codes


def test_scales_are_as_narrow_as_their_values():
    qw = weight(WeightScheme(WoqWeightDtype.INT4, True, 32))
    assert to_saved(qw)["scales"].dtype == torch.float32
    for values, dtype in (
        (qw.scales.half().float(), torch.float16),
        (qw.scales.bfloat16().float() * 2.0**-60, torch.bfloat16),
        (torch.exp2(qw.scales.log2().round()), torch.float8_e5m2),
    ):
        narrow = dataclasses.replace(qw, scales=values)
        assert to_saved(narrow)["scales"].dtype == dtype
        assert_same(saved_weight(to_saved(narrow), qw.scheme, qw.shape), narrow)


@pytest.mark.parametrize("dtype", [dtype for dtype in WoqWeightDtype if dtype.has_integers])
def test_the_lowest_and_highest_zero_points_survive(dtype):
    qw = weight(WeightScheme(dtype, False, 32))
    lowest, highest = (-128, 127) if dtype == WoqWeightDtype.INT8 else (0, 1 << dtype.bits)  # one more than codes
    qw.zero_points[0] = lowest
    qw.zero_points[1] = highest
    assert to_saved(qw)["zero_points"].dtype == torch.int8
    assert_same(saved_weight(to_saved(qw), qw.scheme, qw.shape), qw)


def test_float_minimums_survive():
    plain = weight(WeightScheme(WoqWeightDtype.INT5, False, 32))
    scheme = WeightScheme(WoqWeightDtype.INT5, False, 32, True)
    qw = dataclasses.replace(plain, zero_points=None, minimums=-plain.scales.half().float(), scheme=scheme)
    assert to_saved(qw)["minimums"].dtype == torch.float16
    assert_same(saved_weight(to_saved(qw), scheme, qw.shape), qw)


@pytest.mark.parametrize("factor_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[0] not in (WoqWeightDtype.NF4, WoqWeightDtype.FP8)])
def test_scales_with_super_scales_take_a_byte(kind, factor_dtype):
    qw = with_supers(*kind, factor_dtype=factor_dtype)
    saved = to_saved(qw)
    names = ("scale_factors", "minimum_factors")[: 1 if qw.scheme.symmetric else 2]
    assert {name: saved[name].dtype for name in names} == dict.fromkeys(names, factor_dtype)
    assert not {"scales", "minimums"} & saved.keys()
    assert_same(saved_weight(saved, qw.scheme, qw.shape), qw)


def test_super_scales_of_zero():
    qw = with_supers(WoqWeightDtype.INT4)
    for name in ("scales", "minimums"):
        getattr(qw, f"super_{name}")[0] = 0
        getattr(qw, name)[0] = 0
    assert_same(saved_weight(to_saved(qw), qw.scheme, qw.shape), qw)


def test_other_multiples_of_super_scales_are_refused():
    qw = with_supers(WoqWeightDtype.INT4)
    with pytest.raises(ValueError, match=r"scales: expected integers in -128\.\.127, or float8 e4m3 numbers, times"):
        to_saved(dataclasses.replace(qw, scales=qw.scales * 1.01))


@pytest.mark.parametrize("scheme", [WeightScheme(*kind, 32) for kind in KINDS])
@pytest.mark.parametrize("act_order", [False, True])
def test_stacks_are_saved_as_their_weights_are(scheme, act_order):
    weights = [weight(scheme, seed=seed) for seed in range(3)]
    weights = [ordered(qw, seed) for seed, qw in enumerate(weights)] if act_order else weights
    stack = QuantizedStack.of(weights)
    saved = to_saved(stack)
    assert all(torch.equal(codes, to_saved(qw)["codes"]) for codes, qw in zip(saved["codes"], weights, strict=True))
    places = saved_places(scheme, stack.shape, act_order)
    assert all(tuple(tensor.shape) == places[name][1] for name, tensor in saved.items())
    assert_same(saved_stack(saved, scheme, stack.shape), stack)


def test_stacks_with_super_scales():
    stack = QuantizedStack.of([with_supers(WoqWeightDtype.INT3)] * 2)
    assert_same(saved_stack(to_saved(stack), stack.scheme, stack.shape), stack)


@pytest.mark.parametrize("dtype", list(WoqWeightDtype))
@pytest.mark.parametrize("half", [False, True])
def test_saved_weights_take_the_bytes_of_packed_ones(dtype, half):
    qw = weight(WeightScheme(dtype, not dtype.has_integers, 32), 64, 256)
    qw = dataclasses.replace(qw, scales=qw.scales.half().float()) if half else qw
    assert saved_bytes(qw) + 64 == ops.pack_weight(qw).nbytes  # which has a header


def test_two_level_scales_take_the_bytes_of_packed_ones():
    for qw in (
        with_supers(WoqWeightDtype.INT4, n=64),
        with_supers(WoqWeightDtype.FP4, True, 64, 128, torch.float8_e4m3fn),
    ):
        assert saved_bytes(qw) + 64 == ops.pack_weight(qw).nbytes


def test_wider_dtypes_mean_the_same():
    """As releases of transformers make them that cast to the dtype of the place."""
    for qw in (
        weight(WeightScheme(WoqWeightDtype.INT8, False, 32)),
        with_supers(WoqWeightDtype.INT4),
        with_supers(WoqWeightDtype.FP4, True, factor_dtype=torch.float8_e4m3fn),
        dataclasses.replace(weight(WeightScheme(WoqWeightDtype.NF4)), scales=torch.ones(5, 1)),
    ):
        places = saved_places(qw.scheme, qw.shape, False)
        wide = {name: tensor.to(places[name][0]) for name, tensor in to_saved(qw).items()}
        assert_same(saved_weight(wide, qw.scheme, qw.shape), qw)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("codes", lambda t: t[:, :-1], ValueError, r"codes: expected shape \[6, 48\], got \[6, 47\]"),
        ("codes", lambda t: t.repeat(1, 2), ValueError, r"codes: expected shape \[6, 48\], got \[6, 96\]"),
        ("codes", lambda t: t.to(torch.int8), TypeError, r"codes: expected dtype torch\.uint8, got torch\.int8"),
        ("super_scales", lambda t: t[:, :1], ValueError, r"super_scales: expected shape \[6, 2\], got \[6, 1\]"),
        ("super_scales", lambda t: t.int(), TypeError, "super_scales: expected dtype torch.float8_e5m2 or"),
        ("super_scales", lambda t: t / 0, ValueError, "scales: expected finite values"),
        ("scale_factors", lambda t: t[:, :3], ValueError, r"scale_factors: expected shape \[6, 8\], got \[6, 3\]"),
        ("scale_factors", lambda t: t.half(), TypeError, "scale_factors: expected dtype torch.int8 or"),
        ("scale_factors", lambda t: None, ValueError, "scale_factors: a int3 min g16 in g64 weight must have them"),
        ("scales", lambda t: torch.ones(6, 8), ValueError, "scales: a int3 min g16 in g64 weight must not have them"),
        ("zero_points", lambda t: torch.ones(6, 8), ValueError, "zero_points: a int3 .* must not have them"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name, change, error, message):
    qw = with_supers(WoqWeightDtype.INT3)
    saved = to_saved(qw)
    with pytest.raises(error, match=message):
        saved_weight(saved | {name: change(saved.get(name))}, qw.scheme, qw.shape)


def test_places_of_a_per_channel_weight():
    scheme = WeightScheme(WoqWeightDtype.INT6, False, PER_CHANNEL)
    assert {name: place for name, place in saved_places(scheme, (4, 6, 10), True).items() if place} == {
        "codes": (torch.uint8, (4, 6, 8)),
        "scales": (torch.float32, (4, 6, 1)),
        "zero_points": (torch.int16, (4, 6, 1)),
        "g_idx": (torch.int32, (4, 10)),
    }
    assert {"scale_factors", "minimums"} <= {n for n, place in saved_places(scheme, (6, 10), True).items() if not place}
