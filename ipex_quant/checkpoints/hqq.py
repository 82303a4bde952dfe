"""HQQ's checkpoints in safetensors, as transformers saved them.

A linear with weight ``[N, K]`` is ``[N * K / group_size, group_size]``, a group a row, stored as

- ``W_q``: the codes of `nbits`, packed along the rows: uint8 of 1, 2 or 4 parts of all rows, the first in the highest
  bits; 3 bits in int32 of 10 parts, of which the last may be filled up; 5 and 6 bits take 8;
- ``scale`` and ``zero``, floats, one a row: ``w = (code - zero) * scale``;
- ``nbits``, ``group_size``, ``axis``, ``shape``, ``packing`` and more, numbers and texts as tensors.

Groups across rows of the weight (`axis` 0) are refused. Zeros that are whole numbers become zero points, others
minimums. Source: HQQ's ``Quantizer`` and ``BitPack``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import FLOAT_DTYPES
from ..reading import shown
from .format import CheckpointFormat
from .tensors import check, group_of, linear_weight, raised_weight, require

_WEIGHT, _SCALE, _ZERO = "W_q", "scale", "zero"
_BITS, _AXIS, _GROUP, _SHAPE, _PACKING = "nbits", "axis", "group_size", "shape", "packing"
_OTHERS = (
    *("channel_wise", "optimize", "round_zero", "view_as_float", "unpack_view_dtype", "compute_dtype", "quant_zero"),
    *("quant_scale", "offload_meta", "stores_quant_config", "encoded_state_dict"),
)

PACKINGS = {
    "8bit_u8": (torch.uint8, 8, 1),
    "4bit_u8": (torch.uint8, 4, 2),
    "3bit_32": (torch.int32, 3, 10),
    "2bit_u8": (torch.uint8, 2, 4),
}
"""Dtype, bits and parts of the rows in an element, by the name of the packing."""

BITS = (8, 6, 5, 4, 3, 2)


class HqqFormat(CheckpointFormat):
    """How HQQ stores a module; its tensors tell everything."""

    keys = (_WEIGHT, _SCALE, _ZERO, _BITS, _AXIS, _GROUP, _SHAPE, _PACKING, *_OTHERS)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> HqqFormat:
        """The format; nothing in a `quantization_config` is needed."""
        return cls()

    def read(
        self, module_name: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int | None, int | None]
    ) -> QuantizedWeight:
        """Read the weight of one module; ValueError or TypeError for tensors that do not fit each other or `shape`."""
        weight, scales, zeros = require(tensors, (_WEIGHT, _SCALE, _ZERO))
        rows, columns = _shape(tensors, shape)
        bits, axis = _number(tensors, _BITS), _number(tensors, _AXIS, 1)
        group = _number(tensors, _GROUP, columns)
        if bits not in BITS:
            raise ValueError(f"{_BITS}: expected one of {list(BITS)}, got {bits}")
        if axis != 1:
            raise ValueError(f"{_AXIS}: expected 1, groups of input features, got {axis}; quantize with axis=1")
        if group <= 0 or columns % group or (group & (group - 1) and group != columns):
            raise ValueError(f"{_GROUP}: expected a power of 2 that divides {columns} columns, got {group}")
        if any(key in tensors and tensors[key].any() for key in ("quant_zero", "quant_scale")):
            raise ValueError("quant_scale, quant_zero: scales and zeros that are quantized, too, are not supported")
        count = rows * columns // group
        fields = _unpacked(tensors, weight, count, group, bits).view(rows, columns)
        groups = columns // group
        for key, values in ((_SCALE, scales), (_ZERO, zeros)):
            each = values.reshape(-1)
            check(key, each, FLOAT_DTYPES, (1,) if each.numel() == 1 else (count,))
        scales, zeros = (each.float().reshape(-1).expand(count).view(rows, groups) for each in (scales, zeros))
        size = group_of(group, columns)
        if bool((zeros == zeros.round()).all()) and zeros.min() >= 0 and zeros.max() < 1 << bits:
            return linear_weight(fields, bits, scales, zeros, size)
        return raised_weight(fields, bits, scales, -zeros * scales, size)


def _shape(tensors: Mapping[str, torch.Tensor], shape: tuple[int | None, int | None]) -> tuple[int, int]:
    (stored,) = require(tensors, (_SHAPE,))
    sizes = stored.reshape(-1).tolist() if stored.numel() <= 4 else []
    if len(sizes) != 2 or any(want not in (None, own) for own, want in zip(sizes, shape, strict=True)) or 0 in sizes:
        raise ValueError(f"{_SHAPE}: expected {list(shape)}, got {shown(sizes)}")
    return int(sizes[0]), int(sizes[1])


def _number(tensors: Mapping[str, torch.Tensor], key: str, default: int | None = None) -> int:
    tensor = tensors.get(key)
    if tensor is None and default is not None:
        return default
    (tensor,) = require(tensors, (key,))
    if tensor.numel() != 1 or tensor.is_floating_point():
        raise ValueError(f"{key}: expected a whole number, got {tensor.dtype} {list(tensor.shape)}")
    return int(tensor)


def _unpacked(
    tensors: Mapping[str, torch.Tensor], weight: torch.Tensor, count: int, group: int, bits: int
) -> torch.Tensor:
    """The codes, uint8 ``[count, group]``."""
    stored = tensors.get(_PACKING)
    default = "8bit_u8" if bits > 4 else "3bit_32" if bits == 3 else f"{bits}bit_u8"
    name = default if stored is None else bytes(stored.to(torch.uint8).tolist()[:20]).decode("ascii", "replace")
    if name not in PACKINGS:
        raise ValueError(f"{_PACKING}: expected one of {list(PACKINGS)}, got {shown(name)}")
    dtype, width, parts = PACKINGS[name]
    if weight.is_floating_point():  # the same bytes, called floats
        weight = weight.contiguous().view(dtype)
    check(_WEIGHT, weight, (dtype,), (-(-count // parts), group))
    shifts = range((parts - 1) * width, -1, -width)
    fields = torch.cat([(weight >> shift & ((1 << width) - 1)).to(torch.uint8) for shift in shifts])[:count]
    if fields.numel() and fields.max() >> bits:
        raise ValueError(f"{_WEIGHT}: expected codes below {1 << bits} for {bits} bits, got {int(fields.max())}")
    return fields
