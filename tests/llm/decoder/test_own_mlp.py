import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ipex_quant.llm.decoder.mlp import FusedMlp
from ipex_quant.llm.decoder.own_mlp import OwnMlp, fuse_mlps, mlp_of
from ipex_quant.nn import WeightOnlyQuantizedLinear
from ipex_quant.nn.fused_forward import fused_forward, restore_forwards
from ipex_quant.quantization import WoqWeightDtype, convert, get_weight_only_quant_qconfig_mapping, prepare


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


class Own(nn.Module):
    """`compute` is its forward, of linears a and b (32 to 48 features), c (48 to 32) and j (32 to 96)."""

    def __init__(self, names, compute, bias=True):
        super().__init__()
        sizes = {"a": (32, 48), "b": (32, 48), "c": (48, 32), "j": (32, 96)}
        for name in names:
            setattr(self, name, nn.Linear(*sizes[name], bias=bias))
        self.compute = compute

    def forward(self, x):
        return self.compute(self, x)


def halves(x):
    return x.chunk(2, dim=-1)


COMPUTED = {
    "gate first": ("abc", lambda m, x: m.c(F.silu(m.a(x)) * m.b(x))),
    "gate last": ("abc", lambda m, x: m.c(m.a(x) * F.gelu(m.b(x)))),
    "gate of tanh": ("bca", lambda m, x: m.c(F.gelu(m.a(x), approximate="tanh") * m.b(x))),
    "gate of relu": ("bca", lambda m, x: m.c(m.a(x) * torch.relu(m.b(x)))),
    "no gate": ("ac", lambda m, x: m.c(F.gelu(m.a(x)))),
    "no gate, relu": ("ca", lambda m, x: F.dropout(m.c(torch.relu(m.a(F.dropout(x, 0.1, False)))), 0.1, False)),
    "halves": ("jc", lambda m, x: m.c(_product(*halves(m.j(x))))),
}
OTHERWISE = {
    "gate in the second half": ("jc", lambda m, x: m.c(_product(*halves(m.j(x))[::-1]))),
    "adds its input": ("abc", lambda m, x: x + m.c(F.silu(m.a(x)) * m.b(x))),
    "scales": ("abc", lambda m, x: m.c(F.silu(m.a(x)) * m.b(x) * 1.01)),
    "scales its input": ("ac", lambda m, x: m.c(F.gelu(m.a(x * 2)))),
    "another input": ("abc", lambda m, x: m.c(F.silu(m.a(x)) * m.b(x.flip(1)))),
    "no activation": ("ac", lambda m, x: m.c(m.a(x))),
    "another activation": ("ac", lambda m, x: m.c(F.hardswish(m.a(x)))),
    "a mean": ("ac", lambda m, x: m.c(F.gelu(m.a(x)).mean(1, keepdim=True))),
    "twice": ("ac", lambda m, x: m.c(F.gelu(m.a(x))) * 0 + m.c(F.gelu(m.a(x)))),
    "one layer is not used": ("abc", lambda m, x: m.c(F.silu(m.a(x)))),
    "a pair": ("ac", lambda m, x: (m.c(F.gelu(m.a(x))), None)),
    "another argument": ("ac", lambda m, x, y: m.c(F.gelu(m.a(x))) + y),
}


def _product(gate, up):
    return F.silu(gate) * up


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("case", COMPUTED)
def test_an_mlp_is_known_by_what_it_computes(case, quantize):
    model = nn.ModuleList([Own(*COMPUTED[case])]).eval()
    if quantize:
        mapping = get_weight_only_quant_qconfig_mapping(weight_dtype=WoqWeightDtype.INT8)
        model = convert(prepare(model, mapping))
        assert any(isinstance(module, WeightOnlyQuantizedLinear) for module in model.modules())
    x = torch.randn(2, 5, 32)
    expected = model[0](x)
    assert fuse_mlps(model) == ["0"]
    torch.testing.assert_close(model[0](x), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(fused_forward(model[0]), OwnMlp)
    restore_forwards(model)
    assert torch.equal(model[0](x), expected)


@pytest.mark.parametrize("case", OTHERWISE)
def test_what_computes_otherwise_is_left_alone(case):
    assert mlp_of(Own(*OTHERWISE[case]).eval()) is None


def test_a_sequence_of_layers_is_an_mlp():
    assert isinstance(
        mlp_of(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.5), nn.Linear(12, 8)).eval()), FusedMlp
    )


def test_a_module_with_more_than_linears_is_left_alone():
    module = Own(*COMPUTED["gate first"]).eval()
    module.register_buffer("scale", torch.ones(1))
    assert mlp_of(module) is None


def test_its_own_code_runs_for_training_gradients_hooks_and_new_layers():
    model = nn.ModuleList([Own(*COMPUTED["gate first"])]).eval()
    fuse_mlps(model)
    seen = []
    own = model[0].compute
    model[0].compute = lambda module, x: seen.append(1) or own(module, x)
    x = torch.randn(2, 32)
    model[0](x)
    assert not seen
    with torch.enable_grad():
        model[0](x)
    model[0].train()(x)
    model[0].eval()
    handle = model[0].a.register_forward_hook(lambda *_: None)
    model[0](x)
    handle.remove()
    model[0].b = nn.Linear(32, 48)
    model[0](x)
    assert len(seen) == 4
