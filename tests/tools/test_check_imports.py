import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "check_imports.py"


@pytest.fixture(scope="module")
def check_imports():
    spec = importlib.util.spec_from_file_location("check_imports", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path):
    """Write files given as {path: text} under a fresh root that holds a package and native sources."""

    def write(files):
        for name, text in ({"ipex_quant/__init__.py": "", "csrc/ops/library.cpp": ""} | files).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("file", "statement", "above"),
    [
        ("ops/woq.py", "import ipex_quant.nn", "nn"),
        ("ops/woq.py", "from ipex_quant.nn import weight_only_linear", "nn"),
        ("ops/woq.py", "from ..llm.optimize import optimize", "llm"),
        ("ops/__init__.py", "from .. import quantization", "quantization"),
        ("numerics/affine.py", "def f():\n    from .. import ops", "ops"),
        ("woq/rtn.py", "from ..smoothquant import scaling", "smoothquant"),
        ("llm/optimize.py", "import ipex_quant as ipex", "ipex_quant"),
        ("llm/optimize.py", "from ipex_quant import explain", "ipex_quant"),
        ("evaluation.py", "from . import cli", "cli"),
    ],
)
def test_import_upwards_or_sideways_is_named(check_imports, tree, file, statement, above):
    root = tree({f"ipex_quant/{file}": statement, "ipex_quant/llm/__init__.py": "", "ipex_quant/cli.py": ""})
    (violation,) = check_imports.python_violations(root)
    own = file.split("/")[0].removesuffix(".py")
    assert violation.startswith(f"ipex_quant/{file}:")
    assert violation.endswith(f"{own} imports {above}, which is not below it")


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("cli.py", "from . import demo, recipes\nimport ipex_quant as ipex"),
        ("nn/linear.py", "from ..ops import woq_linear\nfrom .. import numerics\nfrom . import other"),
        ("ops/__init__.py", "from ipex_quant import _C"),
        ("ops/__init__.py", "import torch.nn\nfrom torch import nn"),
        ("__init__.py", "from . import llm, quantization"),
    ],
)
def test_import_downwards_or_within_a_layer_passes(check_imports, tree, file, statement):
    assert check_imports.python_violations(tree({f"ipex_quant/{file}": statement})) == []


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("from .b import _hidden", "_hidden of ipex_quant.ops.b is private"),
        ("from ..numerics import _rounding", "_rounding of ipex_quant.numerics is private"),
        ("import importlib\nimportlib.import_module('ipex_quant.llm')", "imports by a string"),
        (
            "def f():\n    from .b import g",
            "circle of imports: ipex_quant.ops.a -> ipex_quant.ops.b -> ",
        ),
    ],
)
def test_private_names_strings_and_circles_are_named(check_imports, tree, statement, expected):
    files = {"ipex_quant/ops/a.py": statement, "ipex_quant/ops/b.py": "from .a import f", "ipex_quant/numerics.py": ""}
    if "circle" not in expected:
        files["ipex_quant/ops/b.py"] = ""
    (violation,) = check_imports.shape_violations(tree(files))
    assert expected in violation


def test_the_lazy_face_may_import_by_a_string(check_imports, tree):
    face = "import importlib\ndef __getattr__(name):\n    return importlib.import_module(f'{__name__}.{name}')"
    assert check_imports.shape_violations(tree({"ipex_quant/__init__.py": face, "ipex_quant/ops.py": ""})) == []


def test_module_without_a_layer_is_named(check_imports, tree):
    (violation,) = check_imports.python_violations(tree({"ipex_quant/helpers/stuff.py": ""}))
    assert "helpers has no layer" in violation


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("pack/pack.cpp", "#include <torch/csrc/stable/tensor.h>"),
        ("kernels/gemm.h", '#include "ATen/ATen.h"'),
        ("kernels/gemm.h", "  auto v = _mm512_setzero_si512();"),
        ("pack/layout.h", "struct A { __m256i v; };"),
        ("isa/avx2.cpp", "#include <immintrin.h>"),
    ],
)
def test_native_code_in_the_wrong_file_is_named(check_imports, tree, file, line):
    (violation,) = check_imports.native_violations(tree({f"csrc/{file}": f"int a;\n{line}\n"}))
    assert violation.startswith(f"csrc/{file}:2: ")


def test_native_code_in_its_place_passes(check_imports, tree):
    files = {
        "csrc/ops/library.cpp": "#include <torch/csrc/stable/library.h>\n",
        "csrc/ops/check.h": "#include <torch/headeronly/util/Exception.h>\n",
        "csrc/simd.h": "#include <immintrin.h>\n__m512i zero() { return _mm512_setzero_si512(); }\n",
        "csrc/simd_avx2.h": "__m256i v;\n",
        "csrc/pack/pack.cpp": "// what _mm512_permutexvar_epi8 does, in plain C++\n",
    }
    assert check_imports.native_violations(tree(files)) == []


def test_this_repository_passes():
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
