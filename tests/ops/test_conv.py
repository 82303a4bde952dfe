"""The W8A8 convolutions against their plain-torch definition; test_isa.py runs this file at every ISA level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipex_quant import ops
from ipex_quant.numerics.quantized_weight import QuantizedWeight
from ipex_quant.ops import reference_int8 as reference
from ipex_quant.ops.int8 import INT8_PER_CHANNEL


def weight_of(out: int, columns: int, seed: int = 0) -> QuantizedWeight:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (out, columns), dtype=torch.int8, generator=g)
    return QuantizedWeight(codes, torch.rand(out, 1, generator=g) * 0.01, None, None, INT8_PER_CHANNEL, (out, columns))


def codes_of(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@st.composite
def convolutions(draw):
    """Sizes of a convolution that fits its input."""
    dims = draw(st.integers(1, 3))
    numbers = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    kernel, stride, dilation = numbers(1, 4), numbers(1, 3), numbers(1, 2)
    before, after = numbers(0, 3), numbers(0, 3)
    places = tuple(d * (k - 1) + 1 + more for d, k, more in zip(dilation, kernel, numbers(0, 5), strict=True))
    groups = draw(st.sampled_from([1, 1, 2, 5, 70]))
    channels = groups * draw(st.sampled_from([1, 1, 3, 4])) if groups > 1 else draw(st.sampled_from([1, 3, 4, 65]))
    out = groups * draw(st.sampled_from([1, 1, 2, 3])) if groups > 1 else draw(st.sampled_from([1, 17, 64, 66]))
    return places, kernel, groups, channels, out, ops.ConvGeometry(stride, before, after, dilation)


@settings(max_examples=150, deadline=None)
@given(
    convolution=convolutions(),
    batch=st.integers(0, 3),
    zero_point=st.sampled_from([0, 120, 255]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_is_bit_equal_to_the_definition(convolution, batch, zero_point, bias, dtype) -> None:
    places, kernel, groups, channels, out, geometry = convolution
    columns = channels // groups
    for size in kernel:
        columns *= size
    weight, x = weight_of(out, columns), codes_of(batch, *places, channels)
    b = torch.randn(out) if bias else None
    packed = ops.pack_conv(weight, kernel, groups)
    assert torch.equal(ops.unpack_conv(packed).codes, weight.codes)
    got = ops.int8_conv(x, 0.03, zero_point, packed, b, geometry, dtype)
    assert torch.equal(got, reference.int8_conv(x, 0.03, zero_point, weight, groups, kernel, b, geometry, dtype))


def test_large_inputs_are_gathered_in_blocks() -> None:
    weight, geometry = weight_of(96, 9 * 40), ops.ConvGeometry((1, 1), (1, 1), (1, 1), (1, 1))
    x = codes_of(2, 61, 67, 40)
    got = ops.int8_conv(x, 0.03, 99, ops.pack_conv(weight, (3, 3), 1), None, geometry, torch.float32)
    assert torch.equal(got, reference.int8_conv(x, 0.03, 99, weight, 1, (3, 3), None, geometry, torch.float32))


GEOMETRY = ([1, 1], [1, 1, 1, 1], [1, 1])


def dense(**changes):
    values = {
        "x": codes_of(1, 5, 5, 8),
        "scale": 0.1,
        "zero_point": 3,
        "packed": ops.pack_conv(weight_of(16, 72), (3, 3), 1).data,
        "bias": None,
        "out_channels": 16,
        "groups": 1,
        "kernel": [3, 3],
        "stride": [1, 1],
        "padding": [1, 1, 1, 1],
        "dilation": [1, 1],
        "dtype": torch.float32,
    }
    return tuple((values | changes).values())


def depthwise(**changes):
    values = {
        "x": codes_of(1, 5, 5, 8),
        "scale": 0.1,
        "zero_point": 3,
        "codes": torch.zeros(9, 16, dtype=torch.int8),
        "weight_scales": torch.ones(16),
        "bias": None,
        "groups": 8,
        "kernel": [3, 3],
        "stride": [1, 1],
        "padding": [1, 1, 1, 1],
        "dilation": [1, 1],
        "dtype": torch.float32,
    }
    return tuple((values | changes).values())


def test_opcheck() -> None:
    for op, arguments in (
        (torch.ops.ipex_quant.int8_conv, dense),
        (torch.ops.ipex_quant.int8_depthwise_conv, depthwise),
    ):
        torch.library.opcheck(op.default, arguments(bias=torch.randn(16)))
        torch.library.opcheck(op.default, arguments(stride=[2, 3], padding=[0, 2, 1, 0], dtype=torch.bfloat16))


SHARED_ERRORS = [
    ({"x": torch.zeros(1, 5, 5, 8)}, "x: expected dtype Byte"),
    ({"x": codes_of(5, 8)}, r"x: expected \[batch, ..., channels\]"),
    ({"x": codes_of(1, 8, 5, 5).movedim(1, -1)}, "x: expected a contiguous tensor"),
    ({"x": codes_of(1, 5, 5, 0)}, "channels"),
    ({"scale": float("nan")}, "scale: expected a finite float32"),
    ({"scale": 1e300}, "scale: expected a finite float32"),
    ({"zero_point": 256}, r"zero_point: expected 0\.\.255"),
    ({"x": torch.empty(0, 1, 2**63 - 1, 1, dtype=torch.uint8)}, "x: expected numbers from 0 on"),
    ({"kernel": [3]}, "kernel: expected 2 numbers, got 1"),
    ({"kernel": [0, 3]}, "kernel: expected numbers from 1 on, got 0"),
    ({"stride": [1, -1]}, "stride: expected numbers from 1 on, got -1"),
    ({"dilation": [1, 2**40]}, "dilation: expected numbers from 1 on"),
    ({"padding": [1, 1]}, "padding: expected 4 numbers, got 2"),
    ({"padding": [2**31 - 1] * 4}, "too large"),
    ({"dilation": [4, 4]}, "kernel: larger than the padded input"),
    ({"bias": torch.zeros(15)}, "bias: expected 16 elements"),
    ({"dtype": torch.int8}, "dtype: expected float32, bfloat16 or float16"),
]


@pytest.mark.parametrize(("changes", "message"), SHARED_ERRORS)
@pytest.mark.parametrize("kind", ["dense", "depthwise"])
def test_arguments_that_do_not_fit_raise(kind, changes, message) -> None:
    op, arguments = {
        "dense": (torch.ops.ipex_quant.int8_conv, dense),
        "depthwise": (torch.ops.ipex_quant.int8_depthwise_conv, depthwise),
    }[kind]
    with pytest.raises(RuntimeError, match=message):
        op(*arguments(**changes))


@pytest.mark.parametrize("changes", [{"stride": [0, 1]}, {"kernel": [3, 0]}, {"kernel": [9, 9]}, {"padding": [1, 1]}])
def test_shapes_are_checked_without_data(changes) -> None:
    for op, arguments in (
        (torch.ops.ipex_quant.int8_conv, dense(**changes)),
        (torch.ops.ipex_quant.int8_depthwise_conv, depthwise(**changes)),
    ):
        with pytest.raises(RuntimeError, match=r"kernel|number"):
            op(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dense(groups=3), "groups: expected a divisor of the 16 output channels"),
        (dense(x=codes_of(1, 5, 5, 4)), "packed: expected 2880 bytes of 1 weights of 36 input features, got 5184"),
        (dense(groups=2), "packed: expected 5760 bytes of 2 weights"),
        (dense(out_channels=0), "groups: expected a divisor"),
        (dense(packed=torch.zeros(20, dtype=torch.uint8)), "packed: too short"),
    ],
)
def test_dense_weights_that_do_not_fit_raise(arguments, message) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ipex_quant.int8_conv(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": torch.zeros(8, 16, dtype=torch.int8)}, r"codes: expected shape \[9, 16\]"),
        ({"codes": torch.zeros(9, 17, dtype=torch.int8)}, "a multiple of the 8 groups"),
        ({"x": codes_of(1, 5, 5, 4)}, "x: expected as many channels as there are groups, 8"),
        ({"groups": 0}, "x: expected as many channels as there are groups, 0"),
        ({"weight_scales": torch.ones(8)}, "weight_scales: expected 16 elements"),
    ],
)
def test_depthwise_weights_that_do_not_fit_raise(changes, message) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ipex_quant.int8_depthwise_conv(*depthwise(**changes))


@pytest.mark.parametrize(("kernel", "groups"), [((3, 5), 1), ((3, 3), 3), ((3, 3), 0), ((1, 1, 1, 72), 1)])
def test_kernels_that_do_not_fit_a_weight_raise(kernel, groups) -> None:
    with pytest.raises(ValueError, match=r"kernel, groups: .* do not fit a weight"):
        ops.pack_conv(weight_of(16, 72), kernel, groups)
