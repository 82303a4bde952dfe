"""The AWQ checkpoint formats: "gemm", which all current tools write, "gemv", and "gemv_fast", which llm-awq has, too.

A linear with weight ``[N, K]`` is stored in "gemm" as

- ``qweight`` int32 ``[K, N / 8]``: the 4-bit codes of feature k, eight outputs to a word; nibble i of word c, from the
  low bits on, is output ``8 * c + ORDER[i]``;
- ``qzeros`` int32 ``[groups, N / 8]``: the zero points, 0..15 as they are, in the same order;
- ``scales`` ``[groups, N]``.

In "gemv", ``qweight`` is int32 ``[N, K / 8]``, ``qzeros`` int32 ``[N, words]`` and ``scales`` ``[N, 8 * words]``, with
the nibbles in their order, and groups filled up to whole words.

In "gemv_fast", ``qweight`` is int16 ``[N / 4, K]``: four rows in turn of 64 columns each, and of every 32 of these the
column `FAST_ORDER` in each place. ``scales`` and ``scaled_zeros`` (AutoAWQ's ``qzeros``), floats ``[groups, N]`` or
more rows, give ``w = scales * code + scaled_zeros``.

Else the weight is ``w[n, k] = scales[g, n] * (code[k, n] - zero_point[g, n])``, and ``g = k // group_size``. The
tensors tell the layout. Source: AutoAWQ's ``WQLinear_GEMM``, ``WQLinear_GEMV`` and ``WQLinear_GEMVFast``, llm-awq's
``WQLinear``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..numerics.nibbles import as_bytes, unpack_nibbles
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import FLOAT_DTYPES, PER_CHANNEL, WeightScheme, WoqWeightDtype
from ..ops import transpose_nibbles
from ..reading import shown
from .bit_fields import unpack_fields
from .format import CheckpointFormat, made_by_gptqmodel
from .tensors import (
    INDEX_DTYPES,
    check,
    check_rank,
    coded_weight,
    linear_weight,
    raised_weight,
    require,
    resolve_group_size,
    shape_or_stored,
)

BITS = 4
FIELDS = 8
"""Outputs in one int32 word."""

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, of the eight in a word, that each nibble holds."""

LAYOUTS = ("gemm", "gemv", "gemv_fast", "llm-awq")
"""The layouts that configurations name."""

INTERLEAVED, STRIDE = 4, 64
"""Rows that "gemv_fast" puts in turn, and columns of one turn."""

FAST_ORDER = torch.arange(32).view(4, 4, 2).transpose(0, 1).reshape(4, 4, 2).transpose(1, 2).flatten()
"""The column of 32 in each place of "gemv_fast"."""

_WEIGHT, _ZEROS, _SCALES, _G_IDX, _SCALED = "qweight", "qzeros", "scales", "g_idx", "scaled_zeros"

_OLD_NAMES = {"bits": "w_bit", "group_size": "q_group_size"}
"""Entries as the first releases of AutoAWQ named them in ``quant_config.json``."""


@dataclass(frozen=True)
class AwqFormat(CheckpointFormat):
    """How the modules of one AWQ checkpoint are stored; a `group_size` of None is inferred from each module's shapes.

    Raises ValueError for a `group_size` that is no integer.
    """

    group_size: int | None = None
    halves: bool = False

    keys = (_WEIGHT, _ZEROS, _SCALES, _SCALED)

    def __post_init__(self) -> None:
        if self.group_size is not None and not isinstance(self.group_size, int):
            raise ValueError(f"group_size: expected an integer, got {shown(self.group_size)}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AwqFormat:
        """The format that a `quantization_config` describes; raises ValueError for an unknown layout."""
        layout = config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm"
        if not isinstance(layout, str) or layout.lower() not in LAYOUTS:
            raise ValueError(f"version: expected one of {list(LAYOUTS)}, got {shown(layout)}; save it as 'gemm'")
        bits, group_size = (config.get(name, config.get(old)) for name, old in _OLD_NAMES.items())
        if bits not in (None, BITS):
            raise ValueError(f"bits: expected {BITS} for AWQ, got {shown(bits)}")
        return cls(group_size, made_by_gptqmodel(config))

    def read(
        self, module_name: str, tensors: Mapping[str, torch.Tensor], shape: tuple[int | None, int | None]
    ) -> QuantizedWeight:
        """Read the weight of one module from its `tensors`; raises as `read_awq` does."""
        return read_awq(tensors, self.group_size, shape=shape)


def read_awq(
    tensors: Mapping[str, torch.Tensor],
    group_size: int | None = None,
    *,
    shape: tuple[int | None, int | None] = (None, None),
) -> QuantizedWeight:
    """Read ``qweight``, ``qzeros``, ``scales`` and, if there, an int ``g_idx`` ``[K]`` of one module, as INT4.

    `shape` is the expected ``(out_features, in_features)``; a `group_size` of None is inferred. Raises ValueError for
    missing, truncated or inconsistent tensors, and TypeError for another dtype.
    """
    qweight, scales = require(tensors, (_WEIGHT, _SCALES))
    check_rank(_WEIGHT, qweight, 2)
    check_rank(_SCALES, scales, 2)
    if qweight.dtype == torch.int16:
        return _read_fast(tensors, group_size, shape)
    (qzeros,) = require(tensors, (_ZEROS,))
    check_rank(_ZEROS, qzeros, 2)
    fits_gemm = qweight.shape[1] == -(-scales.shape[1] // FIELDS)
    if not fits_gemm and qweight.shape[0] == scales.shape[0] == qzeros.shape[0]:  # all of one size, that of rows
        return _read_gemv(qweight, qzeros, scales, group_size, shape)
    g_idx = tensors.get(_G_IDX)
    groups = scales.shape[0]
    out_features, in_features = shape_or_stored(shape, (scales.shape[1], qweight.shape[0]))
    size = resolve_group_size(group_size, in_features, groups)
    scheme = WeightScheme(WoqWeightDtype.INT4, symmetric=False, group_size=size)

    words = -(-out_features // FIELDS)
    check(_WEIGHT, qweight, (torch.int32,), (in_features, words))
    check(_SCALES, scales, FLOAT_DTYPES, (scheme.group_count(in_features), out_features))
    check(_ZEROS, qzeros, (torch.int32,), (groups, words))
    if g_idx is not None:
        check(_G_IDX, g_idx, INDEX_DTYPES, (in_features,))

    codes, zero_points = (transpose_nibbles(x.contiguous(), ORDER)[:out_features] for x in (qweight, qzeros))
    zero_points = unpack_nibbles(zero_points, groups)
    return coded_weight(codes, BITS, scales.t(), zero_points, size, g_idx, (out_features, in_features))


def _read_gemv(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    group_size: int | None,
    shape: tuple[int | None, int | None],
) -> QuantizedWeight:
    rows, columns = shape_or_stored(shape, (qweight.shape[0], FIELDS * qweight.shape[1]))
    size, groups = _groups(group_size, columns, scales.shape[1])
    check(_WEIGHT, qweight, (torch.int32,), (rows, -(-columns // FIELDS)))
    check(_ZEROS, qzeros, (torch.int32,), (rows, -(-scales.shape[1] // FIELDS)))
    check(_SCALES, scales, FLOAT_DTYPES, (rows, scales.shape[1]))
    codes = unpack_fields(qweight, BITS, columns)
    return linear_weight(codes, BITS, scales[:, :groups], unpack_fields(qzeros, BITS, groups), size)


def _read_fast(
    tensors: Mapping[str, torch.Tensor], group_size: int | None, shape: tuple[int | None, int | None]
) -> QuantizedWeight:
    qweight, scales = tensors[_WEIGHT], tensors[_SCALES]
    key = _SCALED if _SCALED in tensors else _ZEROS
    (zeros,) = require(tensors, (key,))
    rows, columns = shape_or_stored(shape, (INTERLEAVED * qweight.shape[0], qweight.shape[1]))
    if rows % INTERLEAVED or columns % STRIDE:
        raise ValueError(f"{_WEIGHT}: expected {INTERLEAVED} rows in turn of {STRIDE} columns, of {rows} x {columns}")
    size, groups = _groups(group_size, columns, scales.shape[0])
    check(_WEIGHT, qweight, (torch.int16,), (rows // INTERLEAVED, columns))
    check(_SCALES, scales, FLOAT_DTYPES, (scales.shape[0], rows))
    check(key, zeros, FLOAT_DTYPES, (scales.shape[0], rows))
    fields = unpack_nibbles(as_bytes(qweight), INTERLEAVED * columns)
    turns = fields.view(rows // INTERLEAVED, columns // STRIDE, INTERLEAVED, STRIDE // 32, 32)
    codes = turns[..., FAST_ORDER.argsort()].transpose(1, 2).reshape(rows, columns)
    return raised_weight(codes, BITS, scales[:groups].t(), zeros[:groups].t(), size)


def _groups(group_size: int | None, columns: int, stored: int) -> tuple[int, int]:
    """The `group_size` of a `WeightScheme` and the number of groups, of which more may be `stored`."""
    if group_size is None:
        raise ValueError("group_size: the configuration does not tell, and groups are filled up in this layout")
    size = resolve_group_size(columns if group_size == PER_CHANNEL else group_size, columns, 1)
    groups = WeightScheme(WoqWeightDtype.INT4, False, size).group_count(columns)
    if stored < groups:
        raise ValueError(f"{_SCALES}: expected at least {groups} groups, got {stored}")
    return size, groups
