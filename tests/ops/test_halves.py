"""Joining and splitting of float32 halves, bit for bit as their plain-torch definition."""

from __future__ import annotations

import math

import pytest
import torch

from ipex_quant import ops
from ipex_quant.numerics.halves import join_float32, split_float32

SIZES = [(), (0,), (1,), (7, 0, 8), (33, 1, 16, 5), (70_001,), (3, 200_003, 2)]
SPECIAL = torch.tensor(
    [0, math.inf, math.nan, 1e-45, 1e-42, 1.17549435e-38, 1.0, 1.00390625, 1.01171875, 3.4028235e38, 3.3961775e38]
)
"""Zero, the ends, a NaN, denormals, ties between two bfloat16, and what rounds to an infinity."""


def bits(count: int, seed: int = 0) -> torch.Tensor:
    """Random bits of float32, from all of them, and special values."""
    generator = torch.Generator().manual_seed(seed)
    result = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64).to(torch.int32)
    special = torch.cat([SPECIAL, -SPECIAL]).view(torch.int32)[:count]
    result[: len(special)] = special
    return result


def empty_halves(sizes: tuple[int, ...]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [torch.zeros(n, dtype=torch.bfloat16) for n in sizes], [torch.zeros(n, dtype=torch.int16) for n in sizes]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all bits are the same."""
    dtype = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.view(dtype), b.view(dtype))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_bits_of_the_definition(sizes, threads):
    before = torch.get_num_threads()
    values = bits(sum(sizes)).view(torch.float32)
    highs, lows = empty_halves(sizes)
    joined = torch.zeros_like(values)
    torch.set_num_threads(threads)
    try:
        ops.split_halves(values, highs, lows)
        ops.join_halves(highs, lows, joined)
    finally:
        torch.set_num_threads(before)
    for part, back, high, low in zip(values.split(sizes), joined.split(sizes), highs, lows, strict=True):
        expected_high, expected_low = split_float32(part)
        assert same(high, expected_high)
        assert same(low, expected_low)
        assert same(back, join_float32(high, low))
        assert torch.equal(back.isnan(), part.isnan())
        assert same(back[~part.isnan()], part[~part.isnan()])


def test_rounds_to_nearest_with_ties_away_from_zero():
    values = torch.tensor([1.0, 1.00390625, -1.00390625, 1.0039061, 1.01171875, 3.4028235e38])
    (high,), (low,) = halves = empty_halves((6,))
    ops.split_halves(values, *halves)
    assert high.tolist() == [1.0, 1.0078125, -1.0078125, 1.0, 1.015625, math.inf]
    assert low.tolist() == [0, -0x8000, -0x8000, 0x7FFF, -0x8000, -1]


def test_every_nan_stays_a_nan():
    payloads = torch.tensor([0x7F800001, 0x7F80FFFF, 0x7FBFFFFF, 0x7FFFFFFF, 0x7FC00000], dtype=torch.int32)
    values = torch.cat([payloads, payloads | -(2**31)]).view(torch.float32)
    (high,), (low,) = halves = empty_halves((10,))
    ops.split_halves(values, *halves)
    joined = torch.zeros(10)
    ops.join_halves(*halves, joined)
    assert high.isnan().all()
    assert joined.isnan().all()
    assert not low.any()
    assert (joined.view(torch.int32) & 0x00400000).all()  # quiet


def test_all_stale_lows_as_in_the_definition():
    """Every bfloat16 with the ends of int16, and every int16 with zeros and ones."""
    every = torch.arange(-0x8000, 0x8000).to(torch.int16)
    highs = [every.view(torch.bfloat16)] * 5
    lows = [torch.full_like(every, low) for low in (-0x8000, -1, 0, 1, 0x7FFF)]
    for high in (0.0, -0.0, 1.0):
        highs.append(torch.full((0x10000,), high, dtype=torch.bfloat16))
        lows.append(every)
    highs = [high.clone() for high in highs]
    values = torch.empty(8 * 0x10000)
    ops.join_halves(highs, [low.clone() for low in lows], values)
    for value, high, low in zip(values.split(0x10000), highs, lows, strict=True):
        assert same(value, join_float32(high, low))
    assert not values[5 * 0x10000 :].isnan().any()


def test_views_at_any_element():
    """Nothing beside the views is written."""
    values = bits(400).view(torch.float32)
    high, low, joined = torch.zeros(410).bfloat16(), torch.zeros(410, dtype=torch.int16), torch.zeros(410)
    parts = [(3, 50), (55, 301), (360, 49)]
    views = [[half[start : start + size] for start, size in parts] for half in (high, low)]
    ops.split_halves(values, *views)
    ops.join_halves(*views, joined[1:401])
    expected_high, expected_low = split_float32(values)
    assert same(torch.cat(views[0]), expected_high)
    assert same(torch.cat(views[1]), expected_low)
    assert same(joined[1:401], join_float32(expected_high, expected_low))
    beside = torch.ones(410, dtype=torch.bool)
    for start, size in parts:
        beside[start : start + size] = False
    assert not high[beside].any()
    assert not low[beside].any()
    assert joined[0] == 0
    assert not joined[401:].any()


SGD = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.1, "maximize": True, "factor": 0.3},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "factor": 3.0},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "first": True},
]


@pytest.mark.parametrize("options", SGD)
def test_sgd_has_the_bits_of_torchs_fused_kernel(options):
    """Sizes that threads and blocks do not divide; torch's vectors do, since its remainders may round once less."""
    sizes, momentum = (16, 0, 70_000, 1024, 33_008), options.get("momentum", 0.0)
    torch.manual_seed(0)
    values = [torch.randn(n) for n in sizes]
    grads = [torch.randn(n).bfloat16() for n in sizes]
    momenta = [torch.randn(n) for n in sizes] if momentum else []
    highs, lows = empty_halves(sizes)
    ops.split_halves(torch.cat(values), highs, lows)
    ours = [each.clone() for each in momenta]
    ops.sgd_halves(highs, lows, grads, ours, **options)
    defaults = {"weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False}
    given = {name: value for name, value in options.items() if name not in ("first", "factor")}
    factored = [grad.float() * options.get("factor", 1.0) for grad in grads]
    first = options.get("first", False)
    torch._fused_sgd_(values, factored, momenta, **{**defaults, **given}, is_first_step=first)
    for value, high, low in zip(values, highs, lows, strict=True):
        assert same(join_float32(high, low), value)
    assert all(map(same, ours, momenta))


def test_sgd_by_hand_on_odd_sizes():
    torch.manual_seed(0)
    values, grad, momentum = torch.randn(1031), torch.randn(1031).bfloat16(), torch.randn(1031)
    high, low = split_float32(values)
    expected = 0.9 * momentum + 2 * grad.float()
    ops.sgd_halves([high], [low], [grad], [momentum], lr=0.1, momentum=0.9, factor=2.0)
    torch.testing.assert_close(momentum, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(join_float32(high, low), values - 0.1 * expected, rtol=1e-6, atol=1e-6)


def test_sgd_refuses_what_does_not_fit():
    (high,), (low,) = empty_halves((6,))
    grad, momentum = high.clone(), torch.zeros(6)
    for message, highs, lows, grads, momenta in [
        ("grads: expected 1 tensors", [high], [low], [], []),
        ("grads: expected dtype BFloat16", [high], [low], [grad.float()], []),
        ("grads: expected 6 elements", [high], [low], [grad[:5]], []),
        ("momenta: expected 1 tensors", [high], [low], [grad], [momentum] * 2),
        ("momenta: expected dtype Float", [high], [low], [grad], [momentum.double()]),
        ("momenta: expected 6 elements", [high], [low], [grad], [momentum[:5]]),
        ("momenta: expected a contiguous", [high], [low], [grad], [torch.zeros(12)[::2]]),
        ("do not overlap", [high] * 2, [low, low.clone()], [grad] * 2, []),
        ("do not overlap", [high, grad], [low, low.clone()], [grad] * 2, [momentum] * 2),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.sgd_halves(highs, lows, grads, momenta, lr=1.0, weight_decay=1.0, maximize=True)
        assert not high.any()
        assert not low.any()
        assert not momentum.any()


def bad_arguments() -> list[tuple[str, tuple]]:
    """Arguments ``(values, highs, lows)`` and what is said of them."""
    (high,), (low,) = empty_halves((6,))
    values, memory = torch.zeros(6), torch.zeros(6)
    halves = memory.view(torch.bfloat16), memory.view(torch.int16)
    return [
        ("values: expected dtype Float", (values.double(), [high], [low])),
        ("values: expected 1 dimensions", (values.reshape(2, 3), [high], [low])),
        ("values: expected a contiguous", (torch.zeros(12)[::2], [high], [low])),
        ("values: expected 6 elements", (torch.zeros(7), [high], [low])),
        ("values: expected 0 elements", (values, [], [])),
        ("lows: expected 1 tensors", (values, [high], [])),
        ("highs: expected dtype BFloat16", (values, [high.half()], [low])),
        ("highs: expected 1 dimensions", (values, [high.reshape(2, 3)], [low])),
        ("highs: expected a contiguous", (values, [torch.zeros(12).bfloat16()[::2]], [low])),
        ("lows: expected dtype Short", (values, [high], [low.int()])),
        ("lows: expected a contiguous", (values, [high], [torch.zeros(12, dtype=torch.int16)[::2]])),
        ("lows: expected 6 elements", (values, [high], [low[:5]])),
        ("do not overlap", (memory, [halves[0][:6]], [low])),
        ("do not overlap", (memory, [high], [halves[1][6:]])),
        ("do not overlap", (values, [halves[0][:6]], [halves[1][5:11]])),
        ("do not overlap", (torch.zeros(12), [high, high], [low, low.clone()])),
    ]


@pytest.mark.parametrize(("message", "arguments"), bad_arguments())
def test_nothing_is_written_for_arguments_that_do_not_fit(message, arguments):
    values, highs, lows = arguments
    everything = [values, *highs, *lows]
    for tensor in everything:
        tensor.fill_(3)
    with pytest.raises(RuntimeError, match=message):
        ops.join_halves(highs, lows, values)
    with pytest.raises(RuntimeError, match=message):
        ops.split_halves(values, highs, lows)
    assert all((tensor == 3).all() or "overlap" in message for tensor in everything)


def test_the_ops_are_registered_correctly():
    values, halves = torch.randn(40), empty_halves((33, 7))
    torch.library.opcheck(torch.ops.ipex_quant.split_halves.default, (values, *halves))
    torch.library.opcheck(torch.ops.ipex_quant.join_halves.default, (*halves, values))
    grads, momenta = empty_halves((33, 7))[0], list(torch.zeros(40).split((33, 7)))
    floats = (0.1, 0.9, 0.0, 0.0, 1.0)
    torch.library.opcheck(torch.ops.ipex_quant.sgd_halves.default, (*halves, grads, momenta, *floats, *[False] * 3))
    with pytest.raises(RuntimeError, match="one device"):
        ops.split_halves(values.to("meta"), *halves)
    ops.join_halves(*([half.to("meta") for half in column] for column in halves), values.to("meta"))
