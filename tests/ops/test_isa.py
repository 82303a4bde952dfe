"""Every ISA level that this machine runs, against the plain-torch definition and against the others."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import ipex_quant
from ipex_quant import ops
from ipex_quant.ops import library

Results = dict[str, torch.Tensor]

LEVELS = ops.supported_isas()
RUN = ops.supported_isas(emulated=True)
# The sums are of unit variance and made in float32, in any order; then comes one rounding to the result's dtype. A post
# op starts from the rounded sum, whose last bit may have fallen either way, and can cancel all but the difference.
RTOL = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
ATOL = {torch.float32: 2e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}
ATOL_WIDENED = 3e-5
ATOL_POST_OP = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


def run_python(*arguments: str, level: str | None, **options) -> subprocess.CompletedProcess[str]:
    """A process that finds this very package and runs at `level`, None being its own choice."""
    paths = [str(Path(ipex_quant.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    variables.pop("IPEX_QUANT_ISA", None)
    if level is not None:
        variables["IPEX_QUANT_ISA"] = level
    command = [sys.executable, *(["-S"] if sys.flags.no_site else []), *arguments]
    return subprocess.run(command, env=variables, text=True, timeout=1800, **options)


def run_worker(kind: str, path: Path, level: str | None = None) -> tuple[Results, str]:
    run_python(str(Path(__file__).with_name("isa_worker.py")), kind, str(path), level=level, check=True)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["isa"]  # noqa: SIM118


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("isa")


@pytest.fixture(scope="module")
def expected(directory: Path) -> Results:
    return run_worker("reference", directory / "reference.safetensors")[0]


@pytest.fixture(scope="module")
def results(directory: Path) -> dict[str, Results]:
    computed = {level: run_worker("native", directory / level, level) for level in RUN}
    assert {level: isa for level, (_, isa) in computed.items()} == {level: level for level in RUN}
    return {level: tensors for level, (tensors, _) in computed.items()}


def is_integer(name: str) -> bool:
    """Whether the sums of this case are of integers, and so have one right result on every machine."""
    scheme, lowp_mode, *_ = name.split("|")
    return lowp_mode == "INT8" and not scheme.startswith(("fp8", "bnb_fp4"))


def post_op_of(name: str) -> str:
    return name.split("|")[4]


def has_exact_post_op(name: str) -> bool:
    return post_op_of(name) not in ("GELU", "NEW_GELU", "SILU")


def is_widened(name: str) -> bool:
    """Whether bfloat16 products of this case are sums of ``128 + code``, however small the codes are."""
    scheme, lowp_mode, *_ = name.split("|")
    return lowp_mode in ("BF16", "NONE") and scheme.split()[0] in ("int2", "int3", "int5", "int6", "fp4", "iq4")


def check(mismatches: list[str], total: int) -> None:
    assert total > 0
    assert not mismatches, f"{len(mismatches)} of {total} differ, among them " + "; ".join(mismatches[:5])


@pytest.mark.parametrize("level", RUN)
def test_quantized_weight_is_bit_equal_to_the_definition(results, expected: Results, level: str) -> None:
    names = [name for name in expected if not name.endswith("/y")]
    got = results[level]
    as_bytes = {name: (got[name].contiguous().view(torch.uint8), expected[name].view(torch.uint8)) for name in names}
    check([name for name, (a, b) in as_bytes.items() if not torch.equal(a, b)], len(names))


@pytest.mark.parametrize("level", RUN)
def test_integer_compute_is_bit_equal_to_the_definition(results, expected: Results, level: str) -> None:
    names = [name for name in expected if name.endswith("/y") and is_integer(name) and has_exact_post_op(name)]
    check([name for name in names if not torch.equal(results[level][name], expected[name])], len(names))


@pytest.mark.parametrize("level", RUN)
def test_every_result_is_close_to_the_definition(results, expected: Results, level: str) -> None:
    names = [name for name in expected if name.endswith("/y")]
    mismatches = []
    for name in names:
        value, reference = results[level][name], expected[name]
        assert value.dtype == reference.dtype
        atol = (ATOL if post_op_of(name) == "NONE" else ATOL_POST_OP)[reference.dtype]
        atol = max(atol, ATOL_WIDENED * is_widened(name))
        if not torch.allclose(value.double(), reference.double(), RTOL[reference.dtype], atol):
            mismatches.append(f"{name} by {(value.double() - reference.double()).abs().max():.3g}")
    check(mismatches, len(names))


@pytest.mark.parametrize("level", RUN[1:])
def test_packed_bytes_and_integer_results_do_not_depend_on_the_level(results, level: str) -> None:
    names = [
        name for name in results["generic"] if name.endswith("/packed") or (name.endswith("/y") and is_integer(name))
    ]
    generic, other = results["generic"], results[level]
    exact = [name for name in names if name.endswith("/packed") or has_exact_post_op(name)]
    check([name for name in exact if not torch.equal(generic[name], other[name])], len(exact))


FLOAT_LINEARS = """
import hashlib, itertools, torch
import ipex_quant.ops
torch.manual_seed(0)
digest = hashlib.sha256()
shapes = itertools.product((1, 2, 3, 4, 5, 8, 9), (1, 17, 130), (1, 33, 768, 1365, 4200))
for (rows, n, k), dtype in itertools.product(shapes, (torch.float32, torch.bfloat16, torch.float16)):
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((rows, k), (n, k), (n,)))
    digest.update(torch.ops.ipex_quant.float_linear(x, weight, bias, [], 1).view(torch.uint8).numpy())
print(digest.hexdigest())
"""


HALVES = """
import hashlib, torch
from ipex_quant import ops
values = torch.randint(-(2**31), 2**31, (99991,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
high, low, joined = torch.empty(99991).bfloat16(), torch.empty(99991).to(torch.int16), torch.empty(99991)
ops.split_halves(values.view(torch.float32), [high], [low])
ops.join_halves([high], [low.flip(0)], joined)
print(hashlib.sha256(b"".join(x.view(torch.uint8).numpy().tobytes() for x in (high, low, joined))).hexdigest())
"""


# From few rows to several blocks of a tile's, and k of no whole tile, of several parts and of two folds.
INTEGERS = """
import hashlib, itertools, torch
import ipex_quant.ops
torch.manual_seed(0)
digest = hashlib.sha256()
shapes = [*itertools.product((15, 16, 17, 31, 33, 65, 97), (1, 70), (36, 204, 256)), (19, 65, 4097), (40, 64, 65700)]
for rows, n, k in shapes:
    x = torch.randint(0, 256, (rows, k)).to(torch.uint8)
    codes = torch.randint(-128, 128, (n, k)).to(torch.int8)
    packed = torch.ops.ipex_quant.int8_pack(codes, torch.rand(n), [n])
    for count in (1, rows):
        scales, zeros = torch.rand(count), torch.randint(0, 256, (count,)).to(torch.int32)
        (y,) = torch.ops.ipex_quant.int8_linear(x, scales, zeros, packed, None, [], [n], torch.float32, 0)
        digest.update(y.view(torch.uint8).numpy())
print(digest.hexdigest())
"""


# Every number of e4m3 at each of the four bytes of a lane, by itself: in decode, and in prefill.
FLOAT8 = """
import hashlib, torch
from ipex_quant import ops
from ipex_quant.numerics.quantized_weight import QuantizedWeight
from ipex_quant.numerics.scheme import WeightScheme, WoqLowpMode, WoqWeightDtype
numbers = torch.arange(256).to(torch.uint8)[torch.arange(256) % 128 != 127].view(torch.float8_e4m3fn)
codes = numbers[:, None].repeat(1, 8)
scheme = WeightScheme(WoqWeightDtype.FP8)
packed = ops.pack_weight(QuantizedWeight(codes, torch.ones(len(codes), 1), None, None, scheme, codes.shape))
for dtype in (torch.float32, torch.bfloat16):
    for rows in (*torch.eye(8, dtype=dtype).split(1), *torch.eye(8, dtype=dtype).repeat(5, 1).split((5, 35))):
        y = ops.woq_linear(rows, packed.data, len(codes), None, None, WoqLowpMode.NONE)
        assert torch.equal(y.float(), numbers.float().expand(len(rows), -1)), (dtype, rows)
print(hashlib.sha256(y.view(torch.uint8).numpy()).hexdigest())
"""


@pytest.mark.parametrize(
    "code", [FLOAT_LINEARS, HALVES, INTEGERS, FLOAT8], ids=["float_linears", "halves", "integers", "float8"]
)
def test_the_same_bits_at_every_level(code: str) -> None:
    digests = {run_python("-c", code, level=level, check=True, capture_output=True).stdout for level in RUN}
    assert len(digests) == 1


# What has tiles, and is quick enough where they are emulated; test_tiles.py has the kernels themselves.
TILED = ("attention_ragged", "int8", "woq_group")
OTHERS = (
    "attention",
    "attention_float8",
    "attention_fused",
    "conv",
    "decoder",
    "decoder_int8",
    "embedding",
    "experts",
    "float_linear",
    "gated",
    "mamba",
    "norm",
    "rope",
)


# What levels that are emulated have of their own.
OWN = {"avx2_vnni_emulated": (*TILED, "conv", "decoder_int8", "experts"), "amx_emulated": TILED}


# The highest level runs them anyway.
@pytest.mark.parametrize("level", [level for level in RUN if level != LEVELS[-1]])
def test_ops_pass_their_tests(level: str) -> None:
    names = OWN.get(level, (*TILED, *OTHERS))
    tests = [str(Path(__file__).with_name(f"test_{name}.py")) for name in names]
    done = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, level=level, capture_output=True)
    assert done.returncode == 0, done.stdout


def test_unknown_level_is_an_error_that_lists_the_choices() -> None:
    done = run_python("-c", "from ipex_quant import ops; ops.isa_name()", level="avx9000", capture_output=True)
    assert done.returncode == 1
    for words in ("IPEX_QUANT_ISA", "avx9000", *LEVELS):
        assert words in done.stderr


def test_default_level_is_the_highest() -> None:
    code = "from ipex_quant import ops; print(ops.isa_name())"
    assert run_python("-c", code, level=None, capture_output=True).stdout.strip() == LEVELS[-1]


def test_without_the_native_library_the_import_says_how_to_build_it(monkeypatch) -> None:
    monkeypatch.delattr(ipex_quant, "_C")
    monkeypatch.setitem(sys.modules, "ipex_quant._C", None)
    with pytest.raises(ImportError, match=r"native library: .*; run `make build` or `pip install \.`"):
        importlib.reload(library)
