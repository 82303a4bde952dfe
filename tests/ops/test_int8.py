"""The W8A8 ops in this process against their plain-torch definition; test_isa.py runs this file at every ISA level."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from ipex_quant import ops
from ipex_quant.numerics.quantized_weight import QuantizedWeight
from ipex_quant.numerics.scheme import WeightScheme
from ipex_quant.ops import PostOp
from ipex_quant.ops import reference_int8 as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPERANDS = {PostOp.ADD: 1, PostOp.ADD_ADD: 2, PostOp.MUL: 1}
EXACT_POST_OPS = [PostOp.NONE, PostOp.RELU, PostOp.ADD, PostOp.ADD_ADD, PostOp.MUL]
FEATURES = [1, 3, 5, 63, 65, 64, 128, 300]
ROWS = [0, 1, 2, 5, 7, 64, 129]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight_of(codes: torch.Tensor, scale: float = 0.01) -> QuantizedWeight:
    scales = (torch.rand(len(codes), 1, generator=generator(len(codes))) + 0.5) * scale
    return QuantizedWeight(codes, scales, None, None, WeightScheme(), tuple(codes.shape))


def make(n: int, k: int, seed: int = 0) -> QuantizedWeight:
    return weight_of(torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator(seed)))


def activations(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def quantized(
    rows: int, k: int, per_row: bool = True, seed: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random codes with scales and zero points of their own for every row, or with one of each."""
    g = generator(seed)
    count = rows if per_row else 1
    return (
        torch.randint(0, 256, (rows, k), dtype=torch.uint8, generator=g),
        torch.rand(count, generator=g) * 0.1,
        torch.randint(0, 256, (count,), dtype=torch.int32, generator=g),
    )


def others_of(post_op: PostOp, rows: int, n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [activations(rows, n, dtype=dtype, seed=3 + i) for i in range(OPERANDS.get(post_op, 0))]


@settings(max_examples=120, deadline=None)
@given(
    out_features=st.lists(st.sampled_from([0, 1, 3, 63, 64, 65, 130]), min_size=1, max_size=4),
    k=st.sampled_from(FEATURES),
    rows=st.sampled_from(ROWS),
    dtype=st.sampled_from(DTYPES),
    per_row=st.booleans(),
    bias=st.booleans(),
)
def test_group_is_bit_equal_to_the_definition(out_features, k, rows, dtype, per_row, bias) -> None:
    weights = [make(n, k, seed) for seed, n in enumerate(out_features)]
    x = quantized(rows, k, per_row)
    b = activations(sum(out_features)) if bias else None
    results = ops.int8_linear(*x, ops.pack_int8(weights), b, dtype)
    for got, expected in zip(results, reference.int8_linear(*x, weights, b, dtype), strict=True):
        assert got.is_contiguous()
        assert got.dtype == dtype
        assert torch.equal(got, expected)


@settings(max_examples=80, deadline=None)
@given(
    n=st.sampled_from([1, 63, 65, 128]),
    k=st.sampled_from(FEATURES),
    rows=st.sampled_from(ROWS),
    dtype=st.sampled_from(DTYPES),
    post_op=st.sampled_from(EXACT_POST_OPS),
)
def test_exact_post_ops_are_bit_equal_to_the_definition(n, k, rows, dtype, post_op) -> None:
    weight, x, b = make(n, k), quantized(rows, k), activations(n)
    others = others_of(post_op, rows, n, dtype)
    (got,) = ops.int8_linear(*x, ops.pack_int8([weight]), b, dtype, post_op, others)
    assert torch.equal(got, reference.int8_linear(*x, [weight], b, dtype, post_op, others)[0])


@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([0, 1, 63, 65, 128]),
    k=st.sampled_from(FEATURES),
    rows=st.sampled_from(ROWS),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    gate=st.sampled_from([PostOp.GELU, PostOp.NEW_GELU, PostOp.SILU]),
)
def test_gated_has_the_bits_of_post_ops(n, k, rows, dtype, bias, gate) -> None:
    weights, x = [make(n, k), make(n, k, 1)], quantized(rows, k)
    b = activations(2 * n) if bias else None
    first, second = (None, None) if b is None else (b[:n], b[n:])
    (gated,) = ops.int8_linear(*x, ops.pack_int8(weights[:1]), first, dtype, gate)
    (expected,) = ops.int8_linear(*x, ops.pack_int8(weights[1:]), second, dtype, PostOp.MUL, [gated])
    assert torch.equal(ops.int8_linear_gated(*x, ops.pack_int8(weights), b, dtype, gate), expected)


def test_gated_is_close_to_the_definition() -> None:
    weights, x = [make(70, 40), make(70, 40, 1)], quantized(9, 40)
    gate, up = reference.int8_linear(*x, weights, None, torch.float32)
    got = ops.int8_linear_gated(*x, ops.pack_int8(weights), None, torch.float32, PostOp.SILU)
    torch.testing.assert_close(got, torch.nn.functional.silu(gate) * up, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("post_op", [PostOp.GELU, PostOp.NEW_GELU, PostOp.SILU])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_functions(post_op: PostOp, dtype: torch.dtype) -> None:
    weight, x, b = make(70, 40), quantized(9, 40), activations(70)
    (got,) = ops.int8_linear(*x, ops.pack_int8([weight]), b, dtype, post_op)
    (expected,) = reference.int8_linear(*x, [weight], b, dtype, post_op)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol={torch.float32: 1e-5}.get(dtype, 2.0**-7))


def test_a_quantized_result_feeds_the_next_linear() -> None:
    first, second, x = make(64, 32), make(10, 64), quantized(5, 32, per_row=False)
    (y,) = ops.int8_linear(*x, ops.pack_int8([first]), None, torch.float32)
    scale, zero_point = (y.max() - y.min()) / 255, 120
    codes = ops.quantize_activation(y, 1 / scale[None], zero_point)
    zero_points = torch.tensor([zero_point], dtype=torch.int32)
    (got,) = ops.int8_linear(codes, scale[None], zero_points, ops.pack_int8([second]), None, torch.float32)
    restored = (codes.double() - zero_point) * scale.double()
    torch.testing.assert_close(got.double(), restored @ (second.codes * second.scales).double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 13])
@pytest.mark.parametrize("code", [-128, 127])
@pytest.mark.parametrize("zero_point", [0, 255])
def test_extreme_codes_do_not_saturate(rows: int, code: int, zero_point: int) -> None:
    """Pairs of 255 * -128 overflow 16 bits, and 65536 of them nearly fill 32; every sum is known."""
    for k in (2, 64, 65536):
        weight = QuantizedWeight(
            torch.full((3, k), code, dtype=torch.int8), torch.ones(3, 1), None, None, WeightScheme(), (3, k)
        )
        x = torch.full((rows, k), 255 - zero_point, dtype=torch.uint8)
        zero_points = torch.tensor([zero_point], dtype=torch.int32)
        (y,) = ops.int8_linear(x, torch.ones(1), zero_points, ops.pack_int8([weight]), None, torch.float32)
        expected = k * code * (255 - 2 * zero_point)
        assert torch.equal(y, torch.full((rows, 3), float(expected)))


@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize("k", [65537, 131073, 200000])
def test_sums_beyond_32_bits_are_exact(rows: int, k: int) -> None:
    weights = [weight_of(torch.full((2, k), -128, dtype=torch.int8)), make(3, k)]
    codes, scales, zero_points = quantized(rows, k)
    codes[0], zero_points[0] = 255, 0
    results = ops.int8_linear(codes, scales, zero_points, ops.pack_int8(weights), None, torch.float32)
    expected = reference.int8_linear(codes, scales, zero_points, weights, None, torch.float32)
    assert torch.equal(results[0], expected[0])
    assert torch.equal(results[1], expected[1])


@settings(max_examples=60, deadline=None)
@given(
    out_features=st.lists(st.integers(0, 140), min_size=1, max_size=4),
    k=st.one_of(st.integers(1, 200), st.just(65537)),
)
def test_packing_keeps_every_bit(out_features, k) -> None:
    weights = [make(n, k, seed) for seed, n in enumerate(out_features)]
    packed = ops.pack_int8(weights)
    for i, (weight, unpacked) in enumerate(zip(weights, ops.unpack_int8(packed), strict=True)):
        for got in (unpacked, *ops.unpack_int8(packed.member(i))):
            assert torch.equal(got.codes, weight.codes)
            assert torch.equal(got.scales, weight.scales)
        assert torch.equal(packed.member(i).data, ops.pack_int8([weight]).data)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    k=st.sampled_from(FEATURES),
    rows=st.sampled_from(ROWS),
    per_channel=st.booleans(),
    zero_point=st.sampled_from([0, 1, 128, 255]),
)
def test_static_codes_are_bit_equal_to_the_definition(dtype, k, rows, per_channel, zero_point) -> None:
    x = activations(rows, k, dtype=dtype)
    multiplier = torch.rand(k if per_channel else 1, generator=generator(k)) * 60
    got = ops.quantize_activation(x, multiplier, zero_point)
    assert torch.equal(got, reference.quantize_activation(x, multiplier, zero_point))


def test_static_codes_by_hand() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, torch.inf, -torch.inf, torch.nan, 3e38, 126.5, 127.5])
    expected = [128, 130, 130, 128, 126, 255, 0, 255, 0, 0, 255, 254, 255]
    assert ops.quantize_activation(x, torch.ones(1), 128).tolist() == expected
    ten_times = ops.quantize_activation(x, torch.full((13,), 10.0), 0).tolist()
    assert ten_times == [5, 15, 25, 0, 0, 255, 0, 255, 0, 0, 255, 255, 255]
    assert torch.equal(
        ops.quantize_activation(x, torch.ones(1), 128), reference.quantize_activation(x, torch.ones(1), 128)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(k=st.sampled_from(FEATURES), rows=st.sampled_from(ROWS), shift=st.sampled_from([-5.0, 0.0, 5.0]))
def test_dynamic_codes_are_bit_equal_to_the_definition(dtype, k, rows, shift) -> None:
    x = activations(rows, k, dtype=dtype) + shift
    for got, expected in zip(
        ops.quantize_activation_per_token(x), reference.quantize_activation_per_token(x), strict=True
    ):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def test_dynamic_range_includes_zero_and_keeps_the_error_below_half_a_step() -> None:
    x = torch.cat([activations(4, 100), activations(4, 100).abs() + 3, -activations(4, 100).abs() - 3])
    codes, scales, zero_points = ops.quantize_activation_per_token(x)
    restored = (codes - zero_points[:, None]) * scales[:, None]
    assert ((restored - x).abs() <= scales[:, None] * 1.001).all()  # a half for the code, a half for the zero point
    assert zero_points[4:8].eq(0).all()
    assert zero_points[8:].eq(255).all()


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-38, 1e-36, 1e-30, 1e37])
def test_dynamic_codes_of_extreme_ranges(scale: float) -> None:
    x = activations(3, 70) * scale
    expected = reference.quantize_activation_per_token(x)
    for got, value in zip(ops.quantize_activation_per_token(x), expected, strict=True):
        assert torch.equal(got, value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [3, 8, 20])
def test_non_finite_activation_spoils_its_own_row_only(rows: int, value: float) -> None:
    packed = ops.pack_int8([make(70, 67)])
    x = activations(rows, 67)
    (clean,) = ops.int8_linear(*ops.quantize_activation_per_token(x), packed, None, torch.bfloat16)
    x[2, 33] = value
    (y,) = ops.int8_linear(*ops.quantize_activation_per_token(x), packed, None, torch.bfloat16)
    others = torch.arange(rows) != 2
    assert torch.equal(y[others], clean[others])
    assert not y[2].isfinite().any()
    if value != value:
        assert y[2].isnan().all()


def test_a_row_does_not_depend_on_its_batch() -> None:
    packed = ops.pack_int8([make(70, 5000)])
    codes, scales, zero_points = quantized(67, 5000)

    def run(rows: slice) -> torch.Tensor:
        return ops.int8_linear(codes[rows], scales[rows], zero_points[rows], packed, None, torch.bfloat16)[0]

    alone = torch.cat([run(slice(i, i + 1)) for i in range(67)])
    for rows in (*range(2, 14), 33, 67):
        assert torch.equal(run(slice(rows)), alone[:rows])


@pytest.mark.parametrize("rows", [3, 70, 1100])
def test_result_does_not_depend_on_the_thread_count(rows: int) -> None:
    packed = ops.pack_int8([make(200, 66), make(70, 66)])
    x = quantized(rows, 66)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.cat(ops.int8_linear(*x, packed, None, torch.float32), 1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_shapes_and_views() -> None:
    packed = ops.pack_int8([make(20, 24), make(7, 24)])
    codes, scales, zero_points = quantized(6, 48)
    view = codes[:, ::2].view(2, 3, 24)
    results = ops.int8_linear(view, scales, zero_points, packed, None, torch.float32)
    assert [tuple(y.shape) for y in results] == [(2, 3, 20), (2, 3, 7)]
    flat = ops.int8_linear(view.flatten(0, 1).contiguous(), scales, zero_points, packed, None, torch.float32)
    assert torch.equal(results[1].flatten(0, 1), flat[1])
    (one, _) = ops.int8_linear(view[1, 2], scales[:1], zero_points[:1], packed, None, torch.float32)
    assert one.shape == (20,)
    x = activations(24, 9, 48)
    for floats in (x[..., 0].t(), x[0, :, ::2], x[0, 1, :24]):
        expected = ops.quantize_activation_per_token(floats.contiguous())
        for got, value in zip(ops.quantize_activation_per_token(floats), expected, strict=True):
            assert torch.equal(got, value)


def test_packed_data_need_not_be_aligned() -> None:
    packed = ops.pack_int8([make(70, 64)])
    shifted = ops.PackedInt8(torch.cat([packed.data[:1], packed.data])[1:], *((70,), 64))
    x = quantized(9, 64)
    assert torch.equal(
        ops.int8_linear(*x, shifted, None, torch.float32)[0], ops.int8_linear(*x, packed, None, torch.float32)[0]
    )


def test_opcheck() -> None:
    namespace = torch.ops.ipex_quant
    weights = [make(10, 18), make(70, 18)]
    packed, x = ops.pack_int8(weights), quantized(6, 18)
    codes = torch.cat([w.codes for w in weights])
    scales = torch.cat([w.scales for w in weights]).flatten()
    floats = activations(2, 3, 18, dtype=torch.bfloat16)
    linear = (x[0].view(2, 3, 18), *x[1:], packed.data, activations(80), [], [10, 70], torch.bfloat16, 0)
    cases = {
        "quantize_activation": (floats, torch.ones(18), 5),
        "quantize_activation_per_token": (floats,),
        "int8_pack": (codes, scales, [10, 70]),
        "int8_unpack": (packed.data, [10, 70], 18),
        "int8_linear": linear,
        "int8_linear_gated": (*x, ops.pack_int8([weights[1]] * 2).data, None, 70, torch.float16, int(PostOp.SILU)),
    }
    for name, arguments in cases.items():
        torch.library.opcheck(getattr(namespace, name).default, arguments)


def test_compile_without_graph_break() -> None:
    packed = ops.pack_int8([make(10, 16), make(7, 16)])
    multiplier, scales, zero_points = torch.full((16,), 20.0), torch.tensor([0.05]), torch.tensor([128]).int()

    def run(x: torch.Tensor) -> torch.Tensor:
        static = ops.quantize_activation(x * 2, multiplier, 128)
        first, second = ops.int8_linear(static, scales, zero_points, packed, None, torch.bfloat16)
        dynamic = ops.int8_linear(*ops.quantize_activation_per_token(x), packed, None, torch.bfloat16)
        return torch.cat([first, second, *dynamic], -1) + 1

    compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)
    for rows in (2, 4, 9):
        x = activations(rows, 16)
        assert torch.equal(compiled(x), run(x))


def test_a_dynamic_graph_serves_every_number_of_rows():
    compilations = CompileCounter()

    @torch.compile(backend=compilations, dynamic=True, fullgraph=True)
    def scales_of(x):
        return ops.quantize_activation_per_token(x)[1] + 0

    for rows in (3, 5, 7):
        assert scales_of(torch.ones(rows, 8)).shape == (rows,)
    assert compilations.frame_count == 1


@pytest.mark.parametrize(("rows", "k"), [(1, 64), (3, 67), (130, 64)])
@pytest.mark.parametrize("per_row", [True, False])
def test_signed_activations(rows: int, k: int, per_row: bool) -> None:
    weights = [make(70, k), make(5, k)]
    count = rows if per_row else 1
    codes = torch.randint(-128, 128, (rows, k), dtype=torch.int8)
    zero_points, scales = torch.randint(-128, 128, (count,), dtype=torch.int32), torch.rand(count) + 0.1
    got = ops.int8_linear(codes, scales, zero_points, ops.pack_int8(weights), None, torch.float32)
    for y, expected in zip(
        got, reference.int8_linear(codes, scales, zero_points, weights, None, torch.float32), strict=True
    ):
        assert torch.equal(y, expected)
    with pytest.raises(RuntimeError, match=r"zero_points: expected -128\.\.127, got 128"):
        ops.int8_linear(codes, scales, zero_points.fill_(128), ops.pack_int8(weights), None, torch.float32)
