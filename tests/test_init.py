import importlib.metadata
import subprocess
import sys

import pytest

import ipex_quant as ipex


def test_importing_is_cheap():
    code = "import sys, ipex_quant; print([m for m in ('torch', 'transformers', 'ipex_quant._C') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_quantizing_a_module_does_without_transformers():
    code = "import sys, ipex_quant as ipex; ipex.quantization.prepare; print('transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_submodules_load_on_first_use():
    assert callable(ipex.quantization.convert)
    assert callable(ipex.llm.optimize)
    assert callable(ipex.explain)
    assert {"llm", "quantization", "explain", "show_config"} <= set(dir(ipex))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ipex.nonsense  # noqa: B018


def test_the_names_of_ipex_are_there():
    linear = ipex.nn.WeightOnlyQuantizedLinear
    assert ipex.nn.modules.WeightOnlyQuantizedLinear is linear
    assert ipex.llm.quantization.IPEXWeightOnlyQuantizedLinear is linear
    assert ipex.llm.quantization.QuantMethod.AWQ_GEMM == 1
    assert ipex.llm.quantization.QuantDtype.INT4 == 0


def test_a_source_tree_has_no_version(monkeypatch, capsys):
    def fail(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", fail)
    assert ipex.__version__ == "unknown (not installed)"
    ipex.show_config()
    assert "unknown (not installed)" in capsys.readouterr().out


def test_show_config(capsys):
    ipex.show_config()
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["ipex_quant"] == ipex.__version__
    assert lines["ISA"] == ipex.ops.isa_name()
    assert {"torch", "threads"} <= lines.keys()
