"""Round-to-nearest quantization of a weight matrix and its inverse.

The parameters of a group are IPEX's: with ``mn = min(w, 0)``, ``mx = max(w, 0)`` and ``eps`` of float32,

========  ==========  ===========================  =====================  ===================================
dtype     symmetric   scale                        zero point             code (``inv = 1 / scale`` in float32)
========  ==========  ===========================  =====================  ===================================
INT8      yes         ``max|w| / 127``             none                   ``round(w * inv)`` in -128..127
INT8      no          ``(mx - mn) / 255``          ``-round(mn/s) - 128`` ``round(w * inv) + zp`` in -128..127
INTb      yes         ``max|w| / (2^(b-1) - 1)``   none (``2^(b-1)``)     ``round(w * inv) + 2^(b-1)``
INTb      no          ``(mx - mn) / (2^b - 1)``    ``-round(mn/s)``       ``round(w * inv) + zp``
NF4       yes         ``max|w|``                   none                   nearest level, ties to the lower one
FP4       yes         ``max|w| / 12``              none                   nearest magnitude, ties to the lower one
IQ4       yes         ``max(-mn / 127, mx / 113)`` none                   nearest level, ties to the lower one
BNB_FP4   yes         ``max|w| / 192``             none                   nearest magnitude, ties to the lower one
FP8       yes         ``max|w| / 448``             none                   ``w * inv`` rounded to e4m3
========  ==========  ===========================  =====================  ===================================

Everything is computed in float32 and rounds half to even. A group of zeros has the scale eps. IPEX also gives eps to
groups with a small range, whose values then become 0; here a scale is raised only where its inverse would be infinite.

Scales may be rounded to float16, before zero points and codes are computed of them. They take half of the bytes then,
and the ends of a group move by an eighth of a step of 8 bits at most.
"""

from __future__ import annotations

import torch

from .codebooks import CODEBOOKS, FP8_MAX, code_levels, nearest_codes
from .nibbles import pack_nibbles, unpack_nibbles
from .quantized_weight import QuantizedWeight
from .scheme import FLOAT_DTYPES, PER_CHANNEL, WeightScheme, WoqWeightDtype


def code_offset(dtype: WoqWeightDtype) -> int:
    """Offset of the codes of a symmetric integer dtype, which stores those below 8 bits unsigned."""
    return 0 if dtype == WoqWeightDtype.INT8 else 1 << (dtype.bits - 1)


def code_range(dtype: WoqWeightDtype) -> tuple[int, int]:
    """Lowest and highest code of an integer dtype."""
    return (-128, 127) if dtype == WoqWeightDtype.INT8 else (0, (1 << dtype.bits) - 1)


def _ends(dtype: WoqWeightDtype) -> tuple[float, float]:
    """Magnitudes of the values that a symmetric group's lowest and highest weight get."""
    if dtype == WoqWeightDtype.FP8:
        return FP8_MAX, FP8_MAX
    if dtype in CODEBOOKS:
        return -float(CODEBOOKS[dtype].min()), float(CODEBOOKS[dtype].max())
    return (float((1 << (dtype.bits - 1)) - 1),) * 2


def quantize(
    weight: torch.Tensor,
    scheme: WeightScheme,
    scales: torch.Tensor | None = None,
    zero_points: torch.Tensor | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> QuantizedWeight:
    """Quantize `weight`, float32, bfloat16 or float16 ``[N, K]``, by rounding to nearest.

    `scales` float32 and, for an asymmetric scheme, `zero_points` int16, both ``[N, groups]``, are computed from each
    group's range unless given; with `scale_dtype` float16, scales that are normal numbers of it are rounded to one.
    Raises TypeError for another dtype and ValueError for another rank, NaN or Inf, parameters that do not fit the
    scheme, or another `scale_dtype`.
    """
    check_plain(scheme)
    grouped = in_groups(_check_weight(weight), scheme)
    if scales is None:
        if zero_points is not None:
            raise ValueError("zero_points: given without scales; give both or neither")
        scales, zero_points = _find_parameters(grouped, scheme, has_half_scales(scale_dtype))
    else:
        _check_parameters(grouped, scheme, scales, zero_points)
    codes = _round(grouped * (1.0 / scales).unsqueeze(-1), scheme.dtype, zero_points)
    codes = codes.flatten(1)[:, : weight.shape[1]]
    codes = plain_codes(codes, scheme.dtype)
    return QuantizedWeight(codes, scales, zero_points, None, scheme, (weight.shape[0], weight.shape[1]))


def check_plain(scheme: WeightScheme) -> None:
    """Raise ValueError for a scheme with minimums or super scales, which only checkpoints have."""
    if scheme.minimums or scheme.super_group_size is not None:
        plain = WeightScheme(scheme.dtype, scheme.symmetric, scheme.group_size)
        raise ValueError(f"scheme: nothing rounds weights to {scheme}, which checkpoints have; quantize to {plain}")


def has_half_scales(scale_dtype: torch.dtype) -> bool:
    """Whether scales are rounded to `scale_dtype`, float16, or not, float32; ValueError for another dtype."""
    if scale_dtype not in (torch.float32, torch.float16):
        raise ValueError(f"scale_dtype: expected torch.float32 or torch.float16, got {scale_dtype}")
    return scale_dtype == torch.float16


def find_scales(span: torch.Tensor, steps: float) -> torch.Tensor:
    """Scales ``span / steps`` of finite float32 ranges: eps for a range of 0, else at least float32's tiny."""
    return _usable(span / steps, span)


def _usable(scales: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
    info = torch.finfo(torch.float32)
    return torch.where(span > 0, scales.clamp(min=info.tiny), info.eps)


def dequantize(qw: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Real values of a quantized weight, ``[N, K]``, computed in float32 and then rounded to `dtype`."""
    values = code_values(qw)
    groups = feature_groups(qw)
    if qw.zero_points is not None:
        values -= qw.zero_points[:, groups]
    values.mul_(qw.scales[:, groups])
    if qw.minimums is not None:
        values += qw.minimums[:, groups]
    return values.to(dtype)


def code_values(qw: QuantizedWeight) -> torch.Tensor:
    """Values of the codes before zero point and scale, float32 ``[N, K]``: -8..7 for symmetric INT4, levels for NF4."""
    codes, dtype = stored_codes(qw), qw.scheme.dtype
    if dtype in CODEBOOKS:
        return code_levels(codes, CODEBOOKS[dtype])
    values = codes.to(torch.float32)
    return values.sub_(code_offset(dtype)) if dtype.has_integers and qw.scheme.symmetric else values


def stored_codes(qw: QuantizedWeight) -> torch.Tensor:
    """Stored codes, one per element, ``[N, K]``: int8 for INT8, float8 for FP8, else uint8."""
    return unpack_nibbles(qw.codes, qw.shape[1]) if qw.scheme.dtype.bits <= 4 else qw.codes


def plain_codes(codes: torch.Tensor, dtype: WoqWeightDtype) -> torch.Tensor:
    """Codes ``[N, K]``, one per element, as `QuantizedWeight` holds them."""
    return pack_nibbles(codes) if dtype.bits <= 4 else codes.contiguous()


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


def in_groups(weight: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    """Reshape float32 ``[N, K]`` to ``[N, groups, size]``; a ragged last group is padded with zeros."""
    groups = scheme.group_count(weight.shape[1])
    if scheme.group_size == PER_CHANNEL:
        return weight.unsqueeze(1)
    fill = groups * scheme.group_size - weight.shape[1]
    if fill:
        weight = torch.nn.functional.pad(weight, (0, fill))
    return weight.reshape(-1, groups, scheme.group_size)


def _rounded_to_half(scales: torch.Tensor) -> torch.Tensor:
    """`scales`, those rounded to float16 that are normal numbers of it."""
    info = torch.finfo(torch.float16)
    return torch.where((scales >= info.tiny) & (scales <= info.max), scales.half().float(), scales)


def _find_parameters(
    grouped: torch.Tensor, scheme: WeightScheme, half_scales: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    low = grouped.amin(-1).clamp_(max=0)
    high = grouped.amax(-1).clamp_(min=0)
    span = torch.maximum(high, -low) if scheme.symmetric else high - low
    if not torch.isfinite(span).all():
        raise ValueError(
            "weight: expected finite values whose range fits float32, got NaN, Inf or larger; "
            "check the checkpoint, or leave this module in float"
        )
    if scheme.symmetric:
        lowest, highest = _ends(scheme.dtype)
        scales = _usable(torch.maximum(high / highest, -low / lowest), span)
        return _rounded_to_half(scales) if half_scales else scales, None
    code_min, code_max = code_range(scheme.dtype)
    scales = find_scales(span, float(code_max - code_min))
    scales = _rounded_to_half(scales) if half_scales else scales
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
    if dtype in CODEBOOKS:
        return nearest_codes(scaled, dtype).to(torch.uint8)
    if dtype == WoqWeightDtype.FP8:
        return scaled.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    codes = scaled.round_()
    codes += code_offset(dtype) if zero_points is None else zero_points.unsqueeze(-1)
    return codes.clamp_(*code_range(dtype)).to(torch.int8 if dtype == WoqWeightDtype.INT8 else torch.uint8)
