"""Tiles of AMX: both twins of csrc/tile.h against the manual's formulas, and where the library has the instructions.

The instructions run on any x86-64 processor: where they do not exist, tests/native/tile_trap.cpp carries them out.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ipex_quant
from ipex_quant.ops import isa

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "tests" / "native"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
IS_X86 = platform.machine() == "x86_64"
SMALLEST = torch.finfo(torch.float32).tiny
DOTS = {"u8 s8": (torch.uint8, torch.int8), "s8 u8": (torch.int8, torch.uint8), "bf16": (torch.bfloat16,) * 2}


@pytest.fixture(scope="module", params=["emulated", "real"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    sources = [NATIVE / "tiles.cpp", ROOT / "csrc" / "host" / "self_test.cpp", ROOT / "csrc" / "pack" / "pack_int8.cpp"]
    options = ["-DIPEX_QUANT_EMULATED"]
    if request.param == "real":
        if not IS_X86:
            pytest.skip("no x86-64")
        sources.append(NATIVE / "tile_trap.cpp")
        options = ["-mamx-tile", "-mamx-int8", "-mamx-bf16"]
    path = tmp_path_factory.mktemp("tiles") / f"{request.param}.so"
    common = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([COMPILER, *common, *options, *map(str, sources), "-o", str(path)], check=True)
    loaded = ctypes.CDLL(str(path))
    if request.param == "real":
        loaded.install_tile_trap()  # pytest has taken the signal for itself
    return loaded


def flush(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() < SMALLEST, torch.copysign(torch.zeros_like(x), x), x)


def expected_product(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """``c + a @ b`` in the order of the manual: of bfloat16 per instruction, each of up to 32 elements of a row of `a`.

    Values must be such that one product and a sum fit float64.
    """
    if a.dtype != torch.bfloat16:
        return (a.long() @ b.long() + c.long()).to(torch.int32)
    c = c.clone()
    for first in range(0, a.shape[1], 32):
        sums = [torch.zeros_like(c), torch.zeros_like(c)]
        for k in range(first, min(first + 32, a.shape[1])):
            product = flush(a[:, k].float())[:, None].double() * flush(b[k].float()).double()
            sums[k % 2] = flush((product + sums[k % 2]).float())
        c = flush(flush(c) + flush(sums[0] + sums[1]))
    return c


def product(library: ctypes.CDLL, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, spare: int) -> torch.Tensor:
    """`a` [rows, k] times `b` [k, columns] by tiles, added to `c` if given; all rows are `spare` bytes longer."""
    rows, k = a.shape
    columns, size = b.shape[1], a.element_size()
    words = b.reshape(k * size // 4, 4 // size, columns).transpose(1, 2).reshape(-1, columns * 4 // size).contiguous()
    buffers, pointers = [], []
    result = torch.full((rows, columns), 77, dtype=torch.float32 if size == 2 else torch.int32) if c is None else c
    for tensor in (a, words, result):
        data = tensor.contiguous().view(torch.uint8)
        buffer = torch.full((data.shape[0], data.shape[1] + spare), 255, dtype=torch.uint8)
        buffer[:, : data.shape[1]] = data
        buffers.append(buffer)
        pointers += [ctypes.c_void_p(buffer.data_ptr()), ctypes.c_int64(buffer.shape[1])]
    dot = list(DOTS.values()).index((a.dtype, b.dtype))
    library.tile_product(
        dot, columns // 16, c is not None, *pointers[:4], ctypes.c_int64(rows), ctypes.c_int64(k * size), *pointers[4:]
    )
    assert (buffers[2][:, 4 * columns :] == 255).all()
    return buffers[2][:, : 4 * columns].contiguous().view(result.dtype)


def draw(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype == torch.bfloat16:
        return torch.randn(shape, generator=generator).bfloat16()
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max + 1, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dot", DOTS)
@pytest.mark.parametrize(("rows", "columns"), [(2, 16), (16, 32), (17, 32), (27, 16), (31, 32), (32, 32)])
@pytest.mark.parametrize("words", [1, 7, 16, 23, 32, 37])
@pytest.mark.parametrize("add", [False, True])
def test_product_has_the_bits_of_the_manuals_formula(library, dot: str, rows: int, columns: int, words: int, add: bool):
    generator = torch.Generator().manual_seed(rows * words)
    types = DOTS[dot]
    k = words * 4 // types[0].itemsize
    a, b = draw((rows, k), types[0], generator), draw((k, columns), types[1], generator)
    floats = types[0] == torch.bfloat16
    c = torch.randn(rows, columns, generator=generator) if floats else draw((rows, columns), torch.int32, generator)
    expected = expected_product(a, b, c if add else torch.zeros_like(c))
    result = product(library, a, b, c if add else None, spare=12)
    assert torch.equal(result.view(torch.int32), expected.view(torch.int32))


def test_sums_of_bytes_wrap(library):
    a = torch.full((16, 64), 255, dtype=torch.uint8)
    b = torch.full((64, 16), 127, dtype=torch.int8)
    c = torch.full((16, 16), 2**31 - 1, dtype=torch.int32)
    assert (product(library, a, b, c, 0) == 2**31 - 1 + 64 * 255 * 127 - 2**32).all()


@pytest.mark.parametrize(
    ("a", "b", "c", "expected"),
    [
        (2.0**-127, 1.0, 0.0, 0.0),  # an operand that is denormal
        (2.0**-80, 2.0**-80, 0.0, 0.0),  # a product that is
        (-(2.0**-64), 2.0**-64, 0.0, 0.0),
        (2.0**-64, 2.0**-62, 0.0, 2.0**-125),  # the sum of both, none of which is
        (2.0**-126, 1.0, 2.0**-127, 2.0**-125),  # a summand that is
        (float("inf"), 1.0, 1.0, float("inf")),
        (float("inf"), 0.0, 1.0, float("nan")),
    ],
)
def test_denormals_are_zero(library, a: float, b: float, c: float, expected: float):
    rows = torch.full((4, 2), a).bfloat16()
    columns = torch.full((2, 16), b).bfloat16()
    result = product(library, rows, columns, torch.full((4, 16), c), 0)
    torch.testing.assert_close(result, torch.full((4, 16), expected), rtol=0, atol=0, equal_nan=True)


def test_self_test_tells_a_wrong_product(library):
    assert library.self_test_accepts(0) == 1
    assert library.self_test_accepts(1) == 0


def test_a_level_that_fails_its_self_test_is_told_once(monkeypatch):
    reason = "instruction set amx: a product by its tiles is not what it should be; avx512_bf16 is used"
    monkeypatch.setattr(isa, "native", SimpleNamespace(isa_lowered=lambda: reason))
    with pytest.warns(RuntimeWarning, match=re.escape(reason)):
        isa.warn_if_lowered()


INSTRUCTIONS = {"ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored", "tdpbusd", "tdpbsud", "tdpbf16ps"}
INSTRUCTION = re.compile(r"\s+[0-9a-f]+:\s+((?:ld|st)tilecfg|tile\w+|tdp\w+|tcmm\w+)\b")
FUNCTION = re.compile(r"[0-9a-f]+ <(.*)>:$")


@pytest.mark.skipif(not IS_X86 or shutil.which("objdump") is None, reason="no objdump of x86-64")
def test_tile_instructions_are_in_their_own_object_only():
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", ipex_quant._C.__file__]
    function, places, found = "", set(), set()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if header := FUNCTION.match(line):
                function = header[1]
            elif instruction := INSTRUCTION.match(line):
                places.add(function)
                found.add(instruction[1])
    assert process.returncode == 0
    assert found == INSTRUCTIONS
    assert not [place for place in places if "ipex_quant::amx::" not in place]
