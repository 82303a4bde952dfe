"""Quantized weights from the tensor layouts that IPEX's `WeightOnlyQuantizedLinear` constructors take."""

from __future__ import annotations

from enum import IntEnum

import torch

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
      ``[N, ceil(groups / 8)]`` packed as an int32 `qweight` is; without them the weight is symmetric.
    - GPTQ_FORMAT (INT4 only): `qweight` int32 ``[K / 8, N]``, `scales` ``[groups, N]``, `zero_points` int32
      ``[groups, N / 8]`` that hold the zero point less one, as AutoGPTQ writes them.

    A `group_size` of -1 with several groups is found from their number; a `g_idx` in natural order is dropped. Raises
    ValueError or TypeError for tensors that do not fit.
    """
    if weight_format == WoqWeightFormat.AWQ_FORMAT:
        raise ValueError("weight_format: AWQ_FORMAT is not supported yet, expected PLAIN_FORMAT or GPTQ_FORMAT")
    if weight_format == WoqWeightFormat.GPTQ_FORMAT:
        if dtype != WoqWeightDtype.INT4:
            raise ValueError(f"dtype: GPTQ_FORMAT holds INT4 codes, got {dtype.name}")
        codes, scales, zero_points = _gptq_tensors(tensors, shape)
    else:
        codes, scales, zero_points = _plain_tensors(tensors, dtype, shape)
    scheme = WeightScheme(dtype, zero_points is None, _group_size(group_size, shape[1], scales.shape[1]))
    g_idx = _g_idx(tensors.get("g_idx"), scheme, shape[1])
    return QuantizedWeight(codes, scales, zero_points, g_idx, scheme, shape)


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
        if packed and zero_points.dtype == torch.int32:
            zero_points = _nibbles("zero_points", zero_points, scales.shape[1])
        zero_points = zero_points.round() if zero_points.is_floating_point() else zero_points
        zero_points = zero_points.to(torch.int16)
    return codes.contiguous(), scales, zero_points


def _gptq_tensors(
    tensors: dict[str, torch.Tensor | None], shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = shape
    qweight, scales, zero_points = tensors["qweight"], tensors["scales"], tensors["zero_points"]
    if qweight.dtype != torch.int32 or tuple(qweight.shape) != (columns // 8, rows):
        raise ValueError(f"qweight: expected int32 [{columns // 8}, {rows}], got {qweight.dtype} {list(qweight.shape)}")
    if scales.dim() != 2 or scales.shape[1] != rows:
        raise ValueError(f"scales: expected shape [groups, {rows}], got {list(scales.shape)}")
    groups = len(scales)
    if zero_points is None or zero_points.dtype != torch.int32 or zero_points.dim() != 2 or len(zero_points) != groups:
        got = None if zero_points is None else f"{zero_points.dtype} {list(zero_points.shape)}"
        raise ValueError(f"zero_points: expected int32 [{groups}, {rows // 8}], got {got}")
    # Eight codes an int32 with the first in the lowest bits is, byte by byte, two a byte with the even one low.
    codes = as_bytes(qweight.t())
    zero_points = _nibbles("zero_points", zero_points, rows).t() + 1
    return codes, _floating(scales).t().float().contiguous(), zero_points.to(torch.int16).contiguous()


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


def _group_size(group_size: int, columns: int, groups: int) -> int:
    if group_size != PER_CHANNEL or groups == 1:
        return group_size
    return 1 << (-(-columns // groups) - 1).bit_length()


def _g_idx(g_idx: torch.Tensor | None, scheme: WeightScheme, columns: int) -> torch.Tensor | None:
    if g_idx is None:
        return None
    if g_idx.is_floating_point() or tuple(g_idx.shape) != (columns,):
        raise ValueError(f"g_idx: expected integers [{columns}], got {g_idx.dtype} {list(g_idx.shape)}")
    if scheme.group_size == PER_CHANNEL or not g_idx.any():  # some files hold zeros for "none"
        return None
    g_idx = g_idx.to(torch.int32)
    natural = torch.arange(columns, dtype=torch.int32) // scheme.group_size
    return None if torch.equal(g_idx, natural) else g_idx
