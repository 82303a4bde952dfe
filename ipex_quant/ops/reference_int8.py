"""Plain-torch definitions of the W8A8 ops: the oracle of their tests, written to be read, not to be fast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..numerics.quantized_weight import QuantizedWeight
from .conv import ConvGeometry
from .post_op import PostOp, apply_post_op
from .reference import MIN_RANGE


def quantize_activation(x: torch.Tensor, multiplier: torch.Tensor, zero_point: int) -> torch.Tensor:
    """``clamp(round(x * multiplier) + zero_point, 0, 255)`` as uint8; NaN gives 0."""
    # In float64, where adding the zero point to a large product is not rounded.
    codes = (x.float() * multiplier).double().round() + zero_point
    return codes.clamp(0, 255).nan_to_num(0).to(torch.uint8)


def quantize_activation_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 like `x`; per row a scale, float32 ``[M]``, and a zero point, int32 ``[M]``; ranges include 0."""
    rows = x.float().reshape(-1, x.shape[-1])
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    span = high - low
    # A true division: `float / tensor` would multiply by a rounded reciprocal.
    inverse = torch.where(span >= MIN_RANGE, torch.full_like(span, 255) / span, 0.0)
    zero_points = (-low * inverse).round().clamp(0, 255).nan_to_num(0)
    codes = ((rows * inverse[:, None]).round() + zero_points[:, None]).clamp(0, 255).nan_to_num(0)
    return codes.reshape(x.shape).to(torch.uint8), span / 255, zero_points.to(torch.int32)


def int8_linear(
    x: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    weights: Sequence[QuantizedWeight],
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    post_op: PostOp = PostOp.NONE,
    others: Sequence[torch.Tensor] = (),
) -> list[torch.Tensor]:
    """As `ipex_quant.ops.int8_linear`, with plain weights; a post op takes a single weight."""
    rows = x.reshape(-1, x.shape[-1])
    centred = rows.double() - zero_points[:, None]
    results, start = [], 0
    for weight in weights:
        out_features = weight.shape[0]
        sums = (centred @ weight.codes.double().T).float()  # exact below 2^53, then rounded once
        y = sums * (scales[:, None] * weight.scales.T)
        if bias is not None:
            y = y + bias[start : start + out_features]
        start += out_features
        results.append(apply_post_op(y.to(dtype).reshape(*x.shape[:-1], out_features), post_op, others))
    return results


def int8_conv(
    x: torch.Tensor,
    scale: float,
    zero_point: int,
    weight: QuantizedWeight,
    groups: int,
    kernel: Sequence[int],
    bias: torch.Tensor | None,
    geometry: ConvGeometry,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `ipex_quant.ops.int8_conv`, with a plain weight ``[out, in / groups * taps]``."""
    centred = x.double().movedim(-1, 1) - zero_point
    sides = zip(reversed(geometry.before), reversed(geometry.after), strict=True)
    centred = F.pad(centred, [size for side in sides for size in side])
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    codes = weight.codes.double().view(weight.shape[0], -1, *kernel)
    sums = convolve(centred, codes, None, geometry.stride, 0, geometry.dilation, groups).movedim(1, -1).float()
    y = sums * (torch.tensor(scale, dtype=torch.float32) * weight.scales.flatten())
    return (y if bias is None else y + bias).to(dtype)
