"""Round-to-nearest quantization of a weight matrix and its inverse.

The parameters of a group are IPEX's: with ``mn = min(w, 0)``, ``mx = max(w, 0)`` and ``eps`` of float32,

========  ==========  ==========================  =====================  ===================================
dtype     symmetric   scale                       zero point             code (``inv = 1 / scale`` in float32)
========  ==========  ==========================  =====================  ===================================
INT8      yes         ``max|w| / 127``            none                   ``round(w * inv)`` in -128..127
INT8      no          ``(mx - mn) / 255``         ``-round(mn/s) - 128`` ``round(w * inv) + zp`` in -128..127
INT4      yes         ``max|w| / 7``              none (8)               ``round(w * inv) + 8`` in 0..15
INT4      no          ``(mx - mn) / 15``          ``-round(mn/s)``       ``round(w * inv) + zp`` in 0..15
NF4       yes         ``max|w|``                  none                   nearest level, ties to the lower one
FP8       yes         ``max|w| / 448``            none                   ``w * inv`` rounded to e4m3
========  ==========  ==========================  =====================  ===================================

Everything is computed in float32 and rounds half to even. A group of zeros has the scale eps. IPEX also gives eps to
groups with a small range, whose values then become 0; here a scale is raised only where its inverse would be infinite.
"""

from __future__ import annotations

import torch

from .codebooks import FP8_MAX, NF4_LEVELS
from .nibbles import pack_nibbles, unpack_nibbles
from .quantized_weight import QuantizedWeight
from .scheme import FLOAT_DTYPES, PER_CHANNEL, WeightScheme, WoqWeightDtype

INT4_OFFSET = 8
"""Offset of symmetric INT4 codes, which stores them unsigned."""

_SYMMETRIC_MAX = {
    WoqWeightDtype.INT8: 127.0,
    WoqWeightDtype.INT4: 7.0,
    WoqWeightDtype.NF4: 1.0,
    WoqWeightDtype.FP8: FP8_MAX,
}
_CODE_RANGE = {WoqWeightDtype.INT8: (-128, 127), WoqWeightDtype.INT4: (0, 15)}


def quantize(
    weight: torch.Tensor,
    scheme: WeightScheme,
    scales: torch.Tensor | None = None,
    zero_points: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Quantize `weight`, float32, bfloat16 or float16 ``[N, K]``, by rounding to nearest.

    `scales` float32 and, for an asymmetric scheme, `zero_points` int16, both ``[N, groups]``, are computed from each
    group's range unless given. Raises TypeError for another dtype and ValueError for another rank, NaN or Inf, or
    parameters that do not fit the scheme.
    """
    grouped = _group(_check_weight(weight), scheme)
    if scales is None:
        if zero_points is not None:
            raise ValueError("zero_points: given without scales; give both or neither")
        scales, zero_points = _find_parameters(grouped, scheme)
    else:
        _check_parameters(grouped, scheme, scales, zero_points)
    codes = _round(grouped * (1.0 / scales).unsqueeze(-1), scheme.dtype, zero_points)
    codes = codes.flatten(1)[:, : weight.shape[1]]
    codes = pack_nibbles(codes) if codes.dtype == torch.uint8 else codes.contiguous()
    return QuantizedWeight(codes, scales, zero_points, None, scheme, (weight.shape[0], weight.shape[1]))


def find_scales(span: torch.Tensor, steps: float) -> torch.Tensor:
    """Scales ``span / steps`` of finite float32 ranges: eps for a range of 0, else at least float32's tiny."""
    info = torch.finfo(torch.float32)
    return torch.where(span > 0, (span / steps).clamp(min=info.tiny), info.eps)


def dequantize(qw: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Real values of a quantized weight, ``[N, K]``, computed in float32 and then rounded to `dtype`."""
    values = code_values(qw)
    groups = feature_groups(qw)
    if qw.zero_points is not None:
        values -= qw.zero_points[:, groups]
    return values.mul_(qw.scales[:, groups]).to(dtype)


def code_values(qw: QuantizedWeight) -> torch.Tensor:
    """Values of the codes before zero point and scale, float32 ``[N, K]``: -8..7 for symmetric INT4, levels for NF4."""
    codes = stored_codes(qw)
    if qw.scheme.dtype == WoqWeightDtype.NF4:
        return NF4_LEVELS[codes.int()]
    values = codes.to(torch.float32)
    return values.sub_(INT4_OFFSET) if qw.scheme.dtype == WoqWeightDtype.INT4 and qw.scheme.symmetric else values


def stored_codes(qw: QuantizedWeight) -> torch.Tensor:
    """Stored codes, one per element, ``[N, K]``: uint8 for INT4 and NF4, else the dtype of `qw.codes`."""
    return unpack_nibbles(qw.codes, qw.shape[1]) if qw.codes.dtype == torch.uint8 else qw.codes


def feature_groups(qw: QuantizedWeight) -> torch.Tensor:
    """Group index of every input feature, int64 ``[K]``."""
    if qw.g_idx is not None:
        return qw.g_idx.long()
    features = torch.arange(qw.shape[1])
    return features.zero_() if qw.scheme.group_size == PER_CHANNEL else features // qw.scheme.group_size


def _check_weight(weight: torch.Tensor) -> torch.Tensor:
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"weight: expected dtype float32, bfloat16 or float16, got {weight.dtype}")
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight: expected shape [N, K] with K > 0, got {list(weight.shape)}")
    return weight.detach().float()


def _group(weight: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    """Reshape float32 ``[N, K]`` to ``[N, groups, size]``; a ragged last group is padded with zeros."""
    groups = scheme.group_count(weight.shape[1])
    if scheme.group_size == PER_CHANNEL:
        return weight.unsqueeze(1)
    fill = groups * scheme.group_size - weight.shape[1]
    if fill:
        weight = torch.nn.functional.pad(weight, (0, fill))
    return weight.reshape(-1, groups, scheme.group_size)


def _find_parameters(grouped: torch.Tensor, scheme: WeightScheme) -> tuple[torch.Tensor, torch.Tensor | None]:
    low = grouped.amin(-1).clamp_(max=0)
    high = grouped.amax(-1).clamp_(min=0)
    if scheme.symmetric:
        span, steps = torch.maximum(high, -low), _SYMMETRIC_MAX[scheme.dtype]
    else:
        code_min, code_max = _CODE_RANGE[scheme.dtype]
        span, steps = high - low, float(code_max - code_min)
    if not torch.isfinite(span).all():
        raise ValueError(
            "weight: expected finite values whose range fits float32, got NaN, Inf or larger; "
            "check the checkpoint, or leave this module in float"
        )
    scales = find_scales(span, steps)
    if scheme.symmetric:
        return scales, None
    return scales, (code_min - torch.round(low / scales)).to(torch.int16)


def _check_parameters(
    grouped: torch.Tensor, scheme: WeightScheme, scales: torch.Tensor, zero_points: torch.Tensor | None
) -> None:
    shape = grouped.shape[:2]
    if scales.shape != shape:
        raise ValueError(f"scales: expected shape {list(shape)}, got {list(scales.shape)}")
    if not (torch.isfinite(scales) & (scales != 0)).all():
        raise ValueError("scales: expected finite values other than 0; give an all-zero group the scale 1")
    if not scheme.symmetric and (zero_points is None or zero_points.shape != shape):
        got = None if zero_points is None else list(zero_points.shape)
        raise ValueError(f"zero_points: {scheme} needs them with shape {list(shape)}, got {got}")
    if not torch.isfinite(grouped).all():
        raise ValueError("weight: expected finite values, got NaN or Inf; check the checkpoint")


def _round(scaled: torch.Tensor, dtype: WoqWeightDtype, zero_points: torch.Tensor | None) -> torch.Tensor:
    """Round ``w / scale`` ``[N, groups, size]`` to codes, one per element; may overwrite `scaled`."""
    if dtype == WoqWeightDtype.NF4:
        midpoints = (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2
        return torch.bucketize(scaled, midpoints, out_int32=True).to(torch.uint8)
    if dtype == WoqWeightDtype.FP8:
        return scaled.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    codes = scaled.round_()
    if zero_points is not None:
        codes += zero_points.unsqueeze(-1)
    elif dtype == WoqWeightDtype.INT4:
        codes += INT4_OFFSET
    return codes.clamp_(*_CODE_RANGE[dtype]).to(torch.int8 if dtype == WoqWeightDtype.INT8 else torch.uint8)
