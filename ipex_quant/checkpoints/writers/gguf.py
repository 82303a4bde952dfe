"""Writing GGUF files: the container, version 3, and the blocks that hold quantized weights exactly.

A block has 32 values of a row, with float16 scales d and minimums m:

- Q4_0: d, and 16 bytes of codes 0..15, value i in the low half of byte i and value i + 16 in the high half;
  ``w = d * (code - 8)``;
- Q4_1: d, m, and the same codes; ``w = d * code + m``;
- Q8_0: d, and 32 int8 codes; ``w = d * code``.

Groups of more values than a block's give each of their blocks the same scale. Source: ggml's ``docs/gguf.md`` and
``ggml-common.h``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import torch

from ...numerics.affine import INT4_OFFSET
from ...numerics.nibbles import unpack_nibbles
from ...numerics.quantized_weight import QuantizedWeight
from ...numerics.scheme import PER_CHANNEL, WoqWeightDtype
from .writer import Layer, LayerError, check_dtype

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
BLOCK = 32
"""Values in a block."""

HELD = (WoqWeightDtype.INT4, WoqWeightDtype.INT8)
"""Weight dtypes that the format holds."""

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}
"""Numbers of the types of tensors."""

FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
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
    kind = _kind(layer, weight)
    rows, columns = weight.shape
    return GgufData(
        kind,
        weight.shape,
        lambda: _blocks(kind, layer.read(), order).flatten(),
        rows * (columns // BLOCK) * _BLOCK_BYTES[kind],
    )


_BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}


def _kind(layer: Layer, weight: QuantizedWeight) -> str:
    check_dtype(layer, weight, HELD, _ADVICE)
    size, columns = weight.scheme.group_size, weight.shape[1]
    reason = None
    if weight.g_idx is not None:
        reason = "its groups are in act-order, GGUF's are in the order of the input features"
    elif columns % BLOCK:
        reason = f"GGUF has blocks of {BLOCK} input features, it has {columns}"
    elif size not in (PER_CHANNEL, BLOCK) and size % BLOCK:
        reason = f"GGUF has blocks of {BLOCK} input features, its groups have {size}"
    elif not _is_half(weight.scales):
        reason = "its scales are not float16, GGUF's are; quantize it by a gptq recipe"
    elif weight.zero_points is not None and weight.scheme.dtype == WoqWeightDtype.INT8:
        reason = "GGUF's 8-bit weights have no zero points"
    elif weight.zero_points is not None and not _is_half(_minimums(weight)):
        reason = "its zero points times its scales are not float16, which GGUF's minimums are"
    if reason is not None:
        raise LayerError(layer.name, f"{reason}; {_ADVICE}")
    if weight.scheme.dtype == WoqWeightDtype.INT8:
        return "Q8_0"
    return "Q4_0" if weight.zero_points is None else "Q4_1"


def _is_half(values: torch.Tensor) -> bool:
    return torch.equal(values.half().float(), values)


def _minimums(weight: QuantizedWeight) -> torch.Tensor:
    zero_points = INT4_OFFSET if weight.zero_points is None else weight.zero_points
    return -(weight.scales * zero_points)


def _blocks(kind: str, weight: QuantizedWeight, order: torch.Tensor | None) -> torch.Tensor:
    """Bytes uint8 ``[N, K / 32, bytes of a block]``."""
    rows, columns = weight.shape
    count = columns // BLOCK
    numbers = [weight.scales] if kind != "Q4_1" else [weight.scales, _minimums(weight)]
    heads = [each.half().repeat_interleave(-(-count // each.shape[1]), dim=1)[:, :count, None] for each in numbers]
    if kind == "Q8_0":
        codes = weight.codes.view(torch.uint8).view(rows, count, BLOCK)
    else:
        low, high = unpack_nibbles(weight.codes, columns).view(rows, count, BLOCK).chunk(2, dim=2)
        codes = low | high << 4
    blocks = torch.cat([*(head.contiguous().view(torch.uint8) for head in heads), codes], dim=2)
    return blocks if order is None else blocks[order]


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
