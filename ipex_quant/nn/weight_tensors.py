"""Quantized weights from the tensor layouts that IPEX's `WeightOnlyQuantizedLinear` constructors take."""

from __future__ import annotations

from enum import IntEnum

import torch

from ..checkpoints import read_awq, read_gptq
from ..checkpoints.tensors import INDEX_DTYPES, check, infer_group_size, is_shard, normalize_g_idx, shard_weight
from ..numerics.nibbles import as_bytes, unpack_nibbles
from ..numerics.quantized_weight import QuantizedWeight, code_columns
from ..numerics.scheme import PER_CHANNEL, WeightScheme, WoqWeightDtype


class WoqWeightFormat(IntEnum):
    """Layout of the tensors of one quantized weight."""

    PLAIN_FORMAT = 0
    GPTQ_FORMAT = 1
    AWQ_FORMAT = 2


class QuantMethod(IntEnum):
    """Checkpoint layout that `from_weight` reads."""

    GPTQ_GEMM = 0
    AWQ_GEMM = 1


class QuantDtype(IntEnum):
    """Code dtype that `from_weight` reads."""

    INT4 = 0


_FILE_NAMES = {"zero_points": "qzeros"}
_CODES_A_WORD = 8


def read_tensors(
    tensors: dict[str, torch.Tensor | None],
    dtype: WoqWeightDtype,
    shape: tuple[int, int],
    group_size: int = PER_CHANNEL,
    weight_format: WoqWeightFormat = WoqWeightFormat.PLAIN_FORMAT,
) -> QuantizedWeight:
    """Read `qweight`, `scales`, `zero_points | None` and `g_idx | None` as one weight of `shape` ``(N, K)``.

    - PLAIN_FORMAT: `qweight` as `QuantizedWeight.codes` or, for 4-bit codes, int32 ``[N, ceil(K / 8)]`` with the lowest
      k in the lowest bits; `scales` float ``[N]`` or ``[N, groups]``; `zero_points` likewise, or int32
      ``[N, ceil(groups / 8)]`` packed as an int32 `qweight` is; without them the weight is symmetric. With a `g_idx`
      the weight may be a part of the input features, whose `scales` and `zero_points` are those of all groups.
    - GPTQ_FORMAT (INT4 only): the tensors of `read_gptq`, version 1, with `zero_points` for ``qzeros``.
    - AWQ_FORMAT (INT4 only): the tensors of `read_awq`, with `zero_points` for ``qzeros``.

    A `group_size` of -1 with several groups is inferred from their number; a `g_idx` in natural order is dropped.
    Raises ValueError or TypeError for tensors that do not fit.
    """
    if weight_format != WoqWeightFormat.PLAIN_FORMAT:
        if dtype != WoqWeightDtype.INT4:
            raise ValueError(f"dtype: {weight_format.name} holds INT4 codes, got {dtype.name}")
        return _read_packed(tensors, shape, group_size, weight_format)
    codes, scales, zero_points = _plain_tensors(tensors, dtype, shape)
    g_idx = tensors.get("g_idx")
    if g_idx is not None and is_shard(g_idx, scales, group_size):
        return shard_weight(codes, scales, zero_points, g_idx, dtype, shape)
    groups = scales.shape[1]
    size = infer_group_size(shape[1], groups) if group_size == PER_CHANNEL else group_size
    scheme = WeightScheme(dtype, zero_points is None, size)
    return QuantizedWeight(codes, scales, zero_points, _g_idx(g_idx, scheme, shape[1]), scheme, shape)


def _read_packed(
    tensors: dict[str, torch.Tensor | None], shape: tuple[int, int], group_size: int, weight_format: WoqWeightFormat
) -> QuantizedWeight:
    named = {_FILE_NAMES.get(name, name): tensor for name, tensor in tensors.items() if tensor is not None}
    size = None if group_size == PER_CHANNEL else group_size
    try:
        if weight_format == WoqWeightFormat.AWQ_FORMAT:
            return read_awq(named, size, shape=shape)
        return read_gptq(named, 4, size, shape=shape)
    except (ValueError, TypeError) as error:
        raise type(error)(str(error).replace(_FILE_NAMES["zero_points"], "zero_points")) from error


def _plain_tensors(
    tensors: dict[str, torch.Tensor | None], dtype: WoqWeightDtype, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    rows = shape[0]
    codes, scales, zero_points = tensors["qweight"], tensors["scales"], tensors.get("zero_points")
    scales = _rows("scales", _floating(scales), rows).float().contiguous()
    packed = codes.dtype == torch.int32
    if packed:
        codes = as_bytes(_rows("qweight", codes, rows))[:, : code_columns(dtype, shape[1])]
    if zero_points is not None:
        zero_points = _rows("zero_points", zero_points, rows)
        words = -(-scales.shape[1] // _CODES_A_WORD)
        if zero_points.dtype == torch.int32 and (packed or zero_points.shape[1] == words < scales.shape[1]):
            zero_points = _nibbles("zero_points", zero_points, scales.shape[1])
        zero_points = zero_points.round() if zero_points.is_floating_point() else zero_points
        zero_points = zero_points.to(torch.int16)
    return codes.contiguous(), scales, zero_points


def _floating(scales: torch.Tensor) -> torch.Tensor:
    if not scales.is_floating_point():
        raise ValueError(f"scales: expected a floating-point dtype, got {scales.dtype}")
    return scales


def _rows(name: str, tensor: torch.Tensor, rows: int) -> torch.Tensor:
    if tensor.shape[:1] != (rows,) or tensor.dim() > 2:
        raise ValueError(f"{name}: expected shape [{rows}] or [{rows}, groups], got {list(tensor.shape)}")
    return tensor.reshape(rows, -1)


def _nibbles(name: str, packed: torch.Tensor, count: int) -> torch.Tensor:
    packed = as_bytes(packed)
    if packed.shape[1] < (count + 1) // 2:
        raise ValueError(f"{name}: expected {count} codes of 4 bits in each row, got {packed.shape[1] * 2}")
    return unpack_nibbles(packed[:, : (count + 1) // 2], count)


def _g_idx(g_idx: torch.Tensor | None, scheme: WeightScheme, columns: int) -> torch.Tensor | None:
    if g_idx is None or scheme.group_size == PER_CHANNEL:
        return None
    check("g_idx", g_idx, INDEX_DTYPES, (columns,))
    return normalize_g_idx(g_idx, scheme.group_size, scheme.group_count(columns))
