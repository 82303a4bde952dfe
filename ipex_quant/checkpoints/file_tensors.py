"""`FileTensor`: a tensor in a safetensors file, which is read when it is indexed.

A file is an 8-byte little-endian length, a JSON header of that length with `dtype`, `shape` and `data_offsets` of every
tensor, and the bytes of the tensors one after the other. Source: the safetensors format description.

Tensors are read, not mapped: pages of a mapped file count as memory of the process, and a file that gets shorter would
end it. Nothing is allocated before the header is known to fit the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch

from ..reading import parse_json, shown

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
"""torch dtypes by their names in safetensors files."""

MAX_HEADER = 100_000_000
"""Most bytes of a header, as in the safetensors library."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor of `shape` at the byte `offset` of a file: ``t[...]`` reads all of it, ``t[i]`` entry i of the first
    dimension.

    Raises ValueError, with the file named, when the file has become shorter, and OSError when it cannot be read.
    """

    path: Path
    dtype: torch.dtype
    shape: torch.Size
    offset: int

    def __getitem__(self, index: int | EllipsisType) -> torch.Tensor:
        if not isinstance(index, int):
            return self._read(self.shape, 0)
        entry = self.shape[1:]
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"expected an index below {self.shape[0]}, got {index}")
        return self._read(entry, index * entry.numel() * self.dtype.itemsize)

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def _read(self, shape: torch.Size, start: int) -> torch.Tensor:
        data = torch.empty(shape.numel() * self.dtype.itemsize, dtype=torch.uint8, device="cpu")
        rest = data.numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start)
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise ValueError(f"{self.path}: it has become shorter; download it again")
                rest = rest[count:]
        return data.view(self.dtype).view(shape)


@dataclass(frozen=True)
class ExpertRows:
    """Some rows of one expert of a stack, which are read by ``rows[...]``."""

    stack: Stored
    expert: int
    rows: slice

    @property
    def dtype(self) -> torch.dtype:
        return self.stack.dtype

    @property
    def shape(self) -> torch.Size:
        count = len(range(*self.rows.indices(self.stack.shape[1])))
        return torch.Size((count, *self.stack.shape[2:]))

    def dim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: int | EllipsisType) -> torch.Tensor:
        rows = self.stack[self.expert][self.rows].contiguous()
        return rows[index] if isinstance(index, int) else rows


@dataclass(frozen=True)
class Derived:
    """A tensor of `shape` and `dtype` that `make` makes of `source` when it is read by ``t[...]``."""

    source: Stored
    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def of_values(cls, source: Stored, make: Callable[[torch.Tensor], torch.Tensor]) -> Derived:
        """The result of `make`, whose shape and dtype are found out without reading `source`."""
        result = make(torch.empty(source.shape, dtype=source.dtype, device="meta"))
        return cls(source, result.shape, result.dtype, make)

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __getitem__(self, index: int | EllipsisType) -> torch.Tensor:
        made = self.make(self.source[...])
        return made[index] if isinstance(index, int) else made


@dataclass(frozen=True)
class Joined:
    """A tensor whose entry i of the first dimension `make` makes of ``sources[i]`` when it is read by ``t[...]``."""

    sources: Sequence[Sequence[Stored]]
    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[list[torch.Tensor]], torch.Tensor]

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __getitem__(self, index: int | EllipsisType) -> torch.Tensor:
        if isinstance(index, int):
            return self.make([source[...] for source in self.sources[index]])
        result = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        for entry, _ in enumerate(self.sources):
            result[entry] = self[entry]
        return result


Stored = torch.Tensor | FileTensor | ExpertRows | Derived | Joined
"""A tensor, or one that is read when it is indexed: ``t[...]`` is the tensor in all cases."""


def file_tensors(path: Path) -> dict[str, FileTensor]:
    """The tensors of a safetensors file by name.

    Raises ValueError, with the file named, for a header that is truncated, not JSON, or does not fit the file: unknown
    dtypes, shapes that are no sizes, tensors that overlap, leave gaps or lie outside.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(f"{path}: truncated or no safetensors file (a header of {length} bytes in {size})")
        text = file.read(length)
    try:
        header = parse_json(text.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: truncated or no safetensors file (its header is no JSON: {error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: no safetensors file (its header is a {type(header).__name__})")
    start = 8 + length
    ends: list[tuple[int, int, str]] = []
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            dtype, shape, begin, end = _entry(path, name, entry)
            ends.append((begin, end, name))
            tensors[name] = FileTensor(path, dtype, shape, start + begin)
    at = 0
    for begin, end, name in sorted(ends):
        if begin != at:
            raise ValueError(
                f"{path}: {name}: expected to begin at byte {at}, got {begin}: tensors with gaps, or overlap"
            )
        at = end
    if at != size - start:
        raise ValueError(f"{path}: truncated or damaged: its header tells of {at} bytes, it has {size - start}")
    return tensors


def _entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, torch.Size, int, int]:
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: {name}: expected an object, got {shown(entry)}")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{path}: {name}: dtype: expected one of {list(DTYPES)}, got {shown(dtype)}")
    shape, offsets = _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        stored = entry.get("shape"), entry.get("data_offsets")
        raise ValueError(f"{path}: {name}: expected sizes, got shape {shown(stored[0])}, offsets {shown(stored[1])}")
    begin, end = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        raise ValueError(f"{path}: {name}: {dtype} {shape} takes {expected} bytes, its data_offsets are {offsets}")
    return DTYPES[dtype], torch.Size(shape), begin, end


def _sizes(value: Any) -> list[int] | None:
    """`value` if it is a list of sizes, else None."""
    sizes = isinstance(value, list) and all(type(each) is int and 0 <= each < 1 << 63 for each in value)
    return value if sizes else None
