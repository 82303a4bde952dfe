"""Writing GGUF files: the container, version 3, and quantized layers as blocks that hold their values exactly.

Source: ggml's ``docs/gguf.md``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import torch

from ..gguf_blocks import BLOCKS
from ..gguf_file import ALIGNMENT, MAGIC
from .gguf_blocks import PACKINGS, block_kind, pack_blocks
from .writer import Layer, LayerError, check_dtype

VERSION = 3

TYPES = {"F32": 0, "F16": 1, "BF16": 30, **{kind: blocks.number for kind, blocks in BLOCKS.items()}}
"""Numbers of the types of tensors."""

HELD = tuple(dict.fromkeys(BLOCKS[kind].dtype for kind in PACKINGS))
"""Weight dtypes that the format holds."""

FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

FILE_TYPES = {
    **{"F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7, "MXFP4": 38},
    **{"Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30},
}
"""``general.file_type`` of a model most of whose weights are of a type."""

_ADVICE = "leave it in float, or write another format"
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _INT32 = 4, 6, 7, 8, 9, 5


@dataclass(frozen=True)
class GgufData:
    """A tensor to write: its `kind`, a key of `TYPES`, its `shape`, slowest dimension first, and what makes its bytes.

    The bytes are a contiguous uint8 tensor of one dimension.
    """

    kind: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]
    nbytes: int


def float_data(shape: Sequence[int], dtype: torch.dtype, read: Callable[[], torch.Tensor]) -> GgufData:
    """A float tensor in `dtype`; vectors are float32, as llama.cpp expects them."""
    dtype = torch.float32 if len(shape) == 1 else dtype
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    return GgufData(
        FLOATS[dtype], tuple(shape), lambda: read().to(dtype).contiguous().view(torch.uint8).flatten(), nbytes
    )


def layer_data(layer: Layer, order: torch.Tensor | None = None) -> GgufData:
    """The blocks of a quantized layer, with its rows in `order`; LayerError if none hold its values exactly."""
    if layer.int8_input is not None:
        raise LayerError(layer.name, f"it quantizes its input to 8 bits, GGUF does not; {_ADVICE}")
    weight = layer.read()
    check_dtype(layer, weight, HELD, _ADVICE)
    kind, reason = block_kind(weight)
    if reason is not None:
        raise LayerError(layer.name, f"{reason}; {_ADVICE}")
    rows, columns = weight.shape
    size = rows * (columns // BLOCKS[kind].elements) * BLOCKS[kind].size

    def make() -> torch.Tensor:
        blocks = pack_blocks(kind, layer.read())
        return (blocks if order is None else blocks[order]).flatten()

    return GgufData(kind, weight.shape, make, size)


def stacked_data(experts: Sequence[GgufData]) -> GgufData:
    """The tensors of all `experts`, one after the other; ValueError unless their types and shapes are the same."""
    first = experts[0]
    for what, values in (("types", [each.kind for each in experts]), ("shapes", [each.shape for each in experts])):
        if any(value != values[0] for value in values):
            raise ValueError(f"their {what} are {', '.join(sorted({str(value) for value in values}))}")

    def make() -> torch.Tensor:
        return torch.cat([each.make() for each in experts])

    return GgufData(first.kind, (len(experts), *first.shape), make, sum(each.nbytes for each in experts))


def write_gguf(file: IO[bytes], metadata: Mapping[str, Any], tensors: Mapping[str, GgufData]) -> None:
    """Write a GGUF file of `metadata` (bools, integers, floats, strings, and lists of one of these) and `tensors`."""
    file.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        file.write(_string(key) + _value(key, value))
    at = 0
    for name, data in tensors.items():
        sizes = tuple(reversed(data.shape))  # the fastest first
        file.write(_string(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
        file.write(struct.pack("<IQ", TYPES[data.kind], at))
        at += _aligned(data.nbytes)
    _fill(file)
    for data in tensors.values():
        file.write(data.make().numpy().data)
        _fill(file)


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _fill(file: IO[bytes]) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _string(text: str) -> bytes:
    content = text.encode("utf-8")
    return struct.pack("<Q", len(content)) + content


def _value(key: str, value: Any) -> bytes:
    if isinstance(value, list):
        kind = _kind_of(key, value[0]) if value else _STRING
        kind = _INT32 if kind == _UINT32 else kind  # as in arrays of token types
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(_bytes(kind, each) for each in value)
    kind = _kind_of(key, value)
    return struct.pack("<I", kind) + _bytes(kind, value)


def _kind_of(key: str, value: Any) -> int:
    for python, kind in ((bool, _BOOL), (int, _UINT32), (float, _FLOAT32), (str, _STRING)):
        if isinstance(value, python):
            return kind
    raise TypeError(f"{key}: expected a bool, int, float or string, got {value!r}")


def _bytes(kind: int, value: Any) -> bytes:
    if kind == _STRING:
        return _string(value)
    return struct.pack({_BOOL: "<?", _UINT32: "<I", _INT32: "<i", _FLOAT32: "<f"}[kind], value)
