import copy
import gc
import io
import pickle
import threading
import weakref
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from torch import nn

from ipex_quant import ops
from ipex_quant.nn import Int8Linear
from ipex_quant.numerics import affine
from ipex_quant.numerics.int8 import StaticActivation, quantize_per_channel
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype

IN, OUT = 70, (24, 70, 5)
SMOOTHING = torch.linspace(0.5, 2, IN)
ACTIVATIONS = {
    "per_token": None,
    "static": StaticActivation(0.03125, 120),
    "smoothed": StaticActivation(0.03125, 120, SMOOTHING),
}


def group(activation=ACTIVATIONS["smoothed"], out=OUT, biases=(True, False, True)):
    weights = [quantize_per_channel(torch.randn(n, IN)) for n in out]
    biases = [torch.randn(n) if bias else None for n, bias in zip(out, biases, strict=False)]
    return Int8Linear.make_group(weights, biases, activation, torch.float32)


def single(activation=ACTIVATIONS["smoothed"], bias=True):
    return group(activation, (24,), (bias,))[0]


def dequantized_input(x, activation):
    """What the codes of `x` stand for, in plain arithmetic, before smoothing."""
    if activation is None:
        rows = x.float().reshape(-1, x.shape[-1])
        low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
        scale = (high - low) / 255
        zero = (-low / scale).round()
        return (((rows / scale).round() + zero).clamp(0, 255) - zero).mul(scale).reshape(x.shape)
    factor = 1 if activation.smoothing_factor is None else activation.smoothing_factor
    codes = ((x.float() * (factor / activation.scale)).round() + activation.zero_point).clamp(0, 255)
    return (codes - activation.zero_point) * activation.scale / factor


class Siblings(nn.Module):
    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x):
        x = x + 0
        return tuple(member(x) for member in self.members)


def results(members, x):
    return [member(x) for member in members]


def equal(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.fixture
def gemms(monkeypatch):
    """Counts the GEMMs: what `ops.int8_linear` is called for."""
    spy = Mock(wraps=ops.int8_linear)
    monkeypatch.setattr(ops, "int8_linear", spy)
    return spy


class TestForward:
    @pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
    @pytest.mark.parametrize("bias", [True, False])
    def test_multiplies_the_rounded_input_by_the_weight(self, activation, bias):
        layer = single(activation, bias)
        x = torch.randn(2, 3, IN)
        expected = nn.functional.linear(dequantized_input(x, activation), layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)

    def test_the_weight_is_that_of_the_unscaled_input(self):
        layer = single()
        qw = layer.quantized_weight()
        assert layer.weight.shape == (24, IN)
        assert torch.equal(layer.weight.clone(), qw.codes * qw.scales * SMOOTHING)

    @pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
    def test_what_is_written_to_the_weight_is_quantized(self, activation):
        first, second, _ = group(activation)
        before, other = first.weight.clone(), second.weight.clone()
        delta = torch.randn(before.shape) * 0.1
        first.weight.data += delta
        torch.testing.assert_close(first.weight.clone(), before + delta, rtol=0, atol=0.05)
        assert not torch.equal(first.weight.clone(), before)
        assert torch.equal(second.weight.clone(), other)
        assert first.share_group is second.share_group

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(IN,), (0, IN), (1, IN), (2, 5, IN)])
    def test_keeps_leading_dimensions_and_dtype(self, dtype, shape):
        for y, n in zip(results(group(), torch.randn(shape).to(dtype)), OUT, strict=True):
            assert y.shape == (*shape[:-1], n)
            assert y.dtype == dtype

    def test_input_that_does_not_fit_raises(self):
        with pytest.raises(RuntimeError, match="70"):
            single()(torch.randn(2, 71))
        with pytest.raises(RuntimeError):
            single()(torch.zeros(2, IN, dtype=torch.int32))

    @pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_input_gets_the_gradient_of_the_dequantized_weights(self, activation, dtype):
        members = group(activation)
        x = torch.randn(2, 3, IN, dtype=dtype, requires_grad=True)
        grads = [torch.randn(2, 3, n).to(dtype) for n in OUT]
        outputs = results(members, x)
        with torch.no_grad():
            assert equal(outputs, results(members, x.detach()))
        torch.autograd.backward(outputs, grads)
        expected = sum(g.float() @ m.weight.clone().float() for g, m in zip(grads, members, strict=True))
        torch.testing.assert_close(
            x.grad.float(), expected, **({} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.5})
        )

    @pytest.mark.parametrize("compiled", [False, True])
    def test_autocast_decides_the_dtype(self, compiled):
        layer = single()
        run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        x = torch.randn(2, IN)
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        assert torch.equal(y, layer(x.bfloat16()))

    def test_weights_and_biases_that_do_not_fit_raise(self):
        weights = [quantize_per_channel(torch.randn(4, k)) for k in (8, 9)]
        with pytest.raises(ValueError, match="same number of input features"):
            Int8Linear.make_group(weights, [None, None], None, torch.float32)
        with pytest.raises(ValueError, match="biases: expected one for each of 1 weights, got 2"):
            Int8Linear.make_group(weights[:1], [None, None], None, torch.float32)
        with pytest.raises(ValueError, match=r"bias: expected shape \[4\], got \[3\]"):
            Int8Linear.make_group(weights[:1], [torch.ones(3)], None, torch.float32)
        with pytest.raises(ValueError, match=r"smoothing_factor: expected shape \[8\], got \[70\]"):
            Int8Linear.make_group(weights[:1], [None], ACTIVATIONS["smoothed"], torch.float32)
        int4 = affine.quantize(torch.randn(4, 8), WeightScheme(WoqWeightDtype.INT4, True))
        with pytest.raises(ValueError, match="expected int8 sym per-channel, got int4"):
            Int8Linear.make_group([int4], [None], None, torch.float32)


class TestShareGroup:
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    @pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
    def test_one_gemm_gives_what_each_gives_alone(self, gemms, activation, mode):
        members = group(activation)
        with mode():
            x = torch.randn(3, IN)
            alone = [member(x.clone()) for member in reversed(members)][::-1]
            gemms.reset_mock()
            assert equal(results(members, x), alone)
        assert gemms.call_count == 1
        assert members[0].share_group._pending is None

    def test_other_tensors_in_between(self, gemms):
        q, k, v = group()
        x, other = torch.randn(2, IN), torch.randn(2, IN)
        expected = [v(x.clone()), k(other.clone()), q(other.clone()), v(other.clone())]
        q(x)
        assert equal([v(x), k(other), q(other), v(other)], expected)
        assert torch.equal(k(x), k(x))  # taken once, computed once more

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_a_tensor_written_to_in_between_is_noticed(self, mode, gemms):
        q, k, _ = group()
        with mode():
            x = torch.randn(2, IN)
            before = k(x.clone())
            q(x)
            x[1, IN - 1] += 3
            assert torch.equal(k(x), k(x.clone()))
            assert not torch.equal(k(x), before)

    def test_autocast_that_ends_in_between_is_noticed(self):
        q, k, _ = group()
        x = torch.randn(2, IN)
        with torch.autocast("cpu", torch.bfloat16):
            q(x)
        assert torch.equal(k(x), k(x.clone()))

    def test_nothing_is_kept_after_the_last_member(self):
        members = group()
        x = torch.randn(2, IN)
        outputs = results(members, x)
        seen = [weakref.ref(tensor) for tensor in (x, *outputs)]
        del x, outputs
        gc.collect()
        assert [ref() for ref in seen] == [None] * 4

    def test_the_weight_is_stored_once(self):
        members = group(ACTIVATIONS["static"], (128, 256), (True, True))
        assert len({id(member.share_group) for member in members}) == 1
        held = members[0].share_group
        tensors = (
            held.packed.data,
            held.bias,
            *(vars(held.inputs[0])[n] for n in ("multiplier", "scale", "zero_point")),
            held.tensors[0]["_static_input"],
        )
        assert sum(member.nbytes for member in members) == sum(t.nbytes for t in tensors)
        assert members[1].nbytes > 256 * IN

    def test_a_result_is_taken_by_the_thread_that_computed_it(self, gemms):
        q, k, _ = group()
        x = torch.randn(2, IN)
        q(x)
        others = []
        thread = threading.Thread(target=lambda: others.append(k(x)))
        thread.start()
        thread.join()
        own = k(x)
        assert gemms.call_count == 2
        assert torch.equal(own, others[0])
        assert own is not others[0]

    def test_threads_never_get_each_others_results(self):
        members = group()
        inputs = [torch.randn(2, IN) for _ in range(4)]
        expected = [[member(x.clone()) for member in members] for x in inputs]
        wrong = []

        def work(x, right):
            for _ in range(200):
                if not equal(results(members, x), right):
                    wrong.append(x)

        threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


class TestCompile:
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    @pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
    def test_one_graph_with_one_gemm(self, activation, mode):
        model = Siblings(group(activation))
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

        with mode():
            compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
            for rows in (2, 3):
                x = torch.randn(rows, IN)
                assert equal(compiled(x), model(x))
        assert {str(graph.graph).count("ipex_quant.int8_linear") for graph in graphs} == {1}
        assert model.members[0].share_group._pending is None

    def test_reading_the_weight_does_not_break_the_graph(self):
        layer = single()
        compiled = torch.compile(
            lambda x: x.to(layer.weight.dtype) @ layer.weight.t(), backend="aot_eager", fullgraph=True
        )
        x = torch.randn(2, IN)
        torch.testing.assert_close(compiled(x), x @ layer.weight.t())

    def test_a_graph_that_writes_to_the_shared_input_is_refused(self):
        q, k, _ = group()

        def run(x):
            x = x + 0
            y = q(x)
            x.mul_(3)
            return y, k(x)

        with (
            torch.no_grad(),
            # torch 2.10 puts a message of its own in the place of ours.
            pytest.raises(Exception, match=r"input of a share group changed between its|Runtime assertion failed"),
        ):
            torch.compile(run, backend="aot_eager", fullgraph=True)(torch.randn(2, IN))

    def test_weights_packed_in_inference_mode(self):
        with torch.inference_mode():
            model = Siblings(group())
            model.members[0]._set_bias(torch.ones(24))
        model.members[0]._set_bias(torch.zeros(24))
        x = torch.randn(2, IN, requires_grad=True)
        assert equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))

    @pytest.mark.parametrize("strict", [False, True])
    def test_exports(self, strict):
        model = Siblings(group())
        x = torch.randn(2, IN)
        assert equal(torch.export.export(model, (x,), strict=strict).module()(x), model(x))

    def test_a_graph_break_between_the_members(self):
        q, k, v = group()

        def run(x):
            y = q(x)
            torch._dynamo.graph_break()
            return [y, k(x), v(x)]

        compiled = torch.compile(run, backend="aot_eager")
        for _ in range(3):
            x = torch.randn(2, IN)
            assert equal(compiled(x), run(x))


class TestCopies:
    def test_deepcopy_keeps_the_group(self):
        model = Siblings(group())
        model.members[0](torch.randn(2, IN))  # a result that nobody takes
        other = copy.deepcopy(model)
        assert len({id(member.share_group) for member in (*model.members, *other.members)}) == 2
        assert other.members[0].share_group._pending is None
        x = torch.randn(2, IN)
        assert equal(other(x), model(x))

    def test_pickle_and_torch_save(self):
        model = Siblings(group())
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        x = torch.randn(2, IN)
        for other in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
            assert equal(other(x), model(x))
            assert len({id(member.share_group) for member in other.members}) == 1

    @pytest.mark.parametrize("member", [0, 1])
    def test_a_member_copied_alone(self, member):
        members = group()
        x = torch.randn(2, IN)
        assert torch.equal(copy.deepcopy(members[member])(x), members[member](x))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("gradient", [False, True])
    def test_jit_trace_save_and_load(self, gradient):
        model = Siblings(group())
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(model, torch.randn(2, IN, requires_grad=gradient)), file)
        file.seek(0)
        x = torch.randn(3, IN)
        assert equal(torch.jit.load(file)(x), model(x))

    def test_safetensors(self, tmp_path):
        model, other = Siblings(group()), Siblings(group())
        safetensors.torch.save_model(model, tmp_path / "model.safetensors")
        safetensors.torch.load_model(other, tmp_path / "model.safetensors")
        x = torch.randn(2, IN)
        assert equal(other(x), model(x))


class TestStateDict:
    def test_holds_plain_tensors(self):
        state = single().state_dict()
        kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
        assert kinds == {
            "codes": (torch.int8, (24, IN)),
            "scales": (torch.float32, (24, 1)),
            "smoothing_factor": (torch.float32, (IN,)),
            "input_scale": (torch.float32, (1,)),
            "input_zero_point": (torch.int32, (1,)),
            "bias": (torch.float32, (24,)),
        }
        assert list(single(None, bias=False).state_dict()) == ["codes", "scales"]

    @pytest.mark.parametrize("name", ACTIVATIONS)
    def test_loads_into_another_group(self, gemms, name):
        model, other = Siblings(group(ACTIVATIONS[name])), Siblings(group(ACTIVATIONS[name]))
        for tensor in (state := model.state_dict()):
            if tensor.endswith("input_scale"):
                state[tensor] = state[tensor] * 2  # another calibration, of all members
        other.load_state_dict(state)
        x = torch.randn(2, IN)
        right = model(x) if name == "per_token" else None
        gemms.reset_mock()
        found = other(x)
        assert gemms.call_count == 1
        assert right is None or equal(found, right)
        assert all(torch.equal(tensor, state[key]) for key, tensor in other.state_dict().items())

    def test_members_with_different_activations_compute_alone(self):
        model, other = Siblings(group()), Siblings(group(StaticActivation(0.05, 100, SMOOTHING)))
        x = torch.randn(2, IN)
        expected = [model(x)[0], other(x)[1], model(x)[2]]
        model.members[1].load_state_dict(other.members[1].state_dict())
        assert equal(model(x), expected)

    @pytest.mark.parametrize(
        ("name", "tensor", "message"),
        [
            ("codes", torch.zeros(24, 69, dtype=torch.int8), r"0.codes: expected shape \[24, 70\]"),
            ("codes", torch.zeros(24, IN), "0.codes: expected dtype torch.int8"),
            ("scales", torch.full((24, 1), torch.nan), "0.scales: expected finite"),
            ("bias", torch.ones(23), r"0.bias: expected shape \[24\]"),
            ("smoothing_factor", torch.ones(3), r"0.smoothing_factor: expected shape \[70\]"),
            ("input_scale", torch.zeros(1), "0.scale: expected a finite number above 0"),
            ("input_scale", torch.ones(2), r"0.input_scale: expected shape \[1\]"),
            ("input_zero_point", torch.ones(1), "0.input_zero_point: expected dtype torch.int32"),
            ("input_zero_point", torch.tensor([256], dtype=torch.int32), "0.zero_point: expected 0..255"),
        ],
    )
    def test_tensors_that_do_not_fit_are_named(self, name, tensor, message):
        model = nn.Sequential(single())
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(model.state_dict() | {f"0.{name}": tensor})

    def test_missing_and_unexpected_keys_are_torchs(self):
        layer = single(ACTIVATIONS["static"])
        state = layer.state_dict()
        del state["input_scale"]
        with pytest.raises(RuntimeError, match=r'Missing key.*"input_scale"'):
            layer.load_state_dict(state)
        with pytest.raises(RuntimeError, match=r'Unexpected key.*"smoothing_factor"'):
            layer.load_state_dict(single().state_dict())
        with pytest.raises(RuntimeError, match="whole or not at all"):
            layer.load_state_dict(state, strict=False)


def test_casting_changes_what_is_reported_alone():
    model = Siblings(group())
    before = model.state_dict()
    model.bfloat16()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.members[0].weight.dtype == model.members[0].bias.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="Int8Linear is packed for the CPU, it cannot be moved to meta"):
        model.to("meta")


def test_repr():
    assert group()[1].extra_repr() == (
        "in_features=70, out_features=70, activation=static, smoothed=True, bias=False, group=3"
    )
    assert "activation=per_token" in repr(single(None))
