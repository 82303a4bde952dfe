import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ipex_quant.llm import modules
from ipex_quant.nn import Int8Linear, WeightOnlyQuantizedLinear
from ipex_quant.numerics import affine
from ipex_quant.numerics.int8 import quantize_per_channel
from ipex_quant.numerics.scheme import WeightScheme, WoqWeightDtype
from ipex_quant.ops import float_linear

IN, OUT = 70, 24
FUSIONS = {
    modules.LinearSilu: lambda y: F.silu(y),
    modules.LinearRelu: lambda y: F.relu(y),
    modules.LinearGelu: lambda y: F.gelu(y),
    modules.LinearNewGelu: lambda y: F.gelu(y, approximate="tanh"),
    modules.LinearMul: lambda y, a: y * a,
    modules.LinearAdd: lambda y, a: y + a,
    modules.LinearAddAdd: lambda y, a, b: y + a + b,
    modules.LinearSiluMul: lambda y, a: F.silu(y) * a,
}
EXACT = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 1.6e-2, "atol": 2e-2}}


def weight_only():
    qw = affine.quantize(torch.randn(OUT, IN), WeightScheme(WoqWeightDtype.INT4, False, 32))
    return WeightOnlyQuantizedLinear.from_quantized_weight(qw, torch.randn(OUT))


def int8_group(*out_features):
    weights = [quantize_per_channel(torch.randn(n, IN)) for n in out_features]
    return Int8Linear.make_group(weights, [torch.randn(n) for n in out_features], None, torch.float32)


LINEARS = {"float": lambda: nn.Linear(IN, OUT), "weight_only": weight_only, "int8": lambda: int8_group(OUT)[0]}


def operands(function, shape, dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for _ in range(function.__code__.co_argcount - 1)]


@pytest.fixture
def calls(monkeypatch):
    """Names of the modules whose forward ran."""
    names = []
    for cls in (nn.Linear, WeightOnlyQuantizedLinear, Int8Linear):
        forward = cls.forward
        monkeypatch.setattr(
            cls, "forward", lambda self, x, forward=forward: (names.append(type(self).__name__), forward(self, x))[1]
        )
    return names


@pytest.mark.parametrize("kind", LINEARS)
@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("fusion", FUSIONS)
class TestFusions:
    def test_is_the_linear_and_what_follows(self, fusion, dtype, kind):
        linear = LINEARS[kind]()
        linear = linear.to(dtype) if kind == "float" else linear
        function = FUSIONS[fusion]
        x = torch.randn(2, 5, IN).to(dtype)
        others = operands(function, (2, 5, OUT), dtype)
        fused = fusion(linear)(x, *others)
        assert fused.dtype == dtype
        torch.testing.assert_close(fused, function(linear(x), *others), **EXACT[dtype])


@pytest.mark.parametrize("rows", [1, 3, 50])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_float_linears_are_computed_by_the_op(fusion, rows, calls):
    linear, x = nn.Linear(IN, OUT).requires_grad_(False), torch.randn(rows, IN)
    others = operands(FUSIONS[fusion], (rows, OUT))
    fused = fusion(linear)(x, *others)
    assert calls == []
    torch.testing.assert_close(fused, FUSIONS[fusion](float_linear(x, linear.weight, linear.bias), *others))
    torch.testing.assert_close(
        modules.Linear2SiluMul(linear, linear)(x), F.silu(linear(x)) * linear(x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["weight_only", "int8"])
class TestQuantizedLinears:
    @pytest.mark.parametrize("fusion", [modules.LinearSilu, modules.LinearAddAdd])
    def test_run_the_post_op_in_their_kernel(self, kind, fusion, calls):
        fusion(LINEARS[kind]())(torch.randn(3, IN), *operands(FUSIONS[fusion], (3, OUT)))
        assert calls == []

    def test_both_projections_of_a_gate_run_in_one_call(self, kind, calls):
        gate, up = int8_group(OUT, OUT) if kind == "int8" else (weight_only(), weight_only())
        x = torch.randn(3, IN)
        result = modules.Linear2SiluMul(gate, up)(x)
        assert calls == []
        torch.testing.assert_close(result, F.silu(gate(x)) * up(x))

    def test_others_may_broadcast(self, kind):
        linear, x, other = LINEARS[kind](), torch.randn(3, IN), torch.randn(OUT)
        torch.testing.assert_close(modules.LinearAdd(linear)(x, other), linear(x) + other)

    def test_others_may_have_another_dtype(self, kind):
        linear, x, other = LINEARS[kind](), torch.randn(3, IN).bfloat16(), torch.randn(3, OUT)
        torch.testing.assert_close(modules.LinearMul(linear)(x, other), linear(x) * other)

    def test_hooks_of_the_linear_run(self, kind):
        linear, x = LINEARS[kind](), torch.randn(3, IN)
        linear.register_forward_hook(lambda module, args, output: torch.ones_like(output))
        assert modules.LinearRelu(linear)(x).eq(1).all()
        torch.testing.assert_close(modules.Linear2SiluMul(linear, linear)(x), F.silu(torch.ones(3, OUT)))

    def test_autocast_sets_the_dtype(self, kind):
        linear, x, y = LINEARS[kind](), torch.randn(3, IN), torch.randn(3, OUT)
        with torch.autocast("cpu", torch.bfloat16):
            assert modules.LinearSilu(linear)(x).dtype == torch.bfloat16
            assert modules.Linear2SiluMul(linear, linear)(x).dtype == torch.bfloat16
            torch.testing.assert_close(modules.LinearAdd(linear)(x, y), linear(x) + y)
            torch.testing.assert_close(modules.LinearAdd(linear)(x, y.bfloat16()), linear(x) + y.bfloat16())


class TestLinear2SiluMul:
    @pytest.mark.parametrize("dtype", EXACT)
    def test_float(self, dtype):
        gate, up = nn.Linear(IN, OUT).to(dtype), nn.Linear(IN, OUT).to(dtype)
        x = torch.randn(4, IN).to(dtype)
        torch.testing.assert_close(modules.Linear2SiluMul(gate, up)(x), F.silu(gate(x)) * up(x), **EXACT[dtype])

    def test_members_of_a_share_group_multiply_once(self, monkeypatch):
        gate, up = int8_group(OUT, OUT)
        x = torch.randn(4, IN)
        expected = F.silu(gate(x)) * up(x)
        quantized = []
        quantize = type(gate.share_group.inputs[0]).quantize
        monkeypatch.setattr(
            type(gate.share_group.inputs[0]), "quantize", lambda self, x: (quantized.append(x), quantize(self, x))[1]
        )
        torch.testing.assert_close(modules.Linear2SiluMul(gate, up)(x.clone()), expected)
        assert len(quantized) == 1

    def test_one_projection_may_be_quantized(self):
        gate, up, x = nn.Linear(IN, OUT), weight_only(), torch.randn(4, IN)
        torch.testing.assert_close(modules.Linear2SiluMul(gate, up)(x), F.silu(gate(x)) * up(x))


class TestModule:
    def test_state_dict_has_the_linear(self):
        linear = nn.Linear(IN, OUT)
        assert set(modules.LinearAdd(linear).state_dict()) == {"linear.weight", "linear.bias"}
        assert set(modules.Linear2SiluMul(linear, linear).state_dict()) == {
            "linear_s.weight",
            "linear_s.bias",
            "linear_m.weight",
            "linear_m.bias",
        }

    @pytest.mark.parametrize("kind", ["float", "weight_only"])  # Int8Linear has no gradient
    def test_gradient_reaches_the_input(self, kind):
        linear = LINEARS[kind]()
        x = torch.randn(3, IN)
        with torch.enable_grad():
            results = []
            for function in (modules.LinearSilu(linear), lambda x: F.silu(linear(x))):
                leaf = x.clone().requires_grad_()
                function(leaf).sum().backward()
                results.append(leaf.grad)
        torch.testing.assert_close(*results)

    def test_deepcopy_gives_the_same(self):
        fused, x = modules.LinearSilu(weight_only()), torch.randn(3, IN)
        assert torch.equal(copy.deepcopy(fused)(x), fused(x))

    @pytest.mark.parametrize("cls", [modules.LinearSilu, modules.LinearAdd, modules.LinearSiluMul])
    def test_refuses_what_is_no_module(self, cls):
        with pytest.raises(TypeError, match="linear: expected a linear module, got Tensor"):
            cls(torch.randn(3, 3))

    def test_refuses_other_that_does_not_broadcast(self):
        with pytest.raises(RuntimeError, match="size"):
            modules.LinearAdd(weight_only())(torch.randn(3, IN), torch.randn(3, OUT + 1))
