import copy
import io
import pickle
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ipex_quant import ops
from ipex_quant.nn import QuantMethod, WeightOnlyQuantizedLinear
from ipex_quant.numerics import affine
from ipex_quant.numerics.quantized_weight import QuantizedWeight
from ipex_quant.numerics.saved_weight import saved_weight
from ipex_quant.numerics.scheme import (
    WeightScheme,
    WoqActQuantMode,
    WoqLowpMode,
    WoqWeightDtype,
    WoqWeightQScheme,
)
from ipex_quant.ops import PostOp, reference
from ipex_quant.quantization import get_weight_only_quant_qconfig_mapping

SCHEMES = [
    WeightScheme(WoqWeightDtype.INT8, True),
    WeightScheme(WoqWeightDtype.INT8, False, 32),
    WeightScheme(WoqWeightDtype.INT4, True, 16),
    WeightScheme(WoqWeightDtype.INT4, False, 32),
    WeightScheme(WoqWeightDtype.NF4, True, 64),
    WeightScheme(WoqWeightDtype.FP8, True),
]


def with_minimums(supers):
    """A weight [10, 128] in groups of 32, and in super groups unless `supers` is None."""
    plain = affine.quantize(torch.randn(10, 128), WeightScheme(WoqWeightDtype.INT4, False, 32))
    scheme = WeightScheme(WoqWeightDtype.INT4, False, 32, True, supers)
    scales, minimums = torch.ones(10, 4) * 0.25, torch.ones(10, 4) * -0.5
    factors = {}
    if supers is not None:
        ones = torch.ones(10, scheme.super_count(128))
        factors = {"super_scales": ones / 8, "super_minimums": ones / 4}
    return QuantizedWeight(plain.codes, scales, None, None, scheme, plain.shape, minimums, **factors)


def quantized(scheme, out_features=24, in_features=70, act_order=False):
    qw = affine.quantize(torch.randn(out_features, in_features), scheme)
    if not act_order:
        return qw
    size = in_features if scheme.group_size < 0 else scheme.group_size
    g_idx = (torch.arange(in_features) // size)[torch.randperm(in_features)].to(torch.int32)
    return QuantizedWeight(qw.codes, qw.scales, qw.zero_points, g_idx, scheme, qw.shape)


def layer_of(qw, bias=True, **compute):
    return WeightOnlyQuantizedLinear.from_quantized_weight(qw, torch.randn(qw.shape[0]) if bias else None, **compute)


@pytest.fixture
def layer():
    return layer_of(quantized(SCHEMES[3]))


def assert_same(a, b):
    assert (a.scheme, a.shape, a.tensors().keys()) == (b.scheme, b.shape, b.tensors().keys())
    assert all(torch.equal(tensor, b.tensors()[name]) for name, tensor in a.tensors().items())


def with_qconfig(linear, **options):
    linear.qconfig = get_weight_only_quant_qconfig_mapping(**options).global_qconfig
    return linear


class TestForward:
    @pytest.mark.parametrize("scheme", SCHEMES, ids=str)
    @pytest.mark.parametrize("bias", [True, False])
    def test_multiplies_by_the_dequantized_weight(self, scheme, bias):
        qw = quantized(scheme)
        layer = layer_of(qw, bias)
        x = torch.randn(2, 3, 70)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, affine.dequantize(qw), layer.bias))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(70,), (0, 70), (1, 70), (2, 5, 70)])
    def test_keeps_leading_dimensions_and_dtype(self, layer, dtype, shape):
        y = layer(torch.randn(shape).to(dtype))
        assert y.shape == (*shape[:-1], 24)
        assert y.dtype == dtype

    def test_takes_strided_input(self, layer):
        x = torch.randn(70, 5).t()
        assert torch.equal(layer(x), layer(x.contiguous()))

    def test_quantizes_activations_when_told_to(self):
        qw = quantized(SCHEMES[3], in_features=64)
        mode = WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM
        layer = layer_of(qw, lowp_mode=WoqLowpMode.INT8, act_quant_mode=mode)
        x = torch.randn(3, 64)
        torch.testing.assert_close(layer(x), reference.woq_linear(x, qw, layer.bias, WoqLowpMode.INT8, mode))
        assert not torch.allclose(layer(x), nn.functional.linear(x, affine.dequantize(qw), layer.bias), atol=1e-4)

    def test_act_order_permutes_the_input(self):
        qw = quantized(SCHEMES[3], act_order=True)
        x = torch.randn(3, 70)
        torch.testing.assert_close(layer_of(qw, bias=False)(x), x @ affine.dequantize(qw).t())

    def test_fused_operations(self, layer):
        x, y, z = torch.randn(3, 70), torch.randn(3, 24), torch.randn(3, 24)
        torch.testing.assert_close(layer.forward_fused(x, PostOp.SILU), nn.functional.silu(layer(x)))
        torch.testing.assert_close(layer.forward_fused(x, PostOp.ADD_ADD, y, z), layer(x) + y + z)

    def test_a_layer_without_a_weight_says_so(self):
        with pytest.raises(RuntimeError, match="no weight yet"):
            WeightOnlyQuantizedLinear(4, 4)(torch.randn(1, 4))

    def test_input_that_does_not_fit_raises(self, layer):
        with pytest.raises(RuntimeError, match="70"):
            layer(torch.randn(2, 71))
        with pytest.raises(RuntimeError):
            layer(torch.zeros(2, 70, dtype=torch.int32))


class TestStateDict:
    @settings(max_examples=40, deadline=None)
    @given(
        st.sampled_from(list(WoqWeightDtype)),
        st.booleans(),
        st.sampled_from([-1, 1, 4, 32, 128]),
        st.tuples(st.integers(1, 40), st.integers(1, 140)),
        st.booleans(),
        st.booleans(),
    )
    def test_round_trip_into_an_empty_layer_is_bit_equal(self, dtype, symmetric, group_size, shape, act_order, bias):
        symmetric = symmetric or not dtype.has_integers
        qw = quantized(WeightScheme(dtype, symmetric, group_size), *shape, act_order)
        layer = layer_of(qw, bias)
        state = layer.state_dict()
        optional = {"zero_points": not symmetric, "g_idx": state.get("g_idx") is not None, "bias": bias}
        assert list(state) == ["codes", "scales", *(name for name, present in optional.items() if present)]
        other = WeightOnlyQuantizedLinear(shape[1], shape[0], bias, dtype)
        other.load_state_dict(state)
        x = torch.randn(3, shape[1])
        assert torch.equal(other(x), layer(x))

    @pytest.mark.parametrize("supers", [None, 64, -1])
    def test_minimums_and_super_scales_load_into_an_empty_layer(self, supers):
        qw = with_minimums(supers)
        layer = WeightOnlyQuantizedLinear.from_quantized_weight(qw)
        other = WeightOnlyQuantizedLinear(128, 10, False, WoqWeightDtype.INT4)
        other.load_state_dict(layer.state_dict())
        assert other.scheme == qw.scheme
        assert_same(copy.deepcopy(layer).quantized_weight(), qw)
        x = torch.randn(3, 128)
        assert torch.equal(other(x), layer(x))

    def test_values_written_to_a_weight_with_minimums_get_zero_points(self):
        layer, values = WeightOnlyQuantizedLinear.from_quantized_weight(with_minimums(64)), torch.randn(10, 128)
        layer.weight.copy_(values)
        assert layer.scheme == WeightScheme(WoqWeightDtype.INT4, False, 32)
        assert torch.equal(layer.weight + 0, affine.dequantize(affine.quantize(values, layer.scheme)))

    def test_holds_the_plain_weight(self, layer):
        state = layer.state_dict(prefix="a.")
        weight = saved_weight({name.removeprefix("a."): tensor for name, tensor in state.items()}, SCHEMES[3], (24, 70))
        assert_same(weight, layer.quantized_weight())
        assert state["a.bias"].dtype == torch.float32

    @pytest.mark.parametrize("dtype", [WoqWeightDtype.INT2, WoqWeightDtype.INT3, WoqWeightDtype.INT6])
    def test_a_stream_of_codes_loads_into_an_empty_layer(self, dtype):
        layer = layer_of(quantized(WeightScheme(dtype, False, 16), in_features=67))
        state = layer.state_dict()
        assert state["codes"].shape == (24, -(-67 * dtype.bits // 8))
        other = WeightOnlyQuantizedLinear(67, 24, True, dtype)
        other.load_state_dict(state)
        assert_same(other.quantized_weight(), layer.quantized_weight())
        with pytest.raises(RuntimeError, match=r"codes: expected shape \[24, \d+\], got \[24, 67\]"):
            other.load_state_dict(state | {"codes": torch.zeros(24, 67, dtype=torch.uint8)})

    def test_replaces_the_weight_of_a_full_layer(self, layer):
        other = layer_of(quantized(SCHEMES[3]))
        layer.load_state_dict(other.state_dict())
        x = torch.randn(2, 70)
        assert torch.equal(layer(x), other(x))

    def test_missing_and_unexpected_keys_are_torchs(self, layer):
        model = nn.Sequential(layer)
        state = model.state_dict()
        del state["0.scales"], state["0.bias"]
        with pytest.raises(RuntimeError, match=r'Missing key.*"0.scales", "0.bias"'):
            model.load_state_dict(state)
        symmetric = nn.Sequential(layer_of(quantized(SCHEMES[2])))
        with pytest.raises(RuntimeError, match=r'Unexpected key.*"0.zero_points"'):
            symmetric.load_state_dict(model.state_dict())

    def test_without_strict_a_bias_may_be_missing_but_no_part_of_a_weight(self, layer):
        state = layer_of(quantized(SCHEMES[3])).state_dict()
        del state["bias"]
        before = layer.bias
        result = layer.load_state_dict(state, strict=False)
        assert result.missing_keys == ["bias"]
        assert torch.equal(layer.bias, before)
        assert torch.equal(layer.state_dict()["codes"], state["codes"])
        assert layer.load_state_dict({}, strict=False).missing_keys == ["codes", "scales", "zero_points", "bias"]
        del state["zero_points"]
        with pytest.raises(RuntimeError, match="whole or not at all"):
            layer.load_state_dict(state, strict=False)

    @pytest.mark.parametrize(
        ("name", "tensor", "message"),
        [
            ("codes", torch.zeros(24, 34, dtype=torch.uint8), r"0.codes: expected shape \[24, 35\], got \[24, 34\]"),
            ("codes", torch.zeros(24, 35, dtype=torch.int8), r"0.codes: expected dtype torch.uint8"),
            ("scales", torch.ones(24, 2), r"0.scales: expected shape \[24, 3\]"),
            ("bias", torch.ones(23), r"0.bias: expected shape \[24\]"),
        ],
    )
    def test_tensors_that_do_not_fit_are_named(self, layer, name, tensor, message):
        model = nn.Sequential(layer)
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(model.state_dict() | {f"0.{name}": tensor})

    def test_an_empty_layer_needs_the_right_dtype_and_a_group_size(self, layer):
        with pytest.raises(RuntimeError, match=r"INT8 has torch.int8, got torch.uint8"):
            WeightOnlyQuantizedLinear(70, 24, True, WoqWeightDtype.INT8).load_state_dict(layer.state_dict())
        state = layer.state_dict() | {"scales": torch.ones(24, 7)}
        with pytest.raises(RuntimeError, match="70 input features into 7 groups"):
            WeightOnlyQuantizedLinear(70, 24, True, WoqWeightDtype.INT4).load_state_dict(state)


class TestCopies:
    def check(self, layer, other):
        x = torch.randn(2, 70)
        assert torch.equal(layer(x), other(x))
        assert layer._packed.data_ptr() != other._packed.data_ptr()
        assert repr(layer) == repr(other)

    @pytest.mark.parametrize("act_order", [False, True])
    def test_deepcopy_and_pickle(self, act_order):
        layer = layer_of(quantized(SCHEMES[3], act_order=act_order), lowp_mode=WoqLowpMode.BF16)
        self.check(layer, copy.deepcopy(layer))
        self.check(layer, pickle.loads(pickle.dumps(layer)))
        assert layer._perm is None or layer._packed is not None

    def test_a_pickle_holds_no_packed_bytes(self, layer):
        assert layer.__getstate__()["_buffers"]["_packed"] is None

    def test_an_empty_layer_copies(self):
        assert copy.deepcopy(WeightOnlyQuantizedLinear(4, 4)).scheme is None

    def test_torch_save(self, layer):
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        self.check(layer, torch.load(file, weights_only=False))

    def test_safetensors(self, layer, tmp_path):
        safetensors.torch.save_model(nn.Sequential(layer), tmp_path / "model.safetensors")
        other = WeightOnlyQuantizedLinear(70, 24, True, WoqWeightDtype.INT4)
        safetensors.torch.load_model(nn.Sequential(other), tmp_path / "model.safetensors")
        self.check(layer, other)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("gradient", [False, True])
    def test_jit_trace_save_and_load(self, layer, gradient):
        x = torch.randn(2, 70, requires_grad=gradient)
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(nn.Sequential(layer, nn.ReLU()), x), file)
        file.seek(0)
        x = torch.randn(3, 70)
        assert torch.equal(torch.jit.load(file)(x), layer(x).relu())

    def test_compiles_without_a_graph_break(self, layer):
        model = nn.Sequential(layer, nn.ReLU(), layer_of(quantized(SCHEMES[2], 5, 24, act_order=True)))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
        for rows in (2, 3):
            x = torch.randn(rows, 70)
            assert torch.equal(compiled(x), model(x))

    def test_compiles_where_model_code_reads_the_weight(self, layer):
        def run(x):
            return layer(x.to(layer.weight.dtype)), x @ layer.weight.t()

        x = torch.randn(2, 70)
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        assert all(map(torch.equal, compiled(x), run(x)))


class TestGradients:
    @pytest.fixture
    def layer(self):
        with torch.inference_mode():
            return layer_of(quantized(SCHEMES[3], act_order=True))

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("shape", [(70,), (2, 3, 70)])
    def test_input_gets_that_of_the_dequantized_weight(self, layer, shape, compiled):
        run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        x = torch.randn(shape, requires_grad=True)
        grad = torch.randn(*shape[:-1], 24)
        run(x).backward(grad)
        torch.testing.assert_close(x.grad, grad @ affine.dequantize(layer.quantized_weight()))

    @pytest.mark.parametrize("needs", [0, 1])
    def test_fused_operations_refuse(self, layer, needs):
        tensors = [torch.randn(2, 70), torch.randn(2, 24)]
        tensors[needs].requires_grad_()
        with pytest.raises(RuntimeError, match="post_op: expected NONE where a gradient is needed, got ADD"):
            layer.forward_fused(tensors[0], PostOp.ADD, tensors[1])
        with torch.no_grad():
            assert layer.forward_fused(tensors[0], PostOp.ADD, tensors[1]).shape == (2, 24)


class TestAutocast:
    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_computes_in_its_dtype(self, layer, dtype, compiled):
        run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        x = torch.randn(2, 70)
        with torch.autocast("cpu", dtype):
            y = run(x)
            assert y.dtype == nn.Linear(70, 24)(x).dtype
            fused = layer.forward_fused(x, PostOp.ADD, torch.ones(2, 24))
        assert torch.equal(y, layer(x.to(dtype)))
        assert torch.equal(fused, y + 1)
        assert run(x).dtype == torch.float32

    def test_accepts_no_more_dtypes(self, layer):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="x: expected"):
            layer(torch.zeros(2, 70, dtype=torch.int32))


class TestWeight:
    @pytest.mark.parametrize(
        "read",
        [
            torch.Tensor.clone,
            copy.deepcopy,
            copy.copy,
            lambda w: pickle.loads(pickle.dumps(w)),
            lambda w: w.float(),
            lambda w: w.to(torch.float32),
            lambda w: w.detach().to("cpu"),
            lambda w: torch.from_numpy(w.numpy()),
            lambda w: torch.from_numpy(np.asarray(w)),
            lambda w: torch.tensor(w.tolist()),
            lambda w: torch.zeros(24, 70).copy_(w),
        ],
    )
    def test_reading_it_gives_a_real_tensor(self, layer, read):
        tensor = read(layer.weight)
        assert type(tensor) is torch.Tensor
        assert torch.equal(tensor, affine.dequantize(layer.quantized_weight()))

    @pytest.mark.parametrize(
        "write",
        [
            lambda w: w.__setitem__((0, 0), 5),
            lambda w: torch._foreach_mul_([w], 2),
            nn.Parameter,
            lambda w: safetensors.torch.save({"weight": w}),
        ],
    )
    @pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
    def test_writing_to_a_part_of_it_or_sharing_it_raises(self, layer, write):
        with pytest.raises(RuntimeError, match=r"weight: a packed weight cannot be .* weight\.clone\(\)"):
            write(layer.weight)

    @pytest.mark.parametrize(
        ("write", "expected"),
        [
            (lambda w: w.mul_(2), lambda w: 2 * w),
            (lambda w: w.data.add_(torch.ones(70)), lambda w: w + 1),
            (lambda w: w.detach().mul_(2), lambda w: 2 * w),
            (lambda w: setattr(w, "data", torch.ones(24, 70)), torch.ones_like),
            (lambda w: torch.neg(torch.ones(24, 70), out=w), lambda w: -torch.ones_like(w)),
            (lambda w: w.copy_(w.t().reshape(24, 70)), lambda w: w.t().reshape(24, 70)),
            (nn.init.zeros_, torch.zeros_like),
        ],
    )
    @pytest.mark.parametrize("act_order", [False, True])
    @pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[3]])
    def test_what_is_written_to_all_of_it_is_quantized_again(self, scheme, act_order, write, expected):
        layer = layer_of(quantized(scheme, act_order=act_order and scheme.group_size > 0))
        before = layer.quantized_weight()
        wanted = expected(layer.weight.clone())
        write(layer.weight)
        after = layer.quantized_weight()
        assert after.scheme == scheme
        assert (after.g_idx is None) == (before.g_idx is None)
        assert before.g_idx is None or torch.equal(after.g_idx, before.g_idx)
        step = after.scales.max().item()
        torch.testing.assert_close(layer.weight.clone(), wanted, rtol=0, atol=step)
        x = torch.randn(3, 70)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))

    @pytest.mark.parametrize(
        "write", [lambda w: setattr(w, "data", torch.ones(24, 69)), lambda w: w.data.fill_(torch.nan)]
    )
    def test_what_cannot_be_its_values_changes_nothing(self, layer, write):
        before = layer.weight.clone()
        with pytest.raises(ValueError, match="weight"):
            write(layer.weight)
        assert torch.equal(layer.weight.clone(), before)


class TestDtypeAndDevice:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_casting_changes_no_value(self, layer, dtype):
        before = layer.state_dict()
        model = nn.Sequential(layer).to(dtype)
        for name, tensor in model[0].state_dict().items():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
        assert layer.weight.dtype == layer.bias.dtype == dtype

    def test_half_and_float_agree_with_to(self, layer):
        x = torch.randn(2, 70)
        before = layer(x)
        assert layer.half().weight.dtype == torch.float16
        assert torch.equal(layer.float()(x), before)

    def test_moving_off_the_cpu_raises_and_changes_nothing(self, layer):
        x = torch.randn(2, 70)
        before = layer(x)
        with pytest.raises(RuntimeError, match="packed for the CPU, it cannot be moved to meta"):
            layer.to("meta")
        assert torch.equal(layer.to("cpu")(x), before)

    def test_weight_tells_shape_and_dtype_at_no_cost_and_values_when_read(self, layer, monkeypatch):
        expected = affine.dequantize(layer.quantized_weight())
        unpack = Mock(wraps=ops.unpack_weight)
        monkeypatch.setattr(ops, "unpack_weight", unpack)
        weight = layer.weight
        assert weight.shape == (24, 70)
        assert weight.dtype == torch.float32
        assert weight.device.type == "cpu"
        assert weight.size() == (24, 70)
        assert not unpack.called
        assert torch.equal(weight + 0, expected)
        x = torch.randn(2, 70)
        torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))
        assert unpack.called

    def test_one_copy_of_the_weight_in_memory(self):
        layer = layer_of(quantized(WeightScheme(WoqWeightDtype.INT4, False, 128), 256, 512), bias=False)
        held = [t for t in (*layer.parameters(), *layer.buffers()) if t.numel()]
        assert [t.data_ptr() for t in held] == [layer._packed.data_ptr()]
        assert layer.nbytes == layer._packed.nbytes < 256 * 512 * 0.6


class TestConstructors:
    def test_from_float_follows_the_qconfig(self):
        linear = with_qconfig(nn.Linear(70, 24), weight_dtype=WoqWeightDtype.INT4, group_size=32)
        layer = WeightOnlyQuantizedLinear.from_float(linear.eval())
        assert layer.scheme == WeightScheme(WoqWeightDtype.INT4, False, 32)
        assert not layer.training
        expected = affine.dequantize(affine.quantize(linear.weight, layer.scheme))
        x = torch.randn(2, 70)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, expected, linear.bias))
        assert linear.weight.numel()  # the float layer is left as it was

    def test_from_float_takes_given_parameters(self):
        linear = with_qconfig(nn.Linear(70, 24), weight_qscheme=WoqWeightQScheme.ASYMMETRIC)
        scales, zero_points = torch.full((24,), 0.01), torch.full((24,), 3)
        qw = WeightOnlyQuantizedLinear.from_float(linear, scales, zero_points).quantized_weight()
        assert torch.equal(qw.scales, scales[:, None])
        assert torch.equal(qw.zero_points, zero_points[:, None].to(torch.int16))

    def test_from_float_drops_a_bias_of_zeros(self):
        linear = with_qconfig(nn.Linear(70, 24))
        nn.init.zeros_(linear.bias)
        assert WeightOnlyQuantizedLinear.from_float(linear).bias is None

    def test_from_float_without_a_weight_only_qconfig(self):
        linear = nn.Linear(4, 4)
        with pytest.raises(ValueError, match=r"mod.qconfig: expected a QConfigWoq"):
            WeightOnlyQuantizedLinear.from_float(linear)
        linear.qconfig = torch.ao.quantization.default_qconfig
        assert WeightOnlyQuantizedLinear.from_float(linear) is linear

    def test_from_float_and_qweight(self):
        qw = quantized(SCHEMES[1])
        linear = with_qconfig(nn.Linear(70, 24), lowp_mode=WoqLowpMode.BF16)
        layer = WeightOnlyQuantizedLinear.from_float_and_qweight(
            linear, qw.codes, WoqWeightDtype.INT8, qw.scales, qw.zero_points, group_size=32
        )
        assert torch.equal(layer.quantized_weight().codes, qw.codes)
        assert torch.equal(layer.bias, linear.bias)
        assert layer.lowp_mode == WoqLowpMode.BF16

    def test_from_float_and_int4_weight(self):
        qw, bias = quantized(SCHEMES[2]), torch.randn(24)
        layer = WeightOnlyQuantizedLinear.from_float_and_int4_weight(
            nn.Linear(70, 24), qw.codes, qw.scales, None, bias, group_size=16
        )
        assert torch.equal(affine.dequantize(layer.quantized_weight()), affine.dequantize(qw))
        assert torch.equal(layer.bias, bias)

    def test_from_weight_reads_gptq_tensors(self):
        qweight = torch.randint(-(2**31), 2**31, (8, 16), dtype=torch.int32)
        qzeros = torch.zeros(2, 2, dtype=torch.int32)  # stands for zero points of 1
        layer = WeightOnlyQuantizedLinear.from_weight(qweight, torch.ones(2, 16), qzeros, 64, 16, group_size=32)
        assert layer.lowp_mode == WoqLowpMode.BF16
        expected = (qweight.t()[:, :, None] >> torch.arange(0, 32, 4) & 15).flatten(1) - 1
        assert torch.equal(affine.dequantize(layer.quantized_weight()), expected.float())

    def test_from_int4_weight_takes_the_compute_mode_of_a_mapping(self):
        mapping = get_weight_only_quant_qconfig_mapping(lowp_mode=WoqLowpMode.INT8)
        qweight, scales, qzeros = torch.zeros(8, 16, dtype=torch.int32), torch.ones(1, 16), torch.zeros(1, 2).int()
        layer = WeightOnlyQuantizedLinear.from_int4_weight(
            qweight, scales, qzeros, 64, 16, QuantMethod.GPTQ_GEMM, qconfig=mapping
        )
        assert layer.lowp_mode == WoqLowpMode.INT8
        assert layer.act_quant_mode == WoqActQuantMode.PER_BATCH_IC_BLOCK_SYM

    def test_from_weight_takes_the_shape_of_awq_tensors(self):
        tensors = torch.full((64, 2), 0x33333333, dtype=torch.int32), torch.ones(1, 16), torch.zeros(1, 2).int()
        with pytest.warns(UserWarning, match=r"expected tensors of a weight \(8, 66\), they hold one of \(16, 64\)"):
            layer = WeightOnlyQuantizedLinear.from_weight(*tensors, 66, 8, quant_method=QuantMethod.AWQ_GEMM)
        assert torch.equal(affine.dequantize(layer.quantized_weight()), torch.full((16, 64), 3.0))

    def test_a_bias_of_another_length_raises(self):
        with pytest.raises(ValueError, match=r"bias: expected shape \[24\], got \[23\]"):
            WeightOnlyQuantizedLinear.from_quantized_weight(quantized(SCHEMES[0]), torch.zeros(23))


def test_repr_has_ipexs_fields(layer):
    assert layer.extra_repr() == (
        "in_features=70, out_features=24, dtype=int4, bias=True, lowp_mode=none, act_quant_mode=none, group_size=32, "
        "weight_qscheme=asymmetric"
    )
