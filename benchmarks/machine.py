"""The machine's limits, measured in the same run as a benchmark, and its description."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from ipex_quant import ops

ROOT = Path(__file__).resolve().parent.parent
READ_BYTES = 512 << 20

_AVX2 = ("-mavx2", "-mfma")
_VNNI = (*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")))
_BF16 = (*_VNNI, "-mavx512bf16")
_FLAGS = {
    "generic": _AVX2,
    "avx2": _AVX2,
    "avx2_vnni": (*_AVX2, "-mavxvnni"),
    "avx512_vnni": _VNNI,
    "avx512_bf16": _BF16,
    "amx": _BF16,
}
"""What the limits are compiled with, by instruction set level."""


class Limits:
    """Memory read bandwidth and multiply-accumulate rates of this machine on `threads` threads, by vectors.

    Rates are those of the instruction set level in use.
    """

    def __init__(self, threads: int) -> None:
        self._library = ctypes.CDLL(str(_build(ops.isa_name())))
        for name in ("read_bandwidth", "read_bandwidths", "int8_rate", "float_rate", "bf16_rate"):
            getattr(self._library, name).restype = ctypes.c_double
        self._library.read_bandwidth.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        self._library.allocate.restype = ctypes.c_void_p
        self._library.allocate.argtypes = [ctypes.c_int64]
        self._buffer = self._library.allocate(READ_BYTES)
        self.threads = threads

    def measure(self) -> tuple[float, float]:
        """Bytes per second of reading half a gigabyte, and operations per second (a multiply-accumulate is two)."""
        bandwidth = self._library.read_bandwidth(self._buffer, READ_BYTES, self.threads)
        return bandwidth, self._library.int8_rate(self.threads)

    def bandwidth_of(self, tensors: Sequence[torch.Tensor]) -> float:
        """Bytes per second of reading these very tensors: how fast memory is depends on where it is."""
        data = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
        sizes = (ctypes.c_int64 * len(tensors))(*(tensor.nbytes for tensor in tensors))
        return self._library.read_bandwidths(data, sizes, len(tensors), self.threads)

    def rate(self, dtype: str) -> float:
        """Operations per second on "INT8" (bytes), "bfloat16" or "float32"."""
        library = self._library
        return {"INT8": library.int8_rate, "bfloat16": library.bf16_rate, "float32": library.float_rate}[dtype](
            self.threads
        )

    def bandwidths(self) -> tuple[float, float]:
        """Bytes per second of reading half a gigabyte: in large pages, and in a tensor's pages."""
        tensor = self._library.read_bandwidth(self._tensor.data_ptr(), READ_BYTES, self.threads)
        return self._library.read_bandwidth(self._buffer, READ_BYTES, self.threads), tensor

    @cached_property
    def _tensor(self) -> torch.Tensor:
        return torch.ones(READ_BYTES, dtype=torch.uint8)

    def best(self, rounds: int = 5) -> dict[str, float]:
        """The highest of several measurements, for the head of a table: the first ones may be too low."""
        bandwidths, rates = zip(*(self.measure() for _ in range(rounds)), strict=True)
        return {"read_bandwidth": max(bandwidths), "int8_rate": max(rates)}


def describe(threads: int, **more: str | float) -> dict[str, str | float]:
    """Print and return CPU, ISA level, threads, versions and `more`: the head of a table and of a JSON file."""
    machine = {
        "cpu": _cpu_name(),
        "isa": ops.isa_name(),
        "threads": threads,
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **more,
    }
    print(", ".join(f"{key}: {value}" for key, value in machine.items()))
    return machine


def _cpu_name() -> str:
    fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if line.count(":") == 1)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    return (
        f"{fields.get('model name', platform.processor())} "
        f"(family {fields.get('cpu family')}, model {fields.get('model')})"
    )


def _build(level: str) -> Path:
    source = ROOT / "benchmarks" / "limits.cpp"
    library = ROOT / "build" / "benchmarks" / f"liblimits_{level}.so"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        library.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", *_FLAGS[level], "-shared", "-fPIC", "-pthread", "-w"]
        subprocess.run([os.environ.get("CXX", "g++"), *flags, str(source), "-o", str(library)], check=True)
    return library
