"""IPEX's helpers to quantize and dequantize one weight tensor."""

from __future__ import annotations

import torch

from ..numerics import affine
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import PER_CHANNEL, WeightScheme, WoqWeightDtype

Parameters = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None"]


def quantize_per_channel(
    t: torch.Tensor,
    dtype: WoqWeightDtype,
    scales: torch.Tensor | None = None,
    zero_points: torch.Tensor | None = None,
    sym_quant: bool = False,
) -> Parameters:
    """Quantize `t`, float ``[N, K]``, with one scale per row; see `quantize_per_block`."""
    return quantize_per_block(t, dtype, PER_CHANNEL, scales, zero_points, sym_quant)


def quantize_per_block(
    t: torch.Tensor,
    dtype: WoqWeightDtype,
    group_size: int,
    scales: torch.Tensor | None = None,
    zero_points: torch.Tensor | None = None,
    sym_quant: bool = False,
) -> Parameters:
    """Quantize `t`, float ``[N, K]``, with one scale per `group_size` columns of a row.

    Returns (codes, scales, zero points). Codes are int8 ``[N, K]``, uint8 ``[N, ceil(K / 2)]`` with even k in the low
    nibble, or float8; scales are float32 and zero points int16 ``[N, groups]``, or None if symmetric. Weights that are
    no integers are always symmetric. `scales` and `zero_points` are used if given. Raises as
    `numerics.affine.quantize` does.
    """
    symmetric = sym_quant or not dtype.has_integers
    scheme = WeightScheme(dtype, symmetric, group_size)
    if scales is not None:
        scales = _grid("scales", scales, len(t)).float()
    qw = affine.quantize(t, scheme, scales, _zero_points(zero_points, len(t)))
    return qw.codes, qw.scales, qw.zero_points


def dequantize_per_channel(
    qt: torch.Tensor,
    scales: torch.Tensor,
    zps: torch.Tensor | None,
    dtype: WoqWeightDtype,
    weight_shape: tuple[int, int] | None = None,
    dequant_nf4_via_int8: bool = False,
) -> torch.Tensor:
    """Dequantize codes with one scale per row to float32 ``[N, K]``; see `dequantize_per_block`."""
    return dequantize_per_block(qt, scales, zps, dtype, PER_CHANNEL, weight_shape, None, dequant_nf4_via_int8)


def dequantize_per_block(
    qt: torch.Tensor,
    scales: torch.Tensor,
    zps: torch.Tensor | None,
    dtype: WoqWeightDtype,
    group_size: int,
    weight_shape: tuple[int, int] | None = None,
    g_idx: torch.Tensor | None = None,
    dequant_nf4_via_int8: bool = False,
) -> torch.Tensor:
    """Dequantize the result of `quantize_per_block` to float32 ``[N, K]``.

    `weight_shape` is needed for an odd K with two codes per byte; `g_idx`, int ``[K]``, is the group of every column
    (act-order). `dequant_nf4_via_int8` rounds the levels of NF4 to multiples of 1/127, as INT8 compute does. Raises
    ValueError or TypeError when the tensors do not fit each other.
    """
    rows = len(qt)
    columns = qt.shape[1] * 2 if dtype.bits <= 4 else qt.shape[1]
    shape = (rows, columns) if weight_shape is None else tuple(weight_shape)
    scheme = WeightScheme(dtype, zps is None, group_size)
    g_idx = None if g_idx is None else g_idx.to(torch.int32)
    scales = _grid("scales", scales, rows).float()
    qw = QuantizedWeight(qt, scales, _zero_points(zps, rows), g_idx, scheme, shape)
    if dequant_nf4_via_int8 and dtype == WoqWeightDtype.NF4:
        levels = (affine.code_values(qw) * 127).round() / 127
        return levels * qw.scales[:, affine.feature_groups(qw)]
    return affine.dequantize(qw)


def _zero_points(zero_points: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    return None if zero_points is None else _grid("zero_points", zero_points, rows).to(torch.int16)


def _grid(name: str, tensor: torch.Tensor, rows: int) -> torch.Tensor:
    if not rows or tensor.numel() % rows:
        raise ValueError(f"{name}: expected a multiple of {rows} elements, as many a row, got {list(tensor.shape)}")
    return tensor.reshape(rows, -1)
