"""Round to nearest: every weight to the closest point of its group's grid, without calibration."""

from __future__ import annotations

import torch

from ..numerics.affine import quantize
from ..numerics.quantized_weight import QuantizedWeight
from ..numerics.scheme import WeightScheme


def rtn(weight: torch.Tensor, scheme: WeightScheme, scale_dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    """Quantize `weight` ``[N, K]`` by rounding to nearest, with scales that `scale_dtype` can hold.

    Raises TypeError for a weight that is not floating point, and ValueError for another rank, NaN or Inf.
    """
    qw = quantize(weight, scheme)
    if scale_dtype == torch.float32:
        return qw
    return quantize(weight, scheme, round_scales(qw.scales, scale_dtype), qw.zero_points)


def round_scales(scales: torch.Tensor, scale_dtype: torch.dtype) -> torch.Tensor:
    """float32 `scales` rounded to what `scale_dtype` can hold; raises ValueError when one overflows or vanishes."""
    rounded = scales.to(scale_dtype).float()
    if not (torch.isfinite(rounded) & (rounded > 0)).all():
        raise ValueError(
            f"scales: not representable in {scale_dtype}, range {scales.min():g}..{scales.max():g}; use float32"
        )
    return rounded
