"""INT8 quantization of activations and weights for W8A8, with torch.ao's rounding.

Activations are unsigned with one scale and zero point per tensor; weights are signed and symmetric with one scale per
row. The weight scale is ``max|w| / 127.5``, where weight-only INT8 has ``max|w| / 127``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .affine import find_scales, quantize
from .quantized_weight import QuantizedWeight
from .scheme import PER_CHANNEL, WeightScheme, WoqWeightDtype

ACTIVATION_MAX = 255
"""Highest code of an activation; the lowest is 0."""


@dataclass(frozen=True)
class StaticActivation:
    """Static quantization of a layer's input: ``clamp(round(x * multiplier) + zero_point, 0, 255)``.

    Calibration finds the values: `scale` above 0, `zero_point` in 0..255, and SmoothQuant's `smoothing_factor`, float32
    ``[K]`` or None, which multiplies the input channels. Raises ValueError or TypeError for other values.
    """

    scale: float
    zero_point: int
    smoothing_factor: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale: expected a finite number above 0, got {self.scale}; calibrate again")
        if not 0 <= self.zero_point <= ACTIVATION_MAX:
            raise ValueError(f"zero_point: expected 0..{ACTIVATION_MAX}, got {self.zero_point}")
        factor = self.smoothing_factor
        if factor is None:
            return
        if factor.dtype != torch.float32:
            raise TypeError(f"smoothing_factor: expected dtype torch.float32, got {factor.dtype}")
        if factor.dim() != 1:
            raise ValueError(f"smoothing_factor: expected shape [K], got {list(factor.shape)}")
        if not torch.isfinite(factor).all():
            raise ValueError("smoothing_factor: expected finite values, got NaN or Inf; calibrate again")

    @property
    def multiplier(self) -> torch.Tensor:
        """``smoothing_factor / scale``: float32 ``[K]``, or ``[1]`` without smoothing."""
        factor = torch.ones(1, dtype=torch.float32) if self.smoothing_factor is None else self.smoothing_factor
        return factor / torch.tensor(self.scale, dtype=torch.float32, device=factor.device)


def same_activation(one: StaticActivation | None, other: StaticActivation | None) -> bool:
    """Whether scale, zero point and smoothing factor are equal; None (dynamic quantization) equals only None."""
    if one is None or other is None:
        return one is other
    if (one.scale, one.zero_point) != (other.scale, other.zero_point):
        return False
    mine, theirs = one.smoothing_factor, other.smoothing_factor
    return mine is theirs or (mine is not None and theirs is not None and torch.equal(mine, theirs))


def affine_parameters(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale, float32, and zero point, int32, of unsigned 8-bit codes for the ranges ``low..high``, elementwise.

    Every range is widened to include 0; the range 0..0 has the scale eps of float32. (torch.ao also raises smaller
    scales to eps, which loses the values.) Raises ValueError for a NaN, an Inf, a range wider than float32 holds, or a
    low above its high. Source: torch.ao's quint8 affine observers.
    """
    low, high = low.float(), high.float()
    if not (low <= high).all():
        raise ValueError("low, high: expected low <= high, got the reverse or NaN; check the calibration data")
    low, high = low.clamp(max=0), high.clamp(min=0)
    span = high - low
    if not torch.isfinite(span).all():
        raise ValueError("low, high: expected a finite range, got Inf or one that float32 does not hold")
    scale = find_scales(span, ACTIVATION_MAX)
    zero_point = torch.round(low / scale).neg_().clamp_(0, ACTIVATION_MAX).to(torch.int32)
    return scale, zero_point


def channel_scales(weight: torch.Tensor) -> torch.Tensor:
    """Scale of every output channel of a floating-point `weight` ``[N, ...]``: float32 ``[N]``, ``max|w| / 127.5``.

    A channel of zeros has the scale eps of float32. (torch.ao also raises smaller scales to eps.) Raises ValueError for
    NaN, Inf or a weight without values in a channel. Source: torch.ao's qint8 per-channel symmetric observer.
    """
    if weight.dim() < 2 or weight[:1].numel() == 0 < weight.shape[0]:
        raise ValueError(f"weight: expected shape [N, K] or [N, K, ...] with K > 0, got {list(weight.shape)}")
    low, high = torch.aminmax(weight.detach().float().flatten(1), dim=1)
    largest = torch.maximum(high, -low)
    if not torch.isfinite(largest).all():
        raise ValueError("weight: expected finite values, got NaN or Inf; check the checkpoint")
    # 255 steps over twice the largest value; a value at the top rounds to 128 and is clamped.
    return find_scales(largest, 127.5)


def quantize_per_channel(weight: torch.Tensor, scales: torch.Tensor | None = None) -> QuantizedWeight:
    """Quantize `weight`, float32, bfloat16 or float16 ``[N, K]``, to INT8, symmetric per output channel.

    `scales`, float32 ``[N]``, default to `channel_scales(weight)`. The codes equal those of
    `torch.quantize_per_channel`, except that values beyond int32 are clamped too. Raises TypeError for another dtype
    and ValueError for another rank, NaN or Inf, or scales that do not fit.
    """
    scales = channel_scales(weight) if scales is None else scales
    return quantize(weight, WeightScheme(WoqWeightDtype.INT8, True, PER_CHANNEL), scales.reshape(-1, 1))
