import importlib
import logging
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.ao.nn.quantized.dynamic import Linear as DynamicLinear

import ipex_quant
from ipex_quant import quantization
from ipex_quant.alias import IPEX, install_as_ipex, uninstall_as_ipex
from ipex_quant.settings import compiler

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ipex():
    install_as_ipex()
    yield importlib.import_module(IPEX)
    uninstall_as_ipex()


def quantized(mapping):
    prepared = quantization.prepare(nn.Sequential(nn.Linear(8, 8)), mapping, example_inputs=X)
    prepared(X)
    return quantization.convert(prepared)[0]


def test_nothing_changes_before_the_first_import():
    code = f"""if True:
        import torch
        trace = torch.jit.trace
        import ipex_quant
        ipex_quant.install_as_ipex()
        assert torch.jit.trace is trace and not hasattr(torch.xpu, "optimize")
        import {IPEX}.quantization
        assert torch.jit.trace is not trace and hasattr(torch.xpu, "optimize")
        assert "ipex" in torch.compiler.list_backends()
        ipex_quant.alias.uninstall_as_ipex()
        assert torch.jit.trace is trace and not hasattr(torch.xpu, "optimize")
        assert "ipex" not in torch.compiler.list_backends()
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_backend_for_torch_compile(ipex, monkeypatch):
    monkeypatch.setattr(compiler._Setting, "backend", "torchscript")  # inductor's is quicker to start
    assert ipex._get_compiler_backend() == "torchscript"
    torch._dynamo.reset()
    model = nn.Conv2d(3, 4, 3).eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="ipex")(X), model(X))
    ipex._set_compiler_backend("inductor")
    assert compiler.get_compiler_backend() == "inductor"


def test_tracing_under_autocast(ipex):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(X)
        assert torch.is_autocast_cache_enabled()
        traced = torch.jit.trace(model, X)
        assert torch.is_autocast_cache_enabled()
        torch.testing.assert_close(traced(X), expected)
        with pytest.raises(TypeError):
            torch.jit.trace()
        assert torch.is_autocast_cache_enabled()


def test_graphs_traced_under_autocast_run_as_traced(ipex):
    norm, x = nn.LayerNorm(8), torch.randn(2, 8).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
        assert torch.jit.trace(norm, x)(x).dtype == torch.bfloat16


def test_arrays_of_bfloat16(ipex):
    x = torch.randn(2, 3).bfloat16()
    for y in (x, x.numpy(), x.numpy(force=True)):
        assert torch.equal(torch.as_tensor(y).float(), x.float())
    y = x.float()
    assert torch.from_numpy(y.numpy()).data_ptr() == y.data_ptr()
    with pytest.raises(RuntimeError, match="requires grad"):
        x.requires_grad_().numpy()


def test_lowp_mode_by_its_name_in_ipex(ipex):
    woq = ipex.quantization.get_weight_only_quant_qconfig_mapping(lowp_mode=ipex.quantization.WoqLowpMode.BF16)
    woq = ipex.utils.weight_only_quantization._woq_enable_weight_cache_for_large_batch(woq)
    layer = ipex.quantization.convert(ipex.quantization.prepare(nn.Linear(8, 8).eval(), woq))
    assert layer._lowp_mode == ipex.quantization.WoqLowpMode.BF16
    uninstall_as_ipex()
    assert not hasattr(layer, "_lowp_mode")
    with pytest.raises(TypeError, match="BFloat16"):
        torch.ones(1).bfloat16().numpy()


def test_what_wrapped_tracing_later_stays(ipex, monkeypatch):
    def wrapper(*args, **kwargs):
        raise NotImplementedError

    original = torch.jit.trace.__wrapped__
    monkeypatch.setattr(torch.jit, "trace", wrapper)
    uninstall_as_ipex()
    assert torch.jit.trace is wrapper
    monkeypatch.undo()
    torch.jit.trace = original


def test_optimize_for_an_xpu(ipex, monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout()).eval()
    with pytest.raises(RuntimeError, match=r"torch\.xpu\.optimize: torch finds no XPU; use ipex\.optimize"):
        torch.xpu.optimize(model, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    optimized = torch.xpu.optimize(model, torch.bfloat16)
    assert optimized[0].weight.dtype == torch.bfloat16
    assert isinstance(optimized[1], nn.Identity)
    assert "forward" not in vars(optimized[0])
    training = model.train()
    optimizer = torch.optim.SGD(training.parameters(), lr=0.1)
    assert len(torch.xpu.optimize(training, torch.bfloat16, optimizer)) == 2


def test_dynamic_linear_layers_are_torchs(ipex):
    dynamic = quantized(quantization.default_dynamic_qconfig_mapping)
    static = quantized(quantization.get_smooth_quant_qconfig_mapping())
    assert isinstance(dynamic, torch.nn.quantized.dynamic.Linear)
    assert not isinstance(static, torch.nn.quantized.dynamic.Linear)
    assert not isinstance(nn.Linear(2, 2), torch.nn.quantized.dynamic.Linear)
    uninstall_as_ipex()
    assert not isinstance(dynamic, DynamicLinear)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_torchs_own_stay_what_they_are(ipex):
    assert isinstance(DynamicLinear(2, 2), DynamicLinear)
    assert not isinstance(nn.Linear(2, 2), DynamicLinear)
    assert issubclass(DynamicLinear, nn.Module)


def test_messages_are_ipexs(ipex, caplog):
    model = nn.Conv2d(3, 4, 3).double().eval()
    ipex.optimize(model, dtype=torch.bfloat16)
    text = "[NotSupported]Can't convert model's parameters dtype from torch.float64 to torch.bfloat16"
    assert caplog.record_tuples == [("IPEX", logging.WARNING, text)]
    caplog.clear()
    with caplog.at_level(logging.ERROR, logger="IPEX"):
        ipex.optimize(model, dtype=torch.bfloat16)
    assert caplog.record_tuples == []
    uninstall_as_ipex()
    ipex_quant.optimize(model, dtype=torch.bfloat16)
    assert [name for name, _, _ in caplog.record_tuples] == ["ipex_quant"]
