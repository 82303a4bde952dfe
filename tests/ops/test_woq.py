"""`woq_linear` in this process: what does not need every ISA level (those are in test_isa.py)."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ipex_quant import ops
from ipex_quant.numerics import affine
from ipex_quant.numerics.quantized_weight import QuantizedWeight
from ipex_quant.numerics.scheme import WeightScheme, WoqActQuantMode, WoqLowpMode, WoqWeightDtype
from ipex_quant.ops import PostOp, reference

from .weights import KINDS, draw, make, shuffle_features

INTEGER_KINDS = [kind for kind in KINDS if kind[0].fits_int8]
ROW_MODES = [mode for mode in WoqActQuantMode if "BATCH" in mode.name]
W4A8 = (WoqLowpMode.INT8, WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM)
NONE = (WoqLowpMode.NONE, WoqActQuantMode.NONE)


def linear(
    x: torch.Tensor, qw: QuantizedWeight, *arguments, bias: torch.Tensor | None = None, **options
) -> torch.Tensor:
    packed = ops.pack_weight(qw)
    return ops.woq_linear(x, packed.data, qw.shape[0], bias, packed.perm, *arguments, **options)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 140),
    k=st.integers(1, 300),
    rows=st.integers(0, 20),
    kind=st.sampled_from(INTEGER_KINDS),
    group_size=st.sampled_from([-1, 1, 4, 32, 128, 256]),
    mode=st.sampled_from([mode for mode in WoqActQuantMode if mode != WoqActQuantMode.NONE]),
    act_order=st.booleans(),
    bias=st.booleans(),
)
def test_integer_compute_is_bit_equal_to_the_definition(n, k, rows, kind, group_size, mode, act_order, bias) -> None:
    qw = make(n, k, WeightScheme(*kind, group_size))
    qw = shuffle_features(qw) if act_order else qw
    x, b = draw(rows, k), draw(n) if bias else None
    assert torch.equal(
        linear(x, qw, WoqLowpMode.INT8, mode, bias=b), reference.woq_linear(x, qw, b, WoqLowpMode.INT8, mode)
    )


@pytest.mark.parametrize("mode", [WoqActQuantMode.PER_BATCH, WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM])
@pytest.mark.parametrize(("k", "group_size"), [(16_500, -1), (8_300, 64), (16_404, 16_384)])
@pytest.mark.parametrize("kind", INTEGER_KINDS)
def test_features_of_several_panels(kind, k, group_size, mode) -> None:
    minimums = not kind[1] and mode == WoqActQuantMode.PER_BATCH
    qw, x = make(70, k, WeightScheme(*kind, group_size, minimums)), draw(15, k)
    y = linear(x, qw, WoqLowpMode.INT8, mode)
    assert torch.equal(y, reference.woq_linear(x, qw, None, WoqLowpMode.INT8, mode))
    assert torch.equal(linear(x[4:6], qw, WoqLowpMode.INT8, mode), y[4:6])


@pytest.mark.parametrize(("dtype", "symmetric"), KINDS)
@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize("group_size", [-1, 128])
def test_float32_matches_dequantized_matmul_at_4096(dtype, symmetric, rows, group_size) -> None:
    qw = make(48, 4096, WeightScheme(dtype, symmetric, group_size))
    x = draw(rows, 4096)
    torch.testing.assert_close(linear(x, qw), F.linear(x, affine.dequantize(qw)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("modes", [NONE, W4A8, (WoqLowpMode.BF16, WoqActQuantMode.NONE)])
def test_shapes_of_activations(dtype: torch.dtype, modes: tuple) -> None:
    qw = make(20, 24, WeightScheme(WoqWeightDtype.INT4, False, 8))
    x = draw(2, 3, 24, dtype=dtype)
    y = linear(x, qw, *modes)
    assert y.shape == (2, 3, 20)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert torch.equal(linear(x.flatten(0, 1), qw, *modes), y.flatten(0, 1))
    assert torch.equal(linear(x[1, 2], qw, *modes), linear(x[1, 2:], qw, *modes)[0])
    for shape in ((0, 24), (2, 0, 24)):
        assert linear(x.new_zeros(shape), qw, *modes).shape == (*shape[:-1], 20)


@pytest.mark.parametrize("modes", [NONE, W4A8])
def test_activations_may_be_views(modes: tuple) -> None:
    qw = make(20, 24, WeightScheme(WoqWeightDtype.INT4, True, 8))
    base = draw(24, 9, 48)
    for view in (base[..., 0].t(), base[0, :, ::2], base[:, :, 24:][1:3], base[0, :1, :24].expand(5, 24)):
        assert torch.equal(linear(view, qw, *modes), linear(view.contiguous(), qw, *modes))


def test_no_output_features() -> None:
    qw = make(1, 24, WeightScheme(group_size=8))
    empty = QuantizedWeight(qw.codes[:0], qw.scales[:0], None, None, qw.scheme, (0, 24))
    assert linear(draw(3, 24), empty).shape == (3, 0)


@pytest.mark.parametrize("mode", ROW_MODES)
@pytest.mark.parametrize(("dtype", "symmetric"), INTEGER_KINDS)
def test_a_row_does_not_depend_on_its_batch(dtype, symmetric, mode) -> None:
    data = ops.pack_weight(make(70, 100, WeightScheme(dtype, symmetric, 32))).data
    x = draw(67, 100, dtype=torch.bfloat16)

    def run(rows: torch.Tensor) -> torch.Tensor:
        return ops.woq_linear(rows, data, 70, None, None, WoqLowpMode.INT8, mode)

    alone = torch.cat([run(row) for row in x.split(1)])
    for rows in (2, 3, 4, 5, 7, 8, 9, 33, 67):
        assert torch.equal(run(x[:rows]), alone[:rows])


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("modes", [NONE, W4A8, (WoqLowpMode.INT8, WoqActQuantMode.PER_TENSOR)])
def test_result_does_not_depend_on_the_thread_count(rows: int, modes: tuple) -> None:
    qw = make(400, 256, WeightScheme(WoqWeightDtype.INT4, True, 32))
    x = draw(rows, 256)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(linear(x, qw, *modes))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("modes", [NONE, *((WoqLowpMode.INT8, mode) for mode in ROW_MODES)])
@pytest.mark.parametrize("rows", [4, 12])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_activation_spoils_its_own_row_only(kind, value, rows, modes) -> None:
    qw = make(40, 64, WeightScheme(*kind, 16))
    x = draw(rows, 64)
    clean = linear(x, qw, *modes)
    x[2, 33] = value
    y = linear(x, qw, *modes)
    others = torch.arange(rows) != 2
    assert torch.equal(y[others], clean[others])
    assert not y[2].isfinite().any()
    if value != value:
        assert y[2].isnan().all()


@pytest.mark.parametrize("mode", [WoqActQuantMode.PER_TENSOR, WoqActQuantMode.PER_IC_BLOCK_SYM])
def test_nan_spoils_every_row_of_a_shared_range(mode: WoqActQuantMode) -> None:
    x = draw(12, 64)
    x[2, 33] = torch.nan
    assert linear(x, make(5, 64, WeightScheme(group_size=16)), WoqLowpMode.INT8, mode).isnan().all()


@pytest.mark.parametrize("mode", [mode for mode in WoqActQuantMode if mode != WoqActQuantMode.NONE])
def test_tiny_and_zero_activations(mode: WoqActQuantMode) -> None:
    qw = make(5, 64, WeightScheme(WoqWeightDtype.INT4, False, 16))
    for scale in (0.0, 1e-45, 1e-38, 1e-36, 1e-30):
        x = draw(3, 64) * scale
        y = linear(x, qw, WoqLowpMode.INT8, mode)
        assert torch.equal(y, reference.woq_linear(x, qw, None, WoqLowpMode.INT8, mode)), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [5, 11])
@pytest.mark.parametrize("lowp_mode", [WoqLowpMode.NONE, WoqLowpMode.FP16, WoqLowpMode.BF16])
def test_float_compute_rounds_special_values_like_torch(lowp_mode, rows, dtype) -> None:
    """Each value passes through alone: its weight is 1 and everything else of its row is 0."""
    tiny = torch.finfo(dtype).tiny
    values = [65503.0, 65505.0, 65520.0, -65520.0, 1e30, 1 + 2**-8, 1 + 3 * 2**-9, 1 + 2**-11, torch.nan]
    values += [2.0**-14, 2.0**-24, 2.0**-25, 3 * 2.0**-26, 1e-20, 1e-37, tiny, -tiny, 0.0]
    values = torch.tensor(values).to(dtype)
    ones = QuantizedWeight(torch.ones(2, 16, dtype=torch.int8), torch.ones(2, 1), None, None, WeightScheme(), (2, 16))
    for group in values.split(rows):
        x = torch.zeros(rows, 16, dtype=dtype)
        x[: len(group), 3] = group
        y, expected = linear(x, ones, lowp_mode), reference.woq_linear(x, ones, None, lowp_mode)
        finite = expected.isfinite()  # codes may be made of two parts, so that infinity becomes NaN
        assert torch.equal(y.isfinite(), finite)
        assert torch.equal(y[finite], expected[finite])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, 11])
@pytest.mark.parametrize("post_op", [PostOp.GELU, PostOp.NEW_GELU, PostOp.SILU, PostOp.RELU])
def test_activation_functions_over_their_whole_range(post_op: PostOp, rows: int, dtype: torch.dtype) -> None:
    values = torch.linspace(-30, 30, 1201)
    qw = QuantizedWeight(
        torch.zeros(1201, 8, dtype=torch.int8), torch.ones(1201, 1), None, None, WeightScheme(), (1201, 8)
    )
    x = torch.zeros(rows, 8, dtype=dtype)
    y = linear(x, qw, bias=values, post_op=post_op)
    torch.testing.assert_close(
        y,
        reference.woq_linear(x, qw, values, post_op=post_op),
        rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-3 if dtype == torch.float16 else 1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, 11])
def test_binary_post_ops_round_like_eager_code(rows: int, dtype: torch.dtype) -> None:
    qw = make(70, 64, WeightScheme(WoqWeightDtype.INT4, True, 16))
    x, b = draw(rows, 64, dtype=dtype), draw(70)
    y, z = draw(rows, 70, dtype=dtype, seed=2), draw(70, rows, dtype=dtype, seed=3).t()
    plain = linear(x, qw, *W4A8, bias=b)
    assert torch.equal(linear(x, qw, *W4A8, bias=b, post_op=PostOp.ADD, others=(y,)), plain + y)
    assert torch.equal(linear(x, qw, *W4A8, bias=b, post_op=PostOp.ADD_ADD, others=(y, z)), plain + y + z)
    assert torch.equal(linear(x, qw, *W4A8, bias=b, post_op=PostOp.MUL, others=(z,)), plain * z)


def test_packed_data_need_not_be_aligned() -> None:
    qw = make(70, 64, WeightScheme(WoqWeightDtype.INT4, False, 16))
    data = ops.pack_weight(qw).data
    shifted = torch.cat([data[:1], data])[1:]
    x = draw(3, 64)
    for modes in (NONE, W4A8):
        assert torch.equal(ops.woq_linear(x, shifted, 70, None, None, *modes), linear(x, qw, *modes))


def test_inference_needs_no_gradient() -> None:
    qw = make(5, 8, WeightScheme())
    with torch.no_grad():
        assert not linear(draw(2, 8).requires_grad_(), qw).requires_grad


@pytest.mark.parametrize("post_op", [PostOp.NONE, PostOp.ADD_ADD])
def test_opcheck_of_woq_linear(post_op: PostOp) -> None:
    packed = ops.pack_weight(shuffle_features(make(10, 16, WeightScheme(WoqWeightDtype.INT4, False, 4))))
    others = [draw(2, 3, 10), draw(2, 3, 10)] if post_op == PostOp.ADD_ADD else []
    arguments = (
        draw(2, 3, 16),
        packed.data,
        draw(10),
        packed.perm,
        others,
        10,
        *map(int, W4A8),
        int(post_op),
    )
    torch.library.opcheck(torch.ops.ipex_quant.woq_linear.default, arguments)


@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck_of_the_other_ops(symmetric: bool) -> None:
    scheme = WeightScheme(WoqWeightDtype.INT4, symmetric, 4)
    qw = shuffle_features(make(10, 16, scheme))
    packed = ops.pack_weight(qw)
    namespace = torch.ops.ipex_quant
    torch.library.opcheck(namespace.woq_quantize.default, (draw(10, 16), int(scheme.dtype), 4, symmetric, True))
    pack = (qw.codes, qw.scales, qw.zero_points, None, None, None, packed.perm, 16, int(scheme.dtype), 4)
    torch.library.opcheck(namespace.woq_pack.default, pack, test_utils=("test_schema",))
    unpack = (packed.data, packed.perm, 10, 16, int(scheme.dtype), 4, int(not symmetric), 0)
    torch.library.opcheck(namespace.woq_unpack.default, unpack)


def test_opcheck_of_minimums_and_super_scales() -> None:
    scheme = WeightScheme(WoqWeightDtype.INT5, False, 4, True, 8)
    qw = make(10, 16, scheme)
    packed = ops.pack_weight(qw)
    pack = (qw.codes, qw.scales, None, qw.minimums, qw.super_scales, qw.super_minimums, None, 16, int(scheme.dtype), 4)
    torch.library.opcheck(torch.ops.ipex_quant.woq_pack.default, pack, test_utils=("test_schema",))
    torch.library.opcheck(torch.ops.ipex_quant.woq_unpack.default, (packed.data, None, 10, 16, scheme.dtype, 4, 2, 2))


@pytest.mark.parametrize(("dtype", "symmetric"), KINDS)
@pytest.mark.parametrize("group_size", [-1, 4])
@pytest.mark.parametrize("real", [torch.float32, torch.bfloat16])
def test_dequantize_reads_the_header(dtype, symmetric, group_size, real) -> None:
    qw = shuffle_features(make(10, 17, WeightScheme(dtype, symmetric, group_size)))
    packed = ops.pack_weight(qw)
    arguments = (packed.data, packed.perm, 10, 17, real)
    assert torch.equal(ops.woq_dequantize(*arguments), affine.dequantize(qw, real))
    torch.library.opcheck(torch.ops.ipex_quant.woq_dequantize.default, arguments)


def test_dequantize_of_another_shape_raises() -> None:
    data = ops.pack_weight(make(10, 16, WeightScheme())).data
    with pytest.raises(RuntimeError, match="holds another weight"):
        ops.woq_dequantize(data, None, 16, 10)


@pytest.mark.parametrize("modes", [NONE, W4A8])
def test_gradient_of_the_activations(modes: tuple) -> None:
    qw = shuffle_features(make(10, 16, WeightScheme(WoqWeightDtype.INT4, False, 4)))
    x = draw(3, 16, dtype=torch.bfloat16).requires_grad_()
    y = linear(x, qw, *modes, bias=draw(10))
    assert torch.equal(y, linear(x.detach(), qw, *modes, bias=draw(10)))
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(grad, torch.ones_like(y) @ affine.dequantize(qw, torch.bfloat16))


@pytest.mark.parametrize("shape", [(16,), (2, 16), (2, 3, 16), (0, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_tensors_tell_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    data = ops.pack_weight(make(10, 16, WeightScheme())).data
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = ops.woq_linear(mode.from_tensor(torch.zeros(shape, dtype=dtype)), mode.from_tensor(data), 10)
    assert y.shape == (*shape[:-1], 10)
    assert y.dtype == dtype


def test_compile_without_graph_break() -> None:
    qw = make(10, 16, WeightScheme(WoqWeightDtype.INT4, True, 4))
    data = ops.pack_weight(qw).data

    def run(x: torch.Tensor) -> torch.Tensor:
        return ops.woq_linear(x * 2, data, 10, None, None, *W4A8) + 1

    compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)
    for rows in (1, 4, 9):
        x = draw(rows, 16)
        assert torch.equal(compiled(x), run(x))


def test_names_for_explain() -> None:
    assert ops.isa_name() in ops.supported_isas(emulated=True)
    names = {
        ops.kernel_name(WeightScheme(*kind), mode, dtype)
        for kind, mode, dtype in itertools.product(KINDS, WoqLowpMode, (torch.float32, torch.bfloat16, torch.float16))
    }
    assert len(names) > 1
    assert all(isinstance(name, str) and name for name in names)


@pytest.mark.parametrize("post_op", [PostOp.SILU, PostOp.GELU, PostOp.NEW_GELU])
def test_activations_of_extreme_values(post_op: PostOp) -> None:
    packed = ops.pack_weight(ops.quantize_weight(torch.eye(2), WeightScheme(WoqWeightDtype.INT8)))
    x = torch.tensor([[-1e36, -1e35], [-100.0, -20.0], [0.0, 1e36]])
    result = ops.woq_linear(x, packed.data, 2, post_op=post_op)
    torch.testing.assert_close(result, reference.woq_linear(x, ops.unpack_weight(packed), post_op=post_op))
